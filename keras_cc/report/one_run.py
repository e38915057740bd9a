"""One picture of one training run: what it learned, language by language."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from keras_cc.report import panels
from keras_cc.report.labels import label
from keras_cc.report.pictures import BLUE, GREY, styled

MEASURES = (
    ("sft_loss", "nats an answer token (lower is better)", 1),
    ("exact_match", "right answers, per cent", 100),
)


def draw_run(
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    losses: Sequence[float],
    path: "str | pathlib.Path",
    title: str = "",
) -> pathlib.Path:
    """Draws the scores of each language before and after, and the loss of each step.

    Args:
        before: from language code to its scores before training: `"sft_loss"`, nats an answer
            token, and `"exact_match"`, a share.
        after: the same, of the same languages, after it.
        losses: the loss of each training step; empty: no curve.
        path: where to write it, by its ending a PNG, SVG or PDF.
        title: heading.

    Returns:
        The path.

    Raises:
        ValueError: where the languages differ.
        ModuleNotFoundError: where matplotlib is not installed.

    Example:

    ```python
    before = {"tr": {"sft_loss": 5.1, "exact_match": 0.0}}
    after = {"tr": {"sft_loss": 1.5, "exact_match": 0.3}}
    keras_cc.report.draw_run(before, after, [5.0, 2.1, 1.4], "run.png")
    ```
    """
    if not before or set(before) != set(after):
        raise ValueError(
            "`before` and `after` must have scores of the same languages. "
            f"Received: before of {sorted(before)}, after of {sorted(after)}"
        )
    path = pathlib.Path(path)
    with styled():
        count = len(MEASURES) + bool(losses)
        height = 0.32 * len(after) + 0.9 if not losses else 2.6
        figure, axes = panels.panels(count, most=3, width=3.1, height=height)
        for axis, (name, text, factor) in zip(axes, MEASURES, strict=False):
            _dumbbells(axis, before, after, name, factor)
            axis.set_title(text)
        if losses:
            axes[-1].plot(range(1, len(losses) + 1), losses, color=BLUE, lw=1.2)
            axes[-1].set_title("training loss, step by step")
            axes[-1].set_ylim(bottom=0)
            axes[-1].grid(axis="y")
        if title:
            figure.suptitle(title, fontsize=10)
        figure.savefig(path)
    return path


def _dumbbells(axis: Any, before: Any, after: Any, name: str, factor: float) -> None:
    """A row a language: an open ring before, a full one after, and the figures at them."""
    for row, language in enumerate(after):
        first, last = factor * before[language][name], factor * after[language][name]
        axis.plot([first, last], [row, row], color=GREY, lw=1.2, zorder=1)
        axis.plot(first, row, "o", color=GREY, mfc="white", ms=6, clip_on=False)
        axis.plot(last, row, "o", color=BLUE, ms=6, clip_on=False)
        figures = f"{first:.2f} → {last:.2f}" if factor == 1 else f"{first:.0f} → {last:.0f}"
        axis.annotate(
            figures,
            (max(first, last), row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    panels.label_rows(axis, [label(language) for language in after])
    axis.set_ylim(len(after) - 0.5, -0.5)
    largest = max(factor * scores[name] for of in (before, after) for scores in of.values())
    axis.set_xlim(0, 1.4 * largest or 1)  # room for the figures
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
