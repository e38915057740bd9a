"""What crossed: shares, differences and intervals of made cells, by hand."""

import made_cells
import numpy as np
import pytest

from keras_cc import report
from keras_cc.evaluation import statistics
from keras_cc.report import transfer
from keras_cc.report.entries import MISSING
from keras_cc.report.transfer_tables import transfer_tables

pytestmark = pytest.mark.once
pytest.importorskip("scipy", reason='keras_cc.evaluation needs "keras-cc[evaluation]"')

ITEMS = 8
PARTS = ["pairs"] * 4 + ["held_out"] * 4
LANGUAGES = ("en", "tr", "es")
SAMPLE = [1, 6]  # an item of each part


def cell(name, pairs, held_out, english, seed=0, unseen=0.0, connected=None, curve=True):
    """Of each language the shares of right answers, of pairs and held out; nats are 2 - share."""
    shares = {
        "en": [english] * ITEMS,
        "tr": [pairs] * 4 + [held_out] * 4,
        "es": [unseen] * ITEMS,
    }
    nats = {language: [2 - v for v in values] for language, values in shares.items()}
    made = made_cells.cell(name, seed)
    return {
        **made,
        "config": {
            **made["config"],
            "task": "currency_code",
            "languages": ["en", "tr"],
            "unseen_languages": ["es"],
        },
        "metric": "exact_match",
        "items": {language: [str(n) for n in range(ITEMS)] for language in LANGUAGES},
        "parts": dict.fromkeys(LANGUAGES, PARTS),
        "scores": {
            "exact_match": shares,
            "nll": nats,
            "wrong_language": {language: [0.25] * ITEMS for language in LANGUAGES},
        },
        "sample": {
            "items": {language: [str(n) for n in SAMPLE] for language in LANGUAGES},
            "parts": {language: [PARTS[n] for n in SAMPLE] for language in LANGUAGES},
        },
        "borrowed": {
            "in_context": {language: [1.5, 1.5] for language in ("tr", "es")},
            **({} if connected is None else {
                "connected": {language: [connected, 1.5] for language in ("tr", "es")}
            }),
        },
        "before": {},
        "curve": {"step": [1, 2], "nll": [
            dict.fromkeys(LANGUAGES, [2.0] * len(SAMPLE)),
            {language: [values[n] for n in SAMPLE] for language, values in nats.items()},
        ]}
        if curve else {"step": [], "nll": []},
        "english_perplexity": None,
    }  # fmt: skip


CELLS = [
    cell("floor", 0.2, 0.2, 0.2, unseen=0.2),
    cell("sft", 0.4, 0.3, 1.0, unseen=0.2),
    cell("cc", 0.8, 0.3, 0.9, unseen=0.2, connected=0.7),
]


def test_crossing_is_the_share_of_what_english_learnt():
    found = transfer.summarise(CELLS)
    assert found["places"] == {
        "pairs": ["tr"], "held_out": ["tr"], "pairs unseen": ["es"], "held_out unseen": ["es"]
    }  # fmt: skip
    expected = {  # (others - floor) / (English - floor)
        ("sft", "pairs"): 0.2 / 0.8,
        ("sft", "held_out"): 0.1 / 0.8,
        ("cc", "pairs"): 0.6 / 0.7,
        ("cc", "held_out"): 0.1 / 0.7,
        ("cc", "pairs unseen"): 0.0,
    }
    for (name, place), share in expected.items():
        for metric in ("exact_match", "nll"):
            crossing = found["methods"][name][metric][place]["crossing"]
            assert crossing["mean"] == pytest.approx(share, abs=1e-9)
    cc = found["methods"]["cc"]
    assert cc["exact_match"]["pairs"]["difference"]["mean"] == pytest.approx(0.4)
    assert cc["exact_match"]["pairs"]["english"] == pytest.approx(0.9)
    assert cc["borrowed"]["connected"]["pairs"] == pytest.approx(0.7)
    assert cc["borrowed"]["connected"]["held_out"] == pytest.approx(1.5)
    assert cc["wrong_language"]["held_out"] == 0.25
    assert found["methods"]["floor"]["nll"]["pairs"]["crossing"] is None
    assert "choice" not in cc  # no cell has it


def test_the_interval_draws_items_and_seeds_in_both_at_once():
    draws = np.random.default_rng(0).random((2, 1, 40)).repeat(3, axis=1)
    others, english = {"tr": draws[0] / 2, "sw": draws[0] / 4}, {"en": 1 + draws[1]}
    found = statistics.ratio(others, english)
    # Where one item decides both, it is 1/2 in every draw that has it, and no number in others.
    alone = statistics.ratio({"tr": [0.5, 0.0, 0.0]}, {"en": [1.0, 0.0, 0.0]})
    assert alone.mean == pytest.approx(0.5) and np.isnan(alone.low)
    means = draws.mean(axis=(1, 2))
    assert found.mean == pytest.approx(3 / 8 * means[0] / (1 + means[1]))
    assert found.low < found.mean < found.high
    with pytest.raises(ValueError, match="different languages"):
        statistics.ratio(others, {"tr": draws[1]})


def test_without_a_floor_or_a_baseline_nothing_is_made_up():
    (found,) = [transfer.summarise([CELLS[2]])]
    one = found["methods"]["cc"]["nll"]["pairs"]
    assert (found["baseline"], one["difference"], one["crossing"]) == (None, None, None)
    assert transfer.curves([CELLS[2]]) == {}
    shown = transfer_tables(found)
    assert [entry.text for entry in shown[0].rows[0]][3] == MISSING


def test_no_share_is_said_of_an_english_that_learnt_nothing(tmp_path):
    worse = cell("cc", 0.1, 0.1, 0.1)  # below the floor in both: its ratio would be 1
    cells = [*CELLS[:2], worse]
    found = transfer.summarise(cells)["methods"]["cc"]
    for metric in ("exact_match", "nll"):
        assert found[metric]["pairs"]["crossing"] is None
        assert found[metric]["pairs"]["difference"] is not None
    assert np.isnan(transfer.curves(cells)["cc"]["pairs"][1][-1])
    written = report.write(cells, tmp_path)
    assert "Most crosses with sft" in written["report.html"].read_text()


def test_seeds_are_paired_and_the_floors_are_its_mean():
    cells = [
        cell("floor", 0.1, 0.1, 0.1), cell("floor", 0.3, 0.3, 0.3, seed=1),
        cell("sft", 0.4, 0.3, 1.0), cell("sft", 0.6, 0.3, 1.0, seed=1),
        cell("cc", 0.8, 0.3, 1.0, seed=1), cell("cc", 0.9, 0.3, 1.0, seed=2),
    ]  # fmt: skip
    found = transfer.summarise(cells)["methods"]
    assert found["cc"]["exact_match"]["pairs"]["difference"]["mean"] == pytest.approx(0.2)
    assert found["sft"]["exact_match"]["pairs"]["crossing"]["mean"] == pytest.approx(0.3 / 0.8)


def test_the_curve_ends_where_the_cell_does():
    found = transfer.curves(CELLS)
    assert set(found) == {"sft", "cc"}
    steps, shares = found["cc"]["pairs"]
    assert steps == [1, 2]
    assert shares[1] == pytest.approx(0.6 / 0.7)


def test_the_report_has_it_all(tmp_path):
    pytest.importorskip("matplotlib", reason='needs "keras-cc[report]"')
    paths = report.write(CELLS, tmp_path)
    text = paths["results.md"].read_text(encoding="utf-8")
    assert "What crosses: Exact match" in text and "What there was to borrow" in text
    assert "25.0 %" in text and "85.7 %" in text
    assert paths["crossing.png"].exists()
    assert "Most crosses with cc, 85.7 %, of prompts seen." in paths["report.html"].read_text()
