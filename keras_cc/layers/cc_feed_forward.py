from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cc.layers.alignment import ALIGNMENTS, align
from keras_cc.layers.decision_gate import GRANULARITIES, INITIAL_GATE, DecisionGate
from keras_cc.layers.transform_matrix import TRANSFORMS, TransformMatrix
from keras_cc.losses import squared_error
from keras_cc.options import choice, choice_or_share
from keras_cc.passes import pairing, positions

FUSED_ALIGNMENTS = (*ALIGNMENTS, "answer")
ALIGNMENT_GRADIENTS = ("transform", "stream", "full")
ALIGNMENT_ERRORS = ("relative", "plain")


@keras.saving.register_keras_serializable(package="keras_cc")
class CCFeedForward(keras.layers.Layer):
    """A feed-forward output projection, connected to the same layer of the pivot's pass.

    With `F` the projection's output, `x` the target sequence and `p` the pivot prompt:

        A     = align(F(p), F(x))
        alpha = DecisionGate(A, F(x)), or the constant `gate`
        Ff    = alpha * A + (1 - alpha) * F(x)      the output in a connected pass
        T     = TransformMatrix(F(x))               the output in any other

    Which pass it is, the layer learns from `keras_cc.passes.pairing`; called by itself, or by a
    model that knows nothing of pairs, it gives `T`. In a connected pass it also leaves
    there, for every row, the alignment error between `T` and `Ff` and the mean gate.
    Padding, and rows without a pivot, are left out of all of it: they get `F(x)`.

    Args:
        inner: the `keras.layers.Layer` to connect, usually the `Dense` or `EinsumDense`
            down projection of a decoder block.
        alignment: `"attention"`, `"mean"` or `"last"`, see `keras_cc.layers.align`, or
            `"answer"`: the pivot's pass reads the answer behind its prompt, and `A` is what it
            has at the same token. With `"last"` only the target's last prompt token is fused, with
            `"answer"` that one and the answer's.
        gate: `"dimension"`, `"layer"`, or a float in [0, 1]: a constant.
        initial_gate: float in (0, 1), the value at which a trained gate starts.
        transform: `"linear"`, `"low_rank"`, `"mlp"`, or None: then `T = F(x)` and there
            is no alignment error.
        rank: int, inner width of `"low_rank"` and `"mlp"`.
        pivot_gradient: bool, whether gradients flow into the pivot's pass.
        alignment_gradient: what the alignment error trains. `"transform"`: the
            transform alone. `"stream"`: the target stream `F(x)` too (and through it the
            layers before), towards a fixed `Ff`. `"full"`: everything that `T` and `Ff`
            depend on, as the formula has it.
        alignment_error: `"relative"` or `"plain"`, see `keras_cc.losses.squared_error`.

    Input shape:
        Whatever `inner` takes, `(batch, length, inner dim)`.

    Output shape:
        `inner`'s, `(batch, length, d)`.

    Raises:
        ValueError: if an option has none of the values above.
        TypeError: if `inner` is not a Keras layer.

    Example:

    ```python
    layer = keras_cc.layers.CCFeedForward(keras.layers.Dense(8), gate="layer")
    layer(keras.random.normal((2, 7, 32))).shape  # (2, 7, 8)
    ```

    Source: CC-Tuning (Ye et al., arXiv 2506.00875), fused at every layer and dimension.
    """

    def __init__(
        self,
        inner,
        alignment="attention",
        gate="dimension",
        initial_gate=INITIAL_GATE,
        transform="linear",
        rank=16,
        pivot_gradient=False,
        alignment_gradient="transform",
        alignment_error="relative",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if isinstance(inner, dict):
            inner = keras.saving.deserialize_keras_object(inner)
        if not isinstance(inner, keras.layers.Layer):
            raise TypeError(f"`inner` must be a Keras layer. Received: inner={inner!r}")
        self.inner = inner
        self.alignment = choice("alignment", alignment, FUSED_ALIGNMENTS)
        self.gate = choice_or_share("gate", gate, GRANULARITIES)
        self.initial_gate = initial_gate
        self.transform = choice("transform", transform, (*TRANSFORMS, None))
        self.rank = rank
        self.pivot_gradient = choice("pivot_gradient", pivot_gradient, (True, False))
        self.alignment_gradient = choice(
            "alignment_gradient", alignment_gradient, ALIGNMENT_GRADIENTS
        )
        self.alignment_error = choice("alignment_error", alignment_error, ALIGNMENT_ERRORS)
        self.decision_gate = None
        if isinstance(gate, str):
            self.decision_gate = DecisionGate(
                gate, initial_gate, dtype=self.dtype_policy, name="decision_gate"
            )
        self.transform_matrix: Any = None
        if transform is not None:
            self.transform_matrix = TransformMatrix(
                transform, rank, dtype=self.dtype_policy, name="transform_matrix"
            )

    @property
    def parts(self):
        """The layers that the connection brought, by name."""
        parts = {"decision_gate": self.decision_gate, "transform_matrix": self.transform_matrix}
        return {name: part for name, part in parts.items() if part is not None}

    def folded(self):
        """`inner`'s weights with the transform in them, float32, by the variables' names.

        kernel <- kernel @ W,    bias <- bias @ W
        """
        if self.transform_matrix is None:
            return {}
        matrix = self.transform_matrix.matrix()
        weights = {"kernel": self.inner.kernel, "bias": getattr(self.inner, "bias", None)}
        return {
            name: np.matmul(ops.convert_to_numpy(ops.cast(value, "float32")), matrix)
            for name, value in weights.items()
            if value is not None
        }

    def build(self, input_shape):
        if not self.inner.built:
            self.inner.build(input_shape)
        output_shape = self.inner.compute_output_shape(input_shape)
        if self.decision_gate is not None:
            self.decision_gate.build(output_shape, output_shape)
        if self.transform_matrix is not None:
            self.transform_matrix.build(output_shape)

    def call(self, inputs):
        target = ops.cast(self.inner(inputs), self.compute_dtype)  # (B, T, d)
        scope = pairing.current()
        if isinstance(scope, pairing.PivotPass):
            scope.activations[id(self)] = target
            return target
        if isinstance(scope, pairing.TargetPass):
            return self._connect(target, scope)
        return self._stand_in(target)

    def _stand_in(self, target):
        return target if self.transform_matrix is None else self.transform_matrix(target)

    def _connect(self, target, scope):
        pivot = scope.pivot.activations[id(self)]  # (B, S, d)
        if not self.pivot_gradient:
            pivot = ops.stop_gradient(pivot)
        if self.alignment == "answer":
            places = scope.at(scope.places, target)  # beyond the answer there may be none
            aligned = positions.gather(pivot, ops.clip(places, 0, ops.shape(pivot)[1] - 1))
        else:
            readable = scope.pivot.mask if scope.readable is None else scope.readable
            aligned = align(pivot, target, readable, self.alignment)
        if self.decision_gate is None:
            gate = ops.full_like(target[..., :1], self.gate)
        else:
            gate = self.decision_gate(aligned, target)
        where = scope.at(scope.fused, target)  # (B, T)
        fused = ops.where(where[..., None], target + gate * (aligned - target), target)

        if scope.samples is not None:
            scope.samples.append((target, fused))
        gate = ops.cast(gate, "float32")
        scope.gate_sums.append(ops.sum(ops.where(where, ops.mean(gate, axis=-1), 0.0), axis=-1))
        if scope.dimension_sums is not None:
            scope.dimension_sums.append(ops.sum(ops.where(where[..., None], gate, 0.0), axis=1))
        if self.transform_matrix is not None:
            scope.alignment_errors.append(self._alignment_error(target, fused, scope))
        if scope.through_transform is None:
            return fused
        return ops.where(scope.through_transform[..., None], self._stand_in(target), fused)

    def _alignment_error(self, target, fused, scope):
        if scope.index is not None:
            return ops.zeros_like(scope.gate_sums[-1])  # generating: nobody asks for a loss
        if self.alignment_gradient != "full":
            fused = ops.stop_gradient(fused)
        if self.alignment_gradient == "transform":
            target = ops.stop_gradient(target)
        error = squared_error(
            self.transform_matrix(target), fused, relative=self.alignment_error == "relative"
        )
        return ops.sum(ops.where(scope.mask, error, 0.0), axis=-1)

    def compute_output_shape(self, input_shape):
        return self.inner.compute_output_shape(input_shape)

    def get_config(self):
        config = super().get_config()
        config.update(
            inner=keras.saving.serialize_keras_object(self.inner),
            alignment=self.alignment,
            gate=self.gate,
            initial_gate=self.initial_gate,
            transform=self.transform,
            rank=self.rank,
            pivot_gradient=self.pivot_gradient,
            alignment_gradient=self.alignment_gradient,
            alignment_error=self.alignment_error,
        )
        return config
