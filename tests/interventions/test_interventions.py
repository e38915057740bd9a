"""XTransplant and Incline: against a NumPy forward pass with the same edit, one row at a time."""

import connected
import keras
import numpy as np
import pytest
import tiny
from connected import QUICK, logits, monolingual
from reference import Options, Reference

import keras_cc
from keras_cc import CCCausalLM, FusedConnection, Incline, XTransplant
from keras_cc.calibration.compiled import Compiled

SITES = ["hidden", "ffn", "attention"]
# Rows of different lengths, all but the longest padded, on both sides; the last has no pivot.
X, Y, WEIGHTS = tiny.batch(rows=5, prompt_lengths=(4, 3, 6, 5, 2), length=10)
PROMPTS = ["Kenya'nın para", "the quick brown fox"]
PIVOTS = ["What is the currency of Kenya?", "a fox"]
LENGTH = 24


class SiteReference(Reference):
    """The stock forward pass, or that of the transforms, with edits at sites of its blocks."""

    def run(self, ids, edits=None, position=None):
        """Logits, and what left each site, (tokens, d) by (kind, block).

        `edits` has the vector that takes a site's place at `position`, (d,) by (kind, block).
        """
        states = {}

        def visit(kind, number, value):
            if (kind, number) in (edits or {}):
                value = value.copy()
                value[position] = edits[kind, number]
            states[kind, number] = value
            return value

        embeddings = self.weights["token_embedding/embeddings"]
        x = embeddings[ids]
        for number in range(self.num_layers):
            block = f"transformer_layer_{number}"
            normed = self.norm(x, f"{block}/self_attention_layernorm/scale")
            x = x + visit("attention", number, self.attention(normed, block))
            f = self.feed_forward(self.norm(x, f"{block}/feedforward_layernorm/scale"), block)
            x = x + visit("ffn", number, self.transform(number, f))
            x = visit("hidden", number, x)
        return self.norm(x, "sequence_output_layernorm/scale") @ embeddings.T, states

    def xtransplant(self, ids, pivot_ids, position, source, target, site):
        if not len(pivot_ids):
            return self.run(ids)[0]
        state = self.run(pivot_ids)[1][site, source][-1]
        return self.run(ids, {(site, target): state}, position)[0]

    def incline(self, ids, prompt, matrices, sigma, site):
        """`prompt`: how many ids there are up to the last prompt token, it included."""
        plain = {at: value[prompt - 1] for at, value in self.run(ids[:prompt])[1].items()}
        edits = {
            (site, number): plain[site, number] + sigma * plain[site, number] @ matrix
            for number, matrix in matrices.items()
        }
        return self.run(ids, edits, prompt - 1)[0]

    def of(self, model, ids, pivot_ids, prompt):
        """Logits with the model's intervention."""
        own = model.intervention
        if own is None:
            return self.run(ids)[0]
        if isinstance(own, XTransplant):
            layers = (own.source_layer % self.num_layers, own.target_layer % self.num_layers)
            return self.xtransplant(ids, pivot_ids, prompt - 1, *layers, own.site)
        return self.incline(ids, prompt, kernels(own), own.sigma, own.site)


def kernels(incline):
    return {n: connected.to_numpy(layer.kernel) for n, layer in incline.matrices.items()}


def make(intervention=None, connection=None, seed=0, **options):
    """A tiny Llama 3; an Incline has random matrices, as if it were fitted."""
    model = CCCausalLM(tiny.causal_lm("llama3", seed=seed, **options), connection)
    connected.train_connection(model)
    model.intervention = intervention
    fill(model)
    return model


def fill(model, scale=0.5):
    if isinstance(model.intervention, Incline):
        for number, layer in model.intervention.matrices.items():
            tiny.fill(layer, 20 + number, scale)


def reference(model):
    options = Options() if model.connection else Options(transform=None)
    return SiteReference(connected.weights(model), model.num_blocks, options=options)


def rows_of(x):
    """Each row's ids, pivot ids, and how many tokens there are up to the last prompt token."""
    for row, mask in enumerate(x["padding_mask"]):
        ids = x["token_ids"][row][mask == 1]
        pivot = np.zeros(0, "int32")
        if "pivot_token_ids" in x:
            pivot = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
        answers = np.flatnonzero(x["answer_mask"][row]) if "answer_mask" in x else ()
        yield ids, pivot, int(answers[0]) + 1 if len(answers) else len(ids)


def expected_logits(model, x):
    numpy_model = reference(model)
    return [numpy_model.of(model, *row) for row in rows_of(x)]


def assert_logits(model, x):
    """The model's logits are the reference's, and say which rows are not the plain model's."""
    found, changed = logits(model, x), []
    plain = [reference(model).run(ids)[0] for ids, _, _ in rows_of(x)]
    for row, expected in enumerate(expected_logits(model, x)):
        np.testing.assert_allclose(found[row, : len(expected)], expected, rtol=2e-5, atol=2e-5)
        changed.append(bool(np.abs(expected - plain[row]).max() > 1e-2))
    return changed


def padded(rows):
    """`(rows, longest, vocabulary)`: the reference's logits as a batch."""
    longest = max(map(len, rows))
    return np.stack([np.pad(row, ((0, longest - len(row)), (0, 0))) for row in rows])


# ---------------------------------------------------------------- XTransplant: logits


PAIRS = [(0, 0), (0, 1), (1, 0), (1, 1), (-2, -1)]


@pytest.mark.thorough("0-1-ffn", "1-0-attention")
@pytest.mark.parametrize(
    "source, target, site",
    [*((i, j, "ffn") for i, j in PAIRS), (0, 1, "attention"), (1, 0, "attention")],
)
def test_xtransplant_is_the_numpy_forward_pass(source, target, site):
    model = make(XTransplant(source, target, site))
    assert assert_logits(model, X) == [True, True, True, True, False]  # no pivot: a plain row


@pytest.mark.parametrize("source, target", [(2, 0), (-3, -2)])
def test_xtransplant_of_three_blocks_without_an_answer(source, target):
    # Without an answer, the last real token is the last prompt token.
    x = {name: value for name, value in X.items() if name != "answer_mask"}
    model = make(XTransplant(source, target), num_layers=3)
    assert assert_logits(model, x) == [True, True, True, True, False]


def test_xtransplant_changes_nothing_before_the_last_prompt_token():
    model, plain = make(XTransplant(1, 0)), make()
    found, before = logits(model, X), logits(plain, monolingual(X))
    for row, (_, pivot, prompt) in enumerate(rows_of(X)):
        np.testing.assert_allclose(found[row, : prompt - 1], before[row, : prompt - 1], atol=1e-5)
        if len(pivot):
            difference = np.abs(found - before)[row, prompt - 1 : X["padding_mask"][row].sum()]
            assert difference.max(axis=-1).min() > 1e-3  # it, and whatever attends to it


@pytest.mark.thorough("1-ffn")
@pytest.mark.parametrize("site", ["ffn", "attention"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_transplant_of_the_prompts_own_state_changes_nothing(layer, site):
    model, plain = make(XTransplant(layer, layer, site)), make()
    prompts = [ids[:prompt] for ids, _, prompt in rows_of(X)]
    pivot = np.zeros((5, 8), "int32")
    for row, ids in enumerate(prompts):
        pivot[row, : len(ids)] = ids
    mask = (np.arange(8)[None] < np.array([[len(ids)] for ids in prompts])).astype("int32")
    x = {**X, "pivot_token_ids": pivot, "pivot_padding_mask": mask}
    real = X["padding_mask"] == 1
    found = logits(model, x)[real]
    np.testing.assert_allclose(found, logits(plain, monolingual(X))[real], atol=1e-5)
    # Of another layer, it does change something.
    assert np.abs(logits(make(XTransplant(1 - layer, layer, site)), x)[real] - found).max() > 0.1


def test_answer_positions_ask_for_the_same_logits():
    model = make(XTransplant(0, 1))
    positions = keras_cc.data.prepared.answer_positions(X["answer_mask"])
    found = logits(model, {**X, "answer_positions": positions})
    whole = logits(model, X)
    np.testing.assert_allclose(
        found, np.take_along_axis(whole, positions[..., None], axis=1), atol=1e-5
    )


# ---------------------------------------------------------------- Incline: logits


@pytest.mark.thorough("None-attention", "fused-hidden")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("connection", [None, "fused"])
def test_incline_is_the_numpy_forward_pass(site, connection):
    connection = FusedConnection(dropout=0.0, initial_gate=0.5) if connection else None
    model = make(Incline(0.7, site), connection)
    x = monolingual(X)
    assert assert_logits(model, {**x, "answer_mask": X["answer_mask"]}) == [True] * 5
    assert assert_logits(model, x) == [True] * 5
    if connection is None:  # a pivot is not read
        np.testing.assert_allclose(
            logits(model, X), logits(model, {**x, "answer_mask": X["answer_mask"]}), atol=1e-6
        )
    else:  # with one, it is the connected pass, which an intervention does not touch
        other = make(None, connection)
        np.testing.assert_allclose(logits(model, X), logits(other, X), atol=1e-6)


@pytest.mark.thorough("ffn")
@pytest.mark.parametrize("site", SITES)
def test_incline_before_it_is_fitted_or_without_sigma_changes_nothing(site):
    plain = logits(make(), monolingual(X))
    unfitted = CCCausalLM(tiny.causal_lm("llama3"), None, intervention=Incline(0.5, site))
    np.testing.assert_allclose(logits(unfitted, monolingual(X)), plain, atol=1e-5)
    still = make(Incline(0.0, site))
    np.testing.assert_allclose(logits(still, monolingual(X)), plain, atol=1e-5)
    # The same matrices do change something, with a sigma.
    assert np.abs(logits(make(Incline(-0.5, site)), monolingual(X)) - plain).max() > 0.1


@pytest.mark.thorough("hidden")
@pytest.mark.parametrize("site", SITES)
def test_incline_after_a_fit(site):
    rows = tiny.batch(40, prompt_lengths=[2 + i % 4 for i in range(40)], seed=3)
    model = CCCausalLM(tiny.causal_lm("llama3", num_key_value_heads=2), None)
    model.intervention = Incline(0.3, site)
    model.fit_transform(rows[0], rows[1], sample_weight=rows[2], ridge=1e-2, verbose=0)
    assert all(np.abs(kernel).max() > 1e-3 for kernel in kernels(model.intervention).values())
    changed = assert_logits(model, {**monolingual(X), "answer_mask": X["answer_mask"]})
    assert changed == [True] * 5


# ---------------------------------------------------------------- evaluate, predict, fit


def scored(model):
    result = model.evaluate(X, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True)
    return result["sft_loss"]


def fresh_loss(model):
    """Nats an answer token, by the reference."""
    found = padded(expected_logits(model, X))
    return connected.sft_loss(found, Y[:, : found.shape[1]], WEIGHTS[:, : found.shape[1]])


INTERVENTIONS = {
    "none": lambda: None,
    "transplant": lambda: XTransplant(0, 1),
    "back": lambda: XTransplant(1, 0),
    "incline": lambda: Incline(0.7),
}


@pytest.mark.thorough
def test_evaluation_is_of_the_intervention_at_hand():
    model = make()
    model.compile("sgd")  # compiled on every backend that compiles: nothing may be stale
    losses = {}
    for name in ("none", "transplant", "incline", "back", "none"):
        model.intervention = INTERVENTIONS[name]()
        fill(model)
        result = scored(model)
        np.testing.assert_allclose(result, fresh_loss(model), rtol=1e-5, err_msg=name)
        predicted = model.predict(X, verbose=0, batch_size=5)["logits"]
        for row, expected in enumerate(expected_logits(model, X)):
            np.testing.assert_allclose(predicted[row, : len(expected)], expected, atol=2e-5)
        losses.setdefault(name, result)
        assert losses[name] == pytest.approx(result, rel=1e-6)
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, connection", [("transplant", None), ("incline", None), ("incline", "fused")]
)
def test_training_does_not_see_it(name, connection):
    found = []
    for intervention in (None, INTERVENTIONS[name]()):
        model = make(intervention, FusedConnection(dropout=0.0) if connection else None)
        model.compile(keras.optimizers.SGD(0.05), **QUICK)
        options = {"sample_weight": WEIGHTS, "epochs": 2, "batch_size": 5}
        options |= {"validation_data": (X, Y, WEIGHTS), "shuffle": False, "verbose": 0}
        history = model.fit(X, Y, **options).history
        weights = connected.weights(model)
        matrices = {p: w for p, w in weights.items() if "incline" in p}
        found.append({p: w for p, w in weights.items() if p not in matrices})
        found.append(history)
    plain, plain_history, other, history = found
    connected.assert_weights_equal(other, plain, atol=1e-6)
    np.testing.assert_allclose(history["loss"], plain_history["loss"], rtol=1e-6)
    assert history["loss"][1] < history["loss"][0]
    # What is validated is what a user gets.
    assert abs(history["val_sft_loss"][1] - plain_history["val_sft_loss"][1]) > 1e-3
    np.testing.assert_allclose(history["val_sft_loss"][1], scored(model), rtol=1e-6)
    assert len(matrices) == (2 if name == "incline" else 0)
    for number, kernel in enumerate(matrices.values()):
        layer = keras.layers.Dense(tiny.HIDDEN, use_bias=False)
        layer.build((None, tiny.HIDDEN))
        tiny.fill(layer, 20 + number, 0.5)
        np.testing.assert_array_equal(kernel, connected.to_numpy(layer.kernel))


# ---------------------------------------------------------------- generation


def text_model(intervention=None, connection=None, family="llama3"):
    model = connected.text_model(family, connection)
    connected.train_connection(model)
    model.intervention = intervention
    fill(model, scale=1.0)
    model.compile("sgd", sampler="greedy", **QUICK)
    return model


def prompt_rows(model, pivots):
    """`rows_of` the prompts, and of their pivots where there are any."""
    x = model.preprocessor.generate_preprocess(PROMPTS, LENGTH)
    if pivots is not None:
        x = {**x, **model.preprocessor.pivot_preprocess(pivots)}
    return rows_of({name: np.asarray(value) for name, value in x.items()})


def greedy_by_hand(model, pivots=None):
    """The likeliest token after what there is, one at a time, every time the whole row anew."""
    numpy_model, found = reference(model), []
    for ids, pivot, prompt in prompt_rows(model, pivots):
        while len(ids) < LENGTH:
            following = numpy_model.of(model, ids, pivot, prompt)[-1].argmax()
            ids = np.append(ids, following)
        found.append(ids)
    return np.stack(found)


def generated(model, seen_ids, pivots=None):
    model.generate(PROMPTS, LENGTH, pivot_prompts=pivots, stop_token_ids=None)
    return seen_ids[-1]


@pytest.mark.thorough("attention")
@pytest.mark.parametrize("site", ["ffn", "attention"])
def test_generation_with_a_transplant(site, seen_ids):
    model = text_model(XTransplant(0, 1, site))
    pivots = [PIVOTS[0], ""]
    plain = greedy_by_hand(text_model())
    found = generated(model, seen_ids, pivots)
    np.testing.assert_array_equal(found, greedy_by_hand(model, pivots))
    assert (found[0] != plain[0]).any() and (found[1] == plain[1]).all()
    found = generated(model, seen_ids, PIVOTS)
    np.testing.assert_array_equal(found, greedy_by_hand(model, PIVOTS))
    # The prompt's own state is what is there already.
    own = text_model(XTransplant(1, 1, site))
    np.testing.assert_array_equal(generated(own, seen_ids, PROMPTS), plain)


@pytest.mark.thorough("hidden")
@pytest.mark.parametrize("site", SITES)
def test_generation_with_incline(site, seen_ids):
    model = text_model(Incline(0.5, site))
    found = generated(model, seen_ids)
    np.testing.assert_array_equal(found, greedy_by_hand(model))
    assert (found != greedy_by_hand(text_model())).any(axis=1).all()
    one = model.generate(PROMPTS[0], LENGTH, stop_token_ids=None)
    assert one == model.generate(PROMPTS, LENGTH, stop_token_ids=None)[0]


@pytest.mark.thorough
def test_generation_with_incline_beside_a_connection(seen_ids):
    model = text_model(Incline(0.5), FusedConnection(initial_gate=0.6))
    found = generated(model, seen_ids)
    np.testing.assert_array_equal(found, greedy_by_hand(model))
    paired = generated(model, seen_ids, PIVOTS)
    model.intervention = None
    assert (generated(model, seen_ids) != found).any()
    np.testing.assert_array_equal(generated(model, seen_ids, PIVOTS), paired)


@pytest.mark.thorough("intervention0")
@pytest.mark.parametrize(
    "intervention", [XTransplant(0, 1), XTransplant(1, 0, "attention"), Incline(0.5, "attention")]
)
def test_generation_of_gemma3(intervention, seen_ids):
    # Norms behind both sublayers, sliding windows: against whole passes of the model itself.
    model = text_model(intervention, family="gemma3")
    pivots = PIVOTS if intervention.needs_pivot else None
    found = generated(model, seen_ids, pivots)
    forward = Compiled(model, lambda x: {"logits": model(x)["logits"]})
    prompts = [prompt for _, _, prompt in prompt_rows(model, None)]
    pivot = {} if pivots is None else model.preprocessor.pivot_preprocess(pivots)
    x = {"token_ids": found, "padding_mask": np.ones_like(found), **pivot}
    x["answer_mask"] = (np.arange(LENGTH)[None] >= np.array(prompts)[:, None] - 1).astype("int32")
    # Causal: one pass over what was generated has every step's logits.
    following = forward.run(x)["logits"].argmax(axis=-1)
    for row, prompt in enumerate(prompts):
        np.testing.assert_array_equal(found[row, prompt:], following[row, prompt - 1 : -1])
    model.intervention = None
    assert (generated(model, seen_ids) != found).any()


@pytest.mark.thorough
def test_generation_is_of_the_intervention_at_hand(seen_ids):
    model, found = text_model(), {}
    for name in ("none", "transplant", "incline", "back", "none"):
        model.intervention = INTERVENTIONS[name]()
        fill(model, scale=1.0)
        pivots = PIVOTS if name in ("transplant", "back") else None
        ids = generated(model, seen_ids, pivots)
        np.testing.assert_array_equal(ids, greedy_by_hand(model, pivots), err_msg=name)
        np.testing.assert_array_equal(found.setdefault(name, ids), ids)
    assert len({ids.tobytes() for ids in found.values()}) == 4


# ---------------------------------------------------------------- taking it off


@pytest.mark.parametrize("name", ["transplant", "incline"])
def test_setting_none_gives_the_stock_model_back(name):
    model = make()
    before, paths = logits(model, monolingual(X)), [v.path for v in model.weights]
    attributes = [set(dir(block)) for block in model.causal_lm.backbone.transformer_layers]
    model.intervention = INTERVENTIONS[name]()
    fill(model)
    assert np.abs(logits(model, X) - before)[:-1].max() > 0.01
    extra = len(model.weights) - len(paths)
    assert extra == (2 if name == "incline" else 0)
    model.intervention = None
    assert model.intervention is None
    np.testing.assert_array_equal(logits(model, monolingual(X)), before)
    np.testing.assert_array_equal(logits(model, X), before)
    assert [v.path for v in model.weights] == paths
    after = [set(dir(block)) for block in model.causal_lm.backbone.transformer_layers]
    assert after == attributes


def test_what_was_fitted_is_there_when_it_is_set_again():
    model = make(Incline(0.7))
    fitted, found = model.intervention, logits(model, monolingual(X))
    model.intervention = None
    model.intervention = fitted
    np.testing.assert_allclose(logits(model, monolingual(X)), found, atol=1e-6)
    with pytest.raises(ValueError, match=r"has matrices for 2 blocks of width 16.*Received: "):
        make(num_layers=3).intervention = fitted


def test_merge_refuses_and_says_why():
    model = make(Incline(0.7), FusedConnection(dropout=0.0))
    before, found = connected.weights(model), logits(model, monolingual(X))
    with pytest.raises(
        ValueError, match=r"cannot fold an intervention.*`model.intervention = None`.*Incline\("
    ):
        model.merge()
    connected.assert_weights_equal(connected.weights(model), before, atol=0)
    np.testing.assert_array_equal(logits(model, monolingual(X)), found)
    model.intervention = None
    expected = logits(model, monolingual(X))
    np.testing.assert_allclose(logits(model.merge(), monolingual(X)), expected, atol=1e-4)
    alone = make(XTransplant(0, 1))
    with pytest.raises(ValueError, match=r"cannot fold an intervention.*Received: .*XTransplant"):
        alone.merge()


def test_disconnect_takes_it_off():
    model = make(Incline(0.7))
    stock = model.disconnect()
    assert model.intervention is None
    np.testing.assert_array_equal(
        logits(stock, monolingual(X)), logits(tiny.causal_lm("llama3"), monolingual(X))
    )


# ---------------------------------------------------------------- saving


@pytest.mark.thorough("intervention1-fused")
@pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning")
@pytest.mark.parametrize(
    "intervention, connection",
    [
        (Incline(-0.3, "attention"), None),
        (Incline(0.4), "fused"),
        (XTransplant(-1, 0, "attention"), None),
    ],
)
def test_a_keras_file_keeps_it(intervention, connection, tmp_path):
    model = text_model(intervention, connection)
    model.save(tmp_path / "model.keras")
    # Without its optimizer, which nothing has been trained with.
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    loaded.compile("sgd", sampler="greedy", **QUICK)
    assert type(loaded.intervention) is type(intervention)
    assert loaded.intervention.get_config() == intervention.get_config()
    x, _, _ = model.preprocessor(connected.ROWS)
    x = x if connection is None else monolingual(x)
    np.testing.assert_allclose(logits(loaded, x), logits(model, x), atol=1e-5)
    for number, kernel in kernels(model.intervention).items():
        np.testing.assert_array_equal(kernels(loaded.intervention)[number], kernel)
    pivots = PIVOTS if intervention.needs_pivot else None
    texts = model.generate(PROMPTS, LENGTH, pivot_prompts=pivots)
    assert loaded.generate(PROMPTS, LENGTH, pivot_prompts=pivots) == texts
    # It made a difference.
    loaded.intervention = None
    assert np.abs(logits(loaded, x) - logits(model, x)).max() > 0.01


@pytest.mark.thorough("safetensors")
@pytest.mark.parametrize("ending", ["safetensors", "weights.h5"])
def test_a_weights_file_keeps_the_matrices(ending, tmp_path):
    model, other = make(Incline(0.7)), make(Incline(0.7))
    for layer in other.intervention.matrices.values():
        layer.kernel.assign(np.zeros((tiny.HIDDEN, tiny.HIDDEN), "float32"))
    model.save_cc_weights(tmp_path / f"incline.{ending}")
    other.load_cc_weights(tmp_path / f"incline.{ending}")
    np.testing.assert_allclose(
        logits(other, monolingual(X)), logits(model, monolingual(X)), atol=1e-6
    )


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("number", [0.5, 1.0, "1", None, True, [0]])
@pytest.mark.parametrize("name", ["source_layer", "target_layer"])
def test_layers_are_integers(name, number):
    with pytest.raises(ValueError, match=rf"`{name}` must be an integer.*Received: {name}="):
        XTransplant(**{"source_layer": 0, "target_layer": 0, name: number})
    assert XTransplant(np.int64(1), 0).get_config()["source_layer"] == 1


@pytest.mark.parametrize("number", [2, -3, 99])
@pytest.mark.parametrize("name", ["source_layer", "target_layer"])
def test_layers_outside_the_model(name, number):
    outside = XTransplant(**{"source_layer": 0, "target_layer": 0, name: number})
    message = rf"`{name}` must be a block number from 0 to 1 .*2 blocks. Received: {name}={number}"
    with pytest.raises(ValueError, match=message):
        CCCausalLM(tiny.causal_lm(), None, intervention=outside)
    model = make(XTransplant(0, 1))
    kept, before = model.intervention, logits(model, X)
    with pytest.raises(ValueError, match=message):
        model.intervention = outside
    assert model.intervention is kept
    np.testing.assert_array_equal(logits(model, X), before)


@pytest.mark.parametrize("site", ["hidden", "mlp", None, 0])
def test_sites_of_xtransplant(site):
    with pytest.raises(ValueError, match=r"`site` must be one of .*Received: site="):
        XTransplant(0, 1, site)


@pytest.mark.parametrize("site", ["embedding", "mlp", None, 1])
def test_sites_of_incline(site):
    with pytest.raises(ValueError, match=r"`site` must be one of .*Received: site="):
        Incline(site=site)


@pytest.mark.parametrize("sigma", ["0.1", None, True, float("nan"), [0.1]])
def test_sigma_is_a_number(sigma):
    with pytest.raises(ValueError, match=r"`sigma` must be a number. Received: sigma="):
        Incline(sigma)


@pytest.mark.parametrize("value", ["incline", Incline, 3, [Incline()]])
def test_what_is_no_intervention(value):
    model = make()
    with pytest.raises(ValueError, match=r"`intervention` must be an intervention object.*Receiv"):
        model.intervention = value
    assert model.intervention is None


@pytest.mark.parametrize("connection", ["fused", "selected"])
def test_a_transplant_does_not_stand_beside_a_connection(connection):
    model = make(None, connection)
    before = logits(model, X)
    with pytest.raises(ValueError, match=r"reads the pivot's plain pass.*Received: connection="):
        model.intervention = XTransplant(0, 1)
    assert model.intervention is None
    np.testing.assert_array_equal(logits(model, X), before)
    model.disconnect()
    model.intervention = XTransplant(0, 1)
    assert assert_logits(model, X) == [True, True, True, True, False]


def test_a_pivot_that_is_missing():
    model = text_model(XTransplant(0, 1))
    with pytest.raises(ValueError, match=r"`pivot_prompts` must be given.*XTransplant.*Received"):
        model.generate(PROMPTS, LENGTH)
    with pytest.raises(ValueError, match=r"as many as `prompts`.*Received: 1 pivot prompts for 2"):
        model.generate(PROMPTS, LENGTH, pivot_prompts=PIVOTS[:1])
    with pytest.raises(
        ValueError, match=r"XTransplant.* needs the pivot prompts.*Received: inputs"
    ):
        model(monolingual(X))
    alone = text_model(Incline(0.5))
    with pytest.raises(ValueError, match=r"`pivot_prompts` need a connection.*Received"):
        alone.generate(PROMPTS, LENGTH, pivot_prompts=PIVOTS)


@pytest.mark.parametrize("sampler", ["beam", "contrastive"])
def test_samplers_that_lay_out_rows_of_their_own(sampler):
    model = text_model(Incline(0.5))
    samplers = {"beam": "beam", "contrastive": "contrastive"}
    model.compile("sgd", sampler=samplers[sampler], **QUICK)
    with pytest.raises(ValueError, match=r"cannot continue a prompt with .*Received: sampler="):
        model.generate(PROMPTS, LENGTH)


@pytest.mark.parametrize("sigma", [float("inf"), -float("inf")])
def test_an_infinite_sigma(sigma):
    with pytest.raises(ValueError, match="`sigma` must be a number"):
        Incline(sigma)


def test_a_float_of_numpy_is_a_sigma():
    assert Incline(np.float32(0.5)).sigma == 0.5
