import numpy as np
import pytest
import tiny
from backend_tools import gradients
from keras import ops
from keras.src import testing

from keras_cc.layers import InvertibleAdapter

DIM = 8


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 7, DIM)).astype("float32")


def filled():
    layer = InvertibleAdapter()
    layer.build((None, None, DIM))
    tiny.fill(layer, 1, 0.5)
    return layer


def numbers(value):
    return ops.convert_to_numpy(value)


@pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed:UserWarning")  # its own fit
class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        self.run_layer_test(
            InvertibleAdapter,
            init_kwargs={"reduction_factor": 2},
            input_shape=(2, 7, DIM),
            expected_output_shape=(2, 7, DIM),
            expected_num_trainable_weights=8,
            expected_num_non_trainable_weights=0,
            expected_num_seed_generators=0,
            expected_num_losses=0,
            supports_masking=False,
        )


def test_is_the_identity_at_the_start():
    layer = InvertibleAdapter()
    np.testing.assert_array_equal(numbers(layer(inputs())), inputs())
    np.testing.assert_array_equal(numbers(layer(inputs(), inverse=True)), inputs())


def test_formula():
    """Additive coupling, in NumPy."""
    layer = filled()
    w = {weight.name: numbers(weight).astype("float64") for weight in layer.weights}

    def bottleneck(name, x):
        inner = np.maximum(x @ w[f"{name}_down"] + w[f"{name}_down_bias"], 0)
        return inner @ w[f"{name}_up"] + w[f"{name}_up_bias"]

    assert w["first_down"].shape == (DIM // 2, DIM // 4)
    a, b = inputs()[..., : DIM // 2], inputs()[..., DIM // 2 :]
    a = a + bottleneck("first", b)
    b = b + bottleneck("second", a)
    result = numbers(layer(inputs()))
    np.testing.assert_allclose(result, np.concatenate([a, b], -1), rtol=1e-4, atol=1e-5)
    assert (np.abs(result - inputs()).max(axis=(0, 1)) > 0.05).all()  # no half is left out


@pytest.mark.parametrize("first", [False, True])
def test_the_inverse_takes_it_back(first):
    layer = filled()
    there = layer(inputs(), inverse=first)
    assert np.abs(numbers(there) - inputs()).max() > 0.1
    np.testing.assert_allclose(numbers(layer(there, inverse=not first)), inputs(), atol=1e-5)
    # Only its own inverse does.
    assert np.abs(numbers(layer(there, inverse=first)) - inputs()).max() > 0.1


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_reach_every_weight(inverse):
    layer = filled()
    found = gradients(lambda: ops.mean(ops.square(layer(inputs(), inverse=inverse))), layer.weights)
    assert all(np.abs(gradient).max() > 0 for gradient in found)


def test_bad_input():
    with pytest.raises(ValueError, match=r"`reduction_factor` must be .*Received"):
        InvertibleAdapter(0)
    with pytest.raises(ValueError, match=r"even last axis. Received: .*7"):
        InvertibleAdapter().build((None, 7))
