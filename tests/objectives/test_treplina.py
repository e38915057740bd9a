import numpy as np
import pytest
from keras import ops
from test_objectives import make_rows, pack, pooled, result, state_gradients

from keras_cc.objectives import TRepLiNa

# The third row has no pivot, the fourth no token behind its first one.
LENGTHS = [(5, 3), (3, 6), (4, 0), (1, 4), (6, 5), (4, 4), (3, 3)]
COUNTED = [1, 1, 0, 0, 1, 1, 1]
CKA = TRepLiNa(layer=4, anchor=0.0)


def cka(x, y):
    """|| X^T Y ||^2 / (|| X^T X || || Y^T Y ||), of centred columns, in float64."""
    x, y = (np.asarray(rows, "float64") for rows in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))


def expected_losses(
    rows, layer=4, pooling="mean", sink_tokens=1, anchor=0.0, error="relative", untrained=None
):
    """`(values, counts)`; `untrained` has a row's states of the target as `rows` do."""
    kept, pairs = [], []
    for b, row in enumerate(rows):
        streams = [pooled(row[name][layer], pooling, sink_tokens) for name in ("target", "pivot")]
        if all(stream is not None for stream in streams):
            kept.append(b)
            pairs.append(streams)
    values, counts = np.zeros(len(rows)), np.zeros(len(rows))
    if len(kept) >= 3:
        x, y = zip(*pairs, strict=True)
        values[kept], counts[kept] = 1 - cka(x, y), 1
        for b in kept if anchor else ():
            now, before = (of[b]["target"][layer][sink_tokens:] for of in (rows, untrained))
            moved = ((now.astype("float64") - before) ** 2).mean(axis=-1)
            scale = (before.astype("float64") ** 2).mean(axis=-1) if error == "relative" else 1
            values[b] += anchor * (moved / scale).mean()
    return values, counts


def packed(rows, untrained, **options):
    states = pack(rows, **options)
    states.untrained = pack(untrained, **options).target
    return states


class TestCKA:
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    @pytest.mark.parametrize("sink_tokens", [0, 1, 2])
    def test_against_numpy(self, pooling, sink_tokens):
        rows = make_rows(LENGTHS)
        expected, counts = expected_losses(rows, 4, pooling, sink_tokens)
        objective = TRepLiNa(4, pooling, anchor=0.0, sink_tokens=sink_tokens, weight=7.0)
        values, found_counts = result(objective, pack(rows))
        np.testing.assert_array_equal(found_counts, counts)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        assert 0.05 < expected.max() < 1

    def test_a_rotated_scaled_and_moved_geometry_is_the_same(self):
        rows = make_rows([(4, 4)] * 5)
        rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))
        for row in rows:
            row["pivot"] = (7 * row["target"] @ rotation + 3).astype("float32")
        np.testing.assert_allclose(result(CKA, pack(rows))[0], 0, atol=1e-5)

    @pytest.mark.parametrize("pivots", [0, 1, 2, 3])
    def test_of_two_rows_it_says_nothing(self, pivots):
        states = pack(make_rows([(5, 3), (3, 6), (6, 5), (4, 4)]))
        states.has_pivot = ops.convert_to_tensor(np.arange(4) < pivots)
        values, counts = result(CKA, states)
        assert counts.tolist() == ([1, 1, 1, 0] if pivots == 3 else [0] * 4)
        assert values.any() == (pivots == 3)
        slopes = state_gradients(CKA, states).values()
        assert any(slope.any() for slope in slopes) == (pivots == 3)
        rng = np.random.default_rng(0)
        for _ in range(3):
            assert cka(*rng.normal(size=(2, 2, 640))) == pytest.approx(1)

    @pytest.mark.once
    @pytest.mark.parametrize("rows, said", [(8, 0.99), (32, 0.95), (128, 0.83), (640, 0.50)])
    def test_the_bias_that_its_docstring_tells_of(self, rows, said):
        rng = np.random.default_rng(0)
        found = [cka(*rng.normal(size=(2, rows, 640))) for _ in range(3)]
        assert np.mean(found) == pytest.approx(said, abs=0.006)
        assert f"{said:.2f} at {rows}" in " ".join(TRepLiNa.__doc__.split())

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_and_large_states(self, dtype):
        rows = make_rows(LENGTHS)
        for row in rows:  # their squares overflow float16, their fourth powers float32
            row["target"] *= 300
            row["pivot"] *= 300
        values, counts = result(CKA, pack(rows, dtype=dtype))
        assert counts.tolist() == COUNTED
        np.testing.assert_allclose(values, expected_losses(rows)[0], atol=0.02)
        for row in rows:
            row["target"] *= np.float32(1e9)
        found, _ = result(CKA, pack(rows))
        np.testing.assert_allclose(found, expected_losses(rows)[0], atol=1e-3)

    def test_padding_answers_and_rows_without_a_pivot_change_nothing(self):
        rows = make_rows(LENGTHS)
        values, counts = result(CKA, pack(rows))
        assert counts.tolist() == COUNTED
        for options in ({"padding": 3}, {"left": 2}, {"garbage": np.nan}, {"seed": 6}):
            again, again_counts = result(CKA, pack(rows, **options))
            np.testing.assert_array_equal(again_counts, counts)
            np.testing.assert_allclose(again, values, rtol=1e-4, atol=1e-5)

    def test_states_without_any_difference_have_finite_gradients(self):
        states = pack(make_rows(LENGTHS))
        states.target = {i: ops.ones_like(h) for i, h in states.target.items()}
        values, _ = result(CKA, states)
        np.testing.assert_allclose(values, COUNTED, atol=1e-4)  # CKA of one point is taken for 0
        assert all(np.isfinite(g).all() for g in state_gradients(CKA, states).values())


class TestAnchor:
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    @pytest.mark.parametrize("error", ["relative", "plain"])
    def test_against_numpy(self, pooling, error):
        rows, untrained = make_rows(LENGTHS), make_rows(LENGTHS, seed=7)
        objective = TRepLiNa(layer=4, pooling=pooling, anchor=0.3, anchor_error=error)
        values, counts = result(objective, packed(rows, untrained, garbage=np.nan))
        options = {"anchor": 0.3, "error": error, "untrained": untrained}
        expected, _ = expected_losses(rows, 4, pooling, **options)
        assert counts.tolist() == COUNTED
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        plain, _ = expected_losses(rows, 4, pooling)
        assert (expected - plain)[COUNTED.index(1)] > 0.1

    def test_what_has_not_moved_costs_nothing(self):
        rows = make_rows(LENGTHS)
        values, _ = result(TRepLiNa(layer=4), packed(rows, rows))
        np.testing.assert_allclose(values, result(CKA, pack(rows))[0], rtol=1e-6)

    def test_blocks(self):
        assert TRepLiNa().target_blocks(32) == TRepLiNa().pivot_blocks(32) == (14,)
        assert TRepLiNa().untrained_blocks(32) == (14,)
        assert TRepLiNa(anchor=0).untrained_blocks(32) == ()


class TestGradients:
    @pytest.mark.parametrize("pivot_gradient", [True, False])
    def test_who_learns(self, pivot_gradient):
        objective = TRepLiNa(layer=3, pivot_gradient=pivot_gradient)
        states = packed(make_rows(LENGTHS), make_rows(LENGTHS, seed=7), garbage=np.nan)
        for (stream, block), gradient in state_gradients(objective, states).items():
            assert np.isfinite(gradient).all()
            learns = block == 3 and (stream == "target" or pivot_gradient)
            expected = COUNTED if learns else [0] * len(COUNTED)
            per_row = np.abs(gradient).sum((1, 2))
            assert (per_row > 0).tolist() == [bool(one) for one in expected], (stream, block)

    def test_against_differences_of_the_formula(self):
        rows, untrained = (make_rows([(3, 4), (4, 3), (3, 3), (4, 5)], seed=s) for s in (3, 4))
        objective = TRepLiNa(layer=1, anchor=0.2)
        found = state_gradients(objective, packed(rows, untrained))
        options = {"anchor": 0.2, "untrained": untrained}
        for stream in ("target", "pivot"):
            for d in range(5):
                sides = []
                for step in (1e-4, -1e-4):
                    moved = [dict(row) for row in rows]
                    moved[0][stream] = rows[0][stream].astype("float64")
                    moved[0][stream][1, 2, d] += step
                    sides.append(expected_losses(moved, 1, **options)[0].sum())
                slope = (sides[0] - sides[1]) / 2e-4
                assert found[stream, 1][0, 2, d] == pytest.approx(slope, rel=2e-3, abs=1e-5)


@pytest.mark.once
def test_only_three_rows_or_more_are_a_batch():
    assert (TRepLiNa().name, TRepLiNa().least_rows, TRepLiNa().alternating) == (
        "treplina", 3, False
    )  # fmt: skip
