"""`CCCausalLM` equals the NumPy reference of its formulas, for every option."""

import connected
import keras
import numpy as np
import pytest
import tiny
from backend_tools import gradients
from keras import ops
from reference import Options, Reference

from keras_cc import DFT, CCCausalLM, FusedConnection
from keras_cc.passes import runs

# Each option by itself, beside some that meet.
CASES = {
    "default": {},
    "mean": {"alignment": "mean"},
    "last": {"alignment": "last"},
    "answer": {"alignment": "answer"},
    "answer_constant_low_rank": {"alignment": "answer", "gate": 0.5, "transform": "low_rank"},
    "layer": {"gate": "layer"},
    "constant": {"gate": 0.3},
    "low_rank": {"transform": "low_rank"},
    "mlp": {"transform": "mlp"},
    "no_transform": {"transform": None},
    "plain": {"alignment_error": "plain"},
    "lambda": {"alignment_loss_weight": 0.25},
    "one_layer": {"layers": [1]},
    "every_token": {"sink_tokens": 0},
    "mean_two_sinks": {"alignment": "mean", "sink_tokens": 2},
    "align_without_pivot": {"without_pivot": "align"},
    "last_layer_mlp_plain": {
        "alignment": "last",
        "gate": "layer",
        "transform": "mlp",
        "alignment_error": "plain",
        "alignment_loss_weight": 3.0,
    },
    "mean_constant_low_rank": {"alignment": "mean", "gate": 1.0, "transform": "low_rank"},
    "last_constant_one_layer": {"alignment": "last", "gate": 0.5, "layers": [0]},
}


def connected_model(options, **switches):
    """A tiny Llama 3 with random gates and transforms, and its reference."""
    connection = FusedConnection(rank=3, **options, **switches)
    model = CCCausalLM(tiny.causal_lm("llama3"), connection)
    for number, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, 3 + number)
    layers = tuple(options.get("layers", (0, 1)))
    weights = {w.path: ops.convert_to_numpy(w) for w in model.weights}
    return model, Reference(weights, options=Options(**{**options, "layers": layers}))


def real_rows(logits, x):
    """Each row's real positions, as the reference has them."""
    logits = ops.convert_to_numpy(logits)
    return [row[mask == 1] for row, mask in zip(logits, x["padding_mask"], strict=True)]


def tensors(x):
    return {name: ops.convert_to_tensor(value) for name, value in x.items()}


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class TestForward:
    @pytest.mark.thorough("default", "last", "low_rank", "mean_constant_low_rank")
    @pytest.mark.parametrize("name", CASES)
    def test_one_connected_pass(self, name):
        model, reference = connected_model(CASES[name])
        x, y, sample_weight = tiny.batch()
        assert (x["pivot_padding_mask"][-1] == 0).all()  # a row without pivot is in it
        expected = reference.batch(x, y, sample_weight)
        # The weights do something: neither path is the stock model's, nor are they one.
        assert abs(expected["sft_loss"] - expected["monolingual_loss"]) > 1e-4

        inputs = tensors(x)
        outputs = model(inputs)
        for actual, wanted in zip(real_rows(outputs["logits"], x), expected["logits"], strict=True):
            close(actual, wanted)
        gate = ops.sum(outputs["gate"]) / ops.sum(outputs["gate_tokens"])
        close(ops.convert_to_numpy(gate), expected["mean_gate"])
        error = ops.sum(outputs["alignment_error"]) / ops.sum(outputs["alignment_tokens"])
        close(ops.convert_to_numpy(error), expected["alignment_loss"])
        loss = model.compute_loss(inputs, ops.convert_to_tensor(y), outputs, sample_weight)
        close(ops.convert_to_numpy(loss), expected["loss"])

        alone = model({name: inputs[name] for name in ("token_ids", "padding_mask")})
        assert set(alone) == {"logits"}
        rows = real_rows(alone["logits"], x)
        for actual, wanted in zip(rows, expected["monolingual_logits"], strict=True):
            close(actual, wanted)

    def test_an_answer_is_read_token_by_token(self):
        x, _, _ = tiny.batch()
        first = x["answer_mask"].argmax(axis=1)  # where the answer's first token is foretold
        found = {}
        for alignment in ("last", "answer"):
            model, _ = connected_model({"alignment": alignment})
            found[alignment] = connected.logits(model, x)
        # So far there is nothing to read, and behind it there is.
        for row, place in enumerate(first):
            close(found["answer"][row, place], found["last"][row, place])
        assert (
            np.abs(found["answer"][0, first[0] + 1] - found["last"][0, first[0] + 1]).max() > 1e-3
        )
        # Nothing is seen before it has been said.
        later = {**x, "token_ids": x["token_ids"].copy()}
        later["token_ids"][0, first[0] + 1] += 1
        changed = connected.logits(model, later)
        close(changed[0, : first[0] + 1], found["answer"][0, : first[0] + 1])
        assert np.abs(changed[0, first[0] + 1] - found["answer"][0, first[0] + 1]).max() > 1e-3

    def test_what_objectives_see_of_the_pivot_ends_with_its_prompt(self):
        x, _, _ = tiny.batch()
        found = {}
        for alignment in ("last", "answer"):
            connection = FusedConnection(alignment=alignment)
            model = CCCausalLM(tiny.causal_lm("llama3"), connection, [DFT()])
            site = ("hidden", 1)
            scope = runs.pivot(model, tensors(x), observed=[site])
            assert scope.states[site].shape[1] == x["pivot_token_ids"].shape[1]
            found[alignment] = real_rows(
                scope.states[site], {"padding_mask": x["pivot_padding_mask"]}
            )
        for one, other in zip(found["answer"], found["last"], strict=True):
            close(one, other)

    @pytest.mark.thorough("mean_constant_low_rank")
    @pytest.mark.parametrize("name", ["default", "last", "mean_constant_low_rank"])
    def test_evaluate(self, name):
        model, reference = connected_model(CASES[name])
        batch = tiny.batch(seed=5)
        expected = reference.batch(*batch)
        model.compile("sgd", run_eagerly=True)
        found = model.evaluate(batch, batch_size=3, verbose=0, return_dict=True)
        assert set(found) == {
            "loss",
            "sft_loss",
            "alignment_loss",
            "mean_gate",
            "token_accuracy",
            "connected_sft_loss",
        }
        close(found["loss"], expected["monolingual_loss"])
        close(found["sft_loss"], expected["monolingual_loss"])
        close(found["connected_sft_loss"], expected["sft_loss"])
        close(found["alignment_loss"], expected["alignment_loss"])
        close(found["mean_gate"], expected["mean_gate"])
        close(found["token_accuracy"], expected["token_accuracy"])

    def test_evaluate_over_uneven_batches_weighs_tokens_not_batches(self):
        model, reference = connected_model({})
        batch = tiny.batch(seed=6)
        model.compile("sgd")
        found = model.evaluate(batch, batch_size=2, verbose=0, return_dict=True)  # 2 rows, then 1
        expected = reference.batch(*batch)
        close(found["sft_loss"], expected["monolingual_loss"])
        close(found["connected_sft_loss"], expected["sft_loss"])
        close(found["alignment_loss"], expected["alignment_loss"])
        close(found["mean_gate"], expected["mean_gate"])

    def test_without_an_answer_mask_the_last_real_token_ends_the_prompt(self):
        model, reference = connected_model({"alignment": "last"})
        x, _, _ = tiny.batch()
        del x["answer_mask"]
        logits = real_rows(model(tensors(x))["logits"], x)
        for row in (0, 1):
            ids = x["token_ids"][row][x["padding_mask"][row] == 1]
            pivot_ids = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
            close(logits[row], reference.connected(ids, pivot_ids, len(ids) - 1)[0])

    def test_answer_positions_pick_their_logits(self):
        model, _ = connected_model({})
        x, _, _ = tiny.batch()
        every = ops.convert_to_numpy(model(tensors(x))["logits"])
        positions = np.array([[3, 4, 5], [2, 6, 2], [0, 8, 1]], "int32")
        picked = model(tensors({**x, "answer_positions": positions}))["logits"]
        close(ops.convert_to_numpy(picked), np.take_along_axis(every, positions[..., None], 1))


class TestGradients:
    @pytest.mark.thorough("mean")
    @pytest.mark.parametrize("name", ["mean", "last", "layer", "low_rank"])
    def test_of_the_whole_loss_against_finite_differences(self, name):
        """The formula's own gradient, through both streams: "full", and a plain error."""
        options = {**CASES[name], "alignment_error": "plain"}
        switches = {"pivot_gradient": True, "alignment_gradient": "full", "dropout": 0.0}
        model, reference = connected_model(options, **switches)
        x, y, sample_weight = tiny.batch()
        inputs, labels = tensors(x), ops.convert_to_tensor(y)
        variables = model.trainable_variables

        def loss():
            outputs = model(inputs, training=True)
            return model.compute_loss(inputs, labels, outputs, sample_weight)

        found = dict(zip((v.path for v in variables), gradients(loss, variables), strict=True))
        rng = np.random.default_rng(0)
        for group in ("decision_gate", "transform_matrix", "feedforward", "attention", "embedding"):
            direction = {
                path: rng.normal(size=value.shape) * (group in path)
                for path, value in reference.weights.items()
            }
            along = []
            for step in (1e-5, -1e-5):
                moved = {k: v + step * direction[k] for k, v in reference.weights.items()}
                along.append(
                    Reference(moved, options=reference.options).batch(x, y, sample_weight)["loss"]
                )
            expected = (along[0] - along[1]) / 2e-5
            actual = sum((found[path] * direction[path]).sum() for path in found)
            assert actual == pytest.approx(expected, rel=2e-4, abs=2e-5), group
            assert abs(expected) > 1e-4, group


class TestRefused:
    def test_another_number_of_pivots(self):
        model, _ = connected_model({})
        x, _, _ = tiny.batch()
        x["pivot_token_ids"] = x["pivot_token_ids"][:2]
        x["pivot_padding_mask"] = x["pivot_padding_mask"][:2]
        message = r"the same batch size.*Received: token_ids.shape=\(3, 9\), .*shape=\(2, 6\)"
        with pytest.raises(ValueError, match=message):
            model(tensors(x))

    def test_no_keras_causal_lm(self):
        with pytest.raises(
            TypeError, match=r"`causal_lm` must be a keras_hub.*Received: causal_lm="
        ):
            CCCausalLM(keras.layers.Dense(2))
