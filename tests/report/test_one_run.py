"""The picture of one run: it is there, and has the figures in it."""

import pytest

from keras_cc.report import draw_run

pytestmark = pytest.mark.once

matplotlib = pytest.importorskip("matplotlib")

BEFORE = {
    "tr": {"sft_loss": 5.083, "exact_match": 0.0},
    "en": {"sft_loss": 5.4, "exact_match": 0.125},
}
AFTER = {
    "tr": {"sft_loss": 1.448, "exact_match": 0.3125},
    "en": {"sft_loss": 0.94, "exact_match": 0.625},
}


def test_the_figures_and_the_languages_are_in_it(tmp_path):
    path = draw_run(BEFORE, AFTER, [5.0, 3.0, 2.0], tmp_path / "run.svg", "cc, 3 steps")
    # Text of an SVG is drawn as outlines, each with what it says in a comment.
    drawn = path.read_text(encoding="utf-8")
    for text in ("5.08 → 1.45", "0 → 31", "12 → 62", "Turkish", "cc, 3 steps", "training loss"):
        assert f"<!-- {text}" in drawn, text


def test_without_steps_there_is_no_curve(tmp_path):
    path = draw_run(BEFORE, AFTER, [], tmp_path / "run.svg")
    assert "training loss" not in path.read_text(encoding="utf-8")
    assert draw_run(BEFORE, AFTER, [1.0], tmp_path / "run.png").stat().st_size > 5000


@pytest.mark.parametrize(("before", "after"), [({}, {}), (BEFORE, {"tr": AFTER["tr"]})])
def test_languages_must_be_the_same(before, after, tmp_path):
    with pytest.raises(ValueError, match="scores of the same languages"):
        draw_run(before, after, [], tmp_path / "run.svg")
    assert not list(tmp_path.iterdir())
