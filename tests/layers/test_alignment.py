"""`align` against NumPy, one token at a time."""

import keras
import numpy as np
import pytest
from backend_tools import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_cc.layers.alignment import ALIGNMENTS, align


def activations(rows=3, pivot_length=5, length=4, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    pivot = rng.normal(size=(rows, pivot_length, dim)).astype("float32")
    target = rng.normal(size=(rows, length, dim)).astype("float32")
    return pivot, target


def right_padded(lengths, width):
    return np.arange(width)[None] < np.asarray(lengths)[:, None]


def reference(pivot, target, mask, method):
    """`(B, T, d)`: row by row and token by token, on the real pivot tokens alone."""
    result = np.zeros(target.shape)
    for row in range(len(target)):
        real = pivot[row][mask[row]].astype("float64")  # (real tokens, d)
        for t, x in enumerate(target[row].astype("float64")):
            if method == "attention":
                exponentials = [np.exp(x @ p / np.sqrt(len(p))) for p in real]
                total = sum(exponentials)
                result[row, t] = sum(e / total * p for e, p in zip(exponentials, real, strict=True))
            elif method == "mean":
                result[row, t] = sum(real) / len(real)
            else:
                result[row, t] = real[-1]
    return result


def aligned(pivot, target, mask, method):
    return ops.convert_to_numpy(
        align(*map(ops.convert_to_tensor, (pivot, target, mask)), method=method)
    )


class TestValues:
    @pytest.mark.parametrize("method", ALIGNMENTS)
    def test_against_numpy(self, method):
        pivot, target = activations()
        mask = right_padded([5, 3, 1], 5)
        result = aligned(pivot, target, mask, method)
        assert result.shape == ((3, 4, 6) if method == "attention" else (3, 1, 6))
        expected = reference(pivot, target, mask, method)
        np.testing.assert_allclose(
            np.broadcast_to(result, expected.shape), expected, rtol=1e-5, atol=1e-6
        )

    @pytest.mark.parametrize("method", ALIGNMENTS)
    def test_padding_may_be_anywhere(self, method):
        pivot, target = activations()
        mask = np.array([[0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], "bool")
        result = aligned(pivot, target, mask, method)
        expected = reference(pivot, target, mask, method)
        np.testing.assert_allclose(
            np.broadcast_to(result, expected.shape), expected, rtol=1e-5, atol=1e-6
        )

    def test_attention_is_the_default(self):
        pivot, target = activations()
        mask = right_padded([5, 3, 1], 5)
        default = ops.convert_to_numpy(align(*map(ops.convert_to_tensor, (pivot, target, mask))))
        np.testing.assert_array_equal(default, aligned(pivot, target, mask, "attention"))

    @pytest.mark.parametrize("method", ALIGNMENTS)
    def test_a_single_pivot_token_is_copied(self, method):
        pivot, target = activations(rows=1)
        result = aligned(pivot, target, right_padded([1], 5), method)
        np.testing.assert_allclose(
            result, np.broadcast_to(pivot[:, :1], result.shape), rtol=1e-6, atol=1e-7
        )

    def test_attention_does_not_overflow_in_half_precision(self):
        # x . p = 4 * 300 * 300 is beyond float16's largest number, 65504.
        pivot = np.array([[[300.0] * 4, [-300.0] * 4]], "float16")
        target = np.array([[[300.0] * 4]], "float16")
        result = aligned(pivot, target, np.ones((1, 2), "bool"), "attention")
        assert result.dtype == "float16"
        np.testing.assert_array_equal(result, [[[300.0] * 4]])


class TestMasks:
    @pytest.mark.parametrize("method", ALIGNMENTS)
    @settings(max_examples=15, deadline=None)
    @given(
        lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
        seed=st.integers(0, 1000),
        scale=st.sampled_from([1.0, 1e4]),
    )
    def test_padded_pivot_activations_change_nothing(self, method, lengths, seed, scale):
        pivot, target = activations(seed=seed)
        mask = right_padded(lengths, 5)
        noise = scale * np.random.default_rng(seed + 1).normal(size=pivot.shape)
        changed = np.where(mask[..., None], pivot, noise).astype("float32")
        np.testing.assert_array_equal(
            aligned(changed, target, mask, method), aligned(pivot, target, mask, method)
        )

    @pytest.mark.parametrize("method", ALIGNMENTS)
    @settings(max_examples=10, deadline=None)
    @given(order=st.permutations(range(5)), seed=st.integers(0, 1000))
    def test_soft_alignments_ignore_the_order_of_the_pivot(self, method, order, seed):
        pivot, target = activations(seed=seed)
        mask = np.ones((3, 5), "bool")
        result = aligned(pivot[:, order], target, mask, method)
        if method == "last":
            np.testing.assert_array_equal(result[:, 0], pivot[:, order[-1]])
        else:
            expected = aligned(pivot, target, mask, method)
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("method", ALIGNMENTS)
    def test_a_row_without_pivot_stays_finite_with_its_gradients(self, method):
        pivot, target = (keras.Variable(value) for value in activations())
        mask = ops.convert_to_tensor(right_padded([5, 0, 2], 5))

        def loss():
            return ops.sum(ops.square(align(pivot, target, mask, method)))

        assert np.isfinite(ops.convert_to_numpy(loss()))
        of_pivot, of_target = gradients(loss, [pivot, target])
        assert np.isfinite(of_pivot).all() and np.isfinite(of_target).all()
        assert np.abs(of_pivot[0]).max() > 0
        # Padding gets no gradient either.
        np.testing.assert_array_equal(of_pivot[2, 2:], 0)


class TestRefused:
    @pytest.mark.parametrize("method", ["max", "", None, "Attention"])
    def test_unknown_method(self, method):
        pivot, target = activations()
        message = rf"`alignment` must be one of .*'attention', 'mean', 'last'.*Received: .*{method}"
        with pytest.raises(ValueError, match=message):
            align(pivot, target, np.ones((3, 5), "bool"), method)
