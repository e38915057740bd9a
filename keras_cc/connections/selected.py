import keras
from keras import ops

from keras_cc.connections.connection import Connection
from keras_cc.layers.layer_selector import LayerSelector
from keras_cc.layers.transform_matrix import TransformMatrix
from keras_cc.options import choice
from keras_cc.passes import pairing, positions


@keras.saving.register_keras_serializable(package="keras_cc")
class SelectedConnection(Connection):
    """The published connection: one pivot layer is selected and added at one position.

        a_l = F_l(p) at the pivot's last prompt token, l = 1..L
        e   = the target's input embedding at its last prompt token
        z   = S mean_l(a_l + e)                                   Decision Maker
        g   = gumbel_softmax(z, temperature, hard)                arg max at inference
        h_1 at the target's last prompt token  +=  sum_l g_l a_l
        loss = SFT(answer tokens)

    `h_1` is the output of the first decoder block, `e` what enters it. Gradients flow through
    both passes. A row without a pivot is a plain row.

    At inference, without the pivot prompt, a first pass collects the target prompt's own
    activations, and `a_l X` takes the place of `a_l`. One matrix `X` serves all layers: the
    identity until `CCCausalLM.fit_transform` fits it, after training. What is added depends on
    the prompt, so `merge()` cannot fold it: keep the `CCCausalLM` for inference. (Without a
    transform there is nothing to fold.)

    Args:
        temperature: float > 0, of the Gumbel softmax.
        transform: `"linear"`, or None: then nothing is added without the pivot prompt.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    model = keras_cc.CCCausalLM(causal_lm, keras_cc.SelectedConnection(temperature=0.5))
    model.compile(keras.optimizers.AdamW(1e-5))
    model.fit(rows)
    model.fit_transform(rows)
    ```

    Source: CC-Tuning (Ye et al., ACL 2025, arXiv 2506.00875), and the authors' code. That one
    leaves the Gumbel noise on at inference; here inference is deterministic.
    """

    needs_taps = True

    def __init__(self, temperature=1.0, transform="linear"):
        self.transform = choice("transform", transform, ("linear", None))
        self.temperature = LayerSelector(temperature).temperature  # checked there

    @property
    def obstacle(self):
        if self.transform is None:
            return None
        return "what it adds depends on the prompt, and needs a first pass over it"

    def own_layers(self, num_blocks, dim):
        selector = LayerSelector(self.temperature, dtype="float32", name="layer_selector")
        selector.build((None, num_blocks, dim), (None, dim))
        layers = {"layer_selector": selector}
        if self.transform is not None:
            # Fitted in closed form; the loss does not depend on it.
            matrix = TransformMatrix(dtype="float32", name="pooled_transform", trainable=False)
            matrix.build((None, num_blocks, dim))
            layers["pooled_transform"] = matrix
        return layers

    def pivot_pass(self, mask, num_blocks, segments=None):
        return pairing.PivotPass(mask, observed=_activation_sites(num_blocks))

    def target_pass(self, inputs, pivot, layers, training=False, seed=None):
        last = positions.last_prompt(pivot.mask)
        activations = _activations(pivot, last)
        real = ops.cast(inputs["padding_mask"], "bool")
        where = positions.last_prompt(real, inputs.get("answer_mask"))
        where = ops.logical_and(where, ops.any(last, axis=1, keepdims=True))
        return _AdditionPass(activations, where, layers["layer_selector"], training)

    def own_pass(self, num_blocks):
        if self.transform is None:
            return None
        return pairing.Pass(observed=_activation_sites(num_blocks))

    def monolingual_pass(self, inputs, own, layers):
        if own is None:
            return pairing.Pass()
        real = ops.cast(inputs["padding_mask"], "bool")
        where = positions.last_prompt(real, inputs.get("answer_mask"))
        activations = layers["pooled_transform"](_activations(own, where))
        return _AdditionPass(activations, where, layers["layer_selector"], training=False)

    def outputs(self, scope):
        has_pivot = ops.any(scope.where, axis=1, keepdims=True)
        return {"selection": ops.where(has_pivot, scope.choice, ops.zeros_like(scope.choice))}

    def get_config(self):
        return {"temperature": self.temperature, "transform": self.transform}


class _AdditionPass(pairing.Pass):
    """A pass that selects when the embedding comes by, and adds to the first block's output.

    In cached generation it selects in the prefill. KerasHub computes some prompt tokens a second
    time afterwards; the addition belongs to a position, so it is there again.
    """

    def __init__(self, activations, where, selector, training):
        super().__init__()
        self.activations = activations  # (B, L, d)
        self.where = where  # (B, T), True at the last prompt token
        self.selector = selector
        self.training = training
        self.choice = self.addition = None
        self.edit(("embedding", 0), self._select)
        self.edit(("hidden", 0), self._add)

    def _select(self, value):
        if self.choice is None:
            embedding = positions.pick(value, self.where)
            self.choice = self.selector(self.activations, embedding, training=self.training)
            self.addition = ops.einsum("bl,bld->bd", self.choice, self.activations)
        return value

    def _add(self, value):
        addition = ops.cast(self.addition, value.dtype)[:, None]
        return ops.where(self.at(self.where, value)[..., None], value + addition, value)


def _activation_sites(num_blocks):
    return {("ffn", number) for number in range(num_blocks)}


def _activations(scope, where):
    """The feed-forward activations of every block at one position: float32 `(B, L, d)`."""
    sites = sorted(site for site in scope.states if site[0] == "ffn")
    return positions.pick_sites(scope, sites, where)
