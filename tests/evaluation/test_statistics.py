"""Intervals and paired tests, against enumeration, formulas and simulation."""

import itertools
import math
import sys
import time

import numpy as np
import pytest

from keras_cc.evaluation.statistics import Comparison, Interval, compare, interval

pytestmark = pytest.mark.once


def coin_flips(shape, share=0.5, seed=0):
    return (np.random.default_rng(seed).random(shape) < share).astype("float64")


def width(found):
    return found.high - found.low


class TestInterval:
    def test_mean_is_over_languages_of_their_own_means(self):
        found = interval({"tr": [[1, 0, 1, 0]], "sw": [[1, 1]]}, {"tr": "abcd", "sw": "ab"})
        assert found.mean == pytest.approx((0.5 + 1.0) / 2)  # and not 4 of 6

    def test_mean_over_seeds(self):
        assert interval({"tr": [[1, 0], [1, 1]]}).mean == pytest.approx(0.75)

    def test_enumerated(self):
        """Of 3 items, all 27 draws are counted by hand: the percentiles of their means."""
        scores = [0.0, 0.2, 1.0]
        means = [np.mean(draw) for draw in itertools.product(scores, repeat=3)]
        found = interval({"tr": scores}, resamples=20_000, confidence=0.5)
        assert found.low == pytest.approx(np.quantile(means, 0.25, method="inverted_cdf"))
        assert found.high == pytest.approx(np.quantile(means, 0.75, method="inverted_cdf"))

    def test_close_to_the_normal_interval_where_items_are_many(self):
        scores = coin_flips(2000, 0.3)
        error = 1.96 * scores.std() / math.sqrt(2000)
        found = interval({"tr": scores})
        assert found.low == pytest.approx(scores.mean() - error, abs=0.003)
        assert found.high == pytest.approx(scores.mean() + error, abs=0.003)

    def test_the_same_item_is_drawn_in_all_languages(self):
        scores = coin_flips(400)
        both, other = {"tr": scores, "sw": scores}, {"tr": scores, "sw": 1 - scores}
        # The second language says nothing new ...
        assert width(interval(both)) == pytest.approx(width(interval({"tr": scores})), abs=1e-9)
        # ... unless its items are others: 1/sqrt(2) of the width.
        apart = {"tr": [f"tr/{i}" for i in range(400)], "sw": [f"sw/{i}" for i in range(400)]}
        assert width(interval(both, apart)) / width(interval(both)) == pytest.approx(0.71, abs=0.05)
        # Where each item is right in exactly one language, the mean is sure.
        assert width(interval(other)) == pytest.approx(0.0, abs=1e-9)

    def test_items_are_matched_by_id_and_not_by_place(self):
        scores = coin_flips(50)
        ids = [str(i) for i in range(50)]
        found = interval({"tr": scores, "sw": 1 - scores[::-1]}, {"tr": ids, "sw": ids[::-1]})
        assert (found.low, found.high) == pytest.approx((0.5, 0.5))
        wrong = interval({"tr": scores, "sw": 1 - scores[::-1]})
        assert width(wrong) > 0.05

    def test_seeds_are_drawn_too(self):
        scores = np.array([[0.2] * 100, [0.5] * 100, [0.8] * 100])
        found = interval({"tr": scores})
        assert found.mean == pytest.approx(0.5)
        # 1 of 27 draws is three times the worst: beyond 2.5 %
        assert (found.low, found.high) == pytest.approx((0.2, 0.8))
        one = interval({"tr": scores[:1]})
        assert (one.low, one.high) == pytest.approx((0.2, 0.2))

    def test_seeds_are_the_same_in_every_language(self):
        scores = {"tr": [[0.2] * 9, [0.8] * 9], "sw": [[0.8] * 9, [0.2] * 9]}
        assert width(interval(scores)) == pytest.approx(0.0, abs=1e-9)

    def test_covers_the_truth_about_as_often_as_it_says(self):
        inside = 0
        for trial in range(200):
            found = interval({"tr": coin_flips(60, 0.6, seed=trial)}, resamples=400, confidence=0.8)
            inside += found.low <= 0.6 <= found.high
        assert 0.72 < inside / 200 < 0.88

    def test_the_same_seed_gives_the_same_interval(self):
        scores = {"tr": np.random.default_rng(0).random((2, 30))}
        assert interval(scores, seed=3) == interval(scores, seed=3)
        assert interval(scores, seed=3) != interval(scores, seed=4)

    def test_wider_where_more_confidence_is_asked_for(self):
        scores = {"tr": coin_flips(100)}
        assert width(interval(scores, confidence=0.99)) > width(interval(scores, confidence=0.8))

    def test_a_language_that_a_draw_misses(self):
        found = interval({"tr": [[1, 0]], "sw": [[0]]}, {"tr": [1, 2], "sw": [3]})
        assert found.mean == pytest.approx(0.25)
        assert np.isfinite([found.low, found.high]).all()

    def test_an_id_that_comes_twice_is_one_item(self):
        # Two items, one of them asked three times: draws of (a, a), (a, b), (b, b).
        found = interval({"tr": [1, 1, 1, 0]}, {"tr": "aaab"})
        assert found == Interval(pytest.approx(0.75), 0.0, 1.0)

    def test_one_item_has_no_interval(self):
        found = interval({"tr": [0.5]})
        assert found.mean == 0.5
        assert math.isnan(found.low) and math.isnan(found.high)

    def test_equal_scores_are_sure(self):
        assert interval({"tr": np.ones((2, 5))}) == Interval(1.0, 1.0, 1.0)

    def test_quick(self):
        scores = {f"l{i}": coin_flips((3, 300), seed=i) for i in range(7)}
        interval(scores, resamples=10)  # imports SciPy
        start = time.perf_counter()
        interval(scores)
        assert time.perf_counter() - start < 0.9


class TestCompare:
    def test_difference_is_paired(self):
        baseline = coin_flips(200)
        ours = baseline.copy()
        ours[:10] = 1.0
        found = compare({"tr": ours}, {"tr": baseline})
        assert found.difference == pytest.approx((ours - baseline).mean())
        # Unpaired, two intervals of 200 coin flips are 0.14 wide.
        assert found.high - found.low < 0.05

    def test_p_value_enumerated(self):
        """Of 4 items, the 16 sign flips by hand."""
        differences = np.array([0.5, 0.25, 1.0, -0.25])
        flips = np.array(list(itertools.product([1, -1], repeat=4)))
        sums = flips @ differences
        expected = 2 * np.mean(sums >= differences.sum() - 1e-12)
        found = compare({"tr": differences}, {"tr": np.zeros(4)})
        assert found.p_value == pytest.approx(expected)
        assert found.p_value == pytest.approx(2 * 3 / 16)  # 1.5 itself, 1.5, 2.0

    def test_translations_flip_together(self):
        differences = np.array([1.0, 1.0, 1.0, 0.0])
        one = compare({"tr": differences}, {"tr": 0 * differences})
        two = {"tr": differences, "sw": differences}
        zero = {"tr": 0 * differences, "sw": 0 * differences}
        # The same items in a second language are no further evidence ...
        assert compare(two, zero).p_value == pytest.approx(one.p_value)
        # ... other items are: of six that say yes, 2 of 64 ways are as clear; of three 2 of 8.
        apart = {"tr": "abcd", "sw": "efgh"}
        assert one.p_value == pytest.approx(2 / 8)
        assert compare(two, zero, apart).p_value == pytest.approx(2 / 64)

    def test_seeds_flip_together(self):
        differences = np.array([[1.0, 1.0, 1.0, 0.0]] * 3)
        assert compare({"tr": differences}, {"tr": 0 * differences}).p_value == pytest.approx(2 / 8)

    def test_a_baseline_of_one_seed(self):
        ours, baseline = coin_flips((3, 40)), coin_flips((1, 40), seed=1)
        found = compare({"tr": ours}, {"tr": baseline})
        assert found == compare({"tr": ours}, {"tr": np.repeat(baseline, 3, axis=0)})
        assert found.difference == pytest.approx(ours.mean() - baseline.mean())

    def test_no_difference_is_no_surprise(self):
        scores = {"tr": coin_flips((2, 30)), "sw": coin_flips((2, 30), seed=1)}
        assert compare(scores, scores) == Comparison(0.0, 0.0, 0.0, 1.0)
        assert compare({"tr": [1.0]}, {"tr": [0.0]}).p_value == 1.0

    def test_p_values_are_uniform_where_there_is_nothing(self):
        p_values = [
            compare(
                {"tr": coin_flips(40, seed=2 * trial)},
                {"tr": coin_flips(40, seed=2 * trial + 1)},
                resamples=200,
            ).p_value
            for trial in range(200)
        ]
        assert np.mean(np.array(p_values) <= 0.1) < 0.16
        assert 0.4 < np.mean(p_values) < 0.7

    def test_a_clear_difference(self):
        found = compare({"tr": coin_flips(300, 0.8)}, {"tr": coin_flips(300, 0.5, seed=1)})
        assert found.low > 0
        assert found.p_value == pytest.approx(2 / 2001)

    def test_sign(self):
        found = compare({"tr": [0, 0, 1]}, {"tr": [1, 1, 1]})
        assert found.difference == pytest.approx(-2 / 3)
        assert found.high <= 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("scores", "items", "message"),
        [
            ({}, None, "at least one"),
            ([1, 2], None, "dict from language"),
            ({"tr": []}, None, "at least one"),
            ({"tr": [[[1]]]}, None, r"\(seeds, items\)"),
            ({"tr": [1, math.nan]}, None, "1 not finite"),
            ({"tr": [[1], [1]], "sw": [[1]]}, None, "same seeds"),
            ({"tr": [1, 0], "sw": [1]}, None, "`items` must be given"),
            ({"tr": [1, 0]}, {"tr": "a"}, "2 scores and 1 ids of 'tr'"),
            ({"tr": [1, 0]}, {"sw": "ab"}, "0 ids of 'tr'"),
        ],
    )
    def test_scores(self, scores, items, message):
        with pytest.raises(ValueError, match=message):
            interval(scores, items)

    def test_options(self):
        for options in ({"confidence": 95}, {"confidence": 0}, {"resamples": 0}):
            with pytest.raises(ValueError, match="Received"):
                interval({"tr": [1, 0]}, **options)
            with pytest.raises(ValueError, match="Received"):
                compare({"tr": [1, 0]}, {"tr": [1, 0]}, **options)

    def test_pairs(self):
        with pytest.raises(ValueError, match="same languages"):
            compare({"tr": [1]}, {"sw": [1]})
        with pytest.raises(ValueError, match="items of `scores`"):
            compare({"tr": [1, 0]}, {"tr": [1]})
        with pytest.raises(ValueError, match="single one"):
            compare({"tr": np.ones((3, 2))}, {"tr": np.ones((2, 2))})

    def test_names_the_extra_where_scipy_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "scipy", None)
        with pytest.raises(ModuleNotFoundError, match=r"keras-cc\[evaluation\]"):
            interval({"tr": [1, 0]})
