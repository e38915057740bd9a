"""Captions say what the numbers are: hand-made maps and curves."""

import numpy as np
import pytest
from made_cells import atlas, cell, three

from keras_cc.report import captions
from keras_cc.report.atlas import by_dimension, by_language
from keras_cc.report.summary import summarise

pytestmark = pytest.mark.once


def maps(key, **changes):
    return {"cc": by_language([cell("cc", atlas=atlas(**changes))], key)}


def test_scores():
    pytest.importorskip("scipy")
    lines = captions.scores(summarise(three()))
    assert lines[0] == "Best on average without English: cc with 100.0."
    assert lines[1] == "Beyond chance above sft on average without English: cc (+62.5)."
    minus = "\N{MINUS SIGN}"
    assert lines[2] == f"Beyond chance below sft on average without English: incline ({minus}37.5)."
    assert lines[3] == "Largest gain beyond chance: cc in Arabic, 75.0 points."


def test_scores_where_nothing_differs():
    pytest.importorskip("scipy")
    lines = captions.scores(summarise([cell(), cell("cc")]))
    assert lines[1].endswith("without English: none.") and lines[2].endswith("English: none.")
    assert not any("Largest gain" in line for line in lines)
    assert "No baseline" in captions.scores(summarise([cell("cc")]))[1]


class TestAtlas:
    def test_gate(self):
        # Means by layer 0.15, 0.75, 0.745, 0.35; of tr 0.55, of ar 0.4475.
        assert captions.gate(maps("gate"))[1] == (
            "cc: the gate opens most at layers 3 to 4 (up to 0.75), least at layer 2 (0.15); most "
            "for Turkish (0.55), least for Arabic (0.45)."
        )

    def test_a_fixed_gate(self):
        fixed = maps("gate", gate={"tr": [0.5] * 4, "ar": [0.5] * 4})
        assert captions.gate(fixed)[1] == (
            "cc: the same at every layer, 0.50; about the same for every language."
        )

    def test_one_language(self):
        assert captions.gate(maps("gate", gate={"tr": [0.2, 0.8, 0.5, 0.4]}))[1] == (
            "cc: the gate opens most at layer 3 (up to 0.80), least at layer 2 (0.20)."
        )

    def test_alignment_error(self):
        assert captions.alignment(maps("alignment_error")) == [
            "cc: the error is largest at layer 5 (up to 20.00), smallest at layer 2 (0.02); "
            "largest for Arabic (8.33), smallest for Turkish (2.78)."
        ]

    def test_selected(self):
        # By layer 0, 0.5, 0.5, 0: the first of the two; Arabic's own is the other.
        assert captions.selected(maps("selected")) == [
            "cc: layer 3 is selected most, by 50 % of the rows; not in Arabic (layer 4). "
            "2 of 4 layers are never selected."
        ]

    def test_dimensions(self):
        # Of 12 values, 0.6, 0.9, 0.6 and 0.7 are above 0.5; layer 3 has 0.9, 0.1 and 0.5.
        found = {"cc": by_dimension([cell("cc", atlas=atlas())])}
        line = captions.dimensions(found)[1]
        assert line.startswith("cc: 33 % of all values are above 0.5; the dimensions differ most")
        assert "at layer 3, nine in ten between 0.14 and 0.86." in line

    def test_maps_are_means_over_the_seeds(self):
        other = atlas(gate={"tr": [0.4] * 4, "ar": [0.3] * 4})
        found = by_language([cell("cc", 0, atlas=atlas()), cell("cc", 1, atlas=other)], "gate")
        assert found.languages == ["ar", "tr"] and found.layers == [2, 3, 4, 5]
        np.testing.assert_allclose(found.values[1], [0.3, 0.6, 0.6, 0.4])

    def test_a_seed_without_atlas_is_not_in_the_mean(self):
        found = by_language([cell("cc", 0, atlas=atlas()), cell("cc", 1)], "gate")
        np.testing.assert_allclose(found.values[1], [0.2, 0.8, 0.8, 0.4])
        assert by_language([cell("cc")], "gate") is None

    @pytest.mark.parametrize(
        "second",
        [
            atlas(layers=[1, 2, 3, 4]),
            atlas(gate={"tr": [0.5] * 3, "ar": [0.5] * 3}),
            atlas(gate={"tr": [0.5] * 4}),
        ],
    )
    def test_seeds_that_do_not_fit_are_refused(self, second):
        with pytest.raises(ValueError, match="of 'cc' with"):
            by_language([cell("cc", 0, atlas=atlas()), cell("cc", 1, atlas=second)], "gate")


class TestCurves:
    def test_lowest_rising_and_gap(self):
        curves = {
            "sft": {"monolingual": np.array([[10, 20, 25], [3.0, 2.0, 1.5]])},
            "cc": {
                "monolingual": np.array([[10, 20, 25], [3.0, 1.25, 2.0]]),
                "connected": np.array([[10, 20, 25], [2.5, 1.0, 0.75]]),
            },
        }
        lines = captions.curves(curves, "sft")
        assert "Lowest monolingual loss: cc with 1.250, after 20 of 25 steps." in lines
        assert "Rises again by the end: cc." in lines
        assert lines[-1] == (
            "Widest gap between the paths at the end: cc, monolingual 1.250 above connected."
        )

    def test_not_finite_is_said(self):
        lines = captions.curves({"sft": {"monolingual": np.array([[1, 2], [3.0, np.nan]])}}, None)
        assert lines[-1] == "Not finite somewhere: sft."
