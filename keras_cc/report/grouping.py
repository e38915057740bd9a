"""The cells of a comparison: which of them stand in one report, and which make up one method."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

#: Of a cell's JSON, and of what its figures mean; `keras_cc.comparison` writes it.
VERSION = 3
PIVOT = "en"
#: The name of the model as it came, among the methods.
UNTUNED = "untuned"
_NEEDED = ("name", "config", "metric", "items", "scores")
_SHARED = ("model", "task", "languages", "metric")  # one report is about one of each


def check(cells: dict[str, Any] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells as a list, where they can stand in one table.

    Args:
        cells: dicts, as `keras_cc.comparison` stores them.

    Returns:
        The same cells.

    Raises:
        ValueError: for no cells, a cell without a needed key or of another version, cells of
            several models, tasks, languages, metrics or items, one name for two configurations,
            the same name and seed twice, or scores that are not finite.
    """
    found: list[Any] = [cells] if isinstance(cells, dict) else list(cells)
    if not found:
        raise ValueError(
            "`cells` must have at least one cell: the JSON files that a comparison wrote. "
            "Received: cells=[]"
        )
    for cell in found:
        _check_one(cell)
    _check_alike(found)
    known: dict[str, dict] = {}
    seeds: set[tuple] = set()
    for cell in found:
        name, seed, settings = cell["name"], cell["config"].get("seed"), method_config(cell)
        if known.setdefault(name, settings) != settings:
            differing = sorted(
                key
                for key in {*settings, *known[name]}
                if settings.get(key) != known[name].get(key)
            )
            raise ValueError(
                "`cells` must have one configuration a name, since cells of a name are one method "
                f"with several seeds; give the other one another name. Received: {name!r} with "
                f"different {', '.join(differing)}"
            )
        if (name, seed) in seeds:
            raise ValueError(
                "`cells` must have each seed of a method once; leave one of the two out. "
                f"Received: {name!r} twice with seed={seed}"
            )
        seeds.add((name, seed))
    return found


def method_config(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell's configuration without its seed: what its method is."""
    return {key: value for key, value in cell["config"].items() if key != "seed"}


def methods(cells: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cells of each name, in order of seed."""
    found: dict[str, list] = {}
    for cell in cells:
        found.setdefault(cell["name"], []).append(cell)
    for group in found.values():
        group.sort(key=lambda cell: str(cell["config"].get("seed")).rjust(12))
    return found


def seeds(group: Sequence[dict[str, Any]]) -> list:
    """The seeds of a method's cells, in their order."""
    return [cell["config"].get("seed") for cell in group]


def settings(groups: dict[str, list[dict[str, Any]]]) -> tuple[dict, dict[str, dict]]:
    """Of the configurations: what all methods share, and by name what each has of its own."""
    configs = {name: method_config(group[0]) for name, group in groups.items()}
    listed = list(configs.values())
    keys = list(dict.fromkeys(key for config in listed for key in config))
    shared = {k: listed[0][k] for k in keys if all(k in c and c[k] == listed[0][k] for c in listed)}
    own = {n: {k: v for k, v in c.items() if k not in shared} for n, c in configs.items()}
    return shared, own


def machines(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The different machines that the cells ran on."""
    found = []
    for cell in cells:
        if cell.get("machine") and cell["machine"] not in found:
            found.append(cell["machine"])
    return found


def _check_one(cell):
    missing = [key for key in _NEEDED if key not in cell] if isinstance(cell, dict) else _NEEDED
    if missing:
        raise ValueError(
            f"`cells` must be dicts with {', '.join(_NEEDED)}, as a comparison writes them. "
            f"Received: one without {', '.join(missing)}"
        )
    name, metric = cell["name"], cell["metric"]
    if cell.get("version", VERSION) != VERSION:
        raise ValueError(
            f"`cells` must be of version {VERSION}; run the comparison again with this release. "
            f"Received: {name!r} of version={cell['version']!r}"
        )
    lengths = {key: len(values) for key, values in (cell.get("history") or {}).items()}
    if lengths and set(lengths.values()) != {lengths.get("step")}:
        raise ValueError(
            "`cells` must have in their history a `step` for each value. "
            f"Received: {name!r} with values {lengths}"
        )
    scores = cell["scores"].get(metric)
    if not scores:
        raise ValueError(
            "`cells` must have scores of their own metric. "
            f"Received: {name!r} with metric={metric!r} and scores of {sorted(cell['scores'])}"
        )
    for language, values in scores.items():
        ids = cell["items"].get(language, ())
        if not values or len(values) != len(ids):
            raise ValueError(
                "`cells` must have one score an item, and at least one item a language. "
                f"Received: {name!r} with {len(values)} scores and {len(ids)} items in "
                f"{language!r}"
            )
        if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise ValueError(
                "`cells` must have scores that are finite numbers; score the cell again. "
                f"Received: {name!r} with {metric} in {language!r} that is not"
            )


def _check_alike(cells):
    """One report is about one model, task, set of languages, metric and set of items."""
    for key in _SHARED:
        where = '["metric"]' if key == "metric" else f'["config"]["{key}"]'
        holders = (cell if key == "metric" else cell["config"] for cell in cells)
        values = list(dict.fromkeys(repr(holder.get(key)) for holder in holders))
        if len(values) > 1:
            raise ValueError(
                f"`cells` must all have the same {key}, since their scores cannot stand in one "
                f"table; write one report for each: `write([c for c in cells if c{where} == "
                f"{values[0]}], folder)`. Received: {key} {' and '.join(values)}"
            )
    first = cells[0]
    for cell in cells:
        languages = list(cell["scores"][cell["metric"]])
        expected = list(first["scores"][first["metric"]])
        if sorted(languages) != sorted(expected):
            raise ValueError(
                "`cells` must all have scores of the same languages. Received: "
                f"{first['name']!r} of {expected} and {cell['name']!r} of {languages}"
            )
        for language in languages:
            ids = [[str(i) for i in c["items"][language]] for c in (first, cell)]
            if ids[0] != ids[1]:
                raise ValueError(
                    "`cells` must all have scored the same items in the same order, else nothing "
                    f"is paired; score them again with the same rows. Received: {first['name']!r} "
                    f"and {cell['name']!r}, which differ in {language!r}"
                )
