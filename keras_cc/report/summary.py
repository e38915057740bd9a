"""What each method scores, gains over the baseline, and costs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cc.evaluation import statistics
from keras_cc.report import grouping
from keras_cc.report.costs import costs, mean_of
from keras_cc.report.grouping import PIVOT, UNTUNED, VERSION

CONFIDENCE = 0.95
AVERAGE = "average"
LIKELIHOOD = "nll"


def summarise(cells: Sequence[dict[str, Any]], baseline: str = "sft") -> dict[str, Any]:
    """The comparison's results: everything that the tables and pictures show.

    Scores and differences are shares in [0, 1]. An average is the mean over the languages other
    than English of the mean over seeds and items.

    Args:
        cells: dicts of one model, task, set of languages and metric, one a method and seed.
        baseline: name of the method that the others are compared with.

    Returns:
        A dict that JSON can hold: `model`, `task`, `metric`, `languages` (English last), `rows`
        (items a language), `training_rows` (the numbers of rows there are to train on), `seeds`,
        `machines`, `baseline` (None where no cell has its name), `settings` (of the
        configuration, what all methods share), `untuned`, `notes` (strings), and `methods`: a
        list, the baseline first and then from the best average down. A method's `nll` has the same
        of the answers' negative log-likelihood, in nats a token; None where a cell lacks it.

    Raises:
        ValueError: for cells that do not stand in one table; see `keras_cc.report.grouping.check`.

    Example:

    ```python
    summary = summarise(cells)
    summary["methods"][0]["average"]  # {"mean": 0.41, "low": 0.38, "high": 0.44}
    ```
    """
    cells = grouping.check(cells)
    groups = grouping.methods(cells)
    first = cells[0]
    languages = sorted(first["scores"][first["metric"]], key=lambda code: (code == PIVOT, code))
    notes: list[str] = []
    settings, own = grouping.settings(groups)
    against = {name: groups.get(baseline) for name in groups if name != baseline}
    methods = [
        {
            "name": name,
            "settings": own[name],
            **_scores(group, against.get(name), languages, first["metric"], notes),
            LIKELIHOOD: _likelihoods(group, against.get(name), languages),
            **costs(group, notes),
        }
        for name, group in groups.items()
    ]
    main = AVERAGE if methods[0][AVERAGE] else PIVOT
    methods.sort(key=lambda m: (m["name"] != baseline, -part_of(m, main)["mean"]))
    notes += _notes(groups, baseline, own, cells)
    return {
        "version": VERSION,
        "model": first["config"].get("model"),
        "task": first["config"].get("task"),
        "metric": first["metric"],
        "languages": languages,
        "training_rows": sorted({c["rows"]["train"] for c in cells if c.get("rows")}),
        "rows": {language: len(first["items"][language]) for language in languages},
        "seeds": sorted({s for g in groups.values() for s in grouping.seeds(g)}, key=repr),
        "machines": grouping.machines(cells),
        "confidence": CONFIDENCE,
        "baseline": baseline if baseline in groups else None,
        "settings": settings,
        "untuned": _untuned(cells, languages, notes),
        "methods": methods,
        "notes": notes,
    }


def _arrays(group, languages, metric, seeds=None):
    """`{language: (seeds, items)}` of a metric."""
    kept = [c for c in group if seeds is None or c["config"].get("seed") in seeds]
    return {
        language: np.asarray([c["scores"][metric][language] for c in kept], "float64")
        for language in languages
    }


def _likelihoods(group, baseline, languages):
    """`_scores` of the answers' likelihoods, where every cell has them."""
    if not all(LIKELIHOOD in cell["scores"] for cell in [*group, *(baseline or ())]):
        return None
    return _scores(group, baseline, languages, LIKELIHOOD, notes=[])  # they are made already


def _scores(group, baseline, languages, metric, notes):
    """Means with intervals, and the paired differences to the baseline, if there is one."""
    items = {language: [str(i) for i in group[0]["items"][language]] for language in languages}
    others = [language for language in languages if language != PIVOT]
    parts = {language: [language] for language in languages}
    if others:
        parts[AVERAGE] = others
    ids = {part: {language: items[language] for language in of} for part, of in parts.items()}
    found = {
        part: _fields(
            statistics.interval(_arrays(group, of, metric), ids[part], confidence=CONFIDENCE),
            ("mean", "low", "high"),
        )
        for part, of in parts.items()
    }
    result = {
        "seeds": grouping.seeds(group),
        "scores": {language: found[language] for language in languages},
        AVERAGE: found.get(AVERAGE),
        "difference": None,
        "paired_seeds": None,
    }
    if baseline is not None:
        name, against = group[0]["name"], baseline[0]["name"]
        own, theirs = grouping.seeds(group), grouping.seeds(baseline)
        if against == UNTUNED:  # no seed has changed it: its one cell is compared with all
            seeds, theirs_of = own, theirs
        else:
            seeds = theirs_of = [seed for seed in own if seed in theirs]
        if not seeds:
            notes.append(f"{name} and {against} share no seed: their difference is left out.")
        else:
            if against != UNTUNED and {*own, *theirs} != {*seeds}:
                notes.append(
                    f"{name} and {against} have different seeds: their difference is over the "
                    f"shared ones, {listed(seeds)}; each mean is over all of the method's own."
                )
            result["paired_seeds"] = seeds
            result["difference"] = {
                part: _fields(
                    statistics.compare(
                        _arrays(group, of, metric, seeds),
                        _arrays(baseline, of, metric, theirs_of),
                        ids[part],
                        confidence=CONFIDENCE,
                    ),
                    ("difference", "low", "high", "p_value"),
                )
                for part, of in parts.items()
            }
    return result


def _untuned(cells, languages, notes):
    """The model before training: means alone, as the cells have no items of it."""
    metric = cells[0]["metric"]
    before = [c.get("before") or {} for c in cells]
    scores, spread = {}, 0.0
    for language in languages:
        found = [b[metric][language] for b in before if language in (b.get(metric) or {})]
        scores[language] = mean_of(found)
        spread = max(spread, np.ptp(found) if found else 0.0)
    if spread > 1e-3:
        notes.append(
            "The cells disagree about the untuned model's scores by up to "
            f"{100 * spread:.1f} points: its row is their mean."
        )
    others = [scores[language] for language in languages if language != PIVOT]
    known = others and None not in others
    return {
        "scores": scores,
        AVERAGE: float(np.mean(others)) if known else None,
        "english_perplexity": mean_of(
            [b.get("english_perplexity") for b in before], geometric=True
        ),
    }


def _notes(groups, baseline, own, cells):
    notes = []
    if baseline not in groups:
        notes.append(f"No cell is named {baseline!r}, the baseline: differences are left out.")
    elif len(groups) > 2:
        notes.append(
            f"Every p-value is of one comparison with {baseline}; none is corrected for there "
            f"being {len(groups) - 1} methods."
        )
    if baseline in groups and len(groups) > 1 and any(len(group) > 1 for group in groups.values()):
        notes.append(
            "Intervals cover the choice of items and of seeds, p-values that of items alone: a "
            "small p beside an interval that holds 0 can come of seeds that disagree."
        )
    if any(len(group) == 1 for group in groups.values()):
        single = [name for name, group in groups.items() if len(group) == 1]
        notes.append(
            f"One seed of {listed(single)}: the interval covers the choice of items, not of seed."
        )
    differing = {key for settings in own.values() for key in settings} - {
        "recipe",
        "options",
        "finish",
        "connection_learning_rate",
    }  # those are in the name
    if differing:
        notes.append(f"The methods also differ in: {listed(sorted(differing))}.")
    cut = {
        name: sum(c.get("rows", {}).get("truncated", 0) for c in g) for name, g in groups.items()
    }
    if any(cut.values()):
        counts = [f"{name} ({count:,})" for name, count in cut.items() if count]
        notes.append(
            "Rows whose prompts were cut on their left, since they did not fit, counted each time "
            f"that they were read: {listed(counts)}."
        )
    if len(grouping.machines(cells)) > 1:
        notes.append("The cells ran on different machines: compare no times.")
    return notes


def _fields(result, names):
    """Of an `Interval` or a `Comparison`; None for what one item alone does not give."""
    values = {name: float(getattr(result, name)) for name in names}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def verdict(difference: dict[str, Any] | None) -> int:
    """1 where a difference's interval is above 0, -1 where it is below, 0 where it is neither."""
    if not difference or difference["low"] is None:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def part_of(method: dict[str, Any], part: str, what: str = "score") -> Any:
    """A method's `"score"` or `"difference"` of a part: a language, or `AVERAGE`."""
    if what == "difference":
        return method["difference"] and method["difference"][part]
    return method[AVERAGE] if part == AVERAGE else method["scores"][part]


def main_part(summary: dict[str, Any]) -> str:
    """What methods are ranked by: the average, or English where there is nothing else."""
    return AVERAGE if summary["methods"][0][AVERAGE] else summary["languages"][0]


def listed(values) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last
