"""The fused connection in NumPy, written from its formulas: what the Keras code must equal.

A Llama 3 (RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head) whose
feed-forward outputs `F_l` are connected:

    A_l     = align(F_l(p), F_l(x))
    alpha_l = sigmoid((A_l - F_l(x)) G_l + b_l)
    Ff_l    = alpha_l A_l + (1 - alpha_l) F_l(x)
    T_l     = F_l(x) W_l
    loss    = SFT + lambda mean_l mean_tokens || T_l - Ff_l ||^2

Everything runs in float64, one row at a time, on its real tokens alone: there is no padding
and no mask here, which is how this differs from what it checks. It imports no Keras.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Options:
    """The options of `keras_cc.FusedConnection` that change a forward pass."""

    alignment: str = "attention"
    gate: "str | float" = "dimension"
    transform: "str | None" = "linear"
    layers: "tuple[int, ...]" = (0, 1)
    alignment_loss_weight: float = 1.0
    sink_tokens: int = 1
    alignment_error: str = "relative"
    without_pivot: str = "bypass"


@dataclasses.dataclass
class Reference:
    """A model: `weights` by the path that Keras gives them, and the numbers of heads."""

    weights: dict
    num_layers: int = 2
    rope_wavelength: float = 10000.0
    epsilon: float = 1e-6
    options: Options = dataclasses.field(default_factory=Options)

    def __post_init__(self):
        self.weights = {k: np.asarray(v, "float64") for k, v in self.weights.items()}

    # ------------------------------------------------------------ the stock model

    def norm(self, x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.epsilon) * self.weights[name]

    def rotate(self, x):
        """Rotary positions of `x`, (tokens, heads, head dim): pairs are (i, i + head dim / 2)."""
        tokens, _, dim = x.shape
        half = dim // 2
        result = np.empty_like(x)
        for position in range(tokens):
            for i in range(half):
                angle = position * self.rope_wavelength ** (-2 * i / dim)
                a, b = x[position, :, i], x[position, :, half + i]
                result[position, :, i] = a * math.cos(angle) - b * math.sin(angle)
                result[position, :, half + i] = b * math.cos(angle) + a * math.sin(angle)
        return result

    def project(self, x, block, name):
        """(tokens, heads, head dim), of `name` in query, key, value."""
        return np.einsum("td,dhk->thk", x, self.weights[f"{block}/self_attention/{name}/kernel"])

    def attention(self, x, block):
        query, key = (self.rotate(self.project(x, block, name)) for name in ("query", "key"))
        value = self.project(x, block, "value")
        output = self.weights[f"{block}/self_attention/attention_output/kernel"]
        heads, dim = query.shape[1:]
        group = heads // key.shape[1]  # query heads that share one key and value
        result = np.zeros_like(x)
        for t in range(len(x)):
            for head in range(heads):
                scores = key[: t + 1, head // group] @ query[t, head] / math.sqrt(dim)
                mixed = softmax(scores) @ value[: t + 1, head // group]
                result[t] += mixed @ output[head]
        return result

    def feed_forward(self, x, block):
        """`F_l`, (tokens, d)."""
        gate = x @ self.weights[f"{block}/feedforward_gate_dense/kernel"]
        up = x @ self.weights[f"{block}/feedforward_intermediate_dense/kernel"]
        silu = gate / (1 + np.exp(-gate))
        return (silu * up) @ self.weights[f"{block}/feedforward_output_dense/kernel"]

    def forward(self, token_ids, replace):
        """Logits, (tokens, vocabulary). `replace(l, F_l)` gives what goes on instead of `F_l`."""
        embeddings = self.weights["token_embedding/embeddings"]
        x = embeddings[token_ids]
        for number in range(self.num_layers):
            block = f"transformer_layer_{number}"
            x = x + self.attention(self.norm(x, f"{block}/self_attention_layernorm/scale"), block)
            normed = self.norm(x, f"{block}/feedforward_layernorm/scale")
            x = x + replace(number, self.feed_forward(normed, block))
        return self.norm(x, "sequence_output_layernorm/scale") @ embeddings.T

    # ------------------------------------------------------------ the connection

    def align(self, pivot, f):
        """`A_l` for one target token's `f`, (d,), from the pivot's activations (S, d)."""
        pivot = pivot[self.options.sink_tokens :]
        if self.options.alignment == "attention":
            return softmax(pivot @ f / math.sqrt(len(f))) @ pivot
        return pivot.mean(0) if self.options.alignment == "mean" else pivot[-1]

    def decide(self, number, difference):
        """`alpha_l`, (d,) or (1,)."""
        if not isinstance(self.options.gate, str):
            return np.full(1, float(self.options.gate))
        name = f"cc_feed_forward_{number}/decision_gate"
        logits = difference @ self.weights[f"{name}/kernel"] + self.weights[f"{name}/bias"]
        return 1 / (1 + np.exp(-logits))

    def transform(self, number, f):
        """`T_l`, (tokens, d)."""
        name = f"cc_feed_forward_{number}/transform_matrix"
        if self.options.transform is None or number not in self.options.layers:
            return f
        if self.options.transform == "linear":
            width = f.shape[-1]
            return f @ (np.eye(width) + self.weights[f"{name}/delta"] / np.sqrt(width))
        inner = f @ self.weights[f"{name}/down"]
        if self.options.transform == "mlp":
            inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        return f + inner @ self.weights[f"{name}/up"]

    def stock(self, token_ids):
        return self.forward(token_ids, lambda number, f: f)

    def monolingual(self, token_ids):
        return self.forward(token_ids, self.transform)

    def connected(self, token_ids, pivot_ids, last_prompt):
        """One row: logits, and a layer's mean gates and alignment errors, one a token."""
        pivot, length = {}, len(pivot_ids)
        by_token = self.options.alignment == "answer"
        if by_token:
            pivot_ids = np.concatenate([pivot_ids, token_ids[last_prompt + 1 :]])
        self.forward(pivot_ids, lambda number, f: pivot.setdefault(number, f))
        gates, errors = [], []

        def fuse(number, f):
            if number not in self.options.layers:
                return f
            fused = f.copy()
            ends = {"last": last_prompt + 1}.get(self.options.alignment, len(f))
            begins = last_prompt if self.options.alignment in ("last", "answer") else 0
            positions = range(max(begins, self.options.sink_tokens), ends)
            of_layer = []
            for t in positions:
                seen = pivot[number]
                a = seen[length - 1 + t - last_prompt] if by_token else self.align(seen, f[t])
                alpha = self.decide(number, a - f[t])
                fused[t] = alpha * a + (1 - alpha) * f[t]
                of_layer.append(alpha.mean())
            gates.append(of_layer)
            if self.options.transform is not None:
                errors.append(self.error(number, f, fused))
            return fused

        return self.forward(token_ids, fuse), gates, errors

    def error(self, number, f, goal):
        """Squared error of the transform at each token."""
        error = ((self.transform(number, f) - goal) ** 2).sum(-1)
        if self.options.alignment_error == "relative":
            error = error / ((goal**2).sum(-1) + 1e-6)
        return error

    def errors_towards_itself(self, token_ids):
        """One row without a pivot: a layer's alignment errors, one a token."""
        errors = {}

        def measure(number, f):
            if number in self.options.layers:
                errors[number] = self.error(number, f, f)
            return f

        self.forward(token_ids, measure)
        return list(errors.values())

    # ------------------------------------------------------------ a batch

    def batch(self, x, y, sample_weight):
        """What one step computes on a preprocessed batch.

        Returns:
            A dict: `logits` and `monolingual_logits`, a list of (tokens, vocabulary), one a
            row; `sft_loss`, `alignment_loss`, `loss`, `mean_gate`, and of the monolingual
            path `monolingual_loss` and `token_accuracy`.
        """
        logits, monolingual, gates, errors = [], [], [], []
        nats, own_nats, hits, count = 0.0, 0.0, 0, 0.0
        for row in range(len(y)):
            ids = x["token_ids"][row][x["padding_mask"][row] == 1]
            pivot_ids = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
            own = self.monolingual(ids)
            if len(pivot_ids) > self.options.sink_tokens:
                last_prompt = int(np.flatnonzero(x["answer_mask"][row])[0])
                of_row, row_gates, row_errors = self.connected(ids, pivot_ids, last_prompt)
                gates.append(row_gates)
                errors.append(row_errors)
            else:
                of_row = self.stock(ids)
                if self.options.without_pivot == "align":
                    errors.append(self.errors_towards_itself(ids))
            logits.append(of_row)
            monolingual.append(own)
            for t in np.flatnonzero(sample_weight[row]):
                weight = float(sample_weight[row, t])
                nats -= math.log(softmax(of_row[t])[y[row, t]]) * weight
                own_nats -= math.log(softmax(own[t])[y[row, t]]) * weight
                hits += int(own[t].argmax() == y[row, t]) * weight
                count += weight
        sft = nats / count
        alignment = mean_over_tokens_then_layers(errors)
        return {
            "logits": logits,
            "monolingual_logits": monolingual,
            "sft_loss": sft,
            "alignment_loss": alignment,
            "loss": sft + self.options.alignment_loss_weight * alignment,
            "mean_gate": mean_over_tokens_then_layers(gates),
            "monolingual_loss": own_nats / count,
            "token_accuracy": hits / count,
        }


def softmax(scores):
    exponentials = np.exp(scores - scores.max())
    return exponentials / exponentials.sum()


def mean_over_tokens_then_layers(rows):
    """`rows[row][layer]` are values a token; 0 where there is none."""
    by_layer = [np.concatenate(of_layer) for of_layer in zip(*rows, strict=True)]
    return float(np.mean([values.mean() for values in by_layer])) if by_layer else 0.0
