import keras
import numpy as np
from keras import ops

from keras_cc.options import choice, count

TRANSFORMS = ("linear", "low_rank", "mlp")


@keras.saving.register_keras_serializable(package="keras_cc")
class TransformMatrix(keras.layers.Layer):
    """Stands in for the connection when no pivot is at hand.

        "linear":    T = f W,  W = I + D / sqrt(d)            D: (d, d)
        "low_rank":  T = f W,  W = I + U V                    U: (d, rank), V: (rank, d)
        "mlp":       T = f + gelu(f U) V                      U: (d, rank), V: (rank, d)

    All three are the identity at the start (`D` and `V` are zero), so that an untrained
    connection changes nothing. `D` and not `W` is the weight, so that weight decay pulls
    the transform towards the identity and not towards zero. Adam moves each entry of a weight
    by about the learning rate: without the root, `W` would run ahead of the kernel that it is
    folded into (`examples/LOG.md` has what that costs). The first two are matrices, which
    `merge()` folds into the projection before them; `"mlp"` is not.

    Args:
        kind: `"linear"`, `"low_rank"` or `"mlp"`.
        rank: int, the inner width of `"low_rank"` and `"mlp"`.

    Input shape:
        Float tensor `(..., d)`.

    Output shape:
        The input's.

    Raises:
        ValueError: if an argument is not one of the above; from `matrix()` for `"mlp"`.

    Example:

    ```python
    transform = keras_cc.layers.TransformMatrix("low_rank", rank=4)
    transform(keras.random.normal((2, 7, 8))).shape  # (2, 7, 8)
    transform.matrix().shape  # (8, 8)
    ```

    Source: the Transform Matrix of CC-Tuning (Ye et al., arXiv 2506.00875).
    """

    def __init__(self, kind="linear", rank=16, **kwargs):
        super().__init__(**kwargs)
        self.kind = choice("kind", kind, TRANSFORMS)
        self.rank = count("rank", rank, least=1)

    def build(self, input_shape):
        dim = input_shape[-1]
        self._scale = dim**-0.5
        if self.kind == "linear":
            # Made with `trainable=False`, the layer is fitted in closed form, and stays out of
            # training whatever is frozen and thawed around it.
            self.delta = self.add_weight(
                name="delta", shape=(dim, dim), initializer="zeros", trainable=self.trainable
            )
        else:
            self.down = self.add_weight(
                name="down", shape=(dim, self.rank), initializer="glorot_uniform"
            )
            self.up = self.add_weight(name="up", shape=(self.rank, dim), initializer="zeros")

    def call(self, inputs):
        if self.kind == "linear":
            return inputs + self._scale * ops.matmul(inputs, self.delta)
        inner = ops.matmul(inputs, self.down)
        if self.kind == "mlp":
            inner = keras.activations.gelu(inner)
        return inputs + ops.matmul(inner, self.up)

    def compute_output_shape(self, input_shape):
        return input_shape

    @property
    def is_linear(self):
        """Whether the transform is a matrix, which `merge()` can fold."""
        return self.kind != "mlp"

    @property
    def is_identity(self):
        """Whether the transform changes nothing, as at the start."""
        last = self.delta if self.kind == "linear" else self.up
        return not np.any(_float32(last))

    def matrix(self):
        """`W` as a float32 NumPy array `(d, d)`: the transform is `f @ W`."""
        if not self.is_linear:
            raise ValueError(
                "A non-linear transform is no matrix and cannot be folded into the model: keep the "
                'connected model for inference, or train with `transform="linear"` or '
                f'`"low_rank"`. Received: transform={self.kind!r}'
            )
        if self.kind == "linear":
            delta = self._scale * _float32(self.delta)
        else:
            delta = _float32(self.down) @ _float32(self.up)
        return np.eye(delta.shape[0], dtype="float32") + delta

    def assign(self, matrix):
        """Makes `W` a NumPy matrix `(d, d)`, kept in the weight's dtype.

        Raises:
            ValueError: for a transform that is not `"linear"`, or a matrix of another shape.
        """
        if self.kind != "linear" or np.shape(matrix) != tuple(self.delta.shape):
            raise ValueError(
                '`matrix` must be (d, d), for a transform of kind "linear". '
                f"Received: a matrix of shape {np.shape(matrix)} for {self.kind!r}"
            )
        # Before it is rounded to float32: a small change would be lost beside the 1.
        self.delta.assign(((matrix - np.eye(len(matrix))) / self._scale).astype("float32"))

    def get_config(self):
        config = super().get_config()
        config.update(kind=self.kind, rank=self.rank)
        return config


def _float32(variable):
    return ops.convert_to_numpy(ops.cast(variable, "float32"))
