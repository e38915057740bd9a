import keras
from keras import ops

from keras_cc.options import number


@keras.saving.register_keras_serializable(package="keras_cc")
class LayerSelector(keras.layers.Layer):
    """The published Decision Maker: chooses one of the pivot's layers for each row.

        z = S mean_l(a_l + e)                              S: (d -> L), no bias
        y = softmax((z + noise) / temperature)             Gumbel noise while training, else none
        g = one_hot(argmax y) + y - stop_gradient(y)       hard forward, soft backward

    Args:
        temperature: float > 0. Lower makes `y`, and so the gradient, more like the choice.
        seed: int, of the noise, or None.

    Call arguments:
        activations: float tensor `(batch, L, d)`, the pivot's feed-forward activations `a_l` at
            its last prompt token.
        embedding: float tensor `(batch, d)`, the target's input embedding `e` at its last
            prompt token.
        training: bool, whether to draw noise.

    Returns:
        float tensor `(batch, L)`, one-hot.

    Raises:
        ValueError: if `temperature` is not a positive number.

    Example:

    ```python
    selector = keras_cc.layers.LayerSelector()
    choice = selector(keras.random.normal((2, 6, 16)), keras.random.normal((2, 16)))  # (2, 6)
    ```

    Source: CC-Tuning (Ye et al., ACL 2025, arXiv 2506.00875), `source_select` of the authors'
    code, which draws noise at inference too; the straight-through Gumbel softmax is
    Jang et al., arXiv 1611.01144.
    """

    def __init__(self, temperature=1.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.temperature = number("temperature", temperature, positive=True)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, activations_shape, embedding_shape=None):
        _, num_layers, dim = activations_shape
        self.kernel = self.add_weight(
            name="kernel",
            shape=(dim, num_layers),
            # As a linear layer of the authors' framework starts: uniform within 1/sqrt(d).
            initializer=keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform"),
        )

    def call(self, activations, embedding, training=False):
        scores = ops.matmul(ops.mean(activations, axis=1) + embedding, self.kernel)  # (B, L)
        if training:
            scores = scores + self.gumbel_noise(ops.shape(scores), scores.dtype)
        soft = ops.softmax(scores / self.temperature, axis=-1)
        hard = ops.one_hot(ops.argmax(scores, axis=-1), scores.shape[-1], dtype=soft.dtype)
        return ops.stop_gradient(hard - soft) + soft

    def gumbel_noise(self, shape, dtype):
        """`-log(-log(u))`, u uniform in (0, 1)."""
        uniform = keras.random.uniform(shape, 1e-7, 1.0, dtype=dtype, seed=self.seed_generator)
        return -ops.log(-ops.log(uniform))

    def compute_output_shape(self, activations_shape, embedding_shape=None):
        return tuple(activations_shape[:2])

    def get_config(self):
        config = super().get_config()
        config.update(temperature=self.temperature, seed=self.seed)
        return config
