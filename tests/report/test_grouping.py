"""Which cells stand in one table, and which are refused, by name."""

import pytest
from made_cells import BEST, SFT, cell, three

from keras_cc.report import grouping

pytestmark = pytest.mark.once


class TestCheck:
    def test_good_cells_come_back(self):
        cells = three()
        assert grouping.check(cells) == cells
        assert grouping.check(iter(cells)) == cells
        assert grouping.check(cells[0]) == cells[:1]

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (cell("cc", config={"model": "demo:big"}), "same model.*'demo:tiny' and 'demo:big'"),
            (cell("cc", config={"task": "xcopa"}), r"same task.*\[\"task\"\] == 'xnli'"),
            (cell("cc", config={"languages": ["tr"]}), "same languages"),
            (
                {**cell("cc", metric="f1"), "scores": {"f1": cell()["scores"]["accuracy"]}},
                r"same metric.*c\[\"metric\"\] == 'accuracy'",
            ),
            (cell("cc", items={k: ["7"] * 40 for k in SFT}), "same items.*'sft' and 'cc'.*'tr'"),
            (cell(config={"epochs": 4, "seed": 1}), "one configuration a name.*different epochs"),
            (cell(), "'sft' twice with seed=0"),
            (cell("cc", version=1), "version 3.*'cc' of version=1"),
            ({"name": "cc"}, "without config, metric, items, scores"),
            ("cc", "without name, config"),
            (cell("cc", metric="f1"), r"metric='f1' and scores of \['accuracy'\]"),
            (cell("cc", scores={"tr": [1, float("nan")]}), "finite.*'cc' with accuracy in 'tr'"),
            (cell("cc", scores={"tr": []}), "0 scores and 0 items in 'tr'"),
            (cell("cc", history={"loss": [2.0]}), "a `step` for each.*'cc' with .*'loss': 1"),
            (cell("cc", history={"step": [3], "loss": [2.0, 1.0]}), "'step': 1, 'loss': 2"),
        ],
    )
    def test_what_does_not_belong_is_refused(self, other, message):
        with pytest.raises(ValueError, match=message):
            grouping.check([cell(), other])

    def test_no_cells(self):
        with pytest.raises(ValueError, match="at least one cell"):
            grouping.check([])

    def test_scores_of_other_languages(self):
        languages = {"config": {"languages": ["ar", "en", "tr"]}}
        other = cell("cc", scores={"tr": [1, 0, 0, 1]}, **languages)
        with pytest.raises(ValueError, match=r"same languages.*'sft' of .*'cc' of \['tr'\]"):
            grouping.check([cell(), other])

    def test_one_score_too_few(self):
        short = cell("cc", scores=BEST)
        short["scores"]["accuracy"]["ar"].pop()
        with pytest.raises(ValueError, match="'cc' with 39 scores and 40 items in 'ar'"):
            grouping.check([cell(), short])


def test_methods_are_cells_of_a_name_in_order_of_seed():
    cells = [cell(seed=10), cell("cc", 0), cell(seed=2)]
    groups = grouping.methods(cells)
    assert list(groups) == ["sft", "cc"]
    assert grouping.seeds(groups["sft"]) == [2, 10]
    assert grouping.seeds(groups["cc"]) == [0]
