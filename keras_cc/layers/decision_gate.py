import math

import keras
from keras import ops

from keras_cc.options import choice

GRANULARITIES = ("dimension", "layer")
INITIAL_GATE = 0.1


@keras.saving.register_keras_serializable(package="keras_cc")
class DecisionGate(keras.layers.Layer):
    """How much of the pivot's activation replaces the target's own (Decision Maker).

        alpha = sigmoid(G (a - f) + b)

    for aligned pivot activations `a` and target activations `f`, with `G` of shape
    `(d, d)` and `b` of shape `(d,)`, or `(d, 1)` and `(1,)` for `granularity="layer"`.
    `G` starts at zero, so that training starts from the constant gate `initial_gate`.
    Masks are the caller's: the gate looks at each token alone.

    Args:
        granularity: `"dimension"`, one gate a dimension and token, or `"layer"`, one a
            token.
        initial_gate: float strictly between 0 and 1, the gate's value at the start:
            `b = log(initial_gate / (1 - initial_gate))`.

    Call arguments:
        pivot: float tensor `(batch, length, d)`, or `(batch, 1, d)`, which broadcasts.
        target: float tensor `(batch, length, d)`.

    Returns:
        Float tensor in [0, 1], `(batch, length, d)`, or `(batch, length, 1)` for
        `granularity="layer"`. It has the layer's compute dtype; the weights have its
        variable dtype.

    Raises:
        ValueError: if an argument is not one of the above.

    Example:

    ```python
    gate = keras_cc.layers.DecisionGate()
    pivot, target = keras.random.normal((2, 1, 8)), keras.random.normal((2, 7, 8))
    gate(pivot, target).shape  # (2, 7, 8)
    ```

    Source: the Decision Maker of CC-Tuning (Ye et al., arXiv 2506.00875), here one
    decision a dimension where the paper's selects one layer.
    """

    def __init__(self, granularity="dimension", initial_gate=INITIAL_GATE, **kwargs):
        super().__init__(**kwargs)
        if not isinstance(initial_gate, (int, float)) or not 0 < initial_gate < 1:
            raise ValueError(
                "`initial_gate` must be a number strictly between 0 and 1 (for a constant gate, "
                f"give the connection `gate=0.5`). Received: initial_gate={initial_gate!r}"
            )
        self.granularity = choice("granularity", granularity, GRANULARITIES)
        self.initial_gate = initial_gate

    def build(self, pivot_shape, target_shape):
        dim = target_shape[-1]
        units = dim if self.granularity == "dimension" else 1
        self.kernel = self.add_weight(name="kernel", shape=(dim, units), initializer="zeros")
        logit = math.log(self.initial_gate / (1 - self.initial_gate))
        self.bias = self.add_weight(
            name="bias", shape=(units,), initializer=keras.initializers.Constant(logit)
        )

    def call(self, pivot, target):
        return ops.sigmoid(ops.matmul(pivot - target, self.kernel) + self.bias)

    def compute_output_shape(self, pivot_shape, target_shape):
        units = target_shape[-1] if self.granularity == "dimension" else 1
        return (*target_shape[:-1], units)

    def get_config(self):
        config = super().get_config()
        config.update(granularity=self.granularity, initial_gate=self.initial_gate)
        return config
