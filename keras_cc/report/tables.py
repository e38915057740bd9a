"""The summary of a comparison as tables, of scores, likelihoods and costs, and those in Markdown.

A score is bold where it is the best of its column *and* its paired interval against the baseline
excludes 0. Scores and differences are shown in points, 100 times the share.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from keras_cc.report.entries import MISSING, Entry, Table, bracketed, nats, number, points
from keras_cc.report.grouping import PIVOT, UNTUNED
from keras_cc.report.labels import english_name
from keras_cc.report.summary import AVERAGE, LIKELIHOOD, listed, part_of, verdict
from keras_cc.report.transfer_tables import transfer_tables


@dataclasses.dataclass(frozen=True)
class _Measure:
    """How a measure is written, and which way is better."""

    write: Callable[..., str]
    better: int  # 1: higher, -1: lower

    def best(self, methods, part):
        """The name of the part's best method, where it beats the baseline beyond chance."""
        top = max(methods, key=lambda method: self.better * part_of(method, part)["mean"])
        wins = self.better * verdict(part_of(top, part, "difference")) > 0
        return top["name"] if wins else None

    def score(self, value, best, interval=True):
        return Entry(self.write(value["mean"]), self.interval(value) if interval else "", best)

    def difference(self, method, part):
        if method["difference"] is None:
            return [Entry(MISSING), Entry(MISSING)]
        found = method["difference"][part]
        p = found["p_value"]
        return [
            Entry(self.write(found["difference"], signed=True), self.interval(found, signed=True)),
            Entry("<0.001" if p < 0.001 else f"{p:.3f}"),
        ]

    def interval(self, value, signed=False):
        return bracketed(value, self.write, signed)


def scores_table(summary: dict[str, Any], intervals: bool = True) -> Table:
    """Average, difference to the baseline, and the score of each language.

    Args:
        summary: of `keras_cc.report.summary.summarise`.
        intervals: whether the languages' scores have their intervals; the average always does.

    Returns:
        A `Table`: the untuned model's row, then one a method.
    """
    header, rows = _compared(summary, summary["methods"], _Measure(points, 1), intervals)
    if not _has_untuned(summary):
        untuned = summary["untuned"]
        averages = [Entry(points(untuned[AVERAGE]))] if _others(summary) else []
        differences = [Entry(MISSING)] * (2 if summary["baseline"] is not None else 0)
        scores = [Entry(points(untuned["scores"][code])) for code in summary["languages"]]
        row = [Entry(UNTUNED), *averages, *differences, *scores]
        rows.insert(0, row + [Entry(MISSING)] * (len(header) - len(row)))
    return Table(f"Scores ({summary['metric']}, points of 100)", header, rows)


def likelihood_table(summary: dict[str, Any], intervals: bool = True) -> Table | None:
    """The same of the answers' negative log-likelihood, where a small difference shows sooner.

    Args:
        summary: of `keras_cc.report.summary.summarise`.
        intervals: as in `scores_table`.

    Returns:
        A `Table`, one row a method; None where a cell has no likelihoods.
    """
    methods = [
        {**(method[LIKELIHOOD] or {}), "name": method["name"]} for method in summary["methods"]
    ]
    if any(AVERAGE not in method for method in methods):
        return None
    header, rows = _compared(summary, methods, _Measure(nats, -1), intervals)
    return Table(
        "Negative log-likelihood of the answers (nats a token, lower is better)", header, rows
    )


def _compared(summary, methods, measure, intervals):
    """Header and rows: average, difference to the baseline, and each language."""
    languages, baseline, others = summary["languages"], summary["baseline"], _others(summary)
    parts = [AVERAGE, *languages] if others else list(languages)
    shown = intervals or not others
    best = {part: measure.best(methods, part) for part in parts}
    header = ["Method"]
    if others:
        header += [f"Average of {len(others)}"]
    if baseline is not None:
        header += [f"Difference to {baseline}", "p"]
    header += [english_name(language) for language in languages]
    with_english = bool(baseline is not None and others and PIVOT in languages)
    if with_english:
        header += [f"English: difference to {baseline}"]
    rows: list[list[Entry]] = []
    for method in methods:
        row = [Entry(method["name"])]
        if others:
            row += [measure.score(method[AVERAGE], best[AVERAGE] == method["name"])]
        if baseline is not None:
            row += measure.difference(method, AVERAGE if others else languages[0])
        row += [
            measure.score(method["scores"][language], best[language] == method["name"], shown)
            for language in languages
        ]
        if with_english:
            row += measure.difference(method, PIVOT)[:1]
        rows.append(row)
    return header, rows


def _others(summary):
    return [language for language in summary["languages"] if language != PIVOT]


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
    untuned = Entry(number(summary["untuned"]["english_perplexity"]))
    rows = [[Entry(UNTUNED), Entry(MISSING), untuned, *[Entry(MISSING)] * (len(header) - 3)]]
    for method in summary["methods"]:
        extra, inference = method["extra_parameters"], method["inference"] or {}
        low, high = inference.get("low"), inference.get("high")
        measured = None not in (low, high) and low != high
        rows.append(
            [
                Entry(method["name"]),
                Entry(points(method["english_change_to_untuned"], signed=True)),
                Entry(number(method["english_perplexity"])),
                Entry(number(method["english_perplexity_ratio"], 2)),
                Entry(number(method["training_seconds"])),
                Entry(MISSING if extra is None else f"{extra:,}"),
                Entry(
                    number(inference.get("ratio"), 2),
                    f"[{low:.2f}, {high:.2f}]" if measured else "",
                ),
                Entry(", ".join(map(str, method["seeds"]))),
            ]
        )
    return Table("Costs", header, rows[1:] if _has_untuned(summary) else rows)


def tables(summary: dict[str, Any], intervals: bool = True) -> list[Table]:
    """The tables that there are data for, as `scores_table` has them."""
    found = [
        scores_table(summary, intervals),
        likelihood_table(summary, intervals),
        costs_table(summary),
    ]
    crossing = transfer_tables(summary["transfer"]) if "transfer" in summary else []
    return [*crossing, *(table for table in found if table is not None)]


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
    """The results as Markdown: the tables, the protocol, and the notes.

    Args:
        summary: of `keras_cc.report.summary.summarise`.
        title: the heading.

    Returns:
        A string that ends in a new line.
    """
    lines = [f"### {_escaped(title)}", ""]
    for table in tables(summary, intervals=False):
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


def _bold(entry):
    return f"**{_escaped(entry.text)}**" if entry.best else _escaped(entry.text)


def _row(texts, escape=True):
    return "| " + " | ".join(_escaped(text) if escape else text for text in texts) + " |"


def _escaped(text):
    text = re.sub(r"([\\|*`<$\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))
    return text.replace("\n", " ")
