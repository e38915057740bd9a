import keras
import numpy as np
import pytest
from backend_tools import gradients
from keras import ops
from keras.src import testing

from keras_cc import FusedConnection
from keras_cc.layers import CCFeedForward, DecisionGate


def sigmoid(value):
    return 1 / (1 + np.exp(-value.astype("float64")))


def pivot_and_target(pivot_length=7, seed=0):
    rng = np.random.default_rng(seed)
    pivot = rng.normal(size=(2, pivot_length, 5)).astype("float32")
    return pivot, rng.normal(size=(2, 7, 5)).astype("float32")


def filled(granularity="dimension", seed=1):
    layer = DecisionGate(granularity)
    layer.build((2, 7, 5), (2, 7, 5))
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    return layer


class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        for granularity, units in (("dimension", 5), ("layer", 1)):
            for pivot_length in (7, 1):
                self.run_layer_test(
                    DecisionGate,
                    init_kwargs={"granularity": granularity, "initial_gate": 0.3},
                    input_shape={
                        "pivot_shape": (2, pivot_length, 5),
                        "target_shape": (2, 7, 5),
                    },
                    expected_output_shape=(2, 7, units),
                    expected_num_trainable_weights=2,
                    expected_num_non_trainable_weights=0,
                    expected_num_seed_generators=0,
                    expected_num_losses=0,
                    supports_masking=False,
                    run_training_check=False,  # it passes one input; see TestTraining
                )


class TestValues:
    @pytest.mark.parametrize("granularity", ["dimension", "layer"])
    @pytest.mark.parametrize("pivot_length", [7, 1])
    def test_against_numpy(self, granularity, pivot_length):
        layer = filled(granularity)
        pivot, target = pivot_and_target(pivot_length)
        kernel, bias = (ops.convert_to_numpy(w) for w in (layer.kernel, layer.bias))
        expected = np.zeros((2, 7, kernel.shape[1]))
        for row in range(2):
            for t in range(7):
                difference = pivot[row, t % pivot_length] - target[row, t]
                expected[row, t] = sigmoid(difference @ kernel + bias)
        result = ops.convert_to_numpy(layer(pivot, target))
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    def test_one_default_wherever_it_can_be_given(self):
        layers = (DecisionGate(), CCFeedForward(keras.layers.Dense(4)), FusedConnection())
        assert [layer.initial_gate for layer in layers] == [0.1, 0.1, 0.1]

    @pytest.mark.parametrize("granularity", ["dimension", "layer"])
    @pytest.mark.parametrize("initial_gate", [0.1, 0.5, 0.97])
    def test_starts_from_the_initial_gate_whatever_it_sees(self, granularity, initial_gate):
        layer = DecisionGate(granularity, initial_gate)
        result = ops.convert_to_numpy(layer(*pivot_and_target()))
        np.testing.assert_allclose(result, initial_gate, rtol=1e-5)

    def test_looks_at_each_token_alone(self):
        layer = filled()
        pivot, target = pivot_and_target()
        before = ops.convert_to_numpy(layer(pivot, target))
        target[:, 3] += 1.0
        after = ops.convert_to_numpy(layer(pivot, target))
        np.testing.assert_array_equal(np.delete(after, 3, 1), np.delete(before, 3, 1))
        assert np.abs(after[:, 3] - before[:, 3]).max() > 0.01

    def test_weights_stay_float32_under_mixed_precision(self):
        layer = DecisionGate(dtype="mixed_bfloat16")
        result = layer(*pivot_and_target())
        assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
        assert {w.dtype for w in layer.weights} == {"float32"}


class TestTraining:
    def test_gradients_against_the_formula(self):
        # d sum(alpha) / db = sum alpha (1 - alpha);  dG = sum (a - f)^T alpha (1 - alpha)
        layer = filled()
        pivot, target = pivot_and_target()
        alpha = ops.convert_to_numpy(layer(pivot, target)).astype("float64")
        slope = alpha * (1 - alpha)
        of_kernel, of_bias = gradients(
            lambda: ops.sum(layer(pivot, target)), [layer.kernel, layer.bias]
        )
        expected = np.einsum("bti,btj->ij", pivot - target, slope)
        np.testing.assert_allclose(of_kernel, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(of_bias, slope.sum((0, 1)), rtol=1e-4, atol=1e-5)


class TestRefused:
    @pytest.mark.parametrize("granularity", ["token", None, 0.5])
    def test_granularity(self, granularity):
        message = r"`granularity` must be one of \('dimension', 'layer'\)\. Received: granularity="
        with pytest.raises(ValueError, match=message):
            DecisionGate(granularity)

    @pytest.mark.parametrize("initial_gate", [0, 1, -0.1, 1.5, True, "0.5", None, float("nan")])
    def test_initial_gate(self, initial_gate):
        message = (
            r"`initial_gate` must be a number strictly between 0 and 1.*Received: initial_gate="
        )
        with pytest.raises(ValueError, match=message):
            DecisionGate(initial_gate=initial_gate)
