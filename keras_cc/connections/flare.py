import keras
from keras import ops

from keras_cc.connections.connection import Connection
from keras_cc.layers.flare_projection import FlareProjection
from keras_cc.options import block_numbers, blocks
from keras_cc.passes import pairing, positions


@keras.saving.register_keras_serializable(package="keras_cc")
class FlareConnection(Connection):
    """FLARE: both languages fused in the bottleneck of LoRA, at query and value projections.

        t = x D,    s = align(p, x) D
        query, value  +=  alpha / rank * relu(s + t) U       with the pivot at hand
        query, value  +=  alpha / rank * t U                 without
        loss = SFT(answer tokens)

    `x` and `p` are what enters the projection in the target's pass and in the pivot's, which has
    no LoRA and gets no gradient. Rows without a pivot, positions past the pivot's end, and
    inference without the pivot prompt are plain LoRA, which `merge()` folds. As published, the
    model itself is frozen: `causal_lm.backbone.trainable = False` before it is connected.

    The authors' code differs in three things: English comes from the residual stream without its
    norm (in the paper from one block further up), all positions are fused, padding too, and its
    fusion is `relu(s) + relu(t)`.

    Args:
        rank: int, the width of the bottleneck.
        alpha: float > 0, LoRA's.
        alignment: which token of the pivot meets one of the target: `"position"`, as published:
            the one at the same position; `"attention"`, `"mean"` or `"last"`, see
            `keras_cc.layers.align`, the last with the target's last prompt token alone.
        layers: `"all"`, `"upper"` (the upper third), or a sequence of decoder block numbers
            from 0; negative numbers count from the end.

    Raises:
        ValueError: naming the option, what it takes and what was received; from `CCCausalLM`, for
            a family whose query, key and value are one projection.

    Example:

    ```python
    causal_lm.backbone.trainable = False
    model = keras_cc.CCCausalLM(causal_lm, keras_cc.FlareConnection(rank=4))
    model.compile(keras.optimizers.AdamW(1e-4))
    model.fit(rows)
    ```

    Source: FLARE (Borchert et al., ACL 2025, arXiv 2501.06892), github.com/pnborchert/FLARE.
    """

    def __init__(self, rank=8, alpha=16.0, alignment="position", layers="all"):
        self.rank = rank
        self.alpha = alpha
        self.alignment = alignment
        self.layers = blocks("layers", layers)
        self.wrap(keras.layers.Identity())  # the layer knows what its options take

    def paths(self, family):
        if family.query is None:
            raise ValueError(
                "FLARE needs projections of the query and the value, and in this family query, key "
                f"and value are one. Received: causal_lm.backbone={family.backbone}"
            )
        return {
            "query": f"{family.attention}.{family.query}",
            "value": f"{family.attention}.{family.value}",
        }

    def wrap(self, inner, **kwargs):
        return FlareProjection(inner, self.rank, self.alpha, self.alignment, **kwargs)

    def block_numbers(self, num_blocks):
        return block_numbers("layers", self.layers, num_blocks)

    def pivot_pass(self, mask, num_blocks, segments=None):
        return pairing.PivotPass(mask)

    def target_pass(self, inputs, pivot, layers, training=False, seed=None):
        real = ops.cast(inputs["padding_mask"], "bool")
        has_pivot = ops.any(pivot.mask, axis=1, keepdims=True)
        fused = ops.logical_and(real, has_pivot)
        if self.alignment == "last":
            last = positions.last_prompt(real, inputs.get("answer_mask"))
            fused = ops.logical_and(fused, last)
        return pairing.TargetPass(pivot, mask=fused, fused=fused)

    def english_pass(self, mask):
        return pairing.Pass()  # it has learnt the task in LoRA too

    def extend(self, scope, inputs):
        if self.alignment == "last":
            return
        # What is generated is fused as well (it takes the place of the padding).
        scope.fused = ops.ones_like(scope.fused)
        scope.fused = ops.logical_and(scope.fused, ops.any(scope.pivot.mask, axis=1, keepdims=True))

    def get_config(self):
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "alignment": self.alignment,
            "layers": self.layers,
        }
