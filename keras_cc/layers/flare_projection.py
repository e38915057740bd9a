from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cc.layers.alignment import ALIGNMENTS, align
from keras_cc.options import choice, count, number
from keras_cc.passes import pairing

#: As published: the pivot's token at the same position, where there is one.
FLARE_ALIGNMENTS = ("position", *ALIGNMENTS)


@keras.saving.register_keras_serializable(package="keras_cc")
class FlareProjection(keras.layers.Layer):
    """An attention projection with LoRA, in whose bottleneck both languages are fused.

    With `P` the projection, `x` and `p` what enters it in the target's and the pivot's pass:

        t = x D,    s = align(p, x) D                 D: (d, rank)
        P(x) + alpha / rank * relu(s + t) U           in a connected pass, where there is a pivot
        P(x) + alpha / rank * t U                     elsewhere: LoRA

    `U` is zero at the start. In the pivot's pass it is `P(p)`, and no gradient flows into it.

    Args:
        inner: the `keras.layers.Layer` to wrap: a `Dense` or `EinsumDense` that projects `d`.
        rank: int, the width of the bottleneck.
        alpha: float > 0, LoRA's.
        alignment: `"position"` (the pivot's token at the target's position), or how
            `keras_cc.layers.align` takes them together.

    Input shape:
        `(batch, length, d)`.

    Output shape:
        `inner`'s.

    Raises:
        ValueError: if an option has none of the values above.
        TypeError: if `inner` is not a Keras layer.

    Example:

    ```python
    layer = keras_cc.layers.FlareProjection(keras.layers.Dense(8), rank=2)
    layer(keras.random.normal((2, 7, 16))).shape  # (2, 7, 8)
    ```

    Source: FLARE (Borchert et al., ACL 2025, arXiv 2501.06892), fusion "add+relu".
    """

    def __init__(self, inner, rank=8, alpha=16.0, alignment="position", **kwargs):
        super().__init__(**kwargs)
        if isinstance(inner, dict):
            inner = keras.saving.deserialize_keras_object(inner)
        if not isinstance(inner, keras.layers.Layer):
            raise TypeError(f"`inner` must be a Keras layer. Received: inner={inner!r}")
        self.inner: Any = inner
        self.rank = count("rank", rank, least=1)
        self.alpha = number("alpha", alpha)
        self.alignment = choice("alignment", alignment, FLARE_ALIGNMENTS)
        self.low_rank = LowRank(self.rank, dtype=self.dtype_policy, name="low_rank")

    @property
    def parts(self):
        """The layers that the connection brought, by name."""
        return {"low_rank": self.low_rank}

    def build(self, input_shape):
        if not self.inner.built:
            self.inner.build(input_shape)
        outputs = self.inner.compute_output_shape(input_shape)
        self.low_rank.build(input_shape, outputs)

    def call(self, inputs):
        outputs = ops.cast(self.inner(inputs), self.compute_dtype)  # (B, T, ...)
        scope = pairing.current()
        if isinstance(scope, pairing.PivotPass):
            scope.activations[id(self)] = inputs
            return outputs
        bottleneck = self.low_rank.down(inputs)  # (B, T, rank)
        if isinstance(scope, pairing.TargetPass):
            bottleneck = self._fuse(bottleneck, inputs, scope)
        return outputs + self.alpha / self.rank * self.low_rank.up(bottleneck)

    def _fuse(self, own, inputs, scope):
        pivot = ops.stop_gradient(scope.pivot.activations[id(self)])  # (B, S, d)
        where = scope.at(scope.fused, inputs)  # (B, T)
        if self.alignment == "position":
            aligned, there = _at_same_positions(pivot, scope)
            aligned = scope.at(aligned, inputs)
            where = ops.logical_and(where, scope.at(there, inputs))
        else:
            aligned = align(pivot, inputs, scope.pivot.mask, self.alignment)
        fused = ops.relu(self.low_rank.down(aligned) + own)
        return ops.where(where[..., None], fused, own)

    def folded(self):
        """The projection's kernel with LoRA in it, float32, by the variable's name."""
        delta = self.alpha / self.rank * self.low_rank.matrix()  # (d, ...)
        equation = getattr(self.inner, "equation", None)
        if equation is not None:  # "btd,ndh->btnh": the kernel has the axes in its own order
            inputs, rest = equation.split(",")
            kernel, outputs = rest.split("->")
            delta = np.einsum(f"{inputs[-1]}{outputs[2:]}->{kernel}", delta)
        return {"kernel": ops.convert_to_numpy(ops.cast(self.inner.kernel, "float32")) + delta}

    def compute_output_shape(self, input_shape):
        return self.inner.compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "inner": keras.saving.serialize_keras_object(self.inner),
            "rank": self.rank,
            "alpha": self.alpha,
            "alignment": self.alignment,
        }


class LowRank(keras.layers.Layer):
    """The two matrices of LoRA, `x D U`; `U` is zero at the start."""

    def __init__(self, rank, **kwargs):
        super().__init__(**kwargs)
        self.rank = rank

    def build(self, input_shape, output_shape):
        shape = (input_shape[-1], self.rank)
        self.first = self.add_weight(name="down", shape=shape, initializer="he_uniform")
        shape = (self.rank, *output_shape[2:])
        self.second = self.add_weight(name="up", shape=shape, initializer="zeros")

    def down(self, inputs):
        return ops.matmul(inputs, self.first)

    def up(self, bottleneck):
        return ops.tensordot(bottleneck, self.second, axes=1)

    def matrix(self):
        """`D U`, float32 NumPy `(d, ...)`."""
        first, second = (ops.convert_to_numpy(ops.cast(v, "float32")) for v in self.weights)
        return np.tensordot(first, second, axes=1)


def _at_same_positions(pivot, scope):
    """`pivot` `(B, T, d)` at the target's positions, and where it has a token, bool `(B, T)`."""
    last = ops.shape(pivot)[1] - 1
    positions = ops.arange(ops.shape(scope.fused)[1])
    near = ops.minimum(positions, last)
    there = ops.logical_and(ops.take(scope.pivot.mask, near, axis=1), positions <= last)
    return ops.take(pivot, near, axis=1), there
