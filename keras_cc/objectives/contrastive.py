import keras
from keras import ops

from keras_cc import losses
from keras_cc.objectives.objective import Objective, content_masks, pool, unit
from keras_cc.options import block_number, block_or_share, choice, count, flag, number

POOLINGS = ("mean", "last")


@keras.saving.register_keras_serializable(package="keras_cc")
class Contrastive(Objective):
    """InfoNCE: each target prompt finds its own pivot among the batch's.

    With `t_b` and `p_b` the pooled prompts of row `b` at one block, over the rows that
    have a pivot:

        L_b = - log ( exp(cos(t_b, p_b) / tau) / sum_c exp(cos(t_b, p_c) / tau) )

    Each such row counts once. A row without a pivot is neither an anchor nor a negative.
    A batch with fewer than two pivots has no negatives: all its values and counts are 0.
    The loss knows rows, not texts: two rows with the same pivot, say one question in two
    languages, are each other's negatives, and neither loss falls below log 2. Batch such
    rows apart. The negatives are those of one batch; rows on other replicas are not seen.

    One direction only, the target as the anchor. So does mid-align's code: its
    `LogSoftmax(0)` runs over the rows of a matrix cos(text_parallel_1[row],
    text_parallel_0[column]), and in its example data `text_parallel_1` is the English one.

    Args:
        layer: an integer (a block number from 0; negative: from the end), or a float in
            (0, 1), the share of the blocks that have run at its output. mid-align's layer
            16 of 32 is 0.5, or block 15; AFP's layer 1 is block 0.
        pooling: `"mean"` (of the prompt's tokens) or `"last"` (the last prompt token).
        temperature: float > 0, tau. 0.1 in mid-align, 0.05 in AFP.
        pivot_gradient: bool, whether gradients flow into the pivot's states. Without, the
            target's are drawn to the pivot's; with, they meet.
        sink_tokens: int >= 0, how many tokens at the start of both streams are left out
            (mid-align leaves none out). The first one is an attention sink: it holds
            nothing of the prompt, and its states are so large that they decide a mean
            alone. A row without a token beyond them, on either side, is not counted.
        alternating: bool, whether training steps take turns between the task loss and this
            one, as mid-align's do. AFP's add this loss and 1.5 times the language-modelling
            loss up.
        weight: float >= 0, the loss's weight beside the task loss.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    keras_cc.objectives.Contrastive().target_blocks(32)  # (15,): mid-align
    afp = keras_cc.objectives.Contrastive(
        layer=0, pooling="last", temperature=0.05, alternating=False, weight=1 / 1.5
    )
    ```

    Source: mid-align (Liu and Niehues, ACL 2025, arXiv 2502.14830, dannigt/mid-align); AFP
    (NAACL 2024, chongli17/CrossLingualAlignment).
    """

    name = "contrastive"
    least_rows = 2

    def __init__(
        self,
        layer=0.5,
        pooling="mean",
        temperature=0.1,
        pivot_gradient=True,
        sink_tokens=1,
        alternating=True,
        weight=1.0,
    ):
        super().__init__(weight, alternating)
        self.layer = block_or_share("layer", layer)
        self.pooling = choice("pooling", pooling, POOLINGS)
        self.temperature = number("temperature", temperature, positive=True)
        self.pivot_gradient = flag("pivot_gradient", pivot_gradient)
        self.sink_tokens = count("sink_tokens", sink_tokens)

    def target_blocks(self, num_blocks):
        return (block_number("layer", self.layer, num_blocks),)

    def pivot_blocks(self, num_blocks):
        return self.target_blocks(num_blocks)

    def __call__(self, states):
        (layer,) = self.target_blocks(states.num_blocks)
        target_mask, pivot_mask, candidates = content_masks(states, self.sink_tokens)
        target = unit(pool(states.target[layer], target_mask, self.pooling))
        pivot = unit(pool(states.pivot[layer], pivot_mask, self.pooling))
        if not self.pivot_gradient:
            pivot = ops.stop_gradient(pivot)
        similarity = ops.matmul(target, ops.transpose(pivot)) / self.temperature  # (B, B)
        similarity = ops.where(candidates[None, :], similarity, -1e9)
        values = losses.token_cross_entropy(similarity, ops.arange(ops.shape(similarity)[0]))
        enough = ops.sum(ops.cast(candidates, "int32")) >= self.least_rows
        counted = ops.logical_and(candidates, enough)
        return ops.where(counted, values, 0.0), ops.cast(counted, "float32")

    def get_config(self):
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "temperature": self.temperature,
            "pivot_gradient": self.pivot_gradient,
            "sink_tokens": self.sink_tokens,
            **super().get_config(),
        }
