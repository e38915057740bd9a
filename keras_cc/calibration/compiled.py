import keras
from keras import ops

from keras_cc.backbones import surgery
from keras_cc.distribution import shared_out


class Compiled(keras.Model):
    """A function of a model's inputs, compiled once on every backend.

    Keras compiles a model's `predict_on_batch`; wrapping a function as the `call` of one gives
    the same on all backends, weights passed in and not burnt in. On several devices of JAX, each
    computes its part of the rows.

    Args:
        model: the `keras.Model` whose weights `function` reads.
        function: from a dict of tensors to a dict of tensors.

    Example:

    ```python
    twice = Compiled(model, lambda x: {"logits": 2 * model(x)["logits"]})
    twice.run(x)["logits"]  # a NumPy array
    ```
    """

    def __init__(self, model, function):
        super().__init__()
        self.model = model
        self._function = function
        self.built = True
        surgery.mark_built(self)

    def call(self, inputs):
        return self._function(inputs)

    def run(self, inputs):
        """The function's outputs for a dict of arrays, as NumPy arrays."""
        outputs = self.predict_on_batch(shared_out(inputs))
        return {name: ops.convert_to_numpy(value) for name, value in outputs.items()}
