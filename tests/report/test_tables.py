"""The tables: what stands in which place, what is bold, and that Markdown keeps its columns."""

import re

import pytest
from made_cells import BEST, SFT, cell, three

from keras_cc.report.summary import summarise
from keras_cc.report.tables import (
    costs_table,
    likelihood_table,
    markdown,
    protocol,
    scores_table,
    tables,
)

pytestmark = pytest.mark.once

pytest.importorskip("scipy")
MINUS = "\N{MINUS SIGN}"


def column(table, header):
    place = table.header.index(header)
    return {row[0].text: row[place] for row in table.rows}


class TestScores:
    def test_scores_in_points(self):
        table = scores_table(summarise(three()))
        assert table.header == [
            "Method",
            "Average of 2",
            "Difference to sft",
            "p",
            "Arabic",
            "Turkish",
            "English",
            "English: difference to sft",
        ]
        assert all(len(row) == len(table.header) for row in table.rows)
        texts = {name: entry.text for name, entry in column(table, "Average of 2").items()}
        assert texts == {"untuned": "25.0", "sft": "37.5", "cc": "100.0", "incline": "0.0"}
        differences = column(table, "Difference to sft")
        assert differences["cc"].text == "+62.5" and differences["sft"].text == "–"
        assert differences["incline"].text == f"{MINUS}37.5"
        assert re.fullmatch(r"\[\+\d\d\.\d, \+\d\d\.\d\]", differences["cc"].detail)
        assert column(table, "English: difference to sft")["cc"].text == "0.0"
        assert column(table, "English")["untuned"].text == "50.0"

    def test_intervals_of_languages_where_asked(self):
        summary = summarise(three())
        assert column(scores_table(summary), "Turkish")["cc"].detail == "[100.0, 100.0]"
        assert column(scores_table(summary, intervals=False), "Turkish")["cc"].detail == ""
        average = column(scores_table(summary, intervals=False), "Average of 2")
        assert average["cc"].detail == "[100.0, 100.0]"

    def test_bold_is_the_best_and_beyond_chance(self):
        table = scores_table(summarise(three()))
        bold = {
            (row[0].text, table.header[i])
            for row in table.rows
            for i, e in enumerate(row)
            if e.best
        }
        assert bold == {("cc", "Average of 2"), ("cc", "Turkish"), ("cc", "Arabic")}

    def test_the_best_is_not_bold_where_chance_could_do_it(self):
        # One item of forty more: better, not beyond chance.
        scores = {"tr": [1, 0, 1, 0] * 10}
        lucky = {"tr": [1, 1, 1, 0] + [1, 0, 1, 0] * 9}
        cells = [cell(scores=scores, repeat=1), cell("cc", scores=lucky, repeat=1)]
        table = scores_table(summarise(cells))
        assert column(table, "Turkish")["cc"].text == "52.5"
        assert not any(entry.best for row in table.rows for entry in row)

    def test_the_baseline_is_never_bold(self):
        cells = [cell(scores=BEST), cell("cc", scores=SFT)]
        assert not any(e.best for row in scores_table(summarise(cells)).rows for e in row)

    def test_without_baseline(self):
        table = scores_table(summarise([cell("cc", scores=BEST)]))
        assert table.header == ["Method", "Average of 2", "Arabic", "Turkish", "English"]
        assert not any(entry.best for row in table.rows for entry in row)

    def test_english_alone(self):
        scores = {"en": [1, 0, 1, 1]}
        table = scores_table(summarise([cell(scores=scores), cell("cc", scores=scores)]), False)
        assert table.header == ["Method", "Difference to sft", "p", "English"]
        assert column(table, "Difference to sft")["cc"].detail == "[0.0, 0.0]"
        assert column(table, "English")["cc"].detail  # nothing else says how sure it is


def with_nats(name, tr, ar, en=(1.0, 3.0), **changes):
    """A cell of 20 items a language; its likelihoods go in turn."""
    made = cell(name, scores={"tr": [1, 0], "ar": [0, 1], "en": [1, 1]}, **changes)
    made["scores"]["nll"] = {k: list(v) * 10 for k, v in (("tr", tr), ("ar", ar), ("en", en))}
    return made


class TestLikelihoods:
    def test_lower_is_better(self):
        sft, cc = with_nats("sft", (2.0, 4.0), (3.0, 3.0)), with_nats("cc", (1.5, 3.5), (3.0, 3.0))
        dft = with_nats("dft", (2.5, 4.5), (3.0, 3.0), en=(1.0, 3.25))
        table = likelihood_table(summarise([sft, cc, dft]))
        assert "lower is better" in table.title
        assert all(len(row) == len(table.header) for row in table.rows)
        averages = column(table, "Average of 2")
        found = {name: averages[name].text for name in ("sft", "cc", "dft")}
        assert found == {"sft": "3.000", "cc": "2.750", "dft": "3.250"}
        differences = column(table, "Difference to sft")
        # Turkish is 0.5 lower on every item, Arabic the same: no draw of items changes that.
        assert differences["cc"].text == f"{MINUS}0.250"
        assert differences["cc"].detail == f"[{MINUS}0.250, {MINUS}0.250]"
        assert (differences["dft"].text, differences["sft"].text) == ("+0.250", "–")
        assert column(table, "English: difference to sft")["dft"].text == "+0.125"
        assert column(table, "English: difference to sft")["cc"].text == "0.000"
        bold = {row[0].text for row in table.rows if any(entry.best for entry in row)}
        assert bold == {"cc"}

    def test_it_stands_with_the_others_where_all_cells_have_it(self):
        sft, cc = with_nats("sft", (2.0, 4.0), (3.0, 3.0)), with_nats("cc", (1.5, 3.5), (3.0, 3.0))
        summary = summarise([sft, cc])
        assert [len(table.rows) for table in tables(summary)] == [3, 2, 3]  # untuned: no nats
        assert "| **2.750** [" in markdown(summary, "x")
        del cc["scores"]["nll"]
        summary = summarise([sft, cc])
        assert likelihood_table(summary) is None
        assert len(tables(summary)) == 2


def test_costs():
    table = costs_table(summarise([cell(), cell(seed=1), cell("cc", parameters={"extra": 12345})]))
    rows = {row[0].text: [entry.text for entry in row[1:]] for row in table.rows}
    assert rows["untuned"] == ["–", "20.0", "–", "–", "–", "–", "–"]
    assert rows["sft"] == ["+25.0", "30.0", "1.50", "61.5", "0", "1.00", "0, 1"]
    assert rows["cc"][4] == "12,345"
    assert column(table, "Inference time")["sft"].detail == "[0.90, 1.10]"
    known = {"ratio": 1.0, "low": 1.0, "high": 1.0}  # a merged model is the stock model
    table = costs_table(summarise([cell(inference=known)]))
    assert column(table, "Inference time")["sft"].detail == ""


def test_the_untuned_model_stands_there_once():
    """As a method where it has a cell, else with the means that the other cells have of it."""
    for cells, interval in (([cell()], ""), ([cell(), cell("untuned")], "[")):
        summary = summarise(cells)
        for table in (scores_table(summary), costs_table(summary)):
            assert [row[0].text for row in table.rows].count("untuned") == 1
        assert column(scores_table(summary), "Turkish")["untuned"].detail[:1] == interval


def test_protocol():
    text = protocol(summarise(three()))
    assert text.startswith("Model demo:tiny; task xnli; 40 rows scored in each of ar, tr and en;")
    assert "seeds 0 and 1; machine: backend jax, cores 2, keras 3.15.1." in text
    one = summarise([cell(rows={"train": 1200})])
    assert protocol(one).startswith("Model demo:tiny; task xnli; 1,200 rows to train on; 40 rows")
    assert "seed 0;" in protocol(summarise([cell()]))


def test_protocol_of_unequal_rows():
    scores = {"tr": [1, 0, 1, 0], "ar": [1, 0]}
    assert "rows scored: ar 20, tr 40;" in protocol(summarise([cell(scores=scores)]))


class TestMarkdown:
    def test_rows_have_the_header_s_columns(self):
        text = markdown(summarise(three()), "Title")
        assert text.startswith("### Title\n") and text.endswith("\n")
        tables = re.findall(r"(?:^\|.*\|$\n)+", text, re.MULTILINE)
        assert len(tables) == 2
        for table in tables:
            widths = {line.count("|") for line in table.splitlines()}
            assert len(widths) == 1
        assert "| cc | **100.0** [100.0, 100.0] | +62.5 [" in text
        assert "| sft | 37.5 [" in text

    def test_marks_in_names_are_escaped(self):
        cells = [cell(), cell("a|b *c* <i> `d` $e$ _f_ g_h")]
        text = markdown(summarise(cells), "T_1 <b>")
        assert "### T_1 \\<b>" in text
        assert "| a\\|b \\*c\\* \\<i> \\`d\\` \\$e\\$ \\_f\\_ g_h |" in text
