import keras
from keras import ops

from keras_cc.connections.connection import Connection
from keras_cc.layers.cc_feed_forward import CCFeedForward
from keras_cc.layers.decision_gate import INITIAL_GATE
from keras_cc.options import block_numbers, blocks, choice, count, number
from keras_cc.passes import pairing, positions

WITHOUT_PIVOT = ("bypass", "align", "transform")


@keras.saving.register_keras_serializable(package="keras_cc")
class FusedConnection(Connection):
    """The fused connection: at every connected layer, per dimension, gated.

        A     = align(F(p), F(x))                       pivot on the target's positions
        alpha = sigmoid(G (A - F(x)) + b)               Decision Maker
        Ff    = alpha * A + (1 - alpha) * F(x)          replaces F(x) while training
        T     = F(x) W                                  replaces F(x) at inference
        loss  = SFT + alignment_loss_weight * mean_layers mean_tokens error(T, Ff)

    An object of options, checked when it is made; `CCCausalLM` makes one
    `keras_cc.layers.CCFeedForward` a connected layer from it.

    Args:
        alignment: `"attention"` (softmax over the pivot's tokens), `"mean"`, `"last"`
            (the last prompt tokens of both streams alone), or `"answer"`: those, and then the
            answer's tokens, one by one, which the pivot's pass reads behind its own prompt. In
            `generate` with pivot prompts the pivot's pass is run anew for each token.
        gate: `"dimension"`, `"layer"` (one a token), or a float in [0, 1]: equal-weight
            fusion without a Decision Maker.
        transform: `"linear"`, `"low_rank"`, `"mlp"` (cannot be merged), or None.
        layers: `"all"`, `"upper"` (the upper third), or a sequence of decoder block numbers
            from 0; negative numbers count from the end.
        alignment_loss_weight: float >= 0, lambda. Unitless where the error is relative.
        dropout: float in [0, 1], connection dropout: the share of samples that, while
            training, go through `T` at every layer instead of the fusion. It closes the
            gap between training and inference: without it the target stream reads the
            answer off the pivot's activations and need not learn it. With 1 nothing is fused,
            and the connection is only what `T` learns to stand in for.
        without_pivot: what rows without a pivot (those in English) train. `"bypass"`: plain
            fine-tuning, they never meet `T`, though at inference they will. `"align"`: the
            alignment error draws their `T` to `F(x)` itself, so that the transform leaves English
            as it is. `"transform"`: connection dropout sends them through `T` too.
        sink_tokens: int >= 0, how many tokens at the start of both streams are left out of
            the connection. The first one (the start token) holds nothing of the prompt,
            and being an attention sink its activations are so large that they drown the
            others': connected, it ruins the model at any gate. 0 connects every token.
        initial_gate: float in (0, 1), the trained gate's value at the start.
        rank: int, inner width of `"low_rank"` and `"mlp"`.
        pivot_gradient: bool, whether gradients flow into the pivot's pass. Without, its
            backward pass costs nothing.
        alignment_gradient: `"transform"`, `"stream"` or `"full"`: what the alignment
            error trains, see `keras_cc.layers.CCFeedForward`.
        alignment_error: `"relative"` or `"plain"` squared error.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    connection = keras_cc.FusedConnection(alignment="mean", gate="layer", layers=range(2, 6))
    model = keras_cc.CCCausalLM(causal_lm, connection)
    ```

    Source: CC-Tuning (Ye et al., ACL 2025, arXiv 2506.00875), which selects one pivot
    layer and adds it once (`SelectedConnection`); here every layer is fused.
    """

    has_gates = True

    def __init__(
        self,
        alignment="attention",
        gate="dimension",
        transform="linear",
        layers="all",
        alignment_loss_weight=1.0,
        dropout=0.5,
        without_pivot="bypass",
        sink_tokens=1,
        initial_gate=INITIAL_GATE,
        rank=16,
        pivot_gradient=False,
        alignment_gradient="transform",
        alignment_error="relative",
    ):
        self.alignment = alignment
        self.gate = gate
        self.transform = transform
        self.layers = blocks("layers", layers)
        self.alignment_loss_weight = number("alignment_loss_weight", alignment_loss_weight)
        self.dropout = number("dropout", dropout, most=1)
        self.without_pivot = choice("without_pivot", without_pivot, WITHOUT_PIVOT)
        self.sink_tokens = count("sink_tokens", sink_tokens)
        self.initial_gate = initial_gate
        self.rank = rank
        self.pivot_gradient = pivot_gradient
        self.alignment_gradient = alignment_gradient
        self.alignment_error = alignment_error
        # The layer knows what its options take: build one now, so that a wrong value is
        # refused here and not when a model is connected.
        self.wrap(keras.layers.Identity())

    def wrap(self, inner, **kwargs):
        """The `CCFeedForward` around `inner` that these options describe."""
        return CCFeedForward(
            inner,
            alignment=self.alignment,
            gate=self.gate,
            initial_gate=self.initial_gate,
            transform=self.transform,
            rank=self.rank,
            pivot_gradient=self.pivot_gradient,
            alignment_gradient=self.alignment_gradient,
            alignment_error=self.alignment_error,
            **kwargs,
        )

    @property
    def reads_answer(self):
        return self.alignment == "answer"

    @property
    def pivot_is_constant(self):
        return not self.pivot_gradient

    @property
    def aligns_all(self):
        return self.without_pivot == "align"

    @property
    def learns_from_prompts(self):
        return self.transform is not None and self.alignment_loss_weight > 0

    @property
    def obstacle(self):
        return "a non-linear transform is no matrix" if self.transform == "mlp" else None

    @property
    def packs(self):
        return not self.reads_answer  # which goes on over one answer behind one pivot

    def block_numbers(self, num_blocks):
        """The connected blocks of a model with `num_blocks`, sorted, from 0."""
        return block_numbers("layers", self.layers, num_blocks)

    def pivot_pass(self, mask, num_blocks, segments=None):
        return pairing.PivotPass(positions.beyond(mask, self.sink_tokens, segments))

    def target_pass(self, inputs, pivot, layers, training=False, seed=None):
        real = ops.cast(inputs["padding_mask"], "bool")
        segments, readable = inputs.get("segment_ids"), None
        fused = positions.beyond(real, self.sink_tokens, segments)
        if self.alignment == "last":
            fused = ops.logical_and(fused, _last_prompt(real, inputs))
        places = None
        if self.reads_answer:
            behind, places = _behind_prompts(inputs)
            fused = ops.logical_and(fused, behind >= 0)
        if segments is None:
            has_pivot = ops.any(pivot.mask, axis=1, keepdims=True)  # (B, 1), for all its tokens
        else:
            readable = positions.same(segments, inputs["pivot_segment_ids"])
            readable = ops.logical_and(readable, pivot.mask[:, None, :])
            has_pivot = ops.any(readable, axis=2)  # (B, T)
        aligned = ops.ones_like(has_pivot) if self.aligns_all else has_pivot
        scope = pairing.TargetPass(
            pivot,
            mask=ops.logical_and(real, aligned),
            fused=ops.logical_and(fused, has_pivot),
            places=places,
            readable=readable,
        )
        if training and self.dropout > 0:
            scope.through_transform = self._dropped(has_pivot, segments, seed)
        return scope

    def _dropped(self, has_pivot, segments, seed):
        """The pairs that go through the transform, bool `(B, 1)` or of packed rows `(B, T)`."""
        rows, length = ops.shape(has_pivot)
        if segments is None:
            sample = keras.random.uniform((rows,), seed=seed)[:, None]
        else:  # a number for each pair that there could be, and padding
            sample = keras.random.uniform((rows, length + 1), seed=seed)
            sample = ops.take_along_axis(sample, ops.cast(segments, "int32"), axis=1)
        dropped = sample < self.dropout
        return dropped if self.without_pivot == "transform" else ops.logical_and(has_pivot, dropped)

    def extend(self, scope, inputs):
        if self.alignment == "last":
            return
        # What is generated is fused as well (it takes the place of the padding).
        has_pivot = ops.any(scope.pivot.mask, axis=1, keepdims=True)
        padding = ops.logical_not(ops.cast(inputs["padding_mask"], "bool"))
        scope.fused = ops.logical_or(scope.fused, ops.logical_and(has_pivot, padding))

    def outputs(self, scope):
        errors = scope.alignment_errors or [ops.zeros_like(scope.gate_sums[0])]
        return {
            "alignment_error": sum(errors) / len(errors),
            "alignment_tokens": _count(scope.mask),
            "gate": sum(scope.gate_sums) / len(scope.gate_sums),
            "gate_tokens": _count(scope.fused),
        }

    def get_config(self):
        return {
            "alignment": self.alignment,
            "gate": self.gate,
            "transform": self.transform,
            "layers": self.layers,
            "alignment_loss_weight": self.alignment_loss_weight,
            "dropout": self.dropout,
            "without_pivot": self.without_pivot,
            "sink_tokens": self.sink_tokens,
            "initial_gate": self.initial_gate,
            "rank": self.rank,
            "pivot_gradient": self.pivot_gradient,
            "alignment_gradient": self.alignment_gradient,
            "alignment_error": self.alignment_error,
        }


def _last_prompt(real, inputs):
    """True at each pair's last prompt token."""
    if "segment_ids" in inputs:
        return positions.last_prompts(real, inputs["answer_mask"], inputs["segment_ids"])
    return positions.last_prompt(real, inputs.get("answer_mask"))


def _behind_prompts(inputs):
    """How far behind its last prompt token each position is, and the pivot's that is as far.

    Both int32 `(B, T)`, the first below 0 before the last prompt token.
    """
    start = positions.answer_start(inputs)
    length = ops.sum(ops.cast(inputs["pivot_padding_mask"], "int32"), axis=1)
    place = ops.arange(ops.shape(inputs["token_ids"])[1], dtype="int32")
    behind = place[None, :] - (start - 1)[:, None]
    return behind, behind + (length - 1)[:, None]


def _count(mask):
    return ops.sum(ops.cast(mask, "float32"), axis=1)
