"""A model as it was before it was trained: frozen copies of its weights, and a scope that has them.

Notable choices:

- A weight is copied when it is first trained, so that it may be frozen, thawed or given LoRA until
  then; what was never trained is what it was, and costs nothing.
- The same backbone runs with other values (`keras.StatelessScope`), instead of a second one.
- Copies go by their weight's path: a loaded model has them before it knows what it will train.
"""

import keras
from keras import ops


class UntrainedWeights(keras.layers.Layer):
    """Keeps what trained weights of a backbone were.

    Args:
        num_blocks: int, of how many decoder blocks, from the first one on.
    """

    def __init__(self, num_blocks):
        super().__init__(dtype="float32", name="untrained_weights")
        self.num_blocks = num_blocks
        self.built = True

    def keep(self, backbone):
        """Copy what is trainable now and has no copy yet.

        Args:
            backbone: a KerasHub backbone.

        Returns:
            Whether there was anything.
        """
        later = backbone.transformer_layers[self.num_blocks :]
        later = {id(variable) for block in later for variable in block.variables}
        copies = self._copies()
        new = [
            variable
            for variable in backbone.trainable_variables
            if id(variable) not in later and _name(variable) not in copies
        ]
        for variable in new:
            self._copy(_name(variable), variable.value)
        return bool(new)

    def scope(self, backbone):
        """A context in which the backbone's weights have the values that they had.

        Args:
            backbone: the backbone that `keep` was given.
        """
        copies = self._copies()
        # Every weight, not the copied ones alone: a scope hides the values of those around it.
        return keras.StatelessScope(
            [(v, copies.get(_name(v), v).value) for v in backbone.variables]
        )

    def save_own_variables(self, store):
        for copy in self.variables:
            store[copy.name] = copy

    def load_own_variables(self, store):
        copies = self._copies()
        for name in [*store.keys()]:
            if name in copies:
                copies[name].assign(store[name])
            else:
                self._copy(name, store[name])

    def _copies(self):
        return {copy.name: copy for copy in self.variables}

    def _copy(self, name, value):
        dtype = keras.backend.standardize_dtype(value.dtype)
        copy = self.add_weight(
            shape=tuple(value.shape), dtype=dtype, initializer="zeros", trainable=False, name=name
        )
        # JAX gives each buffer away with its variable: two must not share one.
        copy.assign(ops.copy(value))


def _name(variable):
    return variable.path.replace("/", "|")
