import keras
from keras import ops

from keras_cc import losses
from keras_cc.objectives.objective import Objective, content_masks, pool
from keras_cc.options import block_number, block_or_share, choice, count, flag, number

POOLINGS = ("mean", "last")
ANCHOR_ERRORS = ("relative", "plain")


@keras.saving.register_keras_serializable(package="keras_cc")
class TRepLiNa(Objective):
    """CKA between the two prompts' states at one middle block, anchored to the untrained model.

    With `X` and `Y` the pooled prompts of the target and the pivot, `(rows, d)`, over the rows of
    a batch that have a pivot, each centred over them; with `h` the states of the target's prompt
    and `h0` those of the model as it was before it was trained:

        L    = (1 - CKA) + anchor * mean_rows mean_tokens error(h, h0)
        CKA  = || X^T Y ||^2 / (|| X^T X || || Y^T Y ||)           linear, in [0, 1]
        error: || h - h0 ||^2 / || h0 ||^2 ("relative"), or || h - h0 ||^2 / d ("plain")

    CKA compares geometries, not vectors: it does not change when one side is rotated or scaled.
    The anchor (REPINA, with the identity as its projection) keeps the target's states from being
    moved for its sake alone.

    **CKA is biased upwards where there are few rows for so many dimensions.** Of two rows it is 1
    whatever their states are (so there must be three). Of independent random states of 640
    dimensions it is 0.99 at 8 rows, 0.95 at 32, 0.83 at 128 and 0.50 at 640. States that vary in
    few directions are less so: in Gemma 3 270M, questions in Turkish and their English versions
    have 0.68 at 8 rows and 0.41 at 256, against 0.42 and 0.03 for English questions in another
    order. So its value says little across batch sizes, and at the batches of fine-tuning strangers
    are alike. Give it the largest batch that there is room for; with gradient accumulation it is
    that of each micro-batch.

    The paper's: the two terms, and in its code the block, `weight` 0.01 and 0.05 for the anchor's,
    which is 5 here, in units of `weight`. There CKA is taken over tokens, the n-th of one text
    against the n-th of the other, the anchor's error is the plain one, and it is left out of every
    second step. Ours are the pooling, since no position of one prompt belongs to a position of the
    other, and the relative error: in the middle of Gemma 3 270M the mean square of a state is
    37,000, and a change of one hundredth costs 3.7 by the plain one.

    `h0` needs what the trained weights were. The model keeps a frozen copy of those up to the block
    (with LoRA: of LoRA's matrices, which is next to nothing; else of the token embedding too where
    it is trained), from the first `fit` on, saves it with itself, and runs a second pass over the
    target's row without a gradient. A model that is saved with LoRA comes back without it, and is
    its own new start. `anchor=0` costs none of that.

    Args:
        layer: an integer (a block number from 0; negative: from the end), or a float in
            (0, 1), the share of the blocks that have run at its output. 15 / 32 in the code.
        pooling: `"mean"` (of the prompt's tokens) or `"last"` (the last prompt token).
        anchor: float >= 0, the anchor's weight beside that of CKA; 0 for CKA alone.
        anchor_error: `"relative"` or `"plain"` squared error.
        pivot_gradient: bool, whether gradients flow into the pivot's states.
        sink_tokens: int >= 0, how many tokens at the start of both streams are left out. The
            first one is an attention sink, whose states are so large that they decide a mean and
            a squared error alone. A row without a token beyond them, on either side, is not
            counted.
        weight: float >= 0, the loss's weight beside the task loss.
        alternating: bool, whether training steps take turns between the task loss and this one.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    keras_cc.objectives.TRepLiNa().target_blocks(32)  # (14,)
    model = keras_cc.CCCausalLM(causal_lm, None, keras_cc.TRepLiNa(anchor=0.0))
    ```

    Source: TRepLiNa (Nakai et al., arXiv 2510.06249, konta3738/cka-repina-aya23); CKA is
    Kornblith et al.'s, arXiv 1905.00414, REPINA Razdaibiedina et al.'s, arXiv 2205.11603.
    """

    name = "treplina"
    least_rows = 3

    def __init__(
        self,
        layer=15 / 32,
        pooling="mean",
        anchor=5.0,
        anchor_error="relative",
        pivot_gradient=True,
        sink_tokens=1,
        weight=0.01,
        alternating=False,
    ):
        super().__init__(weight, alternating)
        self.layer = block_or_share("layer", layer)
        self.pooling = choice("pooling", pooling, POOLINGS)
        self.anchor = number("anchor", anchor)
        self.anchor_error = choice("anchor_error", anchor_error, ANCHOR_ERRORS)
        self.pivot_gradient = flag("pivot_gradient", pivot_gradient)
        self.sink_tokens = count("sink_tokens", sink_tokens)

    def target_blocks(self, num_blocks):
        return (block_number("layer", self.layer, num_blocks),)

    def pivot_blocks(self, num_blocks):
        return self.target_blocks(num_blocks)

    def untrained_blocks(self, num_blocks):
        return self.target_blocks(num_blocks) if self.anchor else ()

    def __call__(self, states):
        (layer,) = self.target_blocks(states.num_blocks)
        target_mask, pivot_mask, counted = content_masks(states, self.sink_tokens)
        target = pool(states.target[layer], target_mask, self.pooling)
        pivot = pool(states.pivot[layer], pivot_mask, self.pooling)
        if not self.pivot_gradient:
            pivot = ops.stop_gradient(pivot)
        values = 1.0 - _cka(target, pivot, counted)
        if self.anchor:
            moved = self._moved(states.target[layer], states.untrained[layer], target_mask)
            values = values + self.anchor * moved
        enough = ops.sum(ops.cast(counted, "int32")) >= self.least_rows
        counted = ops.logical_and(counted, enough)
        return ops.where(counted, values, 0.0), ops.cast(counted, "float32")

    def _moved(self, states, untrained, mask):
        """The mean error of each row's tokens in `mask`, float32 `(B,)`."""
        pair = (ops.cast(hidden, "float32") for hidden in (states, untrained))
        now, before = (ops.where(mask[..., None], hidden, 0.0) for hidden in pair)
        is_relative = self.anchor_error == "relative"
        error = losses.squared_error(now, before, relative=is_relative)
        error = error if is_relative else error / now.shape[-1]
        return pool(error[..., None], mask, "mean")[:, 0]

    def get_config(self):
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "anchor": self.anchor,
            "anchor_error": self.anchor_error,
            "pivot_gradient": self.pivot_gradient,
            "sink_tokens": self.sink_tokens,
            **super().get_config(),
        }


def _cka(one, other, counted):
    """Linear CKA of two float32 `(B, d)` over the rows that count, by their Gram matrices."""
    one, other = _gram(one, counted), _gram(other, counted)
    squares = ops.sum(ops.square(one)) * ops.sum(ops.square(other))
    return ops.sum(one * other) * ops.rsqrt(ops.maximum(squares, 1e-12))


def _gram(vectors, counted):
    """The Gram matrix `(B, B)` of centred vectors, 0 in the rows that do not count."""
    kept = counted[:, None]
    vectors = ops.where(kept, vectors, 0.0)
    rows = ops.maximum(ops.sum(ops.cast(counted, "float32")), 1.0)
    vectors = ops.where(kept, vectors - ops.sum(vectors, axis=0) / rows, 0.0)
    # CKA has no scale; a constant one keeps the fourth powers within float32.
    scale = ops.rsqrt(ops.maximum(ops.sum(ops.square(vectors)) / rows, 1e-12))
    vectors = vectors * ops.stop_gradient(scale)
    return ops.matmul(vectors, ops.transpose(vectors))
