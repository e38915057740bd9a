"""What crossed: cells of the protocol `transfer`, by the part of their items.

    crossing = (others - floor) / (English - its floor)

on the same items: the share of what English learnt that the other languages have. Of nats, which
fall, the same. The floor is plain fine-tuning without those facts in any language. Where English is
no better than its floor, nothing was there to cross, and no share is said.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_cc.evaluation import statistics
from keras_cc.report import grouping
from keras_cc.report.grouping import PIVOT, UNTUNED

FLOOR, CEILING = "floor", "ceiling"
#: The metrics that are shown, and what each is called.
MEASURES = {
    "exact_match": "Exact match (points of 100)",
    "choice": "Choice among the relation's answers (points of 100)",
    "nll": "Negative log-likelihood of the answers (nats a token, lower is better)",
}
PARTS = {"pairs": "prompts seen", "held_out": "prompts never seen"}


def is_transfer(cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether cells are of the protocol `transfer`."""
    return all("parts" in cell for cell in cells)


def summarise(
    cells: Sequence[dict[str, Any]], baseline: str = "sft", confidence: float = 0.95
) -> dict[str, Any]:
    """Scores, differences to the baseline and crossing, by metric and place.

    A place is a part of the items in a group of languages: `"pairs"` and `"held_out"` in those that
    were trained, `"pairs unseen"` and `"held_out unseen"` in those that were not.

    Args:
        cells: dicts of one relation and model, as `keras_cc.report.write` takes them.
        baseline: name of the method that the others are compared with.
        confidence: float in (0, 1).

    Returns:
        A dict that JSON can hold: `places` (name to languages), and `methods`: from name to a dict
        with, by metric and place, `mean`, `low`, `high`, `english` (a mean on the same items),
        `difference` (`mean`, `low`, `high`, or None) and `crossing` (the same); `wrong_language`
        by place; `borrowed`, nats with English at hand, by path and place; `seeds`, and
        `seconds` of training.

    Example:

    ```python
    found = keras_cc.report.transfer.summarise(transfer_cells)
    found["methods"]["sft"]["nll"]["pairs"]["mean"]
    ```
    """
    groups = grouping.methods(cells)
    first = cells[0]
    places = _places(first)
    floor, base = groups.get(FLOOR), groups.get(baseline)
    methods = {}
    for name, group in groups.items():
        found: dict[str, Any] = {
            metric: {
                place: _one(group, base, floor, metric, of, confidence)
                for place, of in places.items()
            }
            for metric in MEASURES
            if all(metric in cell["scores"] for cell in group)
        }
        found["wrong_language"] = {
            place: _mean(_select(group, "wrong_language", *of)[0]) for place, of in places.items()
        }
        found["borrowed"] = {
            path: {
                place: _mean(_select(_sampled(group), path, *of)[0]) for place, of in places.items()
            }
            for path in group[0]["borrowed"]
        }
        found["seeds"] = grouping.seeds(group)
        seconds = [cell.get("seconds", {}).get("train") for cell in group]
        found["seconds"] = None if None in seconds else float(np.mean(seconds))
        methods[name] = found
    return {
        "baseline": baseline if base else None,
        "places": {place: list(languages) for place, (_, languages) in places.items()},
        "methods": methods,
    }


def curves(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Crossing in nats as training goes on, against the floor at its end.

    Returns:
        From method to place to `(steps, crossing)`, means over seeds; empty without a floor.
    """
    groups = grouping.methods(cells)
    floor, places = groups.get(FLOOR), _places(cells[0])
    found: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        runs = [cell["curve"] for cell in group if cell.get("curve", {}).get("step")]
        if floor is None or name == FLOOR or len(runs) < len(group):
            continue
        steps = runs[0]["step"]
        found[name] = {}
        for place, (part, languages) in places.items():
            ends = [_cut(cell) for cell in floor]
            below = _select(ends, "nll", part, languages)[0]
            below_english = _select(ends, "nll", part, (PIVOT,))[0]
            shares = []
            for at in range(len(steps)):
                cells_then = _sampled(
                    {**c, "borrowed": {"nll": c["curve"]["nll"][at]}} for c in group
                )
                others = _select(cells_then, "nll", part, languages)[0]
                english = _select(cells_then, "nll", part, (PIVOT,))[0]
                gained = _gained("nll", english, below_english)
                crossed = _gained("nll", others, below)
                shares.append(crossed / gained if gained > 0 else float("nan"))
            found[name][place] = (list(steps), shares)
    return found


def _places(cell):
    """From name to `(part, languages)`."""
    trained = [code for code in cell["config"]["languages"] if code != PIVOT]
    unseen = list(cell["config"].get("unseen_languages") or ())
    places = {part: (part, tuple(trained)) for part in PARTS}
    if unseen:
        places |= {f"{part} unseen": (part, tuple(unseen)) for part in PARTS}
    return places


def _one(group, base, floor, metric, place, confidence):
    part, languages = place
    scores, items = _select(group, metric, part, languages)
    english, english_items = _select(group, metric, part, (PIVOT,))
    interval = statistics.interval(scores, items, confidence=confidence)
    found = {**_fields(interval), "english": _mean(english), "difference": None, "crossing": None}
    name = group[0]["name"]
    if base is not None and group is not base:
        seeds = [s for s in grouping.seeds(group) if s in grouping.seeds(base)]
        pair = None
        if name == UNTUNED:
            pair = scores, _over_seeds(_select(base, metric, part, languages)[0])
        elif seeds:
            pair = [_select(some, metric, part, languages, seeds)[0] for some in (group, base)]
        if pair is not None:
            ours, theirs = pair
            compared = statistics.compare(ours, theirs, items, confidence=confidence)
            found["difference"] = {**_fields(compared, "difference"), "p_value": compared.p_value}
    if floor is not None and group is not floor:
        # The floor's own seeds are no part of the method's: its mean is what is left behind.
        below = _over_seeds(_select(floor, metric, part, languages)[0])
        below_english = _over_seeds(_select(floor, metric, part, (PIVOT,))[0])
        if _gained(metric, english, below_english) <= 0:
            return found
        crossing = statistics.ratio(
            {k: values - below[k] for k, values in scores.items()},
            {k: values - below_english[k] for k, values in english.items()},
            {**items, **english_items},
            confidence=confidence,
        )
        found["crossing"] = _fields(crossing)
    return found


def _sampled(group):
    """Cells as if their sample were all: what could be borrowed is scored of it alone."""
    return [{**cell, **cell["sample"], "scores": cell["borrowed"]} for cell in group]


def _cut(cell):
    """A cell with what is in its sample alone."""
    nats = {
        language: [
            found[cell["items"][language].index(id)] for id in cell["sample"]["items"][language]
        ]
        for language, found in cell["scores"]["nll"].items()
    }
    return {**cell, **cell["sample"], "scores": {"nll": nats}}


def _select(group, metric, part, languages, seeds=None):
    """`({language: (seeds, items)}, {language: ids})` of a part's items."""
    kept = [c for c in group if seeds is None or c["config"].get("seed") in seeds]
    scores, items = {}, {}
    for language in languages:
        where = [n for n, one in enumerate(group[0]["parts"][language]) if one == part]
        scores[language] = np.array([c["scores"][metric][language] for c in kept], "float64")[
            :, where
        ]
        items[language] = [str(group[0]["items"][language][n]) for n in where]
    return scores, items


def _gained(metric, scores, floor):
    gained = _mean(scores) - _mean(floor)
    return -gained if metric == "nll" else gained


def _over_seeds(scores):
    return {language: values.mean(axis=0, keepdims=True) for language, values in scores.items()}


def _mean(scores):
    return float(np.mean([values.mean() for values in scores.values()]))


def _fields(result, mean="mean"):
    values = {"mean": getattr(result, mean), "low": result.low, "high": result.high}
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
