"""The published connection in PyTorch float64, from its formulas: what the Keras code must equal.

A Llama 3 (RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head) of two streams,
the pivot's prompt p and the target's sequence x:

    a_l = F_l(p) at the pivot's last token                F_l: feed-forward output, no residual
    e   = embedding of the target's last prompt token     what enters the first decoder layer
    z   = S mean_l(a_l + e)                               S: (d -> L), no bias
    y   = softmax((z + noise) / temperature)
    g   = one_hot(argmax y) + y - stop_gradient(y)        straight-through
    h_1 at x's last prompt token += sum_l g_l a_l         h_1: output of the first decoder layer

Alone, without a pivot: a_l comes from x's own plain pass, a_l <- a_l X, and no noise is drawn.

One row at a time, on its real tokens alone: there is no padding, no mask and no cache here, which
is how this differs from what it checks. It imports no Keras; autograd gives its gradients.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference's gradients are PyTorch's")


class SelectedReference:
    """A model: `weights` by the path that Keras gives them, and the connection's two matrices.

    Args:
        weights: dict of arrays; paths that a Llama 3 backbone does not have are not read.
        S: `(d, L)`, the selection.
        X: `(d, d)`, the pooled matrix of monolingual inference, or None where it is not used.
        temperature: of the softmax.
    """

    def __init__(self, weights, S, X=None, temperature=1.0, rope_wavelength=10000.0, epsilon=1e-6):
        def leaf(value):
            return torch.tensor(np.asarray(value, "float64"), requires_grad=True)

        self.weights = {path: leaf(value) for path, value in weights.items()}
        self.S = leaf(S)
        self.X = None if X is None else leaf(X)
        self.temperature = temperature
        self.rope_wavelength = rope_wavelength
        self.epsilon = epsilon
        self.num_layers = sum(path.endswith("feedforward_layernorm/scale") for path in weights)
        dim = self.weights["token_embedding/embeddings"].shape[1]
        if self.S.shape != (dim, self.num_layers):
            raise ValueError(f"`S` must be (d, L). Received: S.shape={tuple(self.S.shape)}")

    # ------------------------------------------------------------ the stock model

    def norm(self, x, path):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.epsilon) * self.weights[path]

    def rotate(self, x):
        """Rotary positions of `x`, (tokens, heads, head dim): pairs are (i, i + head dim / 2)."""
        tokens, _, dim = x.shape
        frequencies = self.rope_wavelength ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
        angles = torch.arange(tokens, dtype=x.dtype)[:, None, None] * frequencies
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        cos, sin = torch.cos(angles), torch.sin(angles)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def attention(self, x, block):
        kernel = {
            name: self.weights[f"{block}/self_attention/{name}/kernel"]
            for name in ("query", "key", "value", "attention_output")
        }
        query = self.rotate(torch.einsum("td,dhk->thk", x, kernel["query"]))
        key = self.rotate(torch.einsum("td,dhk->thk", x, kernel["key"]))
        value = torch.einsum("td,dhk->thk", x, kernel["value"])
        group = query.shape[1] // key.shape[1]  # query heads that share one key and value
        key, value = (u.repeat_interleave(group, dim=1) for u in (key, value))
        scores = torch.einsum("thk,shk->hts", query, key) / query.shape[-1] ** 0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        probabilities = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        mixed = torch.einsum("hts,shk->thk", probabilities, value)
        return torch.einsum("thk,hkd->td", mixed, kernel["attention_output"])

    def feed_forward(self, x, block):
        """`F_l`, (tokens, d)."""
        gate = x @ self.weights[f"{block}/feedforward_gate_dense/kernel"]
        up = x @ self.weights[f"{block}/feedforward_intermediate_dense/kernel"]
        product = gate * torch.sigmoid(gate) * up
        return product @ self.weights[f"{block}/feedforward_output_dense/kernel"]

    def embed(self, token_ids):
        ids = torch.as_tensor(np.asarray(token_ids), dtype=torch.long)
        return self.weights["token_embedding/embeddings"][ids]

    def forward(self, token_ids, position=0, addition=None):
        """Logits (tokens, vocabulary) and `F_l` of every layer (L, tokens, d).

        `addition`, (d,), is added to the first decoder layer's output at `position`.
        """
        x, activations = self.embed(token_ids), []
        for number in range(self.num_layers):
            block = f"transformer_layer_{number}"
            x = x + self.attention(self.norm(x, f"{block}/self_attention_layernorm/scale"), block)
            normed = self.norm(x, f"{block}/feedforward_layernorm/scale")
            activations.append(self.feed_forward(normed, block))
            x = x + activations[-1]
            if number == 0 and addition is not None:
                here = torch.arange(len(x))[:, None] == position
                x = x + here * addition
        x = self.norm(x, "sequence_output_layernorm/scale")
        return x @ self.weights["token_embedding/embeddings"].T, torch.stack(activations)

    # ------------------------------------------------------------ the connection

    def collect(self, token_ids, position):
        """`a_l` of a plain pass at one position, (L, d)."""
        return self.forward(token_ids)[1][:, position]

    def select(self, a, e, noise=None):
        """`g` (L,), its value one-hot and its gradient the softmax's, and `z` (L,)."""
        z = (a + e).mean(0) @ self.S
        drawn = torch.zeros_like(z) if noise is None else torch.as_tensor(noise, dtype=z.dtype)
        y = torch.softmax((z + drawn) / self.temperature, dim=0)
        one_hot = torch.nn.functional.one_hot(y.argmax(), len(y)).to(y.dtype)
        return one_hot + (y - y.detach()), z

    def add(self, a, token_ids, last_prompt, noise=None, selection=None):
        e = self.embed(token_ids)[last_prompt]
        g, z = self.select(a, e, noise)
        g = g if selection is None else selection
        return self.forward(token_ids, last_prompt, g @ a)[0], g, z

    def connected(self, token_ids, pivot_ids, last_prompt, noise=None, selection=None):
        """One row: logits (tokens, vocabulary), `g` (L,), `z` (L,), as tensors.

        A `selection`, a tensor (L,), replaces `g`: the loss as a function of a free g.
        """
        a = self.collect(pivot_ids, len(pivot_ids) - 1)
        return self.add(a, token_ids, last_prompt, noise, selection)

    def monolingual(self, token_ids, last_prompt):
        """As `connected`, from the row's own plain pass through X, and without noise."""
        if self.X is None:
            raise ValueError("monolingual inference needs `X`, (d, d). Received: X=None")
        return self.add(self.collect(token_ids, last_prompt) @ self.X, token_ids, last_prompt)

    def greedy(self, token_ids, steps, a_source=None):
        """The `steps` likeliest next ids, one by one, everything recomputed at each.

        `a_source` is the pivot's ids, or None for the monolingual path. The addition stays at
        the last token of `token_ids`.
        """
        ids, last_prompt = [int(i) for i in token_ids], len(token_ids) - 1
        with torch.no_grad():
            for _ in range(steps):
                if a_source is None:
                    logits = self.monolingual(ids, last_prompt)[0]
                else:
                    logits = self.connected(ids, a_source, last_prompt)[0]
                ids.append(int(logits[-1].argmax()))
        return ids[last_prompt + 1 :]

    # ------------------------------------------------------------ a batch

    def batch(self, x, y, sample_weight, noise=None):
        """What one step computes on a preprocessed batch; `noise` is (rows, L).

        Returns:
            A dict: `loss`, a tensor to differentiate (its value: `.item()`); of each row an array
            in `logits` (tokens, vocabulary), `selection` (L,) and `scores` (L,), which are g and
            z, zeros without a pivot.
        """
        logits, selections, scores = [], [], []
        for row in range(len(y)):
            ids, pivot_ids, last_prompt = row_of(x, row)
            if len(pivot_ids):
                of_row = None if noise is None else noise[row]
                found, g, z = self.connected(ids, pivot_ids, last_prompt, of_row)
            else:
                found, g = self.forward(ids)[0], torch.zeros(self.num_layers)
                z = g
            logits.append(found)
            selections.append(g.detach().numpy())
            scores.append(z.detach().numpy())
        return {
            "loss": mean_nats(logits, y, sample_weight),
            "logits": [found.detach().numpy() for found in logits],
            "selection": selections,
            "scores": scores,
        }

    def gradients(self, loss, *names):
        """Arrays: the gradients of `loss` by `"S"`, `"X"` or the path of a weight."""
        named = {**self.weights, "S": self.S, "X": self.X}
        found = torch.autograd.grad(loss, [named[name] for name in names], retain_graph=True)
        return [gradient.numpy() for gradient in found]

    def calibration_rows(self, x):
        """`(A_target, A_pivot)`, arrays (n L, d), of the n rows that have a pivot.

        Row by row, and layer by layer within a row; both streams run plainly.
        """
        target, pivot = [], []
        for row in range(len(x["token_ids"])):
            ids, pivot_ids, last_prompt = row_of(x, row)
            if len(pivot_ids):
                target.append(self.collect(ids, last_prompt).detach().numpy())
                pivot.append(self.collect(pivot_ids, len(pivot_ids) - 1).detach().numpy())
        return np.concatenate(target), np.concatenate(pivot)


def row_of(x, row):
    """A row's real ids, its pivot's (none without one) and its last prompt position."""
    ids = x["token_ids"][row][x["padding_mask"][row] == 1]
    pivot_ids = np.zeros(0, "int32")
    if "pivot_token_ids" in x:
        pivot_ids = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
    answers = np.flatnonzero(x["answer_mask"][row]) if "answer_mask" in x else []
    return ids, pivot_ids, int(answers[0]) if len(answers) else len(ids) - 1


def mean_nats(logits, y, sample_weight):
    """Negative log-likelihood of `y`, weighted, over the sum of the weights: a tensor."""
    nats, count = torch.zeros((), dtype=torch.float64), 0.0
    for row, of_row in enumerate(logits):
        log_probabilities = torch.log_softmax(of_row, dim=-1)
        for t in np.flatnonzero(sample_weight[row]):
            nats = nats - log_probabilities[t, int(y[row, t])] * float(sample_weight[row, t])
            count += float(sample_weight[row, t])
    return nats / count
