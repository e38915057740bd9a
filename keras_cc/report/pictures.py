"""The pictures of a report: scores, learning curves and the gate atlas.

Every picture is small panels with shared axes, so that twelve methods stay legible and colour
never has to tell more than four things apart, of which the line or marker tells the same. Colours
are Okabe and Ito's, heat maps viridis: both hold for colour-blind readers and in grey. matplotlib
is imported when drawing.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cc.report import atlas, captions, grouping, panels, transfer
from keras_cc.report.labels import drawable, label
from keras_cc.report.summary import AVERAGE, part_of, verdict

BLUE, _RED, GREY, _PALE = "#0072B2", "#D55E00", "#767676", "#e6e6e6"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _PALE,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "savefig.dpi": 130,
    "text.parse_math": False,  # a "$" in a name is a "$"
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was drawn: its file, a heading, and what one sees, a line a fact."""

    path: pathlib.Path
    heading: str
    caption: list[str]


def draw(summary: dict[str, Any], cells: Sequence[dict[str, Any]], folder) -> list[Picture]:
    """Draws every picture whose data is there.

    Args:
        summary: of `keras_cc.report.summary.summarise`, of the same cells.
        cells: dicts, as `summarise` takes them.
        folder: where to write; it exists. A picture of an earlier report that this one does not
            have is deleted.

    Returns:
        The pictures, in the order of `NAMES`.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    groups = grouping.methods(cells)
    groups = {method["name"]: groups[method["name"]] for method in summary["methods"]}
    drawn = []
    with styled():
        for name, drawer in _DRAWERS.items():
            path = pathlib.Path(folder) / name
            found = drawer(summary, groups)
            if found is None:
                path.unlink(missing_ok=True)
                continue
            figure, heading, caption = found
            figure.savefig(path)
            drawn.append(Picture(path, heading, caption))
    return drawn


@contextlib.contextmanager
def styled():
    """While open, matplotlib draws in the style of the reports, whatever the caller's is."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def require_matplotlib():
    """matplotlib, or an error that says how to get it."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'A report needs matplotlib. Install it with: pip install "keras-cc[report]"'
        ) from error
    return matplotlib


def _scores(summary, groups):
    """A panel for the average and one a language; in each, a row a method."""
    methods, baseline, untuned = summary["methods"], summary["baseline"], summary["untuned"]
    parts = [AVERAGE] if methods[0][AVERAGE] else []
    parts += summary["languages"]
    names = [panels.wrapped(method["name"], 34) for method in methods]
    row_height = 0.08 + 0.125 * max(text.count("\n") + 1 for text, _ in names)
    height = row_height * len(methods) + 0.7
    figure, axes = panels.panels(len(parts), most=3, width=2.9, height=height, share=True)
    for axis, part in zip(axes, parts, strict=True):
        for row, method in enumerate(methods):
            value = part_of(method, part)
            colour, marker = _look(method, part, baseline)
            if value["low"] is not None:
                ends = [100 * value["low"], 100 * value["high"]]
                axis.plot(ends, [row, row], color=colour, lw=1.6)
            axis.plot(100 * value["mean"], row, marker, color=colour, ms=5.5)
            if method["name"] == baseline:
                axis.axvline(100 * value["mean"], color="black", lw=0.8, zorder=1)
        before = part_of(untuned, part)
        if before is not None:
            axis.axvline(100 * before, color=GREY, lw=1.2, ls=":", zorder=1)
        if part == AVERAGE:
            axis.set_title("Average without English", fontweight="bold")
        else:
            text, families = label(part)
            axis.set_title(text, fontfamily=families)
        axis.set_ylim(len(methods) - 0.4, -0.6)
        panels.label_rows(axis, names)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x")
    figure.supxlabel(f"{summary['metric']}, points of 100", fontsize=9)
    return figure, "Scores by language", captions.scores(summary)


def _look(method, part, baseline):
    """Colour and marker: the baseline, above it, below it, or not told apart from it."""
    if method["name"] == baseline:
        return "black", "s"
    looks = {1: (BLUE, "^"), -1: (_RED, "v"), 0: (GREY, "o")}
    return looks[verdict(part_of(method, part, "difference"))]


def _curves(summary, groups):
    """A panel a method: validation loss of the monolingual and of the connected path."""
    paths = {"monolingual": "val_sft_loss", "connected": "val_connected_sft_loss"}
    styles = {"connected": (_RED, "--"), "monolingual": (BLUE, "-")}
    seeds = {name: _histories(group, paths) for name, group in groups.items()}
    seeds = {name: found for name, found in seeds.items() if found}
    if not seeds:
        return None
    means = {
        name: {path: _mean(curves) for path, curves in found.items()}
        for name, found in seeds.items()
    }
    figure, axes = panels.panels(len(seeds), most=4, width=2.3, height=1.9, share=True)
    baseline = summary["baseline"]
    reference = means.get(baseline, {}).get("monolingual")
    lines = {}
    for axis, name in zip(axes, seeds, strict=True):
        for path, (colour, dash) in styles.items():
            for curve in seeds[name].get(path, ()):
                axis.plot(*curve, dash, color=colour, lw=0.7, alpha=0.45)
            if path in means[name]:
                marks = dict(marker="o", ms=3, lw=1.8, color=colour)
                (lines[path],) = axis.plot(*means[name][path], dash, **marks)
        if reference is not None and name != baseline:
            (line,) = axis.plot(*reference, ":", color="black", lw=1.2)
            lines[f"{drawable(baseline)[0]}, monolingual"] = line
        text, families = panels.wrapped(name, 30)
        axis.set_title(text, fontfamily=families)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid()
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("validation loss, nats a token", fontsize=9)
    legend = figure.legend(
        list(lines.values()), list(lines), loc="outside upper left", ncols=3, frameon=False
    )
    for text in legend.get_texts():
        text.set_fontfamily(drawable(text.get_text())[1])
    return figure, "Learning curves", captions.curves(means, baseline)


def _histories(group, paths):
    """`{path: one curve a seed}`; a curve is `(steps, losses)`, float64 `(2, epochs)`."""
    found = {
        path: [
            np.array([cell["history"]["step"], cell["history"][key]], "float64")
            for cell in group
            if (cell.get("history") or {}).get(key)
        ]
        for path, key in paths.items()
    }
    return {path: seeds for path, seeds in found.items() if seeds}


def _mean(curves):
    """The mean curve of the seeds, as far as the shortest goes."""
    shortest = min(curve.shape[1] for curve in curves)
    return np.mean([curve[:, :shortest] for curve in curves], axis=0)


def _crossing(summary, groups):
    """A panel a method: what crossed as training goes on, of prompts seen and never seen."""
    if "transfer" not in summary:
        return None
    found = transfer.curves([cell for group in groups.values() for cell in group])
    if not found:
        return None
    figure, axes = panels.panels(len(found), most=4, width=2.3, height=1.9, share=True)
    baseline = summary["baseline"]
    lines = {}
    for axis, (name, places) in zip(axes, found.items(), strict=True):
        if baseline in found and name != baseline:
            steps, shares = found[baseline]["pairs"]
            (line,) = axis.plot(steps, 100 * np.array(shares), ":", color="black", lw=1.2)
            lines[f"{drawable(baseline)[0]}, {transfer.PARTS['pairs']}"] = line
        for part, (colour, dash) in {"pairs": (BLUE, "-"), "held_out": (_RED, "--")}.items():
            steps, shares = places[part]
            marks = dict(marker="o", ms=3, lw=1.8, color=colour)
            (lines[transfer.PARTS[part]],) = axis.plot(steps, 100 * np.array(shares), dash, **marks)
        axis.axhline(0, color=GREY, lw=0.8, zorder=1)
        text, families = panels.wrapped(name, 30)
        axis.set_title(text, fontfamily=families)
        axis.grid()
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("crossing in nats, %", fontsize=9)
    figure.legend(
        list(lines.values()), list(lines), loc="outside upper left", ncols=3, frameon=False
    )
    return figure, "What crosses, as training goes on", captions.crossing(found)


def _by_language(key, heading, scale, caption):
    """A drawer of `key` by layer and language."""

    def drawer(summary, groups):
        maps = {name: atlas.by_language(group, key) for name, group in groups.items()}
        maps = {name: found for name, found in maps.items() if found is not None}
        if not maps:
            return None
        rows = max(len(found.languages) for found in maps.values())
        figure, axes = panels.heat_maps(maps, scale, height=0.19 * rows + 0.55)
        for axis, found in zip(axes, maps.values(), strict=True):
            panels.label_rows(axis, [label(language) for language in found.languages])
        return figure, heading, caption(maps)

    return drawer


def _by_dimension(summary, groups):
    """The gate by layer and dimension, the dimensions in order of their mean over the layers."""
    maps = {name: atlas.by_dimension(group) for name, group in groups.items()}
    maps = {name: found for name, found in maps.items() if found is not None}
    if not maps:
        return None
    ordered = {
        name: atlas.Map(found.values[np.argsort(found.values.mean(axis=1))], found.layers)
        for name, found in maps.items()
    }
    figure, axes = panels.heat_maps(ordered, "mean gate", height=2.2)
    for axis in axes:
        axis.set_ylabel("dimension, sorted")
    return figure, "The gate by layer and dimension", captions.dimensions(maps)


_DRAWERS = {
    "scores.png": _scores,
    "crossing.png": _crossing,
    "curves.png": _curves,
    "gate_by_language.png": _by_language(
        "gate", "The gate by layer and language", "mean gate", captions.gate
    ),
    "gate_by_dimension.png": _by_dimension,
    "selected_layers.png": _by_language(
        "selected", "English layer selected", "share of rows", captions.selected
    ),
    "alignment_error.png": _by_language(
        "alignment_error", "Alignment error by layer", "alignment error", captions.alignment
    ),
}

NAMES = tuple(_DRAWERS)
"""File names of the pictures, in the report's order."""
