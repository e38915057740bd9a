import keras
from keras import ops

from keras_cc.layers.bottleneck_adapter import Bottleneck
from keras_cc.options import count


@keras.saving.register_keras_serializable(package="keras_cc")
class InvertibleAdapter(keras.layers.Layer):
    """Additive coupling: changes embeddings in a way that can be taken back exactly.

    With `(a, b)` the two halves of a vector, and `F` and `G` bottlenecks `relu(x D + b) U + c`
    from d/2 to d/2:

        forward:   a' = a + F(b),      b' = b + G(a')
        inverse:   b  = b' - G(a'),    a  = a' - F(b)

    It is the identity until it is trained.

    Args:
        reduction_factor: int >= 1, how many times narrower than `d / 2` a bottleneck is.

    Call arguments:
        inputs: float tensor `(..., d)`, `d` even.
        inverse: bool, whether to take the change back.

    Returns:
        A tensor of the input's shape.

    Raises:
        ValueError: for another `reduction_factor`, or an odd `d`.

    Example:

    ```python
    adapter = keras_cc.layers.InvertibleAdapter()
    vectors = keras.random.normal((2, 7, 8))
    adapter(adapter(vectors), inverse=True)  # `vectors`
    ```

    Source: MAD-X (Pfeiffer et al., arXiv 2005.00052), section 4.1.3; NICE (Dinh et al., arXiv
    1410.8516).
    """

    def __init__(self, reduction_factor=2, **kwargs):
        super().__init__(**kwargs)
        self.reduction_factor = count("reduction_factor", reduction_factor, least=1)

    def build(self, input_shape):
        dim = input_shape[-1]
        if dim % 2:
            raise ValueError(f"`inputs` must have an even last axis. Received: {input_shape}")
        self.first = Bottleneck(self, "first_", dim // 2, self.reduction_factor)
        self.second = Bottleneck(self, "second_", dim // 2, self.reduction_factor)

    def call(self, inputs, inverse=False):
        a, b = ops.split(inputs, 2, axis=-1)
        if inverse:
            b = b - self.second(a)
            a = a - self.first(b)
        else:
            a = a + self.first(b)
            b = b + self.second(a)
        return ops.concatenate([a, b], axis=-1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "reduction_factor": self.reduction_factor}
