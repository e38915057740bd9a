from typing import Any

import keras
from keras import ops

from keras_cc.options import count


@keras.saving.register_keras_serializable(package="keras_cc")
class BottleneckAdapter(keras.layers.Layer):
    """A residual bottleneck, which is the identity until it is trained.

        A(f) = f + relu(f D + b) U + c,      D: (d, d / reduction_factor), U: back again

    `U` and `c` are zero at the start.

    Args:
        reduction_factor: int >= 1, how many times narrower than `d` the bottleneck is.

    Input shape:
        Float tensor `(..., d)`.

    Output shape:
        The input's.

    Raises:
        ValueError: for another `reduction_factor`.

    Example:

    ```python
    adapter = keras_cc.layers.BottleneckAdapter(reduction_factor=4)
    adapter(keras.random.normal((2, 7, 8))).shape  # (2, 7, 8)
    ```

    Source: MAD-X (Pfeiffer et al., EMNLP 2020, arXiv 2005.00052), sections 4.1.1 and 4.1.2.
    """

    def __init__(self, reduction_factor=2, **kwargs):
        super().__init__(**kwargs)
        self.reduction_factor = count("reduction_factor", reduction_factor, least=1)

    def build(self, input_shape):
        self.branch = Bottleneck(self, "", input_shape[-1], self.reduction_factor)

    def call(self, inputs):
        return inputs + self.branch(inputs)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "reduction_factor": self.reduction_factor}


class Bottleneck:
    """`relu(x D + b) U + c`, with weights of a layer; 0 until it is trained.

    Args:
        layer: the `keras.layers.Layer` that gets the weights.
        name: string that the weights' names begin with.
        dim: int, the width of inputs and outputs.
        reduction_factor: int, how many times narrower the bottleneck is.
    """

    def __init__(self, layer: Any, name: str, dim: int, reduction_factor: int) -> None:
        width = max(1, dim // reduction_factor)

        def weight(which, shape, initializer="zeros"):
            return layer.add_weight(name=name + which, shape=shape, initializer=initializer)

        self.down = weight("down", (dim, width), "glorot_uniform")
        self.down_bias = weight("down_bias", (width,))
        self.up = weight("up", (width, dim))
        self.up_bias = weight("up_bias", (dim,))

    def __call__(self, inputs):
        inner = ops.relu(ops.matmul(inputs, self.down) + self.down_bias)
        return ops.matmul(inner, self.up) + self.up_bias
