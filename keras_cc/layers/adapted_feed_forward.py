import keras
from keras import ops

from keras_cc.layers.bottleneck_adapter import BottleneckAdapter


@keras.saving.register_keras_serializable(package="keras_cc")
class AdaptedFeedForward(keras.layers.Layer):
    """A feed-forward output projection with a language adapter and a task adapter after it.

        T = task(language(F(x))),      F the projection's output

    Args:
        inner: the `keras.layers.Layer` to adapt, usually the `Dense` or `EinsumDense` down
            projection of a decoder block.
        reduction_factor: int, of the language adapter, see `BottleneckAdapter`.
        task_reduction_factor: int, of the task adapter.

    Input shape:
        Whatever `inner` takes, `(batch, length, inner dim)`.

    Output shape:
        `inner`'s, `(batch, length, d)`.

    Raises:
        ValueError: if a factor is none.
        TypeError: if `inner` is not a Keras layer.

    Example:

    ```python
    layer = keras_cc.layers.AdaptedFeedForward(keras.layers.Dense(32))
    layer(keras.random.normal((2, 7, 64))).shape  # (2, 7, 32)
    ```

    Source: MAD-X (Pfeiffer et al., arXiv 2005.00052), section 4.1.
    """

    def __init__(self, inner, reduction_factor=2, task_reduction_factor=16, **kwargs):
        super().__init__(**kwargs)
        if isinstance(inner, dict):
            inner = keras.saving.deserialize_keras_object(inner)
        if not isinstance(inner, keras.layers.Layer):
            raise TypeError(f"`inner` must be a Keras layer. Received: inner={inner!r}")
        self.inner = inner
        self.language_adapter = BottleneckAdapter(
            reduction_factor, dtype=self.dtype_policy, name="language_adapter"
        )
        self.task_adapter = BottleneckAdapter(
            task_reduction_factor, dtype=self.dtype_policy, name="task_adapter"
        )

    def build(self, input_shape):
        if not self.inner.built:
            self.inner.build(input_shape)
        output_shape = self.inner.compute_output_shape(input_shape)
        self.language_adapter.build(output_shape)
        self.task_adapter.build(output_shape)

    def call(self, inputs):
        outputs = ops.cast(self.inner(inputs), self.compute_dtype)
        return self.task_adapter(self.language_adapter(outputs))

    def compute_output_shape(self, input_shape):
        return self.inner.compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "inner": keras.saving.serialize_keras_object(self.inner),
            "reduction_factor": self.language_adapter.reduction_factor,
            "task_reduction_factor": self.task_adapter.reduction_factor,
        }
