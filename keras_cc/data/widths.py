"""How wide a batch is padded: few widths where each shape is compiled. Not public."""

import bisect
import collections
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

#: The least width of a row, in tokens; see `width_of`.
MIN_WIDTH = 16
#: Shapes that a source's batches take before those that are there are used again; see `Shapes`.
MAX_SHAPES = 4
#: Widths are multiples of it where shapes are not compiled, and cost nothing.
FINE = 8
#: Training steps that a shape must serve: to compile it takes as long as ten to twenty of them.
STEPS_PER_SHAPE = 40


def width_of(length: int, least: int = MIN_WIDTH) -> int:
    """The least of 16, 24, 32, 48, 64, ... that is not below `length` (`least`: a power of two)."""
    width = least
    while width < length:
        is_power = width & (width - 1) == 0
        width = max(width + 1, width * 3 // 2 if is_power else width * 4 // 3)
    return width


def ladder(most: int, widths: Sequence[int] | None = None) -> tuple[int, ...]:
    """The widths that rows of at most `most` tokens are padded to, the last one being `most`.

    Args:
        most: int, tokens of the longest row that may come.
        widths: ascending widths, or None: 16, 24, 32, 48, 64, ... Those from `most` on are left
            out, and `most` itself stands at the end.
    """
    if widths is None:
        widths = [MIN_WIDTH]
        while widths[-1] < most:
            widths.append(width_of(widths[-1] + 1))
    return (*(width for width in widths if width < most), most)


def rung(length: int, widths: Sequence[int]) -> int:
    """The least of ascending `widths` that holds `length` tokens."""
    return widths[bisect.bisect_left(widths, length)]


def fine(length: int, most: int) -> int:
    """The least multiple of `FINE`, or `most`, that holds `length` tokens; not 0."""
    return min(most, max(FINE, -(-length // FINE) * FINE))


def shapes_for(steps: "int | float | None") -> int:
    """How many shapes are worth compiling for so many steps; None: nobody knows how many."""
    return max(1, int(min(MAX_SHAPES, (steps or math.inf) // STEPS_PER_SHAPE)))


class Shape(NamedTuple):
    """What a batch is compiled for, beside its number of rows."""

    target: int
    pivot: int
    answers: int

    def holds(self, other: "Shape") -> bool:
        """Whether a batch of `other` fits in, padded."""
        return all(own >= needed for own, needed in zip(self, other, strict=True))

    @property
    def work(self) -> int:
        """What a row of it costs, roughly: the pivot's pass has no backward one, and no logits."""
        return 3 * self.target + self.pivot + 3 * self.answers


class Shapes:
    """The shapes of a source's batches, few, since each is compiled by itself.

    Where it is known what will come (`plan`), they are the ones that cost the least padding.
    Else a batch gets the shape that it needs until there are `most`, and from then on the one that
    is there, holds it and costs least. Where none holds it, one is added that holds it and all
    others: each such step raises a width by at least one rung, so there are never more than `most`
    plus the number of rungs.

    Args:
        most: int, how many shapes there may be before they are used again. None: each batch has
            the shape that it needs.
    """

    def __init__(self, most: int | None = MAX_SHAPES) -> None:
        self.most = math.inf if most is None else most
        self.known: list[Shape] = []

    def plan(self, needed: "Iterable[Shape]") -> None:
        """Chooses the shapes for batches that need these, unless there are shapes already.

        Step by step, the two shapes become one whose common shape adds the least work, until there
        are no more than `most`.
        """
        if self.known or self.most == math.inf:
            return
        counts = collections.Counter(needed)
        while len(counts) > self.most:
            pairs = itertools.combinations(sorted(counts), 2)
            first, second = min(pairs, key=lambda pair: _added_work(*pair, counts))
            count = counts.pop(first) + counts.pop(second)
            counts[_joined([first, second])] += count
        self.known = sorted(counts)
        self.most = len(self.known)

    def holding(self, needed: Shape) -> Shape:
        """The shape that a batch of this need gets."""
        if needed not in self.known:
            if len(self.known) >= self.most:
                fitting = [shape for shape in self.known if shape.holds(needed)]
                if fitting:
                    return min(fitting, key=lambda shape: shape.work)
                needed = _joined([*self.known, needed])
            self.known.append(needed)
        return needed


def _added_work(first: Shape, second: Shape, counts: "collections.Counter[Shape]") -> int:
    joined = _joined([first, second]).work
    return sum(counts[shape] * (joined - shape.work) for shape in (first, second))


def _joined(shapes: "Iterable[Shape]") -> Shape:
    return Shape(*(max(widths) for widths in zip(*shapes, strict=True)))
