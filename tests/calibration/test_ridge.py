"""Ridge regression from sums, against least squares on the stacked rows."""

import dataclasses
import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_cc.calibration import ridge as ridge_module
from keras_cc.calibration.ridge import CANDIDATES, DEFAULT_RIDGE, RidgeFit, RidgeSums

pytestmark = pytest.mark.once


def random_rows(n, dim, seed=0, noise=0.3, dtype="float32"):
    """Rows of unequal scale, and goals that are a matrix of them plus noise."""
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(n, dim)) * np.linspace(0.5, 2.0, dim)
    goal = source @ rng.normal(size=(dim, dim)) + noise * rng.normal(size=(n, dim))
    return source.astype(dtype), goal.astype(dtype)


def sums_of(source, goal, weight=None, held_out=None, batches=1):
    sums = RidgeSums(source.shape[1])
    for part in np.array_split(np.arange(len(source)), batches):
        sums.add(
            source[part],
            goal[part],
            None if weight is None else weight[part],
            None if held_out is None else held_out[part],
        )
    return sums


def stacked(source, goal, start, ridge=0.0, weight=None):
    """The textbook form: rows times sqrt(weight), and the penalty as d more rows."""
    source, goal = source.astype("float64"), goal.astype("float64")
    root = np.sqrt(np.ones(len(source)) if weight is None else weight)[:, None]
    dim = source.shape[1]
    penalty = ridge * np.sum((root * source) ** 2) / dim
    rows = np.vstack([root * source, np.sqrt(penalty) * np.eye(dim)])
    goals = np.vstack([root * goal, np.sqrt(penalty) * start])
    return np.linalg.lstsq(rows, goals, rcond=None)[0]


def mean_error(source, goal, matrix, weight=None):
    residual = source.astype("float64") @ matrix - goal.astype("float64")
    return np.average(np.sum(residual**2, axis=1), weights=weight)


def relative_difference(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def trained(dim, seed=7):
    return np.eye(dim) + 0.2 * np.random.default_rng(seed).normal(size=(dim, dim))


class TestAgainstLeastSquares:
    @pytest.mark.parametrize("weighted", [False, True])
    @pytest.mark.parametrize("start", [np.eye(6), np.zeros((6, 6)), trained(6)])
    @pytest.mark.parametrize("ridge", [0, 1e-3, 0.7])
    def test_on_the_stacked_rows(self, weighted, start, ridge):
        source, goal = random_rows(80, 6)
        weight = np.random.default_rng(1).uniform(0.1, 3.0, 80) if weighted else None
        fit = sums_of(source, goal, weight).solve(start, ridge=ridge)
        expected = stacked(source, goal, start, ridge, weight)
        assert relative_difference(fit.matrix, expected) < 1e-10
        assert (fit.ridge, fit.ridge_from, fit.rank, fit.rows) == (ridge, "given", 6, 80)
        assert fit.held_out_errors == {}
        assert fit.error_before == pytest.approx(mean_error(source, goal, start, weight))
        assert fit.error_after == pytest.approx(mean_error(source, goal, expected, weight))

    def test_by_hand(self):
        # One dimension: C = 1*4 + 3*1 = 7, D = 1*2*10 + 3*1*(-1) = 17, and trace(C) / d = 7.
        sums = RidgeSums(1)
        sums.add(np.array([[2.0], [1.0]]), np.array([[10.0], [-1.0]]), weight=np.array([1.0, 3.0]))
        assert sums.solve([[1.0]], ridge=0).matrix[0, 0] == pytest.approx(17 / 7)
        # (17 + 2*7*1) / (7 + 2*7): twice the mean diagonal pulls towards the start, 1.
        fit = sums.solve([[1.0]], ridge=2)
        assert fit.matrix[0, 0] == pytest.approx(31 / 21)
        assert fit.error_before == pytest.approx((8**2 + 3 * 2**2) / 4)
        residuals = 62 / 21 - 10, 31 / 21 + 1
        assert fit.error_after == pytest.approx((residuals[0] ** 2 + 3 * residuals[1] ** 2) / 4)

    def test_float32_rows_far_from_zero(self):
        # Sums of squares are 10^4 times what varies: float32 sums could not tell the rows apart.
        rng = np.random.default_rng(3)
        source = (100 + rng.normal(size=(400, 8))).astype("float32")
        goal = (source @ trained(8) + rng.normal(size=source.shape)).astype("float32")
        fit = sums_of(source, goal, batches=7).solve(np.eye(8), ridge=0)
        expected = stacked(source, goal, np.eye(8))
        assert relative_difference(fit.matrix, expected) < 1e-7
        assert fit.rank == 8
        assert fit.error_after == pytest.approx(mean_error(source, goal, expected), rel=1e-6)
        in_float32 = np.linalg.solve(source.T @ source, source.T @ goal)
        assert relative_difference(in_float32, expected) > 1e-3

    def test_the_ridge_has_no_scale(self):
        source, goal = random_rows(40, 5, dtype="float64")
        weight = np.linspace(0.5, 1.5, 40)
        fit = sums_of(source, goal, weight).solve(np.eye(5), ridge=0.1)
        scaled = sums_of(1000 * source, 1000 * goal, 7 * weight).solve(np.eye(5), ridge=0.1)
        np.testing.assert_allclose(scaled.matrix, fit.matrix, rtol=1e-9)
        assert scaled.error_after == pytest.approx(1e6 * fit.error_after)

    def test_a_large_ridge_keeps_the_start(self):
        source, goal = random_rows(40, 5)
        fit = sums_of(source, goal).solve(trained(5), ridge=1e12)
        np.testing.assert_allclose(fit.matrix, trained(5), atol=1e-10)


class TestStreaming:
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_one_batch_or_a_hundred(self, offset):
        source, goal = random_rows(1000, 6)
        source, goal = source + np.float32(offset), goal + np.float32(offset)
        weight = np.random.default_rng(1).uniform(0, 2, 1000)
        held_out = np.arange(1000) % 5 == 0
        one = sums_of(source, goal, weight, held_out)
        many = sums_of(source, goal, weight, held_out, batches=100)
        for name in ("fitted", "held_out"):
            a, b = getattr(one, name), getattr(many, name)
            np.testing.assert_allclose(a.gram, b.gram, rtol=1e-10, atol=1e-9)
            np.testing.assert_allclose(a.cross, b.cross, rtol=1e-10, atol=1e-9)
            assert a.rows == b.rows
        first, second = one.solve(np.eye(6)), many.solve(np.eye(6))
        assert relative_difference(second.matrix, first.matrix) < 1e-5
        assert second.ridge == first.ridge

    def test_the_sums_are_the_formulas(self):
        source, goal = random_rows(30, 4)
        weight = np.linspace(0, 1, 30)
        sums = sums_of(source, goal, weight, np.arange(30) < 10, batches=4)
        for part, chosen in ((sums.held_out, slice(0, 10)), (sums.fitted, slice(10, 30))):
            f, g = source[chosen].astype("float64"), goal[chosen].astype("float64")
            w = weight[chosen]
            np.testing.assert_allclose(part.gram, np.einsum("n,ni,nj->ij", w, f, f), rtol=1e-12)
            np.testing.assert_allclose(
                part.cross, np.einsum("n,ni,nj->ij", w, f, g), rtol=1e-9, atol=1e-12
            )
            assert part.weight == pytest.approx(w.sum())
        assert (sums.held_out.rows, sums.fitted.rows) == (9, 20)  # the first has weight 0

    def test_rows_of_weight_zero_are_as_if_they_were_not_there(self):
        source, goal = random_rows(30, 4)
        weight = np.where(np.arange(30) % 3 == 0, 0.0, 1.0)
        kept = weight > 0
        source[0], goal[3] = np.nan, np.inf  # not even read
        fit = sums_of(source, goal, weight).solve(np.eye(4), ridge=0.1)
        without = sums_of(source[kept], goal[kept]).solve(np.eye(4), ridge=0.1)
        np.testing.assert_allclose(fit.matrix, without.matrix, rtol=1e-12)
        assert fit.rows == 20

    def test_solving_leaves_the_sums_and_more_rows_may_follow(self):
        source, goal = random_rows(60, 4)
        sums = sums_of(source[:30], goal[:30])
        first = sums.solve(np.eye(4), ridge=0)
        np.testing.assert_array_equal(sums.solve(np.eye(4), ridge=0).matrix, first.matrix)
        sums.add(source[30:], goal[30:])
        expected = stacked(source, goal, np.eye(4))
        assert relative_difference(sums.solve(np.eye(4), ridge=0).matrix, expected) < 1e-10

    def test_no_row_is_kept(self):
        dim, sums = 8, RidgeSums(8)
        source, goal = random_rows(2000, dim)
        sums.add(source, goal)
        tracemalloc.start()
        try:
            for _ in range(20):
                sums.add(source, goal)
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert sums.rows == 21 * 2000
        assert kept < 16 * dim * dim * 8  # and not 20 times 2000 rows


class TestFewerRowsThanDimensions:
    def test_unknown_directions_keep_the_start(self):
        source, goal = random_rows(5, 12)
        null = np.linalg.svd(source.astype("float64"))[2][5:].T  # (12, 7), source @ null = 0
        for start in (np.eye(12), trained(12)):
            for ridge in (0, 1e-8, 0.1):
                fit = sums_of(source, goal).solve(start, ridge=ridge)
                assert fit.rank == 5
                np.testing.assert_allclose(null.T @ (fit.matrix - start), 0, atol=1e-6)
            fit = sums_of(source, goal).solve(start, ridge=0)
            np.testing.assert_allclose(source @ fit.matrix, goal, atol=1e-6)
            assert fit.error_after < 1e-10 * fit.error_before
            # What the pseudo-inverse of the rows would do to the start's error.
            change = np.linalg.pinv(source.astype("float64")) @ (goal - source @ start)
            np.testing.assert_allclose(fit.matrix, start + change, atol=1e-6)

    @pytest.mark.parametrize("batches", [1, 300])
    def test_many_rows_of_low_rank(self, batches):
        rng = np.random.default_rng(0)
        source = (100 + rng.normal(size=(300, 3))) @ rng.normal(size=(3, 9))
        goal = rng.normal(size=(300, 9))
        fit = sums_of(source, goal, batches=batches).solve(np.eye(9), ridge=0)
        assert fit.rank == 3
        assert np.abs(fit.matrix).max() < 1e3

    def test_one_row_that_comes_again_and_again(self):
        # Its roundings add up in one direction, as those of a prompt's first token do.
        rng = np.random.default_rng(0)
        source, goal = rng.normal(size=(2, 1, 4)).repeat(3000, axis=1)
        sums = sums_of(source, goal, batches=3000)
        values = np.linalg.eigvalsh(sums.fitted.gram)
        assert values[-2] > 10 * np.finfo("float64").eps * values[-1]
        fit = sums.solve(np.eye(4), ridge=0)
        assert fit.rank == 1
        change = np.outer(source[0], goal[0] - source[0]) / (source[0] @ source[0])
        np.testing.assert_allclose(fit.matrix, np.eye(4) + change, atol=1e-9)

    def test_sources_of_zero_keep_the_start(self):
        sums = sums_of(np.zeros((4, 3)), np.ones((4, 3)), held_out=np.arange(4) < 2)
        for ridge in ("auto", 0, 1.0):
            fit = sums.solve(trained(3), ridge=ridge)
            np.testing.assert_array_equal(fit.matrix, trained(3))
            assert (fit.rank, fit.error_before, fit.error_after) == (0, 3.0, 3.0)


class TestAuto:
    @pytest.mark.parametrize(
        ("rows", "noise", "start"),
        [(30, 0.0, np.eye(8)), (40, 3.0, np.eye(8)), (24, 30.0, trained(8)), (10, 1.0, np.eye(8))],
    )
    def test_picks_what_a_loop_over_the_candidates_picks(self, rows, noise, start):
        source, goal = random_rows(rows, 8, noise=noise)
        weight = np.random.default_rng(1).uniform(0.5, 2.0, rows)
        held_out = np.arange(rows) % 4 == 1
        fit = sums_of(source, goal, weight, held_out).solve(start)
        errors = {}
        for ridge in CANDIDATES:
            part = source[~held_out], goal[~held_out]
            matrix = stacked(*part, start, ridge, weight[~held_out])
            errors[ridge] = mean_error(source[held_out], goal[held_out], matrix, weight[held_out])
        assert fit.held_out_errors.keys() == errors.keys()
        for ridge in CANDIDATES:
            assert fit.held_out_errors[ridge] == pytest.approx(errors[ridge], rel=1e-5, abs=1e-10)
        assert fit.ridge == min(errors, key=errors.get)
        assert fit.ridge_from == "held_out"
        # With it, all the rows are fitted.
        expected = stacked(source, goal, start, fit.ridge, weight)
        assert relative_difference(fit.matrix, expected) < 1e-6
        assert fit.rows == rows

    def test_the_cases_pick_different_ridges(self):
        picked = []
        for noise in (0.0, 3.0, 30.0):
            source, goal = random_rows(40, 8, noise=noise)
            held_out = np.arange(40) % 4 == 1
            picked.append(sums_of(source, goal, held_out=held_out).solve(np.eye(8)).ridge)
        assert picked == sorted(picked) and len(set(picked)) == 3

    @pytest.mark.parametrize(("fitted", "held"), [(20, 0), (20, 1), (1, 20), (0, 5)])
    def test_with_too_few_rows_takes_the_default_and_says_so(self, fitted, held):
        source, goal = random_rows(fitted + held, 4)
        fit = sums_of(source, goal, held_out=np.arange(fitted + held) < held).solve(np.eye(4))
        assert (fit.ridge, fit.ridge_from) == (DEFAULT_RIDGE, "default")
        assert fit.held_out_errors == {}
        expected = stacked(source, goal, np.eye(4), 1e-4)
        assert relative_difference(fit.matrix, expected) < 1e-6

    def test_two_and_two_rows_are_enough(self):
        source, goal = random_rows(4, 4)
        fit = sums_of(source, goal, held_out=np.arange(4) < 2).solve(np.eye(4))
        assert fit.ridge_from == "held_out"

    def test_of_equal_candidates_the_largest(self):
        # The goals are already what the start gives, up to no rounding at all.
        source = np.eye(4)[[0, 1, 2, 3] * 2]
        fit = sums_of(source, source, held_out=np.arange(8) < 4).solve(np.eye(4))
        assert set(fit.held_out_errors.values()) == {0.0}
        assert fit.ridge == max(CANDIDATES)

    def test_a_given_ridge_fits_the_held_out_rows_too(self):
        source, goal = random_rows(40, 4)
        fit = sums_of(source, goal, held_out=np.arange(40) < 15).solve(np.eye(4), ridge=0.01)
        expected = stacked(source, goal, np.eye(4), 0.01)
        assert relative_difference(fit.matrix, expected) < 1e-10


class TestErrors:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 12),
        dim=st.integers(1, 6),
        offset=st.sampled_from([0.0, 1.0, 100.0]),
        scale=st.sampled_from([1e-6, 1.0, 1e4]),
        start=st.sampled_from(["identity", "zeros", "trained", "best"]),
        ridge=st.one_of(st.just("auto"), st.just(0.0), st.floats(0, 1e3)),
        seed=st.integers(0, 10_000),
    )
    def test_are_those_of_the_rows_and_never_grow(
        self, rows, dim, offset, scale, start, ridge, seed
    ):
        rng = np.random.default_rng(seed)
        source = (scale * (offset + rng.normal(size=(rows, dim)))).astype("float32")
        goal = (scale * (offset + rng.normal(size=(rows, dim)))).astype("float32")
        weight, held_out = rng.uniform(0.01, 2, rows), rng.uniform(size=rows) < 0.4
        start = {
            "identity": np.eye(dim),
            "zeros": np.zeros((dim, dim)),
            "trained": trained(dim, seed),
            "best": stacked(source, goal, np.zeros((dim, dim)), 0.1, weight),
        }[start]
        fit = sums_of(source, goal, weight, held_out).solve(start, ridge=ridge)
        assert fit.error_after <= fit.error_before
        # Rounding is relative to what is added up: the goals and what is predicted.
        size = np.average(np.sum(goal.astype("float64") ** 2, axis=1), weights=weight)
        for matrix, error in ((start, fit.error_before), (fit.matrix, fit.error_after)):
            predicted = np.average(np.sum((source @ matrix) ** 2, axis=1), weights=weight)
            expected = mean_error(source, goal, matrix, weight)
            assert error == pytest.approx(expected, rel=1e-6, abs=1e-9 * (size + predicted))

    def test_pulling_towards_zero_instead_would_let_them_grow(self):
        # What the guarantee rests on: the penalty's zero is the start.
        source, goal = random_rows(40, 5, noise=0.01)
        start = stacked(source, goal, np.zeros((5, 5)))
        towards_zero = stacked(source, goal, np.zeros((5, 5)), ridge=1.0)
        before = mean_error(source, goal, start)
        assert mean_error(source, goal, towards_zero) > 10 * before
        assert sums_of(source, goal).solve(start, ridge=1.0).error_after <= before * (1 + 1e-6)


class TestBadInput:
    def test_no_rows(self):
        for sums in (RidgeSums(3), sums_of(np.ones((2, 3)), np.ones((2, 3)), np.zeros(2))):
            with pytest.raises(ValueError, match=r"no row had a pivot.*Received: rows=0"):
                sums.solve(np.eye(3))

    @pytest.mark.parametrize("dim", [0, -1, 2.0, True, None, "3"])
    def test_dim(self, dim):
        with pytest.raises(ValueError, match="`dim` must be an integer >= 1"):
            RidgeSums(dim)

    @pytest.mark.parametrize("ridge", [-1e-9, np.nan, np.inf, None, "best", True, [0.1], 1j])
    def test_ridge(self, ridge):
        sums = sums_of(*random_rows(5, 3))
        with pytest.raises(ValueError, match=re.escape(f"Received: ridge={ridge!r}")):
            sums.solve(np.eye(3), ridge=ridge)

    def test_a_ridge_of_any_kind_of_number(self):
        sums = sums_of(*random_rows(5, 3))
        found = [
            sums.solve(np.eye(3), ridge=r).matrix for r in (1, 1.0, np.float32(1), np.int64(1))
        ]
        for matrix in found:
            np.testing.assert_array_equal(matrix, found[0])

    @pytest.mark.parametrize("start", [np.eye(4), np.ones(3), 1.0, np.full((3, 3), np.nan)])
    def test_start(self, start):
        with pytest.raises(ValueError, match=r"`start` must be a finite matrix of shape \(3, 3\)"):
            sums_of(*random_rows(5, 3)).solve(start)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"source": np.ones((4, 2))}, r"shape \(n, 3\).*source.shape=\(4, 2\)"),
            ({"goal": np.ones((4, 2))}, r"goal.shape=\(4, 2\)"),
            ({"goal": np.ones((5, 3))}, r"goal.shape=\(5, 3\), source.shape=\(4, 3\)"),
            ({"source": np.ones((1, 4, 3))}, r"source.shape=\(1, 4, 3\)"),
            ({"goal": np.ones(3)}, r"goal.shape=\(3,\)"),
            ({"source": 1.0}, r"source.shape=\(\)"),
            ({"weight": np.ones(3)}, r"`weight` must hold one value a row, shape \(4,\)"),
            ({"weight": np.ones((4, 1))}, r"weight.shape=\(4, 1\)"),
            ({"weight": [1, -0.5, 1, 1]}, r"`weight` must be finite.*-0.5 to 1.0"),
            ({"weight": [1, np.nan, 1, 1]}, "`weight` must be finite"),
            ({"weight": [1, np.inf, 1, 1]}, "`weight` must be finite"),
            ({"held_out": np.zeros(3, bool)}, r"`held_out` must hold .* shape \(4,\)"),
            ({"held_out": [0, 1, 0, 1]}, "`held_out` must be bool"),
            (
                {"source": np.diag([1, 1, np.nan, 1])[:, 1:]},
                "`source` must be .* 1 of 4 .* index 2",
            ),
            ({"goal": np.diag([1, np.inf, -np.inf, 1])[:, :3]}, "`goal` .* 2 of 4 .* index 1"),
        ],
    )
    def test_rows(self, changed, message):
        good = dict(source=np.ones((4, 3)), goal=np.ones((4, 3)), weight=np.ones(4))
        sums = RidgeSums(3)
        with pytest.raises(ValueError, match=message):
            sums.add(**{**good, **changed})
        # Refused as a whole.
        assert sums.rows == 0 and not sums.fitted.gram.any() and sums.fitted.weight == 0
        sums.add(**good)
        assert sums.rows == 4

    def test_an_empty_batch_adds_nothing(self):
        sums = sums_of(*random_rows(5, 3))
        sums.add(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0), np.zeros(0, bool))
        assert sums.rows == 5

    def test_the_result_cannot_be_changed(self):
        fit = sums_of(*random_rows(5, 3)).solve(np.eye(3))
        assert isinstance(fit, RidgeFit) and fit.matrix.dtype == np.float64
        with pytest.raises(dataclasses.FrozenInstanceError):
            fit.ridge = 1.0


def test_the_example_of_the_docstring_runs():
    code = re.search(r"```python\n(.*?)```", ridge_module.RidgeSums.__doc__, re.S)[1]
    names = {}
    exec(re.sub(r"(?m)^    ", "", code), names)
    fit = names["fit"]
    assert (fit.ridge, fit.rank, fit.rows) == (1e-8, 3, 50)
    np.testing.assert_allclose(fit.matrix, names["rotation"], atol=1e-6)
