"""`CCFeedForward` in the two passes, against the formulas of its docstring in NumPy."""

import itertools

import keras
import numpy as np
import pytest
from backend_tools import gradients, outputs_after_reload
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from keras.src import testing

from keras_cc.layers import CCFeedForward, DecisionGate, TransformMatrix
from keras_cc.passes import pairing

ROWS, PIVOT, LENGTH, INNER, DIM = 3, 4, 6, 5, 3
PIVOT_LENGTHS, LENGTHS, PROMPTS = [4, 2, 0], [6, 4, 5], [3, 2, 5]  # the last row: no pivot


def serialised(layer):
    return keras.saving.serialize_keras_object(layer)


def filled(seed=0, **options):
    layer = CCFeedForward(keras.layers.Dense(DIM, use_bias=False, name="dense"), rank=2, **options)
    layer.build((None, None, INNER))
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.normal(0, 0.5, variable.shape).astype("float32"))
    return layer


def streams(seed=0):
    rng = np.random.default_rng(seed)
    pivot = rng.normal(size=(ROWS, PIVOT, INNER)).astype("float32")
    return pivot, rng.normal(size=(ROWS, LENGTH, INNER)).astype("float32")


def mask(lengths, width):
    return np.arange(width)[None] < np.asarray(lengths)[:, None]


def connect(layer, pivot, target, through_transform=None):
    """The two passes: the output, and the scope with what the layer left in it."""
    target_mask = mask(LENGTHS, LENGTH)
    has_pivot = np.asarray(PIVOT_LENGTHS)[:, None] > 0
    fused = target_mask
    if layer.alignment == "last":
        fused = np.arange(LENGTH)[None] == np.asarray(PROMPTS)[:, None] - 1
    with pairing.enter(pairing.PivotPass(ops.convert_to_tensor(mask(PIVOT_LENGTHS, PIVOT)))) as p:
        pivot_output = layer(pivot)
    scope = pairing.TargetPass(
        pivot=p,
        mask=ops.convert_to_tensor(target_mask & has_pivot),
        fused=ops.convert_to_tensor(fused & has_pivot),
    )
    if through_transform is not None:
        scope.through_transform = ops.convert_to_tensor(np.asarray(through_transform)[:, None])
    with pairing.enter(scope):
        output = layer(target)
    assert pairing.current() is None
    return output, scope, pivot_output


def numpy(value):
    return ops.convert_to_numpy(value)


def weights(layer):
    return {"/".join(w.path.split("/")[-2:]): numpy(w).astype("float64") for w in layer.weights}


def transformed(layer, f):
    """`T` of one token."""
    w = weights(layer)
    if layer.transform is None:
        return f
    if layer.transform == "linear":
        return f + f @ w["transform_matrix/delta"] / np.sqrt(f.shape[-1])
    return f + f @ w["transform_matrix/down"] @ w["transform_matrix/up"]


def reference(layer, pivot, target):
    """Row by row on real tokens: outputs (by row), alignment errors and gates (their sums)."""
    w = weights(layer)
    outputs, errors, gates = [], np.zeros(ROWS), np.zeros(ROWS)
    for row, (p_length, length) in enumerate(zip(PIVOT_LENGTHS, LENGTHS, strict=True)):
        p = pivot[row, :p_length].astype("float64") @ w["dense/kernel"]
        f = target[row, :length].astype("float64") @ w["dense/kernel"]
        fused = f.copy()
        positions = [PROMPTS[row] - 1] if layer.alignment == "last" else range(length)
        for t in positions if p_length else []:
            if layer.alignment == "attention":
                exponentials = np.exp(p @ f[t] / np.sqrt(DIM))
                a = exponentials @ p / exponentials.sum()
            else:
                a = p.mean(0) if layer.alignment == "mean" else p[-1]
            if isinstance(layer.gate, str):
                logit = (a - f[t]) @ w["decision_gate/kernel"] + w["decision_gate/bias"]
                alpha = 1 / (1 + np.exp(-logit))
            else:
                alpha = np.full(1, layer.gate)
            gates[row] += alpha.mean()
            fused[t] = alpha * a + (1 - alpha) * f[t]
        for t in range(length if p_length else 0):
            error = ((transformed(layer, f[t]) - fused[t]) ** 2).sum()
            if layer.alignment_error == "relative":
                error /= (fused[t] ** 2).sum() + 1e-6
            errors[row] += error
        outputs.append(fused)
    return outputs, errors, gates


@pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed:UserWarning")  # its own fit
@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")  # the gate: no pair there
class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        for options, weights in (
            ({}, 5),
            ({"gate": "layer", "transform": "mlp", "rank": 2, "alignment": "last"}, 6),
            ({"gate": 0.25, "transform": None, "alignment": "mean", "pivot_gradient": True}, 2),
        ):
            self.run_layer_test(
                CCFeedForward,
                # As a dict, so that each instance of the test has its own.
                init_kwargs={"inner": serialised(keras.layers.Dense(DIM)), **options},
                input_shape=(ROWS, LENGTH, INNER),
                expected_output_shape=(ROWS, LENGTH, DIM),
                expected_num_trainable_weights=weights,
                expected_num_non_trainable_weights=0,
                expected_num_seed_generators=0,
                expected_num_losses=0,
                supports_masking=False,
            )


class TestConfig:
    def test_holds_every_option(self):
        options = {
            "alignment": "last",
            "gate": 0.25,
            "initial_gate": 0.2,
            "transform": "low_rank",
            "rank": 3,
            "pivot_gradient": True,
            "alignment_gradient": "full",
            "alignment_error": "plain",
        }
        layer = CCFeedForward(keras.layers.Dense(DIM), **options)
        config = CCFeedForward.from_config(layer.get_config()).get_config()
        assert {name: config[name] for name in options} == options


class TestAlone:
    @pytest.mark.parametrize("transform", ["linear", "low_rank", None])
    def test_gives_the_transform(self, transform):
        layer = filled(transform=transform)
        _, target = streams()
        expected = transformed(layer, target @ weights(layer)["dense/kernel"])
        np.testing.assert_allclose(numpy(layer(target)), expected, rtol=1e-4, atol=1e-5)

    def test_is_the_inner_layer_at_the_start(self):
        inner = keras.layers.Dense(DIM)
        _, target = streams()
        for transform in ("linear", "low_rank", "mlp", None):
            layer = CCFeedForward(inner, transform=transform)
            np.testing.assert_array_equal(numpy(layer(target)), numpy(inner(target)))

    def test_leaves_a_built_inner_layer_as_it_is(self):
        inner = keras.layers.Dense(DIM)
        inner.build((None, None, INNER))
        kernel = numpy(inner.kernel)
        layer = CCFeedForward(inner)
        layer.build((None, None, INNER))
        assert layer.inner is inner
        np.testing.assert_array_equal(numpy(inner.kernel), kernel)

    def test_gate_and_transform_do_not_inherit_the_type_of_the_inner_layer(self):
        layer = CCFeedForward(keras.layers.Dense(DIM, dtype="bfloat16"), dtype="mixed_bfloat16")
        output = layer(streams()[1])
        assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
        own = layer.decision_gate.weights + layer.transform_matrix.weights
        assert {w.dtype for w in own} == {"float32"}
        assert {w.dtype for w in layer.inner.weights} == {"bfloat16"}


class TestConnected:
    @pytest.mark.parametrize(
        ("alignment", "gate", "transform", "error"),
        [
            *itertools.product(
                ["attention", "mean", "last"], ["dimension", "layer", 0.3], ["linear"], ["relative"]
            ),
            ("attention", "dimension", "low_rank", "plain"),
            ("mean", "layer", "linear", "plain"),
        ],
    )
    def test_against_numpy(self, alignment, gate, transform, error):
        layer = filled(alignment=alignment, gate=gate, transform=transform, alignment_error=error)
        pivot, target = streams()
        output, scope, pivot_output = connect(layer, pivot, target)
        expected, errors, gates = reference(layer, pivot, target)
        output = numpy(output)
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(output[row, :length], expected[row], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numpy(scope.alignment_errors[0]), errors, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numpy(scope.gate_sums[0]), gates, rtol=1e-4, atol=1e-5)
        # The pivot's own pass is the model as it is, without transform.
        own = pivot @ weights(layer)["dense/kernel"]
        np.testing.assert_allclose(numpy(pivot_output), own, rtol=1e-4, atol=1e-5)

    def test_without_transform_there_is_no_error(self):
        _, scope, _ = connect(filled(transform=None), *streams())
        assert scope.alignment_errors == [] and len(scope.gate_sums) == 1

    def test_rows_without_pivot_and_padding_get_the_untransformed_projection(self):
        layer = filled()
        pivot, target = streams()
        output, scope, _ = connect(layer, pivot, target)
        own = numpy(layer.inner(target))
        np.testing.assert_allclose(numpy(output)[2], own[2], rtol=1e-6)
        for row, length in enumerate(LENGTHS):
            np.testing.assert_allclose(numpy(output)[row, length:], own[row, length:], rtol=1e-6)
        assert numpy(scope.alignment_errors[0])[2] == 0 and numpy(scope.gate_sums[0])[2] == 0

    def test_connection_dropout_sends_rows_through_the_transform(self):
        layer = filled()
        pivot, target = streams()
        fused, errors, gates = reference(layer, pivot, target)
        output, scope, _ = connect(layer, pivot, target, [True, False, False])
        np.testing.assert_allclose(
            numpy(output)[0],
            transformed(layer, target[0] @ weights(layer)["dense/kernel"]),
            rtol=1e-4,
            atol=1e-5,
        )
        np.testing.assert_allclose(numpy(output)[1, :4], fused[1], rtol=1e-4, atol=1e-5)
        # The alignment error is learnt from all pivot rows alike.
        np.testing.assert_allclose(numpy(scope.alignment_errors[0]), errors, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numpy(scope.gate_sums[0]), gates, rtol=1e-4, atol=1e-5)

    @pytest.mark.thorough("attention")
    @pytest.mark.parametrize("alignment", ["attention", "mean", "last"])
    @settings(max_examples=8, deadline=None)
    @given(seed=st.integers(0, 1000))
    def test_padded_activations_change_nothing(self, alignment, seed):
        layer = filled(alignment=alignment)
        pivot, target = streams(seed)
        noise = [100 * value for value in streams(seed + 1)]
        masks = mask(PIVOT_LENGTHS, PIVOT)[..., None], mask(LENGTHS, LENGTH)[..., None]
        changed = [
            np.where(m, value, n) for m, value, n in zip(masks, (pivot, target), noise, strict=True)
        ]
        output, scope, _ = connect(layer, pivot, target)
        other, other_scope, _ = connect(layer, *changed)
        np.testing.assert_allclose(
            numpy(other)[masks[1][..., 0]], numpy(output)[masks[1][..., 0]], rtol=1e-5, atol=1e-6
        )
        for name in ("alignment_errors", "gate_sums"):
            np.testing.assert_allclose(
                numpy(getattr(other_scope, name)[0]),
                numpy(getattr(scope, name)[0]),
                rtol=1e-5,
                atol=1e-6,
            )

    @pytest.mark.parametrize("alignment", ["attention", "mean", "last"])
    def test_a_row_without_pivot_has_finite_gradients(self, alignment):
        layer = filled(alignment=alignment, pivot_gradient=True, alignment_gradient="full")
        pivot, target = (keras.Variable(value) for value in streams())

        def loss():
            output, scope, _ = connect(layer, pivot, target)
            return ops.sum(ops.square(output)) + ops.sum(scope.alignment_errors[0])

        found = gradients(loss, [pivot, target, *layer.trainable_variables])
        assert all(np.isfinite(g).all() for g in found)
        assert np.abs(found[0][:2]).max() > 0
        np.testing.assert_array_equal(found[0][2], 0)

    def test_the_pivots_activations_are_taken_as_constants_by_default(self):
        pivot, target = (keras.Variable(value) for value in streams())
        for pivot_gradient in (False, True):
            layer = filled(pivot_gradient=pivot_gradient)
            (found,) = gradients(
                lambda layer=layer: ops.sum(connect(layer, pivot, target)[0]), [pivot]
            )
            assert (np.abs(found).max() > 0) == pivot_gradient


class TestSaving:
    @pytest.mark.large
    def test_a_saved_model_gives_equal_outputs_in_another_process(self, tmp_path):
        inputs = keras.Input((LENGTH, INNER), name="inputs")
        outputs = {"gate": DecisionGate("layer")(inputs, inputs[:, :1])}
        for kind in ("linear", "low_rank", "mlp"):
            outputs[kind] = TransformMatrix(kind, rank=2)(inputs)
            outputs[f"ffn_{kind}"] = CCFeedForward(
                keras.layers.Dense(DIM), transform=kind, rank=2, gate="layer"
            )(inputs)
        outputs["ffn_none"] = CCFeedForward(keras.layers.Dense(DIM), transform=None)(inputs)
        model = keras.Model({"inputs": inputs}, outputs)
        rng = np.random.default_rng(0)
        for variable in model.weights:
            variable.assign(rng.normal(size=variable.shape))
        data = {"inputs": streams()[1]}
        expected = model.predict(data, verbose=0)
        found = outputs_after_reload(model, data, tmp_path)
        assert set(found) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


class TestRefused:
    @pytest.mark.parametrize("inner", [None, 8, "dense", np.ones(3)])
    def test_inner(self, inner):
        with pytest.raises(TypeError, match=r"`inner` must be a Keras layer\. Received: inner="):
            CCFeedForward(inner)

    @pytest.mark.parametrize(
        ("name", "values", "wrong"),
        [
            ("alignment", "'attention', 'mean', 'last', 'answer'", ["max", None]),
            ("transform", "'linear', 'low_rank', 'mlp', None", ["full", 1]),
            ("alignment_gradient", "'transform', 'stream', 'full'", ["none", True]),
            ("alignment_error", "'relative', 'plain'", ["absolute", None]),
            ("pivot_gradient", "True, False", ["yes", None]),
        ],
    )
    def test_options(self, name, values, wrong):
        for value in wrong:
            message = rf"`{name}` must be one of \({values}\)\. Received: {name}={value!r}"
            with pytest.raises(ValueError, match=message):
                CCFeedForward(keras.layers.Dense(DIM), **{name: value})

    @pytest.mark.parametrize("gate", [-0.1, 1.1, "token", None, True, float("nan")])
    def test_gate(self, gate):
        message = (
            r"`gate` must be one of \('dimension', 'layer'\) or a number in \[0, 1\]\. Received: "
        )
        with pytest.raises(ValueError, match=message + "gate="):
            CCFeedForward(keras.layers.Dense(DIM), gate=gate)

    def test_options_of_its_parts(self):
        with pytest.raises(ValueError, match=r"`rank` must be .*Received: rank=0"):
            CCFeedForward(keras.layers.Dense(DIM), rank=0)
        with pytest.raises(ValueError, match=r"`initial_gate` must be .*Received: initial_gate=2"):
            CCFeedForward(keras.layers.Dense(DIM), initial_gate=2)
