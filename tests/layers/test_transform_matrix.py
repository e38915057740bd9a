import math

import numpy as np
import pytest
from backend_tools import gradients
from keras import ops
from keras.src import testing

from keras_cc.layers import TransformMatrix
from keras_cc.layers.transform_matrix import TRANSFORMS

DIM, RANK = 6, 2


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 7, DIM)).astype("float32")


def filled(kind, seed=1):
    layer = TransformMatrix(kind, rank=RANK)
    layer.build((None, None, DIM))
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.normal(0, 0.5, size=variable.shape).astype("float32"))
    return layer


def weights(layer):
    return {w.name: ops.convert_to_numpy(w).astype("float64") for w in layer.weights}


@pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed:UserWarning")  # its own fit
class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        for kind in TRANSFORMS:
            self.run_layer_test(
                TransformMatrix,
                init_kwargs={"kind": kind, "rank": RANK},
                input_shape=(2, 7, DIM),
                expected_output_shape=(2, 7, DIM),
                expected_num_trainable_weights=1 if kind == "linear" else 2,
                expected_num_non_trainable_weights=0,
                expected_num_seed_generators=0,
                expected_num_losses=0,
                supports_masking=False,
            )


class TestValues:
    @pytest.mark.parametrize("kind", TRANSFORMS)
    def test_is_the_identity_at_the_start(self, kind):
        layer = TransformMatrix(kind, rank=RANK)
        np.testing.assert_array_equal(ops.convert_to_numpy(layer(inputs())), inputs())

    def test_linear(self):
        layer = filled("linear")
        matrix = np.eye(DIM) + weights(layer)["delta"] / math.sqrt(DIM)
        result = ops.convert_to_numpy(layer(inputs()))
        np.testing.assert_allclose(result, inputs() @ matrix, rtol=1e-4, atol=1e-5)

    def test_low_rank(self):
        layer = filled("low_rank")
        w = weights(layer)
        assert w["down"].shape == (DIM, RANK) and w["up"].shape == (RANK, DIM)
        matrix = np.eye(DIM) + w["down"] @ w["up"]
        result = ops.convert_to_numpy(layer(inputs()))
        np.testing.assert_allclose(result, inputs() @ matrix, rtol=1e-4, atol=1e-5)

    def test_mlp(self):
        layer = filled("mlp")
        w = weights(layer)
        inner = inputs() @ w["down"]
        gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        result = ops.convert_to_numpy(layer(inputs()))
        np.testing.assert_allclose(result, inputs() + gelu @ w["up"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["linear", "low_rank"])
    def test_matrix_is_what_the_layer_multiplies_with(self, kind):
        layer = filled(kind)
        matrix = layer.matrix()
        assert matrix.shape == (DIM, DIM) and matrix.dtype == "float32"
        rows = ops.convert_to_numpy(layer(np.eye(DIM, dtype="float32")))
        np.testing.assert_allclose(matrix, rows, rtol=1e-5, atol=1e-6)

    def test_a_matrix_is_assigned(self):
        layer, matrix = filled("linear"), np.random.default_rng(2).normal(size=(DIM, DIM))
        layer.assign(matrix)
        np.testing.assert_allclose(layer.matrix(), matrix, rtol=1e-5, atol=1e-6)
        result = ops.convert_to_numpy(layer(inputs()))
        np.testing.assert_allclose(result, inputs() @ matrix, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("kind", "shape"), [("linear", (DIM, 2)), ("low_rank", (DIM, DIM)), ("mlp", (DIM, DIM))]
    )
    def test_a_matrix_that_does_not_fit_is_refused(self, kind, shape):
        with pytest.raises(ValueError, match=f"`matrix` must be .*Received: .* for '{kind}'"):
            filled(kind).assign(np.zeros(shape))

    @pytest.mark.parametrize("kind", TRANSFORMS)
    def test_a_zero_weight_is_the_identity_so_that_weight_decay_pulls_there(self, kind):
        layer = filled(kind)
        for variable in layer.weights:
            variable.assign(np.zeros(variable.shape))
        np.testing.assert_array_equal(ops.convert_to_numpy(layer(inputs())), inputs())

    @pytest.mark.parametrize("kind", ["low_rank", "mlp"])
    def test_starts_with_a_gradient(self, kind):
        # Both factors at zero would never move.
        layer = TransformMatrix(kind, rank=RANK)
        x = inputs()
        layer.build(x.shape)
        found = gradients(lambda: ops.sum(ops.square(layer(x))), layer.trainable_variables)
        assert max(np.abs(g).max() for g in found) > 1e-3


class TestRefused:
    @pytest.mark.parametrize("kind", ["full", None, "Linear"])
    def test_kind(self, kind):
        message = r"`kind` must be one of \('linear', 'low_rank', 'mlp'\)\. Received: kind="
        with pytest.raises(ValueError, match=message):
            TransformMatrix(kind)

    @pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4", None])
    def test_rank(self, rank):
        with pytest.raises(ValueError, match=r"`rank` must be an integer >= 1\. Received: rank="):
            TransformMatrix("low_rank", rank=rank)

    def test_matrix_of_a_non_linear_transform(self):
        message = r"is no matrix and cannot be folded.*Received: transform='mlp'"
        with pytest.raises(ValueError, match=message):
            filled("mlp").matrix()

    def test_is_linear(self):
        assert [TransformMatrix(kind).is_linear for kind in TRANSFORMS] == [True, True, False]
