import math

import keras
import numpy as np
import pytest
from backend_tools import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_cc import losses


def numpy(value):
    return ops.convert_to_numpy(value)


def masked_mean(values, weights):
    tensors = (ops.convert_to_tensor(np.asarray(v, "float32")) for v in (values, weights))
    return tuple(float(numpy(v)) for v in losses.masked_mean(*tensors))


class TestTokenCrossEntropy:
    def test_against_numpy(self):
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 3, (2, 5, 11)).astype("float32")
        labels = rng.integers(0, 11, (2, 5)).astype("int32")
        result = numpy(losses.token_cross_entropy(logits, labels))
        for b in range(2):
            for t in range(5):
                exponentials = np.exp(logits[b, t].astype("float64"))
                expected = -math.log(exponentials[labels[b, t]] / exponentials.sum())
                assert result[b, t] == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_of_a_uniform_distribution_is_the_log_of_its_size(self):
        result = losses.token_cross_entropy(ops.zeros((1, 4)), ops.array([2]))
        np.testing.assert_allclose(numpy(result), [math.log(4)], rtol=1e-6)

    def test_is_stable_for_large_logits(self):
        logits = np.array([[1e4, 0.0], [-1e4, 0.0]], "float32")
        result = numpy(losses.token_cross_entropy(logits, np.array([0, 0])))
        np.testing.assert_allclose(result, [0.0, 1e4])

    def test_is_float32_for_half_precision_logits(self):
        logits = ops.cast(np.linspace(-3, 3, 7)[None], "bfloat16")
        result = losses.token_cross_entropy(logits, np.array([3]))
        assert keras.backend.standardize_dtype(result.dtype) == "float32"
        wide = numpy(ops.cast(logits, "float32")).astype("float64")
        expected = math.log(np.exp(wide).sum()) - wide[0, 3]
        np.testing.assert_allclose(numpy(result), [expected], rtol=1e-5)

    def test_gradient_is_probabilities_minus_one_hot(self):
        logits = keras.Variable(np.array([[0.5, -1.0, 2.0]], "float32"))
        labels = np.array([1], "int32")
        (found,) = gradients(lambda: ops.sum(losses.token_cross_entropy(logits, labels)), [logits])
        exponentials = np.exp([0.5, -1.0, 2.0])
        expected = exponentials / exponentials.sum() - [0, 1, 0]
        np.testing.assert_allclose(found[0], expected, rtol=1e-5)


class TestMaskedMean:
    def test_by_hand(self):
        mean, total = masked_mean([[1.0, 5.0], [7.0, 3.0]], [[1.0, 0.0], [0.5, 1.0]])
        assert total == 2.5
        assert mean == pytest.approx((1.0 + 3.5 + 3.0) / 2.5)

    def test_without_any_weight_is_zero(self):
        assert masked_mean(np.ones((2, 3)), np.zeros((2, 3))) == (0.0, 0.0)

    @pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
    def test_what_is_not_finite_counts_only_with_a_weight(self, broken):
        assert masked_mean([2.0, broken], [1.0, 0.0])[0] == 2.0
        assert not math.isfinite(masked_mean([2.0, broken], [1.0, 1.0])[0])

    @settings(max_examples=15, deadline=None)
    @given(count=st.integers(1, 9), split=st.integers(0, 9), seed=st.integers(0, 1000))
    def test_parts_weighted_by_their_totals_give_the_whole(self, count, split, seed):
        # What gradient accumulation relies on.
        values = np.random.default_rng(seed).normal(size=10)
        weights = np.arange(10) < count
        whole, total = masked_mean(values, weights)
        # Zero weights keep the shape, so that no part compiles anew.
        first = np.arange(10) < split
        parts = [masked_mean(values, weights & part) for part in (first, ~first)]
        assert sum(n for _, n in parts) == total == count
        assert sum(m * n for m, n in parts) / total == pytest.approx(whole, rel=1e-5, abs=1e-6)


class TestSquaredError:
    def test_plain_against_numpy(self):
        rng = np.random.default_rng(1)
        prediction, goal = rng.normal(size=(2, 2, 3, 5)).astype("float32")
        result = numpy(losses.squared_error(prediction, goal, relative=False))
        expected = [[math.dist(p, g) ** 2 for p, g in zip(*r, strict=True)]
                    for r in zip(prediction, goal, strict=True)]  # fmt: skip
        np.testing.assert_allclose(result, expected, rtol=1e-5)

    def test_relative_by_hand(self):
        one, two = np.ones((1, 1, 4), "float32"), 2 * np.ones((1, 1, 4), "float32")
        np.testing.assert_allclose(numpy(losses.squared_error(one, two)), [[4 / 16]], rtol=1e-6)
        np.testing.assert_allclose(numpy(losses.squared_error(two, one)), [[4 / 4]], rtol=1e-6)

    @settings(max_examples=15, deadline=None)
    @given(scale=st.sampled_from([0.1, 10.0, 1000.0]), seed=st.integers(0, 1000))
    def test_relative_has_no_scale(self, scale, seed):
        rng = np.random.default_rng(seed)
        prediction, goal = rng.normal(size=(2, 1, 3, 8)).astype("float32")
        result = numpy(losses.squared_error(scale * prediction, scale * goal))
        np.testing.assert_allclose(result, numpy(losses.squared_error(prediction, goal)), rtol=1e-3)

    def test_relative_is_finite_for_a_goal_of_zero(self):
        result = losses.squared_error(np.full((1, 1, 4), 1e-3, "float32"), np.zeros((1, 1, 4)))
        np.testing.assert_allclose(numpy(result), [[4e-6 / 1e-6]], rtol=1e-4)

    def test_is_float32_for_half_precision(self):
        # 300 ** 2 is beyond float16.
        result = losses.squared_error(
            np.full((1, 1, 4), 300, "float16"), np.zeros((1, 1, 4), "float16"), relative=False
        )
        assert keras.backend.standardize_dtype(result.dtype) == "float32"
        np.testing.assert_array_equal(numpy(result), [[360000.0]])

    def test_the_denominator_carries_no_gradient(self):
        prediction = np.array([[[1.0, 0.0]]], "float32")
        goal = keras.Variable(np.array([[[3.0, 4.0]]], "float32"))
        (found,) = gradients(lambda: ops.sum(losses.squared_error(prediction, goal)), [goal])
        # -2 (p - g) / ||g||^2 alone, ||g||^2 = 25
        np.testing.assert_allclose(found[0, 0], [2 * 2 / 25, 2 * 4 / 25], rtol=1e-5)
