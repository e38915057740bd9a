"""What a method costs: English lost, time, parameters, inference."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from keras_cc.report.grouping import PIVOT

_NOT_TRAINING = ("evaluate", "curve")


def costs(group: Sequence[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """A method's costs, means over its seeds; None for what no cell has.

    Args:
        group: the cells of one method.
        notes: what has to be said about them is added here.

    Returns:
        A dict that JSON can hold. Perplexities and their ratios are geometric means; the ends of
        `inference` are the widest of the seeds'.
    """
    name, metric = group[0]["name"], group[0]["metric"]
    english = [
        float(np.mean(c["scores"][metric][PIVOT])) - c["before"][metric][PIVOT]
        for c in group
        if PIVOT in c["scores"][metric] and PIVOT in ((c.get("before") or {}).get(metric) or {})
    ]
    after = [c.get("english_perplexity") for c in group]
    ratios = [
        c["english_perplexity"] / c["before"]["english_perplexity"]
        for c in group
        if c.get("english_perplexity") and (c.get("before") or {}).get("english_perplexity")
    ]
    broken = sum(p is not None and not math.isfinite(p) for p in after)
    if broken:
        notes.append(
            f"{name}: the English perplexity of {broken} of {len(group)} seeds is not finite, and "
            "left out of the mean."
        )
    seconds = [c.get("seconds") or {} for c in group]
    inference = [c["inference"] for c in group if c.get("inference")]
    extra = {(c.get("parameters") or {}).get("extra") for c in group}
    return {
        "english_change_to_untuned": mean_of(english),
        "english_perplexity": mean_of(after, geometric=True),
        "english_perplexity_ratio": mean_of(ratios, geometric=True),
        # What it takes to get the model: preparing its rows, a closed-form fit, a search too.
        "training_seconds": mean_of(
            [
                sum(spent for what, spent in found.items() if what not in _NOT_TRAINING and spent)
                for found in seconds
                if found.get("train") is not None
            ]
        ),
        "extra_parameters": extra.pop() if len(extra) == 1 else max(e or 0 for e in extra),
        "inference": {
            "ratio": mean_of([i.get("ratio") for i in inference]),
            "low": min((i["low"] for i in inference if i.get("low") is not None), default=None),
            "high": max((i["high"] for i in inference if i.get("high") is not None), default=None),
        }
        if inference
        else None,
    }


def mean_of(values: Iterable[float | None], geometric: bool = False) -> float | None:
    """The mean of the values that are there and finite; None where there are none."""
    kept = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not kept or (geometric and min(kept) <= 0):
        return None
    return float(np.exp(np.mean(np.log(kept)))) if geometric else float(np.mean(kept))
