import numpy as np
import pytest
import tiny
from backend_tools import gradients
from keras import ops
from keras.src import testing

from keras_cc.layers import BottleneckAdapter

DIM = 6


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 7, DIM)).astype("float32")


def filled(factor=2):
    layer = BottleneckAdapter(factor)
    layer.build((None, None, DIM))
    tiny.fill(layer, 1, 0.5)
    return layer


def expected(f, weights):
    inner = np.maximum(f @ weights["down"] + weights["down_bias"], 0.0)
    return f + inner @ weights["up"] + weights["up_bias"]


def weights(layer):
    return {w.name: ops.convert_to_numpy(w).astype("float64") for w in layer.weights}


@pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed:UserWarning")  # its own fit
class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        self.run_layer_test(
            BottleneckAdapter,
            init_kwargs={"reduction_factor": 3},
            input_shape=(2, 7, DIM),
            expected_output_shape=(2, 7, DIM),
            expected_num_trainable_weights=4,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )


class TestValues:
    def test_is_the_identity_at_the_start(self):
        np.testing.assert_array_equal(ops.convert_to_numpy(BottleneckAdapter()(inputs())), inputs())

    @pytest.mark.parametrize(("factor", "width"), [(1, 6), (2, 3), (4, 1), (16, 1)])
    def test_formula(self, factor, width):
        layer = filled(factor)
        assert weights(layer)["down"].shape == (DIM, width)
        result = ops.convert_to_numpy(layer(inputs()))
        np.testing.assert_allclose(result, expected(inputs(), weights(layer)), rtol=1e-4, atol=1e-5)
        assert np.abs(result - inputs()).max() > 0.1

    def test_the_first_gradient_reaches_what_is_zero(self):
        layer = BottleneckAdapter()
        layer.build((None, None, DIM))
        names = [w.name for w in layer.weights]
        found = gradients(lambda: ops.mean(ops.square(layer(inputs()))), layer.weights)
        found = dict(zip(names, found, strict=True))
        assert np.abs(found["up"]).max() > 0 and np.abs(found["up_bias"]).max() > 0
        assert not found["down"].any() and not found["down_bias"].any()


@pytest.mark.parametrize("factor", [0, -1, 1.5, "2", None])
def test_a_factor_that_is_none(factor):
    with pytest.raises(ValueError, match=r"`reduction_factor` must be .*Received"):
        BottleneckAdapter(factor)
