"""Objectives inside `fit` and `evaluate`: sums, turns, accumulation, scores, saving, leaving."""

import connected
import keras
import numpy as np
import pytest
import tiny
from backend_tools import gradients
from connected import QUICK, logits, monolingual
from keras import ops
from reference import Options, Reference

from keras_cc import DFT, CCCausalLM, Contrastive, FusedConnection, SelectedConnection

# Prompts and pivots of different lengths; rows 2 and 5 are English.
X, Y, WEIGHTS = tiny.batch(rows=6, prompt_lengths=(4, 3, 6, 5, 2, 4), length=10)
for _name in ("pivot_token_ids", "pivot_padding_mask"):
    X[_name][2] = 0
ROWS = (X, Y, WEIGHTS)
ENGLISH = [2, 5]
PAIRS = [0, 1, 3, 4]
RATE = 0.05


def take(rows, where):
    x, y, weights = rows
    return {name: value[where] for name, value in x.items()}, y[where], weights[where]


def make(objectives, connection=None, rate=RATE, family="llama3", accumulate=None, **options):
    if connection == "fused":
        connection = FusedConnection(dropout=0.0, initial_gate=0.5)
    model = CCCausalLM(tiny.causal_lm(family, **options), connection, objectives)
    connected.train_connection(model)
    optimizer = keras.optimizers.SGD(rate, gradient_accumulation_steps=accumulate)
    model.compile(optimizer, **QUICK)
    return model


def fit(model, rows=ROWS, batch_size=6, **options):
    x, y, weights = rows
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, **options}
    return model.fit(x, y, sample_weight=weights, **options).history


def evaluate(model, rows=ROWS, batch_size=6):
    x, y, weights = rows
    options = {"batch_size": batch_size, "verbose": 0, "return_dict": True}
    return model.evaluate(x, y, sample_weight=weights, **options)


# ---------------------------------------------------------------- the losses in NumPy


class Recording(Reference):
    """Keeps each block's output in the last forward pass: `hidden[block]`, (tokens, d)."""

    hidden = ()

    def norm(self, x, name):
        # What enters a norm that is first in the next block, or final, has left a block.
        if "self_attention_layernorm" in name or "sequence_output" in name:
            self.hidden = (*self.hidden, x)
        return super().norm(x, name)

    def forward(self, token_ids, replace):
        self.hidden = ()
        logits = super().forward(token_ids, replace)
        self.hidden = self.hidden[1:]  # without the embeddings
        return logits


def reference(model):
    options = Options() if model.connection else Options(transform=None)
    return Recording(connected.weights(model), model.num_blocks, options=options)


def prompts(model, rows=ROWS):
    """Of each pair: both prompts' states by block (without the first token), and pivot ids."""
    numpy_model, x = reference(model), rows[0]
    for row in range(len(rows[1])):
        pivot_ids = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
        if not len(pivot_ids):
            continue
        ids = x["token_ids"][row][x["padding_mask"][row] == 1]
        last = int(np.flatnonzero(x["answer_mask"][row])[0])
        numpy_model.stock(pivot_ids)
        pivot = [hidden[1:] for hidden in numpy_model.hidden]
        if model.connection is None:
            numpy_model.stock(ids)
        else:
            numpy_model.connected(ids, pivot_ids, last)
        yield [hidden[1 : last + 1] for hidden in numpy_model.hidden], pivot, pivot_ids[1:]


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def dft(model, rows=ROWS, bottom=0, middle=0):
    """The mean over pairs of DFT's feature form at the last prompt tokens."""
    found = []
    for target, pivot, _ in prompts(model, rows):
        first = cosine(pivot[bottom][-1], target[bottom][-1])
        found.append(2 - first - cosine(pivot[-1][-1], target[middle][-1]))
    return np.mean(found)


def contrastive(model, rows=ROWS, layer=0, temperature=0.1):
    """The mean over pairs of InfoNCE, of mean-pooled prompts."""
    target, pivot = zip(
        *((t[layer].mean(0), p[layer].mean(0)) for t, p, _ in prompts(model, rows)), strict=True
    )
    scores = np.array([[cosine(t, p) / temperature for p in pivot] for t in target])
    return np.mean(np.log(np.exp(scores).sum(axis=1)) - np.diag(scores))


def logit_form(model, rows=ROWS, bottom=0, middle=0):
    """The mean over pairs of DFT's logit form."""
    numpy_model = reference(model)
    head = numpy_model.weights["token_embedding/embeddings"].T

    def read(hidden):
        found = numpy_model.norm(hidden, "sequence_output_layernorm/scale") @ head
        return found - np.log(np.exp(found).sum())

    found = []
    for target, pivot, pivot_ids in prompts(model, rows):
        conversion = -read(target[bottom][-1])[pivot_ids].mean()
        thinking = -(np.exp(read(pivot[-1][-1])) * read(target[middle][-1])).sum()
        found.append(conversion + thinking)
    return np.mean(found)


CASES = {
    "dft": (DFT(weight=0.7), dft),
    "dft blocks": (DFT(bottom=-1, middle=1), lambda m, r=ROWS: dft(m, r, bottom=1, middle=1)),
    "dft logit": (DFT("logit", weight=0.3), logit_form),
    "contrastive": (Contrastive(alternating=False, weight=2.0), contrastive),
    "contrastive last block": (
        Contrastive(layer=1, temperature=0.5, alternating=False),
        lambda m, r=ROWS: contrastive(m, r, layer=1, temperature=0.5),
    ),
}


# ---------------------------------------------------------------- added up


ALONE_AND_BESIDE = [*((name, None) for name in CASES), ("dft", "fused"), ("contrastive", "fused")]


@pytest.mark.thorough("dft-None", "contrastive-fused")
@pytest.mark.parametrize("name, connection", ALONE_AND_BESIDE)
def test_the_loss_is_the_task_and_the_objective(name, connection):
    objective, by_hand = CASES[name]
    model = make(objective, connection)
    expected = by_hand(model)
    if connection is None:
        task = connected.sft_loss(logits(model, monolingual(X)), Y, WEIGHTS)
        others = set()
    else:
        task = reference(model).batch(*ROWS)["loss"]  # with its alignment error
        others = {"alignment_loss", "mean_gate"}
    found = {key: value[0] for key, value in fit(model).items()}
    np.testing.assert_allclose(found[f"{objective.name}_loss"], expected, rtol=2e-5)
    np.testing.assert_allclose(found["loss"], task + objective.weight * expected, rtol=2e-5)
    assert set(found) == {"loss", "sft_loss", "token_accuracy", f"{objective.name}_loss"} | others


@pytest.mark.thorough
def test_two_objectives_beside_the_selected_connection():
    objectives = [DFT(weight=0.5), Contrastive(weight=2.0, alternating=False)]
    model = make(objectives, SelectedConnection())
    found = {key: value[0] for key, value in fit(model).items()}
    expected = found["sft_loss"] + 0.5 * found["dft_loss"] + 2.0 * found["contrastive_loss"]
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    assert set(found) == {"loss", "sft_loss", "token_accuracy", "dft_loss", "contrastive_loss"}


@pytest.mark.thorough("0-1")
@pytest.mark.parametrize("bottom, middle", [(0, 1), (1, 0)])
def test_beside_the_selected_connection_the_states_are_those_of_its_pass(bottom, middle):
    references = pytest.importorskip("reference_selected", reason="PyTorch is not installed")

    class RecordingSelected(references.SelectedReference):
        def norm(self, x, path):
            if path == "sequence_output_layernorm/scale" or "_1/self_attention_l" in path:
                self.hidden.append(x.detach().numpy())
            return super().norm(x, path)

    model = make(DFT(bottom=bottom, middle=middle), SelectedConnection())
    selection = connected.to_numpy(model.connection_layers()["layer_selector"].kernel)
    numpy_model, found = RecordingSelected(connected.weights(model), selection), []
    for row in PAIRS:
        ids, pivot_ids, last = references.row_of(X, row)
        numpy_model.hidden = []
        numpy_model.connected(ids, pivot_ids, last)  # the pivot's pass, then the target's
        pivot, target = numpy_model.hidden[:2], numpy_model.hidden[2:]
        first = cosine(pivot[bottom][-1], target[bottom][last])
        found.append(2 - first - cosine(pivot[-1][-1], target[middle][last]))
    result = evaluate(model)  # no noise there
    np.testing.assert_allclose(result["dft_loss"], np.mean(found), rtol=2e-5)


# ---------------------------------------------------------------- rows that have no pivot


def silent(rows):
    """Rows whose answers weigh nothing: what is left of the loss is the objective."""
    return rows[0], rows[1], np.zeros_like(rows[2])


@pytest.mark.thorough("objective0")
@pytest.mark.parametrize("objective", [DFT(), DFT("logit"), Contrastive(alternating=False)])
def test_english_rows_contribute_nothing(objective):
    found = []
    for rows in (ROWS, take(ROWS, PAIRS)):
        model = make(objective)
        history = fit(model, silent(rows), batch_size=len(rows[1]))
        found.append((history, connected.weights(model)))
    (history, weights), (expected_history, expected) = found
    np.testing.assert_allclose(history["loss"], expected_history["loss"], rtol=1e-6)
    connected.assert_weights_equal(weights, expected, atol=1e-6)
    assert history["sft_loss"] == [0.0] and history["loss"][0] > 0.1


@pytest.mark.thorough
def test_english_rows_alone_are_fine_tuned_plainly():
    english = take(ROWS, ENGLISH)
    plain, model = make(()), make([DFT(), Contrastive(alternating=False)])
    expected, found = fit(plain, english, 2), fit(model, english, 2)
    connected.assert_weights_equal(connected.weights(model), connected.weights(plain), atol=1e-6)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    assert found["dft_loss"] == found["contrastive_loss"] == [0.0]


# ---------------------------------------------------------------- turns


def assign(model, weights):
    for variable in model.weights:
        if variable.path in weights:
            variable.assign(weights[variable.path])


class ByHand:
    """Steps of the task alone and of the objective alone, by models that do not alternate."""

    def __init__(self, connection, weight):
        objective = DFT(weight=weight)
        self.task = make((), connection)
        if connection is not None:
            connection = FusedConnection(dropout=0.0, alignment_loss_weight=0.0)
        self.objective = make(objective, connection)

    def step(self, weights, turn, rows):
        model = (self.task, self.objective)[turn]
        assign(model, weights)
        fit(model, silent(rows) if turn else rows, batch_size=len(rows[1]))
        return connected.weights(model)


@pytest.mark.thorough
@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("connection", [None, "fused"])
def test_steps_take_turns_across_epochs_and_fits(connection, fits):
    """Three batches an epoch: turns 0 1 0, then 1 0 1."""
    model = make(DFT(weight=3.0, alternating=True), connection)
    weights = connected.weights(model)
    for _ in range(fits):
        fit(model, batch_size=2, epochs=2 // fits)
    by_hand = ByHand(connection, 3.0)
    for step in range(6):
        before, place = weights, 2 * (step % 3)
        weights = by_hand.step(weights, step % 2, take(ROWS, slice(place, place + 2)))
        assert connected.moved(before, weights)
    connected.assert_weights_equal(connected.weights(model), weights, atol=2e-6)


@pytest.mark.thorough
def test_a_turn_is_the_gradient_of_the_objective():
    model = make(Contrastive(weight=0.5))  # alternates by default
    fit(model)  # the task's step
    before = connected.weights(model)
    x = {name: ops.convert_to_tensor(value) for name, value in X.items()}

    def loss():
        outputs = model(x, training=True)
        return 0.5 * ops.sum(outputs["contrastive_loss"]) / ops.sum(outputs["contrastive_count"])

    variables = model.trainable_variables
    found = gradients(loss, variables)
    fit(model)  # the objective's
    after, moved = connected.weights(model), 0
    for variable, gradient in zip(variables, found, strict=True):
        expected = before[variable.path] - RATE * gradient
        np.testing.assert_allclose(after[variable.path], expected, atol=1e-6)
        moved += np.abs(gradient).max() > 1e-3
    assert 5 < moved < len(variables)  # the last block and the final norm have no part in it
    final_norm = "sequence_output_layernorm/scale"
    np.testing.assert_array_equal(after[final_norm], before[final_norm])


def test_what_does_not_alternate_stays_with_the_task():
    objectives = [DFT(weight=0.5), Contrastive(weight=2.0)]
    model = make(objectives)
    history = fit(model, epochs=4)  # one step each
    for epoch in range(4):
        sft, first, second = (history[f"{n}_loss"][epoch] for n in ("sft", "dft", "contrastive"))
        expected = 2.0 * second if epoch % 2 else sft + 0.5 * first
        np.testing.assert_allclose(history["loss"][epoch], expected, rtol=1e-5)
    np.testing.assert_allclose(history["contrastive_loss"][0], contrastive(make(())), rtol=2e-5)


# ---------------------------------------------------------------- gradient accumulation

UNEVEN = take(ROWS, [0, 1, 3, 4, 2, 5])  # micro-batches of three pairs and of one


@pytest.mark.thorough
@pytest.mark.parametrize(
    "objective, connection, epochs",
    [
        (DFT(weight=2.0), None, 1),
        (DFT("logit"), "fused", 1),
        # An epoch is one optimizer step: the second one is the objective's.
        (DFT(weight=2.0, alternating=True), None, 2),
        (DFT(weight=2.0, alternating=True), "fused", 2),
    ],
)
def test_uneven_micro_batches_are_one_batch(objective, connection, epochs):
    found = []
    for micro_batches in (1, 2):
        steps = micro_batches if micro_batches > 1 else None
        model = make(objective, connection, rate=0.02, accumulate=steps)
        before = connected.weights(model)
        fit(model, UNEVEN, batch_size=6 // micro_batches, epochs=epochs)
        found.append(connected.weights(model))
        assert len(connected.moved(before, found[-1])) > 10
    connected.assert_weights_equal(*found, atol=2e-6)
    # The objective has a part in it.
    plain = make((), connection, rate=0.02)
    fit(plain, UNEVEN, epochs=epochs)
    plain = connected.weights(plain)
    assert max(np.abs(found[0][path] - plain[path]).max() for path in plain) > 1e-3


@pytest.mark.thorough
def test_turns_change_with_the_optimizers_steps():
    """Groups of two micro-batches, three a pass: turns 0 0 1 | 1 0 0 | 1 1."""
    model = make(DFT(weight=3.0, alternating=True), accumulate=2)
    weights = connected.weights(model)
    fit(model, batch_size=2, epochs=2)
    by_hand = ByHand(None, 3.0)
    for step, rows in enumerate(([0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5])):
        weights = by_hand.step(weights, step % 2, take(ROWS, rows))
    connected.assert_weights_equal(connected.weights(model), weights, atol=2e-6)


# ---------------------------------------------------------------- scores


@pytest.mark.thorough("fused")
@pytest.mark.parametrize("connection", [None, "fused"])
def test_evaluation_is_of_the_task_and_reports_the_objectives(connection):
    model = make([DFT(weight=0.7), Contrastive()], connection)
    result = evaluate(model)
    task = connected.sft_loss(logits(model, monolingual(X)), Y, WEIGHTS)
    for name, expected in (
        ("sft_loss", task),
        ("loss", task),
        ("dft_loss", dft(model)),
        ("contrastive_loss", contrastive(model)),
    ):
        np.testing.assert_allclose(result[name], expected, rtol=2e-5, err_msg=name)
    beside = {"connected_sft_loss", "alignment_loss", "mean_gate"} if connection else set()
    names = {"loss", "sft_loss", "token_accuracy", "dft_loss", "contrastive_loss"}
    assert set(result) == names | beside
    # In batches, a mean over pairs: three, one, and English rows without any.
    batched = evaluate(model, UNEVEN, batch_size=3)["dft_loss"]
    np.testing.assert_allclose(batched, result["dft_loss"], rtol=1e-5)


def test_validation_is_of_the_task_and_reports_the_objectives():
    model = make(DFT(alternating=True))
    history = fit(model, epochs=2, validation_data=ROWS)
    assert history["val_loss"] == pytest.approx(history["val_sft_loss"], rel=1e-6)
    result = evaluate(model)
    assert history["val_dft_loss"][-1] == pytest.approx(result["dft_loss"], rel=1e-6)
    np.testing.assert_allclose(result["dft_loss"], dft(model), rtol=2e-5)


def test_inference_runs_the_target_alone():
    model = make(DFT())
    found = connected.outputs(model, X)
    assert set(found) == {"logits"}
    np.testing.assert_allclose(found["logits"], logits(make(()), monolingual(X)), atol=1e-6)


# ---------------------------------------------------------------- the logit lens


@pytest.mark.thorough("llama3")
@pytest.mark.parametrize("family", ["llama", "llama3"])  # a head of its own, and a tied one
def test_the_logit_form_trains_neither_head_nor_final_norm(family):
    model = make(DFT("logit"), family=family)
    before = connected.weights(model)
    fit(model, silent(ROWS))
    after = connected.weights(model)
    moved = connected.moved(before, after)
    table = "token_embedding/embeddings"
    assert moved and all(path == table or "transformer_layer_0" in path for path in moved)
    # Of the embeddings those that were read, not all those that the head holds.
    pivots, targets = X["pivot_token_ids"][PAIRS], X["token_ids"][PAIRS]
    read = np.unique(targets[X["padding_mask"][PAIRS] == 1])
    rows = np.flatnonzero((before[table] != after[table]).any(axis=1))
    assert set(rows) <= set(read) and len(np.setdiff1d(np.unique(pivots), read)) > 3
    # The task trains them.
    fit(model)
    final = connected.moved(after, connected.weights(model))
    assert "sequence_output_layernorm/scale" in final
    assert ("token_embedding/reverse_embeddings" in final) == (family == "llama")


# ---------------------------------------------------------------- refused


def tapped(causal_lm):
    return [layer.name for layer in causal_lm.backbone._flatten_layers() if "call" in vars(layer)]


@pytest.mark.parametrize("connection", [None, "fused", "selected"])
@pytest.mark.parametrize(
    "objective, message",
    [
        (DFT(bottom=2), r"`bottom` must be a block number from 0 to 1 .*Received: bottom=2"),
        (DFT(middle=-3), r"`middle` must be .* this model of 2 blocks. Received: middle=-3"),
        (["dft", Contrastive(layer=7)], r"`layer` must be a block number.*Received: layer=7"),
    ],
)
def test_a_layer_outside_the_model_is_refused_and_nothing_has_changed(
    objective, message, connection
):
    causal_lm = tiny.causal_lm()
    paths = [v.path for v in causal_lm.weights]
    with pytest.raises(ValueError, match=message):
        CCCausalLM(causal_lm, connection, objective)
    assert tapped(causal_lm) == [] and [v.path for v in causal_lm.weights] == paths
    model = CCCausalLM(causal_lm, connection)  # as if nothing had been tried
    assert (tapped(causal_lm) == []) == (connection != "selected") and model.objectives == ()


def test_contrastive_needs_two_rows_a_batch():
    model = make(Contrastive(), accumulate=2)
    before = connected.weights(model)
    message = r"at least 2 rows.*Raise `batch_size`, or leave the objective out. Received: "
    with pytest.raises(ValueError, match=message):
        fit(model, batch_size=1)
    connected.assert_weights_equal(connected.weights(model), before, atol=0)
    assert np.isfinite(fit(model, batch_size=2)["loss"]).all()


def test_a_short_batch_at_the_end_is_fine():
    rows = take(ROWS, [0, 1, 3])
    model = make(Contrastive(alternating=False), rate=0.0)
    found = {key: value[0] for key, value in fit(model, rows, batch_size=2).items()}
    expected = contrastive(model, take(ROWS, [0, 1]))  # the last row has no negatives
    np.testing.assert_allclose(found["contrastive_loss"], expected, rtol=2e-5)


# ---------------------------------------------------------------- saving and leaving


def configs(model):
    return [(type(o), o.get_config()) for o in model.objectives]


@pytest.mark.thorough("fused")
@pytest.mark.parametrize("connection", [None, "fused"])
def test_a_keras_file_keeps_the_objectives(connection, tmp_path):
    model = make([DFT(bottom=1, weight=0.25), Contrastive(temperature=0.3)], connection)
    fit(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert configs(loaded) == configs(model)
    result = evaluate(model)
    for name, value in evaluate(loaded).items():
        np.testing.assert_allclose(value, result[name], rtol=1e-5, err_msg=name)
    model.compile(keras.optimizers.SGD(RATE), **QUICK)
    loaded.compile(keras.optimizers.SGD(RATE), **QUICK)
    for one in (model, loaded):
        fit(one, epochs=2)
    connected.assert_weights_equal(connected.weights(loaded), connected.weights(model), atol=1e-6)


@pytest.mark.thorough("fused-merge")
@pytest.mark.parametrize("leave", ["merge", "disconnect"])
@pytest.mark.parametrize("connection", [None, "fused"])
def test_leaving_leaves_a_plain_fine_tuner(connection, leave):
    model = make([DFT(), Contrastive()], connection)
    fit(model, epochs=2)
    assert tapped(model.causal_lm)
    stock = getattr(model, leave)()
    assert tapped(stock) == [] and model.objectives == () and model.connection is None
    expected = connected.sft_loss(logits(stock, monolingual(X)), Y, WEIGHTS)
    names = {"loss", "sft_loss", "token_accuracy"}
    result = evaluate(model)
    assert set(result) == names
    history = fit(model)
    assert set(history) == names
    for name in ("loss", "sft_loss"):
        np.testing.assert_allclose(result[name], expected, rtol=1e-5)
        np.testing.assert_allclose(history[name], [expected], rtol=1e-5)
