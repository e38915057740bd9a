"""The reference of the published connection is right: KerasHub, NumPy, finite differences."""

import connected
import numpy as np
import pytest
import tiny
from reference import Reference, softmax
from reference_selected import SelectedReference, mean_nats, row_of, torch

D = tiny.HIDDEN
KERNELS = (
    "transformer_layer_0/feedforward_output_dense/kernel",
    "transformer_layer_1/self_attention/query/kernel",
)


def weights_of(num_layers=3):
    model = tiny.causal_lm("llama3", num_layers=num_layers)
    return model, connected.weights(model)


def references(num_layers=3, seed=0, **options):
    """The reference, and the NumPy model of tests/reference.py with the same weights."""
    _, weights = weights_of(num_layers)
    rng = np.random.default_rng(seed)
    S = rng.normal(size=(D, num_layers))
    X = np.eye(D) + 0.3 * rng.normal(size=(D, D))
    reference = SelectedReference(weights, S, X, **options)
    return reference, Reference(weights, num_layers=num_layers), S, X


def numpy_activations(stock, ids, position):
    """`a_l`, (L, d), by the NumPy model."""
    found = {}
    stock.forward(ids, lambda number, f: found.setdefault(number, f))
    return np.stack([found[number][position] for number in range(stock.num_layers)])


def numpy_added(stock, ids, last_prompt, vector):
    """Logits with `vector` in the first layer's sum: F_1 is its last term, so it may carry it."""

    def replace(number, f):
        f = f.copy()
        f[last_prompt] += vector * (number == 0)
        return f

    return stock.forward(ids, replace)


def mean_sum(stock, a, ids, last_prompt):
    """`mean_l(a_l + e)`, (d,)."""
    return a.mean(0) + stock.weights["token_embedding/embeddings"][ids[last_prompt]]


def example(seed=8):
    """A batch with uneven weights, and Gumbel noise that overturns a choice."""
    x, y, sample_weight = tiny.batch(seed=seed)
    rng = np.random.default_rng(seed + 1)
    sample_weight = sample_weight * rng.uniform(0.5, 2.0, sample_weight.shape)
    return x, y, sample_weight, rng.gumbel(size=(len(y), 3))


class TestForward:
    @pytest.mark.parametrize("num_layers", [2, 3])
    def test_plain_pass_is_keras_hubs(self, num_layers):
        model, weights = weights_of(num_layers)
        x, _, _ = tiny.batch()
        found = connected.logits(model, connected.monolingual(x))
        reference = SelectedReference(weights, np.zeros((D, num_layers)))
        for row in range(len(found)):
            ids, _, _ = row_of(x, row)
            expected = reference.forward(ids)[0].detach().numpy()
            np.testing.assert_allclose(found[row, : len(ids)], expected, rtol=1e-5, atol=1e-5)

    def test_the_addition_against_numpy(self):
        reference, stock, S, _ = references(temperature=0.7)
        x, y, sample_weight, noise = example()
        expected = reference.batch(x, y, sample_weight, noise)
        overturned = 0
        for row in (0, 1):
            ids, pivot_ids, last = row_of(x, row)
            a = numpy_activations(stock, pivot_ids, -1)
            z = mean_sum(stock, a, ids, last) @ S
            chosen = int((z + noise[row]).argmax())
            overturned += chosen != z.argmax()
            np.testing.assert_allclose(expected["scores"][row], z, atol=1e-12)
            np.testing.assert_array_equal(expected["selection"][row], np.eye(3)[chosen])
            by_hand = numpy_added(stock, ids, last, a[chosen])
            np.testing.assert_allclose(expected["logits"][row], by_hand, atol=1e-12)
            # It reaches the last prompt token and what follows, and nothing before.
            plain = stock.stock(ids)
            np.testing.assert_allclose(by_hand[:last], plain[:last], atol=1e-12)
            assert (np.abs(by_hand - plain)[last:].max(-1) > 1e-3).all()
        assert overturned, "the noise decides nothing: choose another seed"

        ids, _, _ = row_of(x, 2)  # no pivot
        np.testing.assert_array_equal(expected["selection"][2], np.zeros(3))
        np.testing.assert_allclose(expected["logits"][2], stock.stock(ids), atol=1e-12)
        rows = zip(expected["logits"], y, sample_weight, strict=True)
        nats = sum(
            -np.log(softmax(logits[t])[labels[t]]) * weight[t]
            for logits, labels, weight in rows
            for t in np.flatnonzero(weight)
        )
        assert expected["loss"].item() == pytest.approx(nats / sample_weight.sum(), rel=1e-12)

    def test_monolingual_against_numpy(self):
        reference, stock, S, X = references()
        ids, _, last = row_of(tiny.batch()[0], 2)
        own = numpy_activations(stock, ids, last)
        a = own @ X
        chosen = int((mean_sum(stock, a, ids, last) @ S).argmax())
        logits, g, _ = reference.monolingual(ids, last)
        np.testing.assert_array_equal(g.detach(), np.eye(3)[chosen])
        expected = numpy_added(stock, ids, last, a[chosen])
        np.testing.assert_allclose(logits.detach(), expected, atol=1e-12)
        assert np.abs(expected - numpy_added(stock, ids, last, own[chosen])).max() > 1e-3

    def test_greedy_keeps_the_addition_at_the_prompt(self):
        reference, stock, S, X = references()
        prompt, pivot = [5, 9, 17, 30], [8, 4, 21]
        own = numpy_activations(stock, prompt, 3) @ X
        for a, source in ((numpy_activations(stock, pivot, -1), pivot), (own, None)):
            vector = a[int((mean_sum(stock, a, prompt, 3) @ S).argmax())]
            ids = list(prompt)
            for _ in range(5):
                ids.append(int(numpy_added(stock, ids, 3, vector)[-1].argmax()))
            assert reference.greedy(prompt, 5, source) == ids[4:]

    def test_calibration_rows(self):
        reference, stock, _, _ = references()
        x, _, _ = tiny.batch()
        target, pivot = reference.calibration_rows(x)
        assert target.shape == pivot.shape == (2 * 3, D)  # the third row has no pivot
        for row in (0, 1):
            ids, pivot_ids, last = row_of(x, row)
            assert last == (3, 2)[row]  # prompts of 4 and 3 tokens
            of_row = slice(3 * row, 3 * row + 3)
            expected = numpy_activations(stock, ids, last)
            np.testing.assert_allclose(target[of_row], expected, atol=1e-12)
            expected = numpy_activations(stock, pivot_ids, -1)
            np.testing.assert_allclose(pivot[of_row], expected, atol=1e-12)

    def test_the_last_prompt_token(self):
        x, _, _ = tiny.batch()
        assert [row_of(x, row)[2] for row in range(3)] == [3, 2, 4]
        none = {**x, "answer_mask": np.zeros_like(x["answer_mask"])}
        for unmarked in (none, connected.monolingual(x)):  # the last real token, then
            assert [row_of(unmarked, row)[2] for row in range(3)] == [6, 6, 7]


class TestGradients:
    temperature = 0.7

    def losses(self, reference, selections):
        """The loss of the example with `selections`, (rows, L), as the g of rows 0 and 1."""
        x, y, sample_weight, _ = example()
        logits = []
        for row in range(len(y)):
            ids, pivot_ids, last = row_of(x, row)
            if len(pivot_ids):
                free = torch.as_tensor(selections[row])
                logits.append(reference.connected(ids, pivot_ids, last, selection=free)[0])
            else:
                logits.append(reference.forward(ids)[0])
        return mean_nats(logits, y, sample_weight).item()

    def soft(self, stock, S):
        """`mean_l(a_l + e)` and the softmax y of rows 0 and 1, by NumPy."""
        x, _, _, noise = example()
        sums, soft = [], []
        for row in (0, 1):
            ids, pivot_ids, last = row_of(x, row)
            a = numpy_activations(stock, pivot_ids, -1)
            sums.append(mean_sum(stock, a, ids, last))
            soft.append(softmax((sums[-1] @ S + noise[row]) / self.temperature))
        return np.stack(sums), np.stack(soft)

    def test_of_S_by_finite_differences_of_g(self):
        reference, stock, S, _ = references(temperature=self.temperature)
        result = reference.batch(*example())
        (found,) = reference.gradients(result["loss"], "S")
        sums, soft = self.soft(stock, S)
        hard, step = np.stack(result["selection"]), 1e-6
        expected = np.zeros_like(S)
        for row in (0, 1):
            by_g = np.zeros(3)
            for layer in range(3):
                moved = [hard.copy(), hard.copy()]
                moved[0][row, layer] += step
                moved[1][row, layer] -= step
                up, down = (self.losses(reference, selections) for selections in moved)
                by_g[layer] = (up - down) / (2 * step)
            y = soft[row]
            jacobian = (np.diag(y) - np.outer(y, y)) / self.temperature  # dy / dz
            expected += np.outer(sums[row], jacobian @ by_g)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
        assert np.abs(expected).max() > 1e-3

    @pytest.mark.parametrize("path", KERNELS)
    def test_of_a_kernel_through_both_passes_and_the_softmax(self, path):
        """Straight-through is the exact gradient of g = one_hot + y(kernel) - y(kernel now)."""
        reference, stock, S, X = references(temperature=self.temperature)
        result = reference.batch(*example())
        (found,) = reference.gradients(result["loss"], path)
        hard, now = np.stack(result["selection"]), self.soft(stock, S)[1]
        direction = np.random.default_rng(3).normal(size=found.shape)
        along, at_fixed_g = [], []
        for step in (1e-5, -1e-5):
            weights = {**stock.weights, path: stock.weights[path] + step * direction}
            soft = self.soft(Reference(weights, num_layers=3), S)[1]
            selections = hard + np.concatenate([soft - now, np.zeros((1, 3))])
            moved = SelectedReference(weights, S, X, self.temperature)
            along.append(self.losses(moved, selections))
            at_fixed_g.append(self.losses(moved, hard))
        expected = (along[0] - along[1]) / 2e-5
        assert (found * direction).sum() == pytest.approx(expected, rel=1e-6)
        # Part of it comes through the softmax: without it another number.
        assert abs(expected - (at_fixed_g[0] - at_fixed_g[1]) / 2e-5) > 1e-3


class TestRefused:
    def test_a_transposed_selection(self):
        _, weights = weights_of(2)
        with pytest.raises(ValueError, match=r"`S` must be \(d, L\).*\(2, 16\)"):
            SelectedReference(weights, np.zeros((2, D)))

    def test_monolingual_without_its_matrix(self):
        _, weights = weights_of(2)
        with pytest.raises(ValueError, match="needs `X`"):
            SelectedReference(weights, np.zeros((D, 2))).monolingual([3, 4, 5], 2)
