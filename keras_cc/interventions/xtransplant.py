import keras
from keras import ops

from keras_cc.interventions.intervention import Intervention
from keras_cc.options import block, block_number, choice


@keras.saving.register_keras_serializable(package="keras_cc")
class XTransplant(Intervention):
    """XTransplant: an activation of the pivot's prompt takes the place of the target's own.

        z_j(x) at the last prompt token  <-  z_i(p) at the pivot's last prompt token

    `z` is the output of the feed-forward or of the attention, `i` the pivot's layer, `j` the
    target's. It changes the first step alone: what is generated attends to the change, and is
    not changed itself. It needs the pivot prompt at inference.

    Args:
        source_layer: int, block number `i`; negative numbers count from the end.
        target_layer: int, block number `j`.
        site: `"ffn"` or `"attention"`.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    model = keras_cc.CCCausalLM(causal_lm, connection=None)
    model.intervention = keras_cc.XTransplant(source_layer=6, target_layer=3)
    model.compile(sampler="greedy")
    question, english = "Kenya'nın para birimi nedir?", "What is the currency of Kenya?"
    model.generate(question, max_length=32, pivot_prompts=english)
    ```

    Source: XTransplant (Ye et al., arXiv 2412.12686; YYF-Tommy/XTransplant). There every pair of
    layers is tried, and the best one a question gives an upper bound; `keras_cc.search` picks one
    pair on a dev set.
    """

    needs_pivot = True
    swept_options = ("source_layer", "target_layer")

    def __init__(self, source_layer, target_layer, site="ffn"):
        super().__init__(site)
        choice("site", site, ("ffn", "attention"))
        self.source_layer = block("source_layer", source_layer)
        self.target_layer = block("target_layer", target_layer)

    def check(self, num_blocks):
        for name in ("source_layer", "target_layer"):
            block_number(name, getattr(self, name), num_blocks)

    def edit(self, scope, where, states, swept=None):
        num_blocks = len(states)
        if swept is None:
            source = states[self.site, self.source_layer % num_blocks]
            numbers = {self.target_layer % num_blocks: True}
        else:
            options = ops.cast(swept[0], "int32") % num_blocks
            stacked = ops.stack([states[self.site, n] for n in range(num_blocks)])
            source = ops.take(stacked, options[0], axis=0)
            numbers = {number: options[1] == number for number in range(num_blocks)}
        for number, is_target in numbers.items():

            def replace(value, is_target=is_target):
                here = ops.logical_and(scope.at(where, value), is_target)[..., None]
                return ops.where(here, ops.cast(source, value.dtype)[:, None], value)

            scope.edit((self.site, number), replace)

    def get_config(self):
        return {
            "source_layer": self.source_layer,
            "target_layer": self.target_layer,
            "site": self.site,
        }
