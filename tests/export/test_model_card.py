"""The model card, and the command line's arguments that fill it in."""

import json
import pathlib

import pytest

from keras_cc.export import ModelCard
from keras_cc.export.__main__ import arguments_of

pytestmark = pytest.mark.once

SCORE = {"mean": 0.25, "low": 0.125, "high": 0.5}
REPORT = {
    "metric": "exact_match",
    "task": "cldr",
    "confidence": 0.95,
    "languages": ["tr", "en"],
    "rows": {"tr": 32, "en": 31},
    "methods": [
        {"name": "sft", "seeds": [0], "scores": {"tr": SCORE, "en": SCORE}, "average": None},
        {
            "name": "cc",
            "seeds": [0, 1, 2],
            "scores": {"tr": SCORE, "en": {**SCORE, "mean": 0.6}},
            "average": {**SCORE, "mean": 0.125},
        },
    ],
}


def rows_of(text):
    """The cells of every table row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_what_is_not_given_is_said_to_be_so():
    facts = dict(row for row in rows_of(ModelCard().text()) if len(row) == 2)
    del facts["---"], facts[""]
    assert set(facts.values()) == {"not given"}
    assert "Not measured" in ModelCard().text()


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("gemma3_270m", "Gemma Terms"),
        ("demo:smollm2_135m", "Apache-2.0"),
        ("Llama3-8B", "Llama 3 Community"),
        ("my_model", "not given"),
        (None, "not given"),
    ],
)
def test_licences(name, licence):
    text = ModelCard(name).text()
    assert f"| Licence of the base model | {licence}" in text
    assert "| Licence of the base model | mine |" in ModelCard(name, licence="mine").text()


def test_scores_of_a_report(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(REPORT))
    for report in (REPORT, file, str(file)):
        text = ModelCard(report=report, report_method="cc").text()
        assert ["tr", "25.0 (12.5 to 50.0)", "32"] in rows_of(text)
        assert ["en", "60.0 (12.5 to 50.0)", "31"] in rows_of(text)
        assert "| average without English | 12.5 (12.5 to 50.0) | |" in text
        assert "3 seed(s)" in text and "95% interval" in text


@pytest.mark.parametrize("method", [None, "dft"])
def test_a_method_that_the_report_does_not_have(method):
    with pytest.raises(ValueError, match=r"\['cc', 'sft'\]"):
        ModelCard(report=REPORT, report_method=method).text()


def test_the_only_method_need_not_be_named():
    report = {**REPORT, "methods": REPORT["methods"][:1]}
    assert "method `sft`" in ModelCard(report=report).text()


def test_a_table_is_not_broken_by_what_stands_in_it():
    text = ModelCard("a|b\nc", data="x | y").text()
    assert "| Base model | a\\|b c |" in text and "| Data | x \\| y |" in text


def test_is_written_once(tmp_path):
    card = ModelCard("gemma3_270m", languages=["tr", "sw"])
    path = card.write(tmp_path)
    assert path == tmp_path / "README.md"
    assert path.read_text(encoding="utf-8") == card.text()
    assert "| Languages | tr, sw |" in card.text()
    with pytest.raises(FileExistsError):
        card.write(tmp_path)


def test_the_report_of_a_comparison_fits(tmp_path, monkeypatch):
    """What `keras_cc.report` writes, of two methods."""
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "report")
    import made_cells

    from keras_cc import report

    cells = made_cells.three()
    written = report.write(cells, tmp_path)
    name = cells[-1]["name"]
    text = ModelCard(report=written["results.json"], report_method=name).text()
    assert f"method `{name}`" in text and "average without English" in text


def test_arguments():
    args = arguments_of(["a", "b", "--languages", "tr", "sw", "--score", "log_likelihood"])
    assert (args.source, args.path, args.version, args.languages) == ("a", "b", 1, ["tr", "sw"])
    with pytest.raises(SystemExit):
        arguments_of(["a", "b", "--score", "nats"])
    with pytest.raises(SystemExit):
        arguments_of(["a"])
