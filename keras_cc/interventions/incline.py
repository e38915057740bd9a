import math
from numbers import Real

import keras
from keras import ops

from keras_cc.interventions.intervention import Intervention


@keras.saving.register_keras_serializable(package="keras_cc")
class Incline(Intervention):
    """INCLINE: the states of the last prompt token are moved towards the pivot's, by one matrix
    a layer.

        W_l = argmin_W  sum || z_l(x) W - z_l(p) ||^2        at the last prompt tokens of ~500 pairs
        z_l(x) at the last prompt token  <-  z_l(x) + sigma z_l(x) W_l

    `z_l` on the right is of a plain pass over the prompt, as in the authors' code; what is
    generated is not changed itself. The matrices are zeros, and nothing changes, until
    `CCCausalLM.fit_transform` fits them. Inference needs the target language alone.

    Args:
        sigma: float, how far. The authors sweep it over [-1, 1] for each task and language; see
            `keras_cc.search`.
        site: `"hidden"` (best on XCOPA, 65.2), `"ffn"` (64.2) or `"attention"` (63.9).

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    model = keras_cc.CCCausalLM(causal_lm, connection=None)
    model.intervention = keras_cc.Incline(sigma=0.2, site="ffn")
    model.fit_transform(rows)
    model.compile(sampler="greedy")
    model.generate("Kenya'nın para birimi nedir?", max_length=32)
    ```

    Source: INCLINE (Wang et al., arXiv 2410.12462; weixuan-wang123/INCLINE). Reported averages,
    base / INCLINE: XCOPA 61.6 / 65.2, XStoryCloze 75.0 / 79.9, XNLI 46.5 / 48.1, XWinograd
    57.1 / 59.4.
    """

    swept_options = ("sigma",)

    def __init__(self, sigma=0.1, site="hidden"):
        super().__init__(site)
        if not isinstance(sigma, Real) or isinstance(sigma, bool) or not math.isfinite(sigma):
            raise ValueError(f"`sigma` must be a number. Received: sigma={sigma!r}")
        self.sigma = float(sigma)

    def build(self, num_blocks, dim):
        if self.matrices:  # taken off a model, and set again
            here = (len(self.matrices), int(self.matrices[0].kernel.shape[0]))
            if here != (num_blocks, dim):
                raise ValueError(
                    f"`intervention` has matrices for {here[0]} blocks of width {here[1]}: make a "
                    f"new one. Received: a model with {num_blocks} blocks of width {dim}"
                )
            return
        layers = {}
        for number in range(num_blocks):
            layers[number] = _Matrix(dtype="float32", name=f"incline_{number}")
            layers[number].build((None, dim))
        self.matrices = layers

    def edit(self, scope, where, states, swept=None):
        sigma = self.sigma if swept is None else swept[0, 0]
        for (kind, number), state in states.items():
            state = ops.cast(state, "float32")
            moved = state + sigma * self.matrices[number](state)

            def replace(value, moved=moved):
                here = scope.at(where, value)[..., None]
                return ops.where(here, ops.cast(moved, value.dtype)[:, None], value)

            scope.edit((kind, number), replace)

    def get_config(self):
        return {"sigma": self.sigma, "site": self.site}


class _Matrix(keras.layers.Layer):
    """`z W`, with a `W` that no training changes, whatever is frozen and thawed around it."""

    def build(self, input_shape):
        shape = (input_shape[-1], input_shape[-1])
        self.kernel = self.add_weight(
            name="kernel", shape=shape, initializer="zeros", trainable=False
        )

    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)
