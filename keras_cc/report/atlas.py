"""The gate atlas of a method: the cells' maps by layer, as arrays, mean over the seeds."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Map:
    """Values by layer.

    Attributes:
        values: float64 `(rows, layers)`, mean over the seeds. A row is a language or a dimension.
        layers: the layers' numbers in the model.
        languages: the rows' codes; empty where a row is a dimension.
    """

    values: np.ndarray
    layers: list[int]
    languages: list[str] = dataclasses.field(default_factory=list)


def by_language(group: Sequence[dict[str, Any]], key: str) -> Map | None:
    """The map of `key` with a row a language, or None where no cell of the method has it.

    Args:
        group: the cells of one method.
        key: `"gate"`, `"alignment_error"` or `"selected"`.

    Raises:
        ValueError: where the seeds have other layers or languages, or a row has another number of
            values than there are layers.
    """
    found = _of(group, key)
    if not found:
        return None
    languages = sorted(found[0][key])
    rows = [[atlas[key].get(language) for language in languages] for atlas in found]
    if any(sorted(atlas[key]) != languages for atlas in found):
        raise ValueError(
            f"`cells` must have the same languages in the atlas of each seed. Received: {key} of "
            f"{group[0]['name']!r} with {[sorted(atlas[key]) for atlas in found]}"
        )
    return Map(_mean(group, key, rows, found, axis=2), list(found[0]["layers"]), languages)


def by_dimension(group: Sequence[dict[str, Any]]) -> Map | None:
    """The gate's map with a row a dimension, or None where no cell of the method has it."""
    key = "gate_by_dimension"
    found = _of(group, key)
    if not found:
        return None
    values = _mean(group, key, [atlas[key] for atlas in found], found, axis=1)
    return Map(values.T, list(found[0]["layers"]))


def _of(group, key):
    return [cell["atlas"] for cell in group if (cell.get("atlas") or {}).get(key)]


def _mean(group, key, values, found, axis):
    """Over the seeds, of `(seeds, ...)` with layers on `axis`."""
    layers = found[0]["layers"]
    try:
        values = np.asarray(values, "float64")
        good = values.ndim == 3 and values.shape[axis] == len(layers)
    except (TypeError, ValueError):  # ragged
        good = False
    if not good or any(atlas["layers"] != layers for atlas in found):
        raise ValueError(
            "`cells` must have an atlas with one value a layer, and the same layers in each seed. "
            f"Received: {key} of {group[0]['name']!r} with layers "
            f"{[atlas['layers'] for atlas in found]}, which its values do not fit"
        )
    return values.mean(axis=0)
