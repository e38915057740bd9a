"""Pivot activations brought onto the target's positions."""

import math

from keras import ops

from keras_cc.options import choice
from keras_cc.passes import positions

ALIGNMENTS = ("attention", "mean", "last")


def align(pivot, target, pivot_mask, method="attention"):
    """Bring pivot activations `p` onto the positions of target activations `x`.

    With `p` of shape `(B, S, d)`, `x` of shape `(B, T, d)` and only the real pivot
    tokens counted:

        "attention":  A_t = sum_s softmax_s(x_t . p_s / sqrt(d)) p_s       (B, T, d)
        "mean":       A   = mean_s p_s                                    (B, 1, d)
        "last":       A   = p at the last real token                      (B, 1, d)

    It has no parameters. A row without a single real pivot token gives finite
    numbers of no meaning, which the caller masks out.

    Args:
        pivot: float tensor `(B, S, d)`.
        target: float tensor `(B, T, d)`.
        pivot_mask: bool tensor `(B, S)`, True at real tokens; or `(B, T, S)`, those that each of
            the target's tokens may read, where several pairs are in a row.
        method: `"attention"`, `"mean"` or `"last"`.

    Returns:
        Float tensor `(B, T, d)` for `"attention"` and a mask `(B, T, S)`, else `(B, 1, d)`, which
        broadcasts.

    Raises:
        ValueError: if `method` is none of the three.

    Example:

    ```python
    pivot, target = keras.random.normal((2, 5, 8)), keras.random.normal((2, 7, 8))
    mask = keras.ops.ones((2, 5), dtype="bool")
    keras_cc.layers.align(pivot, target, mask, "attention").shape  # (2, 7, 8)
    ```

    Source: `"last"` is the position of CC-Tuning (arXiv 2506.00875); soft alignment by
    attention and mean pooling are the two usual ways to fuse streams of unequal length.
    """
    choice("alignment", method, ALIGNMENTS)
    readable = pivot_mask[:, None, :] if len(pivot_mask.shape) == 2 else pivot_mask
    if method == "attention":
        # Products of activations overflow half precision: scores are float32.
        scores = ops.einsum(
            "btd,bsd->bts", ops.cast(target, "float32"), ops.cast(pivot, "float32")
        ) / math.sqrt(int(pivot.shape[-1]))
        scores = ops.where(readable, scores, -1e9)
        weights = ops.cast(ops.softmax(scores, axis=-1), pivot.dtype)
        return ops.einsum("bts,bsd->btd", weights, pivot)
    if method == "mean":
        real = ops.cast(readable, pivot.dtype)
        weights = real / ops.maximum(ops.sum(real, axis=-1, keepdims=True), 1)
    else:
        weights = ops.cast(positions.last_prompt(readable), pivot.dtype)
    return ops.einsum("bts,bsd->btd", weights, pivot)
