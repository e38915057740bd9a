"""`distill`: the model's own greedy English answers, each once, through a cache that is checked."""

import copy
import hashlib
import json
import re

import connected
import keras_hub
import numpy as np
import pytest
import tiny

import keras_cc
from keras_cc.distillation import answer_cache, distill

LENGTH = 40
ROWS = [
    {"id": "kenya-tr", "lang": "tr", "instruction": "Kenya'nın para birimi nedir?",
     "output": "Kenya şilini", "instruction_en": "What is the currency of Kenya?",
     "answers": ["Kenya şilini", "şilin"]},
    {"id": "fox-tr", "lang": "tr", "instruction": "hızlı tilki", "output": "evet",
     "instruction_en": "the quick fox"},
    {"id": "fox-de", "lang": "de", "instruction": "der flinke Fuchs", "output": "ja",
     "instruction_en": "the quick fox"},
    {"id": "dog-en", "lang": "en", "instruction": "the lazy dog", "output": "no"},
    {"id": "dog-de", "lang": "de", "instruction": "der faule Hund", "output": "nein",
     "instruction_en": "the lazy dog"},
    {"id": "question", "lang": "sw", "instruction": "Jibu swali", "output": "ndiyo",
     "instruction_en": "Answer the question"},
]  # fmt: skip
PROMPTS = [
    "What is the currency of Kenya?",
    "the quick fox",
    "the quick fox",
    "the lazy dog",
    "the lazy dog",
    "Answer the question",
]
# The tiny model never stops by itself.
cut = pytest.mark.filterwarnings("ignore:.* fills max_length")


def make(connection=None, sampler="greedy", **preprocessing):
    return connected.answering_model(connection, sampler, {"max_length": 128, **preprocessing})


@pytest.fixture(scope="module")
def shared():
    return make()


class Generation:
    """Stands in for `CCCausalLM.generate`: notes the calls, answers by `say` or the real one."""

    def __init__(self, monkeypatch, say=None):
        self.calls, self.say, self.fail_after = [], say, None
        real = keras_cc.CCCausalLM.generate

        def generate(model, prompts, *args, **kwargs):
            if len(self.calls) == self.fail_after:
                raise KeyboardInterrupt
            self.calls.append(list(prompts))
            if self.say is None:
                return real(model, prompts, *args, **kwargs)
            return [self.say(prompt) for prompt in prompts]

        monkeypatch.setattr(keras_cc.CCCausalLM, "generate", generate)

    @property
    def prompts(self):
        """The distinct prompts of every call, one after the other."""
        return [prompt for call in self.calls for prompt in dict.fromkeys(call)]


@pytest.fixture
def real_generation(monkeypatch):
    return Generation(monkeypatch)


@pytest.fixture
def generation(monkeypatch):
    return Generation(monkeypatch, say=reply)


def reply(prompt):
    return f"re: {prompt.split()[-1]}"


def run(model, *args, **options):
    options = {"batch_size": 2, "max_length": LENGTH, "verbose": False, **options}
    return distill(model, copy.deepcopy(ROWS), *args, **options)


def outputs(rows):
    return [row["output"] for row in rows]


# ---------------------------------------------------------------- what the model answers


@cut
def test_answers_are_the_models_own_one_by_one(shared):
    rows = copy.deepcopy(ROWS)
    distilled = distill(shared, rows, batch_size=3, max_length=LENGTH, verbose=False)
    alone = [shared.generate(prompt, LENGTH, strip_prompt=True) for prompt in PROMPTS]
    assert rows == ROWS
    assert distilled == [
        {**row, "output": answer, "output_gold": row["output"]}
        for row, answer in zip(ROWS, alone, strict=True)
    ]
    assert len(set(alone)) == 4 and not set(alone) & set(outputs(ROWS))


@pytest.mark.thorough
@cut
@pytest.mark.parametrize("connection", ["fused", "selected"])
def test_a_connected_model_answers_untransformed(connection):
    model = make(connection)
    transformed = [model.generate(prompt, LENGTH, strip_prompt=True) for prompt in PROMPTS]
    answers = outputs(run(model))
    model.disconnect()
    assert answers == [model.generate(prompt, LENGTH, strip_prompt=True) for prompt in PROMPTS]
    assert answers != transformed


@pytest.mark.thorough
@cut
def test_the_users_sampler_is_not_used_and_not_lost(shared, real_generation):
    model = make(sampler=keras_hub.samplers.RandomSampler(seed=1))
    draws = {model.generate(PROMPTS[0], LENGTH) for _ in range(3)}
    assert len(draws) == 3
    sampler, function = model.causal_lm.sampler, model.causal_lm.generate_function
    assert outputs(run(model)) == outputs(run(shared))
    assert model.causal_lm.sampler is sampler
    assert model.causal_lm.generate_function is function
    real_generation.fail_after = len(real_generation.calls) + 1
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert model.causal_lm.sampler is sampler
    assert model.causal_lm.generate_function is function
    real_generation.fail_after = None
    assert model.generate(PROMPTS[0], LENGTH) not in draws
    # Asked for, another sampler is used.
    assert outputs(run(model, sampler="random")) != outputs(run(shared))


def test_the_rows_train_on_the_answers(shared, generation):
    _, y, weight = shared.preprocessor(run(shared))
    for labels, is_answer, prompt in zip(y, weight, PROMPTS, strict=True):
        *answer, end = labels[is_answer == 1].tolist()
        assert shared.tokenizer.detokenize([answer])[0] == reply(prompt)
        assert end == shared.preprocessor.end_token_id


# ---------------------------------------------------------------- batches


def test_each_distinct_prompt_is_answered_once_in_batches_of_one_size(shared, generation):
    distilled = run(shared, batch_size=3)
    assert outputs(distilled) == [reply(prompt) for prompt in PROMPTS]
    assert sorted(generation.prompts) == sorted(set(PROMPTS))
    assert [len(call) for call in generation.calls] == [3, 3]  # 4 prompts and 2 repetitions
    lengths = [
        len(shared.tokenizer.tokenize([prompt])[0]) for call in generation.calls for prompt in call
    ]
    assert lengths == sorted(lengths)


def test_the_progress_bar(shared, generation, capsys):
    run(shared)
    assert capsys.readouterr().out == ""
    run(shared, verbose=True)
    assert "4/4" in capsys.readouterr().out


# ---------------------------------------------------------------- rows


def test_without_pivots_columns_by_other_names_and_earlier_rounds(generation):
    names = {"instruction_column": "q", "output_column": "a", "pivot_column": "q_en"}
    model = make(**names)
    rows = [
        {"q": "swali", "a": "ndiyo", "q_en": "question", "instruction_en": "no prompt"},
        {"q": "the fox", "a": b"yes", "q_en": "the fox"},  # the same text: an English row
        {"q": "mbwa", "q_en": b"dog"},
        {"q": "paka", "a": "of a round before", "a_gold": "gold", "q_en": "cat"},
        {"q": "the colour", "a": "red", "q_en": "the color", "lang": "en-GB"},
    ]
    options = {"max_length": LENGTH, "verbose": False}
    distilled = distill(model, iter(rows), keep_pivot=False, **options)
    assert distilled == [
        {"q": "swali", "a": "re: question", "a_gold": "ndiyo", "instruction_en": "no prompt"},
        {"q": "the fox", "a": "re: fox", "a_gold": b"yes"},
        {"q": "mbwa", "a": "re: dog"},
        {"q": "paka", "a": "re: cat", "a_gold": "gold"},
        # As in training, it is the English row's own prompt that counts.
        {"q": "the colour", "a": "re: colour", "a_gold": "red", "lang": "en-GB"},
    ]
    kept = distill(model, rows, **options)
    assert [row.get("q_en") for row in kept] == [row["q_en"] for row in rows]


def test_answers_that_cannot_be_trained_on_are_left_out_and_counted(shared, generation):
    fits = 128 - len(shared.preprocessor.generate_preprocess([""])["padding_mask"][0].nonzero()[0])
    fits -= 2  # one token of the prompt, and the end token
    generation.say = {
        PROMPTS[0]: "", "the quick fox": " \n", "the lazy dog": "z" * (fits + 1),
        "Answer the question": "z" * fits,
    }.get  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        (row,) = run(shared, max_length=256)
    assert row["id"] == "question"
    assert str(caught[0].message) == (
        "3 of 6 rows are left out: the model's answer is empty (the first: row with id kenya-tr). "
        "2 of 6 rows are left out: the answer is too long for preprocessor.max_length=128 "
        "(the first: row with id dog-en)."
    )
    shared.preprocessor([row])
    with pytest.raises(ValueError, match="Answers are never cut"):
        shared.preprocessor([{**row, "output": "z" * (fits + 1)}])
    generation.say = lambda prompt: ""
    with pytest.raises(ValueError, match=r"no row is left. Received: 6 of 6 rows are left out"):
        run(shared)


@pytest.mark.thorough
@cut
def test_of_an_answer_only_what_clean_keeps(shared, monkeypatch, tmp_path):
    generation = Generation(monkeypatch, say=lambda prompt: f"{reply(prompt)}\nQuestion 2")
    rows = run(shared, tmp_path / "cache", clean=lambda text: text.splitlines()[0])
    assert outputs(rows) == [reply(prompt) for prompt in PROMPTS]
    count = len(generation.calls)
    # The cache has the answers as they came.
    rows = run(shared, tmp_path / "cache")
    assert outputs(rows) == [f"{reply(prompt)}\nQuestion 2" for prompt in PROMPTS]
    assert len(generation.calls) == count


def test_an_answer_that_fills_max_length_is_said(shared, generation):
    # "the lazy dog" with its start token, by hand: "the", " ", "l", ..., and LENGTH in all.
    room = LENGTH - 1 - len(shared.tokenizer.tokenize(["the lazy dog"])[0])
    generation.say = lambda prompt: "z" * (room if prompt == "the lazy dog" else 3)
    with pytest.warns(UserWarning, match=rf"^2 of 6 rows .* fills max_length={LENGTH} .*dog-en\)"):
        assert len(run(shared)) == 6
    generation.say = lambda prompt: "z" * (room - 1 if prompt == "the lazy dog" else 3)
    assert len(run(shared)) == 6


# ---------------------------------------------------------------- the cache


@pytest.mark.thorough
@cut
def test_a_killed_run_goes_on_where_it_was(shared, real_generation, tmp_path):
    whole = run(shared)
    cache, calls = tmp_path / "answers.jsonl", real_generation.calls
    calls.clear()
    real_generation.fail_after = 1
    with pytest.raises(KeyboardInterrupt):
        run(shared, cache)
    first = set(real_generation.prompts)
    lines = [json.loads(line) for line in cache.read_text("utf-8").splitlines()]
    assert {line["prompt"] for line in lines[1:]} == first and len(first) == 2
    calls.clear()
    real_generation.fail_after = None
    assert run(shared, cache) == whole
    assert set(real_generation.prompts) == set(PROMPTS) - first
    # Complete, it is all that is needed; other rows go on in it.
    calls.clear()
    content = cache.read_bytes()
    assert run(shared, cache, batch_size=5) == whole
    assert not calls and cache.read_bytes() == content
    other = [*ROWS, {**ROWS[0], "instruction_en": "Answer yes"}]
    distill(shared, other, cache, max_length=LENGTH, verbose=False)
    assert real_generation.prompts == ["Answer yes"]
    assert cache.read_bytes().startswith(content)


def test_a_torn_last_line_is_answered_again(shared, generation, tmp_path):
    cache = tmp_path / "answers.jsonl"
    whole = run(shared, cache)
    content = cache.read_bytes()
    lost = json.loads(content.splitlines()[-1])["prompt"]
    cache.write_bytes(content[:-7])
    generation.calls.clear()
    with pytest.warns(UserWarning, match="is torn.*removed"):
        assert run(shared, cache) == whole
    assert generation.prompts == [lost] and cache.read_bytes() == content


@cut
def test_line_breaks_of_every_kind_come_back(shared, generation, tmp_path):
    generation.say = lambda prompt: f'{prompt}\r\n \u2028\x85\n"ş" {{'
    whole = run(shared, tmp_path / "answers.jsonl")
    generation.calls.clear()
    assert run(shared, tmp_path / "answers.jsonl") == whole and not generation.calls


def refuses(model, cache, match, **options):
    content = cache.read_bytes()
    with pytest.raises(ValueError, match=match):
        run(model, cache, **options)
    assert cache.read_bytes() == content


def test_a_cache_of_another_model_or_other_settings_is_refused(generation, tmp_path):
    model, cache = make(), tmp_path / "answers.jsonl"
    run(model, cache)
    path = re.escape(repr(str(cache)))
    refuses(model, cache, rf"cache={path} with max_length: 40 in the file, 41 here", max_length=41)
    refuses(model, cache, "with sampler: .*GreedySampler.* in the file, .*TopK", sampler="top_k")
    refuses(make(template="Q: {instruction}\nA:"), cache, "with template: None in the file, 'Q: {")
    refuses(make(add_start_token=False), cache, "with add_start_token: True in the file, False")
    wider = connected.causal_lm("llama3", connected.tokenizer_of("llama3"), intermediate_dim=32)
    other = keras_cc.CCCausalLM(wider, None, preprocessor=model.preprocessor)
    refuses(other, cache, "another model.*give another path, or delete .*backbone: .*weights: ")
    # One bit of one weight in the middle of one matrix.
    kernel = model.causal_lm.backbone.transformer_layers[1]._feedforward_gate_dense.kernel
    before = connected.to_numpy(kernel)
    after = before.copy()
    after[7, 5] = np.nextafter(after[7, 5], np.float32(9))
    kernel.assign(after)
    refuses(model, cache, rf"cache={path} with weights: '[0-9a-f]{{64}}' in the file, '[^;]*$")
    kernel.assign(before)
    generation.calls.clear()
    assert len(run(model, cache)) == 6 and not generation.calls


@pytest.mark.thorough("fused")
@pytest.mark.parametrize(
    "connection", [None, "fused", keras_cc.FusedConnection(gate="layer", transform=None)]
)
def test_weights_are_named_alike_connected_or_not(generation, tmp_path, connection):
    """By shapes and float32 values in order, those of the causal LM alone."""
    run(make(connection), tmp_path / "answers.jsonl")
    digest = hashlib.sha256()
    for variable in connected.causal_lm("llama3", connected.tokenizer_of("llama3")).weights:
        value = connected.to_numpy(variable)
        digest.update(repr(value.shape).encode() + value.tobytes())
    header = json.loads((tmp_path / "answers.jsonl").read_bytes().split(b"\n")[0])
    assert header["weights"] == digest.hexdigest()


def test_weights_are_named_alike_on_every_backend_and_in_bfloat16():
    for dtype in ("float32", "bfloat16"):  # multiples of 1/8 below 32 are exact in both
        causal_lm = tiny.causal_lm("llama3", dtype=dtype)
        for number, variable in enumerate(causal_lm.weights):
            values = (np.arange(np.prod(variable.shape)) + number) % 251 / 8
            variable.assign(values.reshape(variable.shape).astype("float32"))
        name = answer_cache.fingerprint(keras_cc.CCCausalLM(causal_lm))
        assert name.startswith("f16c3c5e19875e8a")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\n\n", b"\x89PNG\r\n\x1a\n", b'"text"\n', json.dumps(ROWS[0]).encode() + b"\n"],
)
def test_a_file_that_is_no_cache_is_refused(shared, generation, tmp_path, content):
    cache = tmp_path / "rows.jsonl"
    cache.write_bytes(content)
    refuses(shared, cache, "`cache` must be a file that `distill` wrote.*something else")
    assert not generation.calls


def test_a_broken_line_is_refused(shared, generation, tmp_path):
    cache = tmp_path / "answers.jsonl"
    run(shared, cache)
    first, second, *rest = cache.read_bytes().split(b"\n")
    for broken in (
        b"{",
        b"",
        b'{"prompt": "x"}',
        b'{"prompt": "x", "answer": 1}',
        b'["prompt", "answer"]',
    ):
        cache.write_bytes(b"\n".join([first, second, broken, *rest]))
        refuses(shared, cache, r"prompt and its answer on every line.*Received: line 3 of cache=")


# ---------------------------------------------------------------- refused at the door


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        ({"lang": "tr"}, ValueError, r"row with id x: there is no 'instruction_en'.*lang='tr'"),
        ({}, ValueError, r"row with id x: there is no 'instruction_en'.*lang=None"),
        ({"instruction_en": " "}, ValueError, r"row with id x: there is no 'instruction_en'"),
        ({"instruction_en": 3}, TypeError, r"row with id x: 'instruction_en' must be a string"),
        ({"instruction_en": "a", "instruction": None}, ValueError, r"x: no 'instruction'"),
        ({"instruction_en": "a" * LENGTH}, ValueError, r"row with id x: .*cannot be answered.*41"),
    ],
)
def test_a_row_that_cannot_be_answered(shared, generation, tmp_path, row, error, match):
    rows = [*ROWS, {"id": "x", "instruction": "soru", "output": "cevap", **row}]
    with pytest.raises(error, match=match):
        distill(shared, rows, tmp_path / "answers.jsonl", max_length=LENGTH, verbose=False)
    assert not generation.calls and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, r"`batch_size` must be an integer >= 1. Received: .*=0"),
        ({"batch_size": True}, r"`batch_size` must be an integer"),
        ({"max_length": 1}, r"`max_length` must be an integer >= 2"),
        ({"max_length": "64"}, r"`max_length` must be an integer.*Received: max_length='64'"),
        ({"sampler": None}, r"`sampler` must be a keras_hub.samplers.Sampler.*sampler=None"),
        ({"cache": "nowhere/answers.jsonl"}, r"`cache` must be in a folder that exists"),
    ],
)
def test_options_that_are_none(shared, generation, options, match):
    with pytest.raises(ValueError, match=match):
        run(shared, **options)


@pytest.mark.parametrize("rows", [[], ROWS[0], "rows.jsonl", ["a row"], {"instruction": ["a"]}])
def test_rows_are_a_list_of_dicts(shared, rows):
    with pytest.raises(TypeError, match="`rows` must be a list of row dicts, at least one"):
        distill(shared, rows)


def test_models_that_cannot_be_asked(shared, monkeypatch):
    with pytest.raises(TypeError, match=r"`model` must be a keras_cc.CCCausalLM"):
        distill(shared.causal_lm, ROWS)
    model = make()
    model.preprocessor = None
    with pytest.raises(ValueError, match=r"must have a preprocessor.*model.preprocessor=None"):
        distill(model, ROWS)
    monkeypatch.setattr(keras_cc.CCCausalLM, "intervention", "an intervention", raising=False)
    with pytest.raises(ValueError, match=r"set `model.intervention = None`.*'an intervention'"):
        distill(shared, ROWS)
