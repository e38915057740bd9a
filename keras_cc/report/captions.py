"""What one sees in each picture, said from the data."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_cc.report.atlas import Map
from keras_cc.report.labels import english_name
from keras_cc.report.summary import AVERAGE, listed, main_part, part_of, verdict

#: Two means that differ by less are called the same; also what counts as "rises again".
_SAME = 0.005


def scores(summary: dict[str, Any]) -> list[str]:
    """Which method is best, and which differ from the baseline beyond chance."""
    methods, baseline, part = summary["methods"], summary["baseline"], main_part(summary)
    where = "on average without English" if part == AVERAGE else f"in {english_name(part)}"
    top = max(methods, key=lambda method: part_of(method, part)["mean"])
    lines = [f"Best {where}: {top['name']} with {_points(part_of(top, part)['mean'])}."]
    if baseline is None:
        return [*lines, "No baseline: nothing is told apart from it. Dotted: the untuned model."]
    compared = [method for method in methods if method["difference"]]
    for sign, word in ((1, "above"), (-1, "below")):
        names = [
            f"{method['name']} ({_points(method['difference'][part]['difference'], signed=True)})"
            for method in compared
            if verdict(method["difference"][part]) == sign
        ]
        lines.append(f"Beyond chance {word} {baseline} {where}: {listed(names or ['none'])}.")
    gains = [
        (method["difference"][code]["difference"], method["name"], code)
        for method in compared
        for code in summary["languages"]
        if verdict(method["difference"][code]) > 0
    ]
    if gains:
        gain, name, code = max(gains)
        lines.append(
            f"Largest gain beyond chance: {name} in {english_name(code)}, {_points(gain)} points."
        )
    lines.append(
        f"Square and line: {baseline}. Triangle up or down: the paired interval against it "
        "excludes 0. Circle: not told apart. Dotted line: the untuned model."
    )
    return lines


def curves(found: Mapping[str, Mapping[str, np.ndarray]], baseline: str | None) -> list[str]:
    """Where the validation loss is lowest, where it rises again, and how far the paths lie apart.

    Args:
        found: by method, `"monolingual"` and `"connected"`: training steps and the mean validation
            loss after them, `(2, epochs)`.
        baseline: the baseline's name, or None.
    """
    lines = ["Thick: mean over the seeds; thin: each seed. Dotted: the baseline's."]
    if baseline not in found:
        lines = ["Thick: mean over the seeds; thin: each seed."]
    ends = {name: c["monolingual"][1] for name, c in found.items() if "monolingual" in c}
    lowest = {name: float(np.min(c)) for name, c in ends.items() if np.isfinite(c).all()}
    if lowest:
        name = min(lowest, key=lowest.__getitem__)
        steps = found[name]["monolingual"][0]
        lines.append(
            f"Lowest monolingual loss: {name} with {lowest[name]:.3f}, after "
            f"{steps[np.argmin(ends[name])]:.0f} of {steps[-1]:.0f} steps."
        )
    rising = [name for name, low in lowest.items() if ends[name][-1] > low + _SAME]
    if rising:
        lines.append(f"Rises again by the end: {listed(rising)}.")
    broken = [name for name, curve in ends.items() if name not in lowest]
    if broken:
        lines.append(f"Not finite somewhere: {listed(broken)}.")
    gaps = {
        name: float(ends[name][-1] - c["connected"][1, -1])
        for name, c in found.items()
        if "connected" in c and name in ends
    }
    gaps = {name: gap for name, gap in gaps.items() if math.isfinite(gap)}
    if gaps:
        wide = max(gaps, key=lambda name: abs(gaps[name]))
        side = "above" if gaps[wide] > 0 else "below"
        lines.append(
            f"Widest gap between the paths at the end: {wide}, monolingual {abs(gaps[wide]):.3f} "
            f"{side} connected."
        )
    return lines


def crossing(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How much of what English learnt the other languages have at the end, most and least.

    Args:
        found: of `keras_cc.report.transfer.curves`.
    """
    lines = ["100: all of what English learnt over the floor; 0: nothing of it."]
    for part, where in (("pairs", "prompts seen"), ("held_out", "prompts never seen")):
        ends = {name: places[part][1][-1] for name, places in found.items()}
        ends = {name: end for name, end in ends.items() if math.isfinite(end)}
        if ends:
            top = max(ends, key=ends.__getitem__)
            lines.append(f"Most crosses with {top}, {_points(ends[top])} %, of {where}.")
    return lines


def gate(maps: Mapping[str, Map]) -> list[str]:
    """Per method: at which layers and for which language the gate opens most and least."""
    lines = ["0: the target's own activations pass; 1: the pivot's replace them."]
    for name, found in maps.items():
        lines.append(f"{name}: " + _peak(found, "the gate opens most", "least"))
    return lines


def alignment(maps: Mapping[str, Map]) -> list[str]:
    """Per method: at which layers and for which language the error is largest and smallest."""
    return [
        f"{name}: " + _peak(found, "the error is largest", "smallest")
        for name, found in maps.items()
    ]


def selected(maps: Mapping[str, Map]) -> list[str]:
    """Per method: the layer that most rows select, and the languages that select another."""
    lines = []
    for name, found in maps.items():
        share = found.values.mean(axis=0)
        top = int(np.argmax(share))
        line = (
            f"{name}: layer {found.layers[top]} is selected most, by {100 * share[top]:.0f} % of "
            "the rows"
        )
        own = found.values.argmax(axis=1)
        others = [
            f"{english_name(code)} (layer {found.layers[layer]})"
            for code, layer in zip(found.languages, own, strict=True)
            if layer != top
        ]
        line += f"; not in {listed(others)}." if others else ", and most in every language."
        never = int((found.values.max(axis=0) == 0).sum())
        lines.append(f"{line} {never} of {len(found.layers)} layers are never selected.")
    return lines


def dimensions(maps: Mapping[str, Map]) -> list[str]:
    """Per method: how many of the gate's values are above one half, and where they differ most."""
    lines = ["Dimensions are in order of their mean over the layers, in each panel its own."]
    for name, found in maps.items():
        above = 100 * float((found.values > 0.5).mean())
        low, high = np.quantile(found.values, [0.05, 0.95], axis=0)
        widest = int(np.argmax(high - low))
        if (high - low)[widest] < _SAME:
            spread = "the dimensions of a layer do not differ."
        else:
            spread = (
                f"the dimensions differ most at layer {found.layers[widest]}, nine in ten between "
                f"{low[widest]:.2f} and {high[widest]:.2f}."
            )
        lines.append(f"{name}: {above:.0f} % of all values are above 0.5; {spread}")
    return lines


def _peak(found, most, least):
    """Layers and languages of the largest and smallest mean."""
    by_layer, by_row = found.values.mean(axis=0), found.values.mean(axis=1)
    scale = max(float(np.abs(found.values).max()), 1e-12)
    if np.ptp(by_layer) < _SAME * scale:
        text = f"the same at every layer, {_short(by_layer.mean())}"
    else:
        top, bottom = int(np.argmax(by_layer)), int(np.argmin(by_layer))
        text = (
            f"{most} at {_around(by_layer, found.layers)} (up to {_short(by_layer[top])}), {least} "
            f"at layer {found.layers[bottom]} ({_short(by_layer[bottom])})"
        )
    if len(found.languages) < 2:
        return f"{text}."
    if np.ptp(by_row) < _SAME * scale:
        return f"{text}; about the same for every language."
    top, bottom = int(np.argmax(by_row)), int(np.argmin(by_row))
    most = most.split()[-1]
    return (
        f"{text}; {most} for {english_name(found.languages[top])} ({_short(by_row[top])}), {least} "
        f"for {english_name(found.languages[bottom])} ({_short(by_row[bottom])})."
    )


def _around(values, layers):
    """The run of layers about the largest value that are within a tenth of the range of it."""
    top = int(np.argmax(values))
    near = values >= values[top] - 0.1 * np.ptp(values)
    first = last = top
    while first > 0 and near[first - 1]:
        first -= 1
    while last + 1 < len(values) and near[last + 1]:
        last += 1
    return f"layer {layers[top]}" if first == last else f"layers {layers[first]} to {layers[last]}"


def _points(share, signed=False):
    return f"{100 * share:{'+' if signed else ''}.1f}".replace("-", "\N{MINUS SIGN}")


def _short(value):
    return f"{value:.3g}" if abs(value) < 0.1 or abs(value) >= 100 else f"{value:.2f}"
