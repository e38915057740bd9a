"""`SelfDistillation`: its teachers and its loss against NumPy, and where its gradient goes."""

import connected
import keras
import numpy as np
import pytest
import tiny
from backend_tools import gradients
from connected import QUICK
from keras import ops
from reference import Options, Reference

from keras_cc import CCCausalLM, FusedConnection, SelfDistillation

# Prompts, answers and pivots of different lengths; rows 2 and 5 are English.
X, Y, WEIGHTS = tiny.batch(rows=6, prompt_lengths=(4, 3, 6, 5, 2, 4), length=10)
for _name in ("pivot_token_ids", "pivot_padding_mask"):
    X[_name][2] = 0
X["token_ids"][:, 0] = 2  # both begin with a start token, but for one pivot
X["pivot_token_ids"][[0, 3, 4], 0] = 2
PAIRS = [0, 1, 3, 4]
RATE = 0.05
TEACHERS = [("connected", "fused"), ("in_context", "fused"), ("pivot", "fused"),
            ("in_context", None), ("pivot", None)]  # fmt: skip


def make(objective, connection=None, rate=RATE, accumulate=None):
    if connection == "fused":
        connection = FusedConnection(dropout=0.5, initial_gate=0.5)
    model = CCCausalLM(tiny.causal_lm("llama3"), connection, objective)
    connected.train_connection(model)
    model.compile(keras.optimizers.SGD(rate, gradient_accumulation_steps=accumulate), **QUICK)
    return model


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_row(model, teacher):
    """`(row, answer positions, the teacher's and the student's logits there)` of each pair."""
    has_transform = model.connection is not None
    options = Options() if has_transform else Options(transform=None)
    numpy_model = Reference(connected.weights(model), model.num_blocks, options=options)
    for row in PAIRS:
        ids = X["token_ids"][row][X["padding_mask"][row] == 1]
        pivot = X["pivot_token_ids"][row][X["pivot_padding_mask"][row] == 1]
        where = np.flatnonzero(X["answer_mask"][row])
        if teacher == "connected":
            taught = numpy_model.connected(ids, pivot, where[0])[0][where]
        elif teacher == "pivot":
            answer = ids[where[0] + 1 :]
            taught = numpy_model.stock([*pivot, *answer])[len(pivot) - 1 :][: len(where)]
        else:
            rest = ids[1:] if pivot[0] == ids[0] else ids
            read = numpy_model.stock([*pivot, *rest])
            taught = read[where + len(pivot) + len(rest) - len(ids)]
        yield row, where, taught, numpy_model.monolingual(ids)[where]


def expected_loss(model, teacher, divergence, temperature):
    total = tokens = 0.0
    for _, where, taught, own in by_row(model, teacher):
        q, p = log_softmax(taught / temperature), log_softmax(own / temperature)
        of, by = (q, p) if divergence == "forward" else (p, q)
        total += temperature**2 * (np.exp(of) * (of - by)).sum()
        tokens += len(where)
    return total / tokens


def fit(model, rows=(X, Y, WEIGHTS), batch_size=6, **options):
    x, y, weights = rows
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, **options}
    return model.fit(x, y, sample_weight=weights, **options).history


@pytest.mark.parametrize("teacher, connection", TEACHERS)
@pytest.mark.parametrize("divergence, temperature", [("forward", 1.0), ("reverse", 2.0)])
def test_the_loss_is_the_divergence_from_the_teacher(teacher, connection, divergence, temperature):
    objective = SelfDistillation(teacher, divergence, temperature, weight=0.7)
    model = make(objective, connection)
    expected = expected_loss(model, teacher, divergence, temperature)
    evaluated = model.evaluate(X, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True)
    found = fit(model)
    assert found["self_distillation_loss"][0] == pytest.approx(expected, rel=2e-4)
    assert evaluated["self_distillation_loss"] == pytest.approx(expected, rel=2e-4)
    assert expected > 0.01
    rest = found["sft_loss"][0] + found.get("alignment_loss", [0.0])[0]
    assert found["loss"][0] == pytest.approx(rest + 0.7 * expected, rel=2e-4)


@pytest.mark.thorough("connected-fused")
@pytest.mark.parametrize("teacher, connection", TEACHERS)
def test_the_gradient_is_that_of_the_student_alone(teacher, connection):
    model = make(SelfDistillation(teacher), connection)
    taught = {row: log_softmax(logits) for row, _, logits, _ in by_row(model, teacher)}
    x = {name: ops.convert_to_tensor(value) for name, value in X.items()}

    def loss():
        outputs = model(x, training=True)
        return ops.sum(outputs["self_distillation_loss"])

    def by_hand():
        own = model({name: x[name] for name in ("token_ids", "padding_mask")}, training=True)
        total = 0.0
        for row, log_q in taught.items():
            where = np.flatnonzero(X["answer_mask"][row])
            log_p = ops.log_softmax(own["logits"][row][where[0] : where[-1] + 1])
            q = ops.convert_to_tensor(np.exp(log_q).astype("float32"))
            total = total - ops.sum(q * log_p)
        return total

    variables = model.trainable_variables
    found, expected = gradients(loss, variables), gradients(by_hand, variables)
    for variable, one, other in zip(variables, found, expected, strict=True):
        if "decision_gate" in variable.path:
            assert one is None or not np.any(one), variable.path
        else:
            np.testing.assert_allclose(one, other, atol=2e-5, err_msg=variable.path)
            assert np.abs(one).max() > 1e-5, variable.path


@pytest.mark.thorough("in_context-answer")
@pytest.mark.parametrize("alignment", ["attention", "answer"])
@pytest.mark.parametrize("teacher", ["connected", "in_context", "pivot"])
def test_batches_of_other_widths(teacher, alignment):
    """TensorFlow traces the step for any width from the second one on: none is known then."""
    connection = FusedConnection(alignment=alignment, dropout=0.0)
    model = CCCausalLM(tiny.causal_lm("llama3"), connection, SelfDistillation(teacher))
    connected.train_connection(model)
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    losses = []
    for more in (0, 1, 3):
        x = {
            name: np.pad(value, [(0, 0), (0, more)]) if value.ndim == 2 else value
            for name, value in X.items()
        }
        y, weights = (np.pad(value, [(0, 0), (0, more)]) for value in (Y, WEIGHTS))
        losses.append(fit(model, (x, y, weights))["self_distillation_loss"][0])
        scores = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
        losses.append(scores["self_distillation_loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.mark.thorough
def test_accumulated_micro_batches_are_the_whole_batch():
    order = [0, 1, 3, 4, 2, 5]  # three pairs, then one
    rows = ({name: value[order] for name, value in X.items()}, Y[order], WEIGHTS[order])
    found = []
    for accumulate in (None, 2):
        model = make(SelfDistillation("pivot", weight=2.0), None, accumulate=accumulate)
        fit(model, rows, batch_size=6 if accumulate is None else 3)
        found.append(connected.weights(model))
    connected.assert_weights_equal(*found, atol=2e-6)


def test_english_rows_alone_count_nothing():
    english = [2, 5]
    rows = ({name: value[english] for name, value in X.items()}, Y[english], WEIGHTS[english])
    assert fit(make(SelfDistillation("pivot")), rows)["self_distillation_loss"] == [0.0]


def test_a_teacher_that_reads_a_connection_needs_one():
    causal_lm = tiny.causal_lm("llama3")
    with pytest.raises(ValueError, match="`teacher` can be 'connected' for a model with a conn"):
        CCCausalLM(causal_lm, None, SelfDistillation())
    CCCausalLM(causal_lm, "selected", "self_distillation")


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "english"}, "`teacher` must be one of"),
        ({"divergence": "kl"}, "`divergence` must be one of"),
        ({"temperature": 0}, "`temperature` must be a number > 0"),
        ({"weight": -1}, "`weight` must be a number >= 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SelfDistillation(**options)


@pytest.mark.once
def test_options_are_kept():
    objective = SelfDistillation("pivot", "reverse", 2.0, weight=0.5, alternating=True)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(objective))
    assert again.get_config() == objective.get_config()
    assert objective.get_config()["temperature"] == 2.0
