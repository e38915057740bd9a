"""What Keras leaves out of a saved model, and training goes on from: LoRA and random seeds.

Keras saves a layer that carries LoRA with the matrices added into its kernel, and loads it with
both matrices zero: no gradient reaches either of two zeros, and training goes on without them. Of
random numbers it saves no state at all.
"""

import collections

import keras

from keras_cc.backbones import surgery

_SEED = "seed"


class TrainingState(keras.layers.Layer):
    """A part of a `CCCausalLM` that has no weights, and saves what is told above.

    Saved are the weights of each layer with LoRA as they are, and where each generator of random
    numbers stands. Keras reads a model's parts by their names, the causal LM before this, and what
    is here is put in the place of what was read there.

    Args:
        model: the `CCCausalLM` that it is a part of.
    """

    def __init__(self, model):
        super().__init__(dtype="float32", name="training_state")
        # A function, and not the model, which is not to become a part of its own part.
        self._model_of = lambda: model
        self._error = None
        self.built = True

    def save_own_variables(self, store):
        for number, layer in surgery.lora_layers(self._model_of().causal_lm).items():
            for variable in layer.variables:
                store[f"{number}.{variable.name}"] = variable
        for number, seed in enumerate(surgery.seeds(self._model_of())):
            store[f"{_SEED}.{number}"] = seed

    def load_own_variables(self, store):
        keys = [*store.keys()]
        if not keys and self._error is not None:
            # Keras asks again, by another path, and takes an answer for a success.
            error, self._error = self._error, None
            raise error
        layers = surgery.lora_layers(self._model_of().causal_lm)
        saved = collections.defaultdict(dict)
        for key in keys:
            number, name = key.split(".", 1)
            saved[number if number == _SEED else int(number)][name] = store[key]
        seeds, own = saved.pop(_SEED, {}), surgery.seeds(self._model_of())
        if len(seeds) == len(own):  # a model with another sampler or connection draws by its own
            for number, seed in enumerate(own):
                seed.assign(seeds[str(number)])
        if not layers:
            return  # the kernels that Keras has loaded hold the matrices
        if not saved:
            for layer in layers.values():
                _draw(layer)
            return
        own = {n: {v.name: v for v in layer.variables} for n, layer in layers.items()}
        shapes = {n: {k: tuple(v.shape) for k, v in some.items()} for n, some in own.items()}
        found = {n: {k: tuple(v.shape) for k, v in some.items()} for n, some in saved.items()}
        if shapes != found:
            self._error = ValueError(
                "The file must have LoRA of the same rank in the same layers as this model: make "
                "it with the rank and the layers that were saved. Received: a file with "
                f"{_said(found)}, for a model with {_said(shapes)}"
            )
            raise self._error
        for number, variables in own.items():
            for name, variable in variables.items():
                variable.assign(saved[number][name])


def _draw(layer):
    """Begin LoRA anew: the first matrix is drawn, as Keras does, and the second one is zero."""
    for variable in layer.variables:
        if variable.name.startswith("lora_") and variable.name.endswith("_a"):
            variable.assign(keras.initializers.HeUniform()(variable.shape, variable.dtype))


def _said(shapes):
    """How many layers there are, of which rank."""
    ranks = sorted({s[k][-1] for s in shapes.values() for k in s if k.endswith("_a")})
    return f"{len(shapes)} layers of rank {ranks}"
