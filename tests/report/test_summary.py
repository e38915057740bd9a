"""The summary against means, ratios and differences reckoned by hand."""

import json

import numpy as np
import pytest
from made_cells import BEST, MACHINE, SFT, WORST, cell, three

from keras_cc.report.summary import listed, summarise, verdict

pytestmark = pytest.mark.once

pytest.importorskip("scipy")


def by_name(summary):
    return {method["name"]: method for method in summary["methods"]}


class TestScores:
    def test_means_intervals_and_order(self):
        summary = summarise(three())
        assert [m["name"] for m in summary["methods"]] == ["sft", "cc", "incline"]
        assert summary["languages"] == ["ar", "tr", "en"]
        methods = by_name(summary)
        sft, cc = methods["sft"], methods["cc"]
        assert sft["scores"]["tr"]["mean"] == pytest.approx(0.5)
        assert sft["scores"]["ar"]["mean"] == pytest.approx(0.25)
        assert sft["scores"]["en"]["mean"] == pytest.approx(0.75)
        assert sft["average"]["mean"] == pytest.approx(0.375)  # English is not in it
        assert sft["average"]["low"] < 0.375 < sft["average"]["high"]
        # 40 items, half of them right: the normal interval's half width is 1.96 sqrt(.25 / 40).
        half = 1.96 * np.sqrt(0.25 / 40)
        assert sft["scores"]["tr"]["high"] - 0.5 == pytest.approx(half, abs=0.05)
        # Right everywhere: no draw of items changes that.
        assert cc["average"] == {"mean": 1.0, "low": 1.0, "high": 1.0}

    def test_differences_are_paired_with_the_baseline(self):
        methods = by_name(summarise(three()))
        assert methods["sft"]["difference"] is None
        difference = methods["cc"]["difference"]
        assert difference["average"]["difference"] == pytest.approx(1 - 0.375)
        assert difference["tr"]["difference"] == pytest.approx(0.5)
        assert difference["tr"]["p_value"] < 0.01
        assert (verdict(difference["average"]), verdict(difference["tr"])) == (1, 1)
        # The same answers in English: paired, the difference is 0 with no spread at all.
        english = difference["en"]
        assert (english["difference"], english["low"], english["high"]) == (0, 0, 0)
        assert english["p_value"] == pytest.approx(1.0)
        assert verdict(methods["incline"]["difference"]["average"]) == -1

    def test_another_baseline(self):
        summary = summarise(three(), baseline="cc")
        assert summary["methods"][0]["name"] == summary["baseline"] == "cc"
        assert by_name(summary)["sft"]["difference"]["tr"]["difference"] == pytest.approx(-0.5)

    def test_without_the_baseline_differences_are_left_out_and_it_is_said(self):
        summary = summarise(three(), baseline="plain")
        assert summary["baseline"] is None
        assert all(method["difference"] is None for method in summary["methods"])
        assert any("'plain'" in note and "left out" in note for note in summary["notes"])

    def test_unequal_seeds_are_paired_over_the_shared_ones(self):
        # sft gets better with seed 1, which cc does not have: that must not count.
        cells = [cell(seed=0), cell(seed=1, scores=BEST), cell("cc", 0, BEST)]
        summary = summarise(cells)
        cc = by_name(summary)["cc"]
        assert cc["paired_seeds"] == [0]
        assert cc["difference"]["tr"]["difference"] == pytest.approx(1 - 0.5)
        assert by_name(summary)["sft"]["scores"]["tr"]["mean"] == pytest.approx(0.75)
        assert any("different seeds" in note and "cc" in note for note in summary["notes"])
        assert not any("different seeds" in note for note in summarise(three())["notes"])

    def test_seeds_are_paired_whatever_the_order_of_the_cells(self):
        # In every seed cc is one item better; seeds paired crosswise would spread the difference.
        low, high = {"tr": [0, 0, 0, 0]}, {"tr": [1, 1, 1, 1]}
        cells = [cell(seed=0, scores=low), cell(seed=1, scores=high)]
        cells += [cell("cc", 1, high), cell("cc", 0, low)]
        found = by_name(summarise(cells))["cc"]["difference"]["tr"]
        assert (found["low"], found["high"]) == (0, 0)

    def test_cut_rows_are_counted(self):
        cells = [
            cell(rows={"train": 9, "truncated": 0}),
            cell("cc", rows={"train": 9, "truncated": 4}),
        ]
        cells += [cell("cc", 1, rows={"train": 9, "truncated": 1})]
        assert any(
            "cut on their left" in n and n.endswith(": cc (5).") for n in summarise(cells)["notes"]
        )
        assert not any("cut" in note for note in summarise(three())["notes"])

    def test_an_untuned_baseline_has_no_seeds(self):
        cells = [cell("untuned", scores=WORST), cell(seed=1), cell(seed=2, scores=BEST)]
        sft = by_name(summarise(cells, baseline="untuned"))["sft"]
        assert sft["paired_seeds"] == [1, 2]
        assert sft["difference"]["tr"]["difference"] == pytest.approx((0.5 + 1) / 2)

    def test_no_shared_seed(self):
        summary = summarise([cell(seed=0), cell("cc", 1, BEST)])
        assert by_name(summary)["cc"]["difference"] is None
        assert any("share no seed" in note for note in summary["notes"])

    def test_english_alone_has_no_average(self):
        scores = {"en": [1, 0, 1, 1]}
        summary = summarise([cell(scores=scores), cell("cc", scores=scores)])
        assert summary["methods"][0]["average"] is None
        assert summary["methods"][0]["scores"]["en"]["mean"] == pytest.approx(0.75)

    def test_one_item_has_no_interval(self):
        scores = {"tr": [1]}
        cells = [cell(scores=scores, repeat=1), cell("cc", scores=scores, repeat=1)]
        summary = summarise(cells)
        assert summary["methods"][0]["scores"]["tr"] == {"mean": 1.0, "low": None, "high": None}
        assert verdict(summary["methods"][1]["difference"]["tr"]) == 0


class TestCosts:
    def test_english_perplexity_time_and_parameters(self):
        cells = [
            cell(seed=0, english_perplexity=10.0),
            cell(
                seed=1,
                english_perplexity=40.0,
                seconds={"train": 80.0, "prepare": 2.5, "evaluate": 9.0},
                inference={"ratio": 1.2, "low": 1.0, "high": 1.3},
                parameters={"extra": 7},
            ),
        ]
        method = summarise(cells)["methods"][0]
        assert method["english_change_to_untuned"] == pytest.approx(0.75 - 0.5)
        assert method["english_perplexity"] == pytest.approx(20.0)  # sqrt(10 * 40)
        assert method["english_perplexity_ratio"] == pytest.approx(1.0)  # 20 / 20
        assert method["training_seconds"] == pytest.approx((61.5 + 82.5) / 2)
        assert method["extra_parameters"] == 7
        assert method["inference"] == pytest.approx({"ratio": 1.1, "low": 0.9, "high": 1.3})

    def test_what_was_not_measured_is_none(self):
        bare = cell()
        for key in ("before", "english_perplexity", "seconds", "parameters", "inference"):
            del bare[key]
        method = summarise([bare])["methods"][0]
        for key in (
            "english_change_to_untuned",
            "english_perplexity",
            "english_perplexity_ratio",
            "training_seconds",
            "extra_parameters",
            "inference",
        ):
            assert method[key] is None, key

    def test_a_perplexity_that_is_not_finite_is_said(self):
        summary = summarise([cell(english_perplexity=float("inf")), cell("cc")])
        assert by_name(summary)["sft"]["english_perplexity"] is None
        assert any(note.startswith("sft: the English perplexity") for note in summary["notes"])
        json.dumps(summary, allow_nan=False)

    def test_the_untuned_model(self):
        untuned = summarise(three())["untuned"]
        assert untuned["scores"] == pytest.approx({"ar": 0.2, "tr": 0.3, "en": 0.5})
        assert untuned["average"] == pytest.approx(0.25)
        assert untuned["english_perplexity"] == pytest.approx(20.0)

    def test_untuned_scores_that_disagree_are_said(self):
        other = {"accuracy": {"tr": 0.4, "ar": 0.2, "en": 0.5}}
        notes = summarise([cell(), cell("cc", before=other)])["notes"]
        assert any("cells disagree" in note and "10.0 points" in note for note in notes)
        assert not any("cells disagree" in note for note in summarise(three())["notes"])


class TestProtocol:
    def test_settings_shared_and_own(self):
        summary = summarise([cell(), cell("cc", config={"options": {"dropout": 0.5}, "epochs": 2})])
        assert summary["settings"]["model"] == "demo:tiny" and "epochs" not in summary["settings"]
        own = by_name(summary)["cc"]["settings"]
        assert own == {"recipe": "cc", "options": {"dropout": 0.5}, "epochs": 2}
        assert any("also differ in: epochs." in note for note in summary["notes"])

    def test_rows_seeds_and_machines(self):
        summary = summarise(three())
        assert summary["rows"] == {"ar": 40, "tr": 40, "en": 40}
        assert summary["training_rows"] == []
        trained = [cell(rows={"train": 300}), cell("cc", rows={"train": 300})]
        assert summarise(trained)["training_rows"] == [300]
        assert summary["seeds"] == [0, 1] and summary["machines"] == [MACHINE]
        notes = summarise([cell(), cell("cc", machine={"backend": "torch"})])["notes"]
        assert any("different machines" in note for note in notes)

    def test_one_seed_is_said(self):
        notes = summarise([cell(), cell(seed=1), cell("cc", 0, WORST)])["notes"]
        assert any(note.startswith("One seed of cc:") for note in notes)

    def test_p_values_of_many_methods_are_said_to_be_single_comparisons(self):
        notes = summarise(three())["notes"]
        assert any("2 methods" in note for note in notes)
        assert any("p-values that of items alone" in note for note in notes)
        assert not any("p-value" in note for note in summarise([cell(), cell("cc")])["notes"])

    def test_json_holds_it(self):
        summary = summarise(three())
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_verdict():
    assert verdict({"low": 0.1, "high": 0.2}) == 1
    assert verdict({"low": -0.2, "high": -0.1}) == -1
    assert verdict({"low": 0.0, "high": 0.2}) == 0  # 0 is not excluded
    assert verdict({"low": None, "high": None}) == verdict(None) == 0


def test_listed():
    assert [listed(x) for x in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_scores_of_the_cells_are_not_changed():
    cells = three()
    before = json.dumps(cells)
    summarise(cells)
    assert json.dumps(cells) == before
    assert SFT["tr"] == [1, 0, 1, 0]
