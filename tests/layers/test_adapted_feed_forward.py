import keras
import numpy as np
import pytest
import tiny
from keras import ops
from keras.src import testing

from keras_cc.layers import AdaptedFeedForward

DIM, INNER = 6, 5


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 7, INNER)).astype("float32")


@pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed:UserWarning")  # its own fit
class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        self.run_layer_test(
            AdaptedFeedForward,
            init_kwargs={"inner": keras.layers.Dense(DIM), "task_reduction_factor": 3},
            input_shape=(2, 7, INNER),
            expected_output_shape=(2, 7, DIM),
            expected_num_trainable_weights=10,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )


def test_the_task_stands_on_the_language():
    inner = keras.layers.Dense(DIM)
    layer = AdaptedFeedForward(inner, reduction_factor=2, task_reduction_factor=3)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(layer(inputs())), ops.convert_to_numpy(inner(inputs()))
    )
    tiny.fill(layer, 1, 0.7)
    w = {v.path.split("/", 1)[-1]: ops.convert_to_numpy(v).astype("float64") for v in layer.weights}
    value = inputs() @ ops.convert_to_numpy(inner.kernel) + ops.convert_to_numpy(inner.bias)
    for name, width in (("language_adapter", 3), ("task_adapter", 2)):
        assert w[f"{name}/down"].shape == (DIM, width)
        hidden = np.maximum(value @ w[f"{name}/down"] + w[f"{name}/down_bias"], 0)
        value = value + hidden @ w[f"{name}/up"] + w[f"{name}/up_bias"]
    np.testing.assert_allclose(ops.convert_to_numpy(layer(inputs())), value, rtol=1e-4, atol=1e-5)


def test_bad_input():
    with pytest.raises(TypeError, match=r"`inner` must be a Keras layer. Received: inner=3"):
        AdaptedFeedForward(3)
    with pytest.raises(ValueError, match="`reduction_factor` must be"):
        AdaptedFeedForward(keras.layers.Dense(DIM), task_reduction_factor=0)
