"""`CCCausalLM.generate`: equal to greedy decoding by hand, a whole forward pass a token."""

import threading

import connected
import keras_hub
import numpy as np
import pytest
import tiny

import keras_cc
from keras_cc import generation

PROMPTS = ["Kenya'nın para", "the quick brown fox"]
PIVOTS = ["What is the currency of Kenya?", "a fox"]
LENGTH = 28


def make(family="llama3", with_preprocessor=False, trained=True, **options):
    model = connected.text_model(
        family, keras_cc.FusedConnection(**options), with_preprocessor=with_preprocessor
    )
    if trained:
        connected.train_connection(model, scale=0.3)
    model.compile("sgd", sampler="greedy", **connected.QUICK)
    return model


def greedy_by_hand(model, prompts, pivots=None, length=LENGTH):
    """The most likely token of `model(x)` at the last real position, one at a time, no cache.

    `answer_mask` says where the prompt ends; the rows' prompts differ in length.
    """
    prompt = model.preprocessor.generate_preprocess(prompts, length)
    lengths = prompt["padding_mask"].sum(axis=1)
    ids, position = prompt["token_ids"].copy(), np.arange(length)[None]
    pivot = {} if pivots is None else model.preprocessor.pivot_preprocess(pivots)
    forward = compiled_forward(model)
    for t in range(lengths.min(), length):
        end = np.maximum(t, lengths)[:, None]
        x = {"token_ids": ids, "padding_mask": (position < end).astype("int32"), **pivot}
        if pivots is not None:
            x["answer_mask"] = ((position >= lengths[:, None] - 1) & (position < end)).astype(
                "int32"
            )
        following = forward(x)[:, t - 1].argmax(axis=-1)
        ids[:, t] = np.where(lengths > t, ids[:, t], following)
    return ids


def compiled_forward(model):
    if connected.BACKEND != "jax":
        return lambda x: connected.logits(model, x)
    import jax

    state = (
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
    )
    step = jax.jit(lambda state, x: model.stateless_call(*state, x)[0]["logits"])
    return lambda x: np.asarray(step(state, x))


# ---------------------------------------------------------------- against the forward pass


@pytest.mark.thorough("gemma3-True")
@pytest.mark.parametrize(
    "family, with_preprocessor", [("llama3", False), ("gemma3", False), ("gemma3", True)]
)
def test_monolingual_generation(family, with_preprocessor, seen_ids):
    model = make(family, with_preprocessor)
    texts = model.generate(PROMPTS, LENGTH, stop_token_ids=None)
    expected = greedy_by_hand(model, PROMPTS)
    np.testing.assert_array_equal(seen_ids[0], expected)
    assert texts == model.tokenizer.detokenize(expected[:, 1:].tolist())
    if with_preprocessor:
        assert texts == model.causal_lm.generate(PROMPTS, LENGTH, stop_token_ids=None)


@pytest.mark.thorough("llama3-mean")
@pytest.mark.parametrize(
    "family, alignment",
    [("llama3", "attention"), ("llama3", "mean"), ("llama3", "last"), ("llama3", "answer"),
     ("gemma3", "attention"), ("gemma3", "last"), ("gemma3", "answer")],
)  # fmt: skip
def test_connected_generation(family, alignment, seen_ids):
    model = make(family, alignment=alignment, initial_gate=0.6)
    pivots = [PIVOTS[0], ""]
    model.generate(PROMPTS, LENGTH, pivot_prompts=pivots, stop_token_ids=None)
    connected_ids = greedy_by_hand(model, PROMPTS, pivots)
    np.testing.assert_array_equal(seen_ids[0], connected_ids)
    # Neither path is the other: the pivot decides, and a row without one is the plain model.
    alone = greedy_by_hand(model, PROMPTS)
    assert (connected_ids[0] != alone[0]).any()
    model.generate(PROMPTS, LENGTH, pivot_prompts=PIVOTS, stop_token_ids=None)
    np.testing.assert_array_equal(seen_ids[1], greedy_by_hand(model, PROMPTS, PIVOTS))
    model.disconnect()
    np.testing.assert_array_equal(greedy_by_hand(model, PROMPTS)[1], connected_ids[1])


@pytest.mark.thorough
def test_connected_generation_through_the_preprocessor_of_gemma3(seen_ids):
    model = make("gemma3", with_preprocessor=True, initial_gate=0.6)
    model.generate(PROMPTS, LENGTH, pivot_prompts=PIVOTS, stop_token_ids=None)
    np.testing.assert_array_equal(seen_ids[0], greedy_by_hand(model, PROMPTS, PIVOTS))


# ---------------------------------------------------------------- strings in, strings out


@pytest.fixture(scope="module")
def shared():
    return make()


def test_a_string_gives_a_string_and_a_list_a_list(shared):
    one = shared.generate(PROMPTS[0], LENGTH)
    assert isinstance(one, str) and one.startswith(PROMPTS[0])
    assert shared.generate([PROMPTS[0]], LENGTH) == [one]
    paired = shared.generate(PROMPTS[0], LENGTH, pivot_prompts=PIVOTS[0])
    assert isinstance(paired, str) and paired.startswith(PROMPTS[0])
    assert shared.generate([PROMPTS[0]], LENGTH, pivot_prompts=[PIVOTS[0]]) == [paired]


@pytest.mark.thorough
@pytest.mark.parametrize("pivots", [None, PIVOTS])
def test_strip_prompt_leaves_the_continuation(shared, pivots):
    options = {"pivot_prompts": pivots, "stop_token_ids": None}
    whole = shared.generate(PROMPTS, LENGTH, **options)
    stripped = shared.generate(PROMPTS, LENGTH, strip_prompt=True, **options)
    ids = greedy_by_hand(shared, PROMPTS, pivots)
    lengths = shared.preprocessor.generate_preprocess(PROMPTS, LENGTH)["padding_mask"].sum(axis=1)
    for text, rest, row, length in zip(whole, stripped, ids, lengths, strict=True):
        assert rest == shared.tokenizer.detokenize([row[length:].tolist()])[0] != text


@pytest.mark.parametrize("pivots", [None, PIVOTS])
def test_a_stop_token_ends_the_text(shared, pivots):
    ids = greedy_by_hand(shared, PROMPTS, pivots)
    lengths = shared.preprocessor.generate_preprocess(PROMPTS, LENGTH)["padding_mask"].sum(axis=1)
    stop = int(ids[0, lengths[0] + 3])
    texts = shared.generate(PROMPTS, LENGTH, pivot_prompts=pivots, stop_token_ids=[stop])
    for text, row, length in zip(texts, ids, lengths, strict=True):
        found = np.flatnonzero(row[length:] == stop)
        end = length + found[0] + 1 if len(found) else LENGTH
        assert text == shared.tokenizer.detokenize([row[1:end].tolist()])[0]


def test_without_a_length_it_is_the_preprocessors(shared, seen_ids):
    shared.generate(PROMPTS[0])
    assert seen_ids[0].shape == (1, shared.preprocessor.max_length)


# ---------------------------------------------------------------- nothing goes stale


@pytest.mark.thorough
def test_generation_follows_training_the_sampler_and_the_merge(seen_ids):
    model = make()

    def check(**pivot):
        model.generate(PROMPTS, LENGTH, stop_token_ids=None, **pivot)
        pivots = pivot.get("pivot_prompts")
        np.testing.assert_array_equal(seen_ids[-1], greedy_by_hand(model, PROMPTS, pivots))
        return seen_ids[-1]

    before, paired_before = check(), check(pivot_prompts=PIVOTS)
    assert (check() == before).all() and (check(pivot_prompts=PIVOTS) == paired_before).all()
    # Other weights.
    tiny.fill(model.causal_lm, seed=50)
    after, paired_after = check(), check(pivot_prompts=PIVOTS)
    assert (after != before).any() and (paired_after != paired_before).any()
    # Another sampler: a beam of one is greedy, a random one is not, and back again.
    model.compile("sgd", sampler=keras_hub.samplers.RandomSampler(seed=1), **connected.QUICK)
    for paths in ({}, {"pivot_prompts": PIVOTS}):
        draws = []
        for _ in range(2):
            model.generate(PROMPTS, LENGTH, stop_token_ids=None, **paths)
            draws.append(seen_ids[-1])
        assert (draws[0] != draws[1]).any()
    model.compile("sgd", sampler="greedy", **connected.QUICK)
    np.testing.assert_array_equal(check(pivot_prompts=PIVOTS), paired_after)
    np.testing.assert_array_equal(check(), after)
    model.merge()
    np.testing.assert_array_equal(check(), after)


@pytest.mark.thorough
def test_generation_follows_lora():
    model = make()
    before = model.generate(PROMPTS, LENGTH, stop_token_ids=None)
    paired = model.generate(PROMPTS, LENGTH, pivot_prompts=PIVOTS, stop_token_ids=None)
    model.enable_lora(2)
    assert model.generate(PROMPTS, LENGTH, stop_token_ids=None) == before
    rng = np.random.default_rng(0)
    for variable in model.causal_lm.trainable_variables:
        if "lora" in variable.path:
            variable.assign(rng.normal(0, 1.0, variable.shape).astype("float32"))
    assert model.generate(PROMPTS, LENGTH, stop_token_ids=None) != before
    assert model.generate(PROMPTS, LENGTH, pivot_prompts=PIVOTS, stop_token_ids=None) != paired


# ---------------------------------------------------------------- another sampler for a while


@pytest.mark.parametrize("pivots", [None, PIVOTS])
def test_another_sampler_and_what_is_compiled_for_it(pivots):
    model = connected.text_model("llama3")
    connected.train_connection(model)
    causal_lm, greedy = model.causal_lm, generation.Sampling("greedy")
    say = lambda: model.generate(PROMPTS, LENGTH, pivot_prompts=pivots)  # noqa: E731
    model.compile("sgd", sampler="greedy", **connected.QUICK)
    expected = say()
    model.compile("sgd", sampler=keras_hub.samplers.RandomSampler(temperature=100.0, seed=1))
    say()
    own = causal_lm.sampler, causal_lm.generate_function
    functions = []
    for _ in range(2):
        with greedy.of(causal_lm):
            assert say() == expected
            assert (causal_lm.sampler, causal_lm.generate_function) == own
            functions.append(generation._function(model, pivots is not None))
    assert functions[0] == functions[1]  # once, for every use
    assert say() != expected
    with pytest.raises(KeyError), greedy.of(causal_lm):
        raise KeyError
    assert say() != expected
    # Of another model it is not said.
    other = connected.text_model("llama3")
    other.compile("sgd", sampler=keras_hub.samplers.RandomSampler(temperature=100.0, seed=1))
    with greedy.of(causal_lm):
        assert generation._state(other)[0] is other.causal_lm
    model.forget_compiled()  # as whatever changes the model does
    with greedy.of(causal_lm):
        assert generation._function(model, pivots is not None) != functions[0]


@pytest.mark.parametrize("sampler", [None, "bees", 3])
def test_what_is_no_sampler(sampler):
    with pytest.raises(ValueError, match=str(sampler)):
        generation.Sampling(sampler)


# ---------------------------------------------------------------- refused


def test_as_many_pivot_prompts_as_prompts(shared):
    with pytest.raises(ValueError, match=r"as many as `prompts`.*Received: 1 pivot prompts for 2"):
        shared.generate(PROMPTS, LENGTH, pivot_prompts=PIVOTS[:1])
    with pytest.raises(ValueError, match=r"as many as `prompts`.*Received: 2 pivot prompts for 1"):
        shared.generate(PROMPTS[0], LENGTH, pivot_prompts=PIVOTS)


def test_no_prompt_no_answer(shared):
    assert shared.generate([]) == shared.generate((), LENGTH, pivot_prompts=[]) == []
    with pytest.raises(ValueError, match="1 pivot prompts for 0 prompts"):
        shared.generate([], pivot_prompts=["a"])


@pytest.mark.parametrize("wrong", [{"prompts": ["a"]}, b"a", 3, None])
def test_what_holds_no_prompts_is_refused(shared, wrong):
    with pytest.raises(TypeError, match="`prompts` must be a string or a list of strings"):
        shared.generate(wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match="`pivot_prompts` must be a string or a list"):
            shared.generate(["a"], pivot_prompts=wrong)


def test_no_stop_tokens_are_none(shared):
    expected = shared.generate(PROMPTS, LENGTH, stop_token_ids=None)
    assert shared.generate(PROMPTS, LENGTH, stop_token_ids=[]) == expected


def test_pivot_prompts_need_a_connection():
    model = connected.text_model("llama3", connection=None)
    with pytest.raises(
        ValueError, match=r"`pivot_prompts` need a connection.*Received: connection=None"
    ):
        model.generate(PROMPTS[0], LENGTH, pivot_prompts=PIVOTS[0])


def test_a_preprocessor_is_needed():
    tokenizer = connected.tokenizer_of("llama3")
    model = keras_cc.CCCausalLM(connected.causal_lm("llama3", tokenizer))
    with pytest.raises(
        ValueError, match=r"needs a preprocessor.*Received: model.preprocessor=None"
    ):
        model.generate(PROMPTS[0], LENGTH)


def test_a_prompt_without_room_for_a_token(shared):
    with pytest.raises(ValueError, match=r"prompts\[0\] has \d+ tokens.*Received: max_length=4"):
        shared.generate(PROMPTS[0], 4)


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("connection", ["fused", "selected", None])
def test_threads_and_paths_at_once_are_as_one_at_a_time(connection):
    """The first call of each path, too: all threads begin together, before any is compiled."""
    model = connected.text_model("llama3", connection)
    if connection is not None:
        connected.train_connection(model, scale=0.3)
    model.compile("sgd", sampler="greedy", **connected.QUICK)
    paths = [{}] if connection is None else [{}, {"pivot_prompts": PIVOTS}]
    calls = [(PROMPTS, LENGTH, path) for path in paths]
    calls += [(PROMPTS[::-1], LENGTH, path) for path in ([{}] if connection is None else [
        {}, {"pivot_prompts": PIVOTS[::-1]}
    ])]  # fmt: skip
    greedy = generation.Sampling("greedy")
    found, start = {}, threading.Barrier(2 * len(calls))

    def say(place):
        prompts, length, path = calls[place % len(calls)]
        start.wait()
        try:
            for _ in range(3):
                if place < len(calls):
                    texts = model.generate(prompts, length, **path)
                else:
                    with greedy.of(model.causal_lm):
                        texts = model.generate(prompts, length, **path)
                found.setdefault(place, []).append(texts)
        except Exception as error:
            found.setdefault(place, []).append(error)

    threads = [threading.Thread(target=say, args=(n,)) for n in range(2 * len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [model.generate(prompts, length, **path) for prompts, length, path in calls]
    assert len({tuple(texts) for texts in expected}) == len(calls)
    for place, texts in found.items():
        assert texts == [expected[place % len(calls)]] * 3


@pytest.mark.parametrize("connection", ["fused", None])
def test_more_tokens_than_the_model_has_positions_for(connection):
    tokenizer = connected.tokenizer_of("gpt2")
    stock = connected.causal_lm("gpt2", tokenizer, max_sequence_length=20)
    preprocessor = keras_cc.CCPreprocessor(tokenizer, max_length=64, padding="max_length")
    model = keras_cc.CCCausalLM(stock, connection, preprocessor=preprocessor)
    model.compile("sgd", sampler="greedy", **connected.QUICK)
    before = connected.weights(model)
    message = r"at most 20 tokens, the positions that the model has.*Received: rows of {} tokens"
    with pytest.raises(ValueError, match=message.format(64)):
        model.fit(connected.ROWS, batch_size=3, verbose=0)
    with pytest.raises(ValueError, match=message.format(21)):
        model.generate(["a"], 21)
    connected.assert_weights_equal(connected.weights(model), before)
    assert model.max_positions == 20 and len(model.generate(["a"], 20)) == 1
    preprocessor.max_length = preprocessor.pivot_max_length = 20
    model.fit([{"instruction": "a", "output": "b"}], batch_size=1, verbose=0)
