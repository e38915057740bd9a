import keras
from keras import ops

from keras_cc.objectives.objective import Objective, content_masks, pool, unit
from keras_cc.options import block_number, block_or_share, choice, count, flag

FORMS = ("feature", "logit")
POOLINGS = ("last", "mean")


@keras.saving.register_keras_serializable(package="keras_cc")
class DFT(Objective):
    """Deep supervision: the target's bottom and middle blocks follow the pivot's.

    With `i` the bottom block, `j` the middle one, `L` the last, `h` a stream's pooled
    prompt, `q(h) = softmax(lens(h))` what the frozen final norm and head read in it, and
    `y_1 .. y_n` the pivot prompt's tokens:

        feature:  (1 - cos(h_i pivot, h_i target)) + (1 - cos(h_L pivot, h_j target))
        logit:    - mean_s log q(h_i target)[y_s]
                  - sum_v q(h_L pivot)[v] log q(h_j target)[v]

    The first term supervises the conversion into English, the second one thinking in it.
    Each row with a pivot counts once.

    The paper's: the two terms with equal weights, the cosine of the feature form, and for
    the logit form a cross-entropy of the English text at `i` and of the English answer at
    `j`, through the model's head.

    Ours, where the paper did not tell us or a pair has not what it asks for:

    - Which blocks `i` and `j` are by default, and the pooling over the prompt.
    - The pivot's states are constants (`pivot_gradient=False`): English is the teacher.
    - Logit form, bottom: the streams have different lengths, so that no position of one
      belongs to a position of the other. One distribution, at the target's last prompt
      token, is asked for all of the pivot's tokens: a bag of words.
    - Logit form, middle: rows carry no English answer. The model's own stands in for it,
      its next-token distribution at the pivot's last prompt token, as a constant. The
      loss is a cross-entropy: at its least it equals the entropy of that distribution.

    The paper reports of LLaMA-2-7B, SFT / logit / feature: XNLI zh 36.4 / 36.9 / 37.6,
    XCOPA zh 65.0 / 66.4 / 68.6, XStoryCloze ar 49.7 / 58.8 / 58.8, MMLU zh 30.5 / 33.2 /
    32.8. The logit form ruined translation from English into Chinese, COMET from 68 down to
    37, where the feature form helped (75.6): prefer the feature form.

    Args:
        form: `"feature"` or `"logit"`.
        bottom: the block `i`: an integer (a block number from 0; negative: from the end),
            or a float in (0, 1), the share of the blocks that have run at its output. 0.25
            is our choice.
        middle: the block `j`, likewise. 0.5 is our choice.
        pooling: `"last"` (the last prompt token) or `"mean"` (of the prompt's tokens). The
            logit form reads the last prompt token: `"last"` alone.
        pivot_gradient: bool, whether gradients flow into the pivot's states. The logit form
            has none to let through: False alone.
        sink_tokens: int >= 0, how many tokens at the start of both streams are left out.
            The first one is an attention sink: it holds nothing of the prompt, and its
            states are so large that they decide a mean alone. A row without a token beyond
            them, on either side, is not counted.
        weight: float >= 0, the loss's weight beside the task loss.
        alternating: bool, whether training steps take turns between the task loss and this
            one. The paper adds them up.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    objective = keras_cc.objectives.DFT(bottom=4, middle=0.5, pooling="mean")
    objective.target_blocks(18), objective.pivot_blocks(18)  # (4, 8), (4, 17)
    ```

    Source: Deep Supervision Fine-Tuning (Huo et al., arXiv 2503.01275).
    """

    name = "dft"

    def __init__(
        self,
        form="feature",
        bottom=0.25,
        middle=0.5,
        pooling="last",
        pivot_gradient=False,
        sink_tokens=1,
        weight=1.0,
        alternating=False,
    ):
        super().__init__(weight, alternating)
        self.form = choice("form", form, FORMS)
        self.bottom = block_or_share("bottom", bottom)
        self.middle = block_or_share("middle", middle)
        self.pooling = choice("pooling", pooling, POOLINGS)
        self.pivot_gradient = flag("pivot_gradient", pivot_gradient)
        self.sink_tokens = count("sink_tokens", sink_tokens)
        if form == "logit" and pooling != "last":
            raise ValueError(
                '`pooling` must be "last" with form="logit", which reads the last prompt token. '
                f"Received: pooling={pooling!r}"
            )
        if form == "logit" and pivot_gradient:
            raise ValueError(
                '`pivot_gradient` must be False with form="logit", whose goals are the pivot\'s '
                f"tokens and a constant distribution. Received: pivot_gradient={pivot_gradient!r}"
            )

    def target_blocks(self, num_blocks):
        bottom, middle, _ = self._blocks(num_blocks)
        return tuple(sorted({bottom, middle}))

    def pivot_blocks(self, num_blocks):
        bottom, _, last = self._blocks(num_blocks)
        return tuple(sorted({bottom, last})) if self.form == "feature" else (last,)

    def __call__(self, states):
        target_mask, pivot_mask, counted = content_masks(states, self.sink_tokens)
        loss = self._feature if self.form == "feature" else self._logit
        values = ops.where(counted, loss(states, target_mask, pivot_mask), 0.0)
        return values, ops.cast(counted, "float32")

    def get_config(self):
        return {
            "form": self.form,
            "bottom": self.bottom,
            "middle": self.middle,
            "pooling": self.pooling,
            "pivot_gradient": self.pivot_gradient,
            "sink_tokens": self.sink_tokens,
            **super().get_config(),
        }

    def _blocks(self, num_blocks):
        bottom = block_number("bottom", self.bottom, num_blocks)
        return bottom, block_number("middle", self.middle, num_blocks), num_blocks - 1

    def _feature(self, states, target_mask, pivot_mask):
        bottom, middle, last = self._blocks(states.num_blocks)
        loss = 0.0
        for pivot_block, target_block in ((bottom, bottom), (last, middle)):
            pivot = pool(states.pivot[pivot_block], pivot_mask, self.pooling)
            target = pool(states.target[target_block], target_mask, self.pooling)
            if not self.pivot_gradient:
                pivot = ops.stop_gradient(pivot)
            loss += 1.0 - ops.sum(unit(pivot) * unit(target), axis=-1)
        return loss

    def _logit(self, states, target_mask, pivot_mask):
        bottom, middle, last = self._blocks(states.num_blocks)
        target = [states.target[bottom], states.target[middle]]
        read = ops.log_softmax(_lens(states.lens, target, target_mask), axis=-1)  # (B, 2, V)
        picked = ops.take_along_axis(read[:, 0], ops.cast(states.pivot_token_ids, "int32"), axis=-1)
        conversion = -pool(picked[..., None], pivot_mask, "mean")[:, 0]
        answer = ops.stop_gradient(_lens(states.lens, [states.pivot[last]], pivot_mask))
        thinking = -ops.sum(ops.softmax(answer[:, 0], axis=-1) * read[:, 1], axis=-1)
        return conversion + thinking


def _lens(lens, blocks, mask):
    """The logits, float32 `(B, len(blocks), vocabulary)`, at the last token in `mask`."""
    # Pooled in float32, and given to the head in the dtype that the blocks gave.
    at_last = [ops.cast(pool(hidden, mask, "last"), hidden.dtype) for hidden in blocks]
    return ops.cast(lens(ops.stack(at_last, axis=1)), "float32")
