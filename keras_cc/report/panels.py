"""Figures of small panels, of which every picture is made. matplotlib is imported when drawing."""

import textwrap

import numpy as np

from keras_cc.report.labels import drawable


def heat_maps(maps, scale, height):
    """A panel a method, layers from left to right, one colour scale for all."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import StrMethodFormatter

    values = np.concatenate([found.values.ravel() for found in maps.values()])
    low, high = np.nanmin(values), np.nanmax(values)
    # A norm grows by orders of magnitude over the layers, a share does not.
    logarithmic = low > 0 and high > 1 and high / low > 30
    norm = LogNorm(low, high) if logarithmic else Normalize(min(low, high - 0.01), high)
    figure, axes = panels(len(maps), most=2, width=4.4, height=height)
    for axis, (name, found) in zip(axes, maps.items(), strict=True):
        image = axis.imshow(found.values, aspect="auto", cmap="viridis", norm=norm)
        step = max(1, -(-len(found.layers) // 12))
        axis.set_xticks(range(0, len(found.layers), step), found.layers[::step])
        text, families = wrapped(name, 56)
        axis.set_title(text, fontfamily=families)
    figure.supxlabel("layer", fontsize=9)
    shrink = min(1.0, 4 / figure.get_figheight())
    bar = figure.colorbar(image, ax=axes, aspect=30, shrink=shrink, pad=0.02)
    if logarithmic:
        bar.formatter = StrMethodFormatter("{x:g}")  # the default one is mathematical text
        bar.update_ticks()
    bar.set_label(scale + (", logarithmic" if logarithmic else ""))
    return figure, axes


def panels(count, most, width, height, share=False):
    """A figure of `count` panels, at most `most` a row, inches each; unused places are empty."""
    from matplotlib.figure import Figure

    columns = min(count, most)
    rows = -(-count // columns)
    # Names stand at the left of the first column, or of each.
    size = (columns * width + 1.5, rows * height + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.tick_params(axis="x", labelbottom=True)  # shared axes show them at the bottom alone
    return figure, list(axes[:count])


def label_rows(axis, labels):
    axis.set_yticks(range(len(labels)), [text for text, _ in labels])
    # An inner panel of shared axes shows none.
    for tick, (_, families) in zip(axis.get_yticklabels(), labels, strict=False):
        tick.set_fontfamily(families)


def wrapped(name, width):
    text, families = drawable(name)
    return "\n".join(textwrap.wrap(text, width)) or text, families
