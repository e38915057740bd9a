"""The summary of a comparison as two tables, of scores and of costs, and those in Markdown.

A score is bold where it is the best of its column *and* its paired interval against the baseline
excludes 0. Scores and differences are shown in points, 100 times the share.
"""

import dataclasses
import re
from typing import Any

from keras_cc.report.grouping import PIVOT
from keras_cc.report.languages import english_name
from keras_cc.report.summary import AVERAGE, listed, part_of, verdict

UNTUNED = "untuned"
MISSING = "–"
_MINUS = "\N{MINUS SIGN}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One place in a table: its text, a detail such as an interval, and whether it is bold."""

    text: str
    detail: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its title, the header's strings, and rows of as many entries."""

    title: str
    header: list[str]
    rows: list[list[Entry]]


def scores_table(summary: dict[str, Any], intervals: bool = True) -> Table:
    """Average, difference to the baseline, and the score of each language.

    Args:
        summary: of `keras_cc.report.summary.summarise`.
        intervals: whether the languages' scores have their intervals; the average always does.

    Returns:
        A `Table`: the untuned model's row, then one a method.
    """
    languages, baseline = summary["languages"], summary["baseline"]
    others = [language for language in languages if language != PIVOT]
    parts = [AVERAGE, *languages] if others else list(languages)
    shown = intervals or not others
    best = {part: _best(summary["methods"], part) for part in parts}
    header = ["Method"]
    if others:
        header += [f"Average of {len(others)}"]
    if baseline is not None:
        header += [f"Difference to {baseline}", "p"]
    header += [english_name(language) for language in languages]
    with_english = bool(baseline is not None and others and PIVOT in languages)
    if with_english:
        header += [f"English: difference to {baseline}"]

    untuned = summary["untuned"]
    rows: list[list[Entry]] = [[Entry(UNTUNED)]]
    rows[0] += [Entry(_points(untuned[AVERAGE]))] if others else []
    rows[0] += [Entry(MISSING)] * (2 if baseline is not None else 0)
    rows[0] += [Entry(_points(untuned["scores"][language])) for language in languages]
    rows[0] += [Entry(MISSING)] * (len(header) - len(rows[0]))
    for method in summary["methods"]:
        row = [Entry(method["name"])]
        if others:
            row += [_score(method[AVERAGE], best[AVERAGE] == method["name"])]
        if baseline is not None:
            row += _difference(method, AVERAGE if others else languages[0])
        row += [
            _score(method["scores"][language], best[language] == method["name"], shown)
            for language in languages
        ]
        if with_english:
            row += _difference(method, PIVOT)[:1]
        rows.append(row)
    rows = rows[1:] if _has_untuned(summary) else rows
    return Table(f"Scores ({summary['metric']}, points of 100)", header, rows)


def costs_table(summary: dict[str, Any]) -> Table:
    """What each method does to the model's English, and its time, parameters and inference.

    Args:
        summary: of `keras_cc.report.summary.summarise`.

    Returns:
        A `Table`: the untuned model's row, then one a method.
    """
    header = [
        "Method",
        f"English: change to {UNTUNED}",
        "English perplexity",
        "Perplexity ratio",
        "Training (s)",
        "Extra parameters",
        "Inference time",
        "Seeds",
    ]
    untuned = Entry(_number(summary["untuned"]["english_perplexity"]))
    rows = [[Entry(UNTUNED), Entry(MISSING), untuned, *[Entry(MISSING)] * (len(header) - 3)]]
    for method in summary["methods"]:
        extra, inference = method["extra_parameters"], method["inference"] or {}
        low, high = inference.get("low"), inference.get("high")
        measured = None not in (low, high) and low != high
        rows.append(
            [
                Entry(method["name"]),
                Entry(_points(method["english_change_to_untuned"], signed=True)),
                Entry(_number(method["english_perplexity"])),
                Entry(_number(method["english_perplexity_ratio"], 2)),
                Entry(_number(method["training_seconds"])),
                Entry(MISSING if extra is None else f"{extra:,}"),
                Entry(
                    _number(inference.get("ratio"), 2),
                    f"[{low:.2f}, {high:.2f}]" if measured else "",
                ),
                Entry(", ".join(map(str, method["seeds"]))),
            ]
        )
    return Table("Costs", header, rows[1:] if _has_untuned(summary) else rows)


def protocol(summary: dict[str, Any]) -> str:
    """One sentence: model, task, rows, languages, seeds and machine."""
    rows = summary["rows"]
    counts = sorted(set(rows.values()))
    if len(counts) == 1:
        scored = f"{counts[0]} rows scored in each of {listed(rows)}"
    else:
        scored = "rows scored: " + ", ".join(f"{code} {count}" for code, count in rows.items())
    machines = "; ".join(
        ", ".join(f"{key} {value}" for key, value in machine.items())
        for machine in summary["machines"]
    )
    if summary["training_rows"]:
        trained = " or ".join(f"{count:,}" for count in summary["training_rows"])
        scored = f"{trained} rows to train on; {scored}"
    seeds = f"seed{'s'[: len(summary['seeds']) > 1]} {listed(summary['seeds'])}"
    return (
        f"Model {summary['model']}; task {summary['task']}; {scored}; "
        f"{seeds}; machine: {machines or 'not said'}. "
        f"In brackets: {100 * summary['confidence']:.0f} % intervals. Training counts what comes "
        "before and after it, such as a distillation or a closed-form fit; inference time is "
        "relative to the stock model's."
    )


def markdown(summary: dict[str, Any], title: str) -> str:
    """The results as Markdown: both tables, the protocol, and the notes.

    Args:
        summary: of `keras_cc.report.summary.summarise`.
        title: the heading.

    Returns:
        A string that ends in a new line.
    """
    lines = [f"### {_escaped(title)}", ""]
    for table in (scores_table(summary, intervals=False), costs_table(summary)):
        lines += [f"**{_escaped(table.title)}**", "", _row(table.header)]
        lines += ["|" + " --- |" + " ---: |" * (len(table.header) - 1)]
        for row in table.rows:
            shown = [" ".join(filter(None, (_bold(entry), entry.detail))) for entry in row]
            lines.append(_row(shown, escape=False))
        lines.append("")
    if summary["baseline"] is not None:
        lines += [
            f"Bold: the best of its column, where its paired interval against "
            f"{_escaped(summary['baseline'])} excludes 0.",
            "",
        ]
    lines += [_escaped(protocol(summary)), ""]
    lines += [f"- {_escaped(note)}" for note in summary["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _has_untuned(summary):
    """Whether the untuned model is among the methods, with items and intervals of its own."""
    return any(method["name"] == UNTUNED for method in summary["methods"])


def _best(methods, part):
    """The name of the part's best method, where it beats the baseline beyond chance."""
    top = max(methods, key=lambda method: part_of(method, part)["mean"])
    return top["name"] if verdict(part_of(top, part, "difference")) > 0 else None


def _score(value, best, interval=True):
    return Entry(_points(value["mean"]), _interval(value) if interval else "", best)


def _interval(value, signed=False):
    if value["low"] is None:
        return ""
    return f"[{_points(value['low'], signed)}, {_points(value['high'], signed)}]"


def _difference(method, part):
    if method["difference"] is None:
        return [Entry(MISSING), Entry(MISSING)]
    found = method["difference"][part]
    p = found["p_value"]
    return [
        Entry(_points(found["difference"], signed=True), _interval(found, signed=True)),
        Entry("<0.001" if p < 0.001 else f"{p:.3f}"),
    ]


def _points(value, signed=False):
    if value is None:
        return MISSING
    text = f"{100 * value:{'+' if signed else ''}.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text.replace("-", _MINUS)


def _number(value, digits=1):
    return MISSING if value is None else f"{value:,.{digits}f}"


def _bold(entry):
    return f"**{_escaped(entry.text)}**" if entry.best else _escaped(entry.text)


def _row(texts, escape=True):
    return "| " + " | ".join(_escaped(text) if escape else text for text in texts) + " |"


def _escaped(text):
    text = re.sub(r"([\\|*`<$\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))
    return text.replace("\n", " ")
