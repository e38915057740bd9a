"""Which of the streams a forward pass is: the layers ask, the model answers.

A decoder block calls its layers without knowing about pairs, so the connection's layers
learn from here whether they see the pivot prompt or the target sequence, and what the pivot
left for them; and what is to be read or changed at a site of a block is said here too. The
scope is a context variable: it nests, it is private to a thread (a replica, a data worker), it
is closed even when the forward pass fails, and nothing is ever kept on a layer (a traced
value would leak).

A site is `(kind, block number)`. Kinds: `"embedding"`, what enters block 0; `"attention"` and
`"ffn"`, the output of a block's attention and of its feed-forward projection, before any norm
and the residual sum; `"hidden"`, a block's output.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_cc.passes import positions

_scope: contextvars.ContextVar = contextvars.ContextVar("keras_cc_pass", default=None)
_scoring: contextvars.ContextVar = contextvars.ContextVar("keras_cc_scoring", default=False)


@dataclasses.dataclass(kw_only=True)
class Pass:
    """A forward pass that is read, and may be changed, at sites of the decoder blocks.

    Attributes:
        observed: the sites whose values are kept.
        states: the values at those sites, `(batch, length, dim)`, as they left the site.
        edits: for a site, functions from its value to the one that takes its place.
        index: in cached generation, the position of the one token at hand (int scalar).
        segments: in packed rows, int tensor `(batch, length)`, the number of each token's pair
            in its row, 0 at padding; else None. A token attends to those of its own pair.
        rematerialized: whether the blocks' activations are computed again for the gradient.
    """

    observed: set = dataclasses.field(default_factory=set)
    states: dict = dataclasses.field(default_factory=dict)
    edits: dict[Any, list[Callable]] = dataclasses.field(default_factory=dict)
    index: Any = None
    segments: Any = None
    rematerialized: bool = False

    def edit(self, site, function):
        """Have `function` change what passes `site`, after the edits that are there."""
        self.edits.setdefault(site, []).append(function)

    def visit(self, site, value):
        """What goes on from `site`, where `value` has arrived."""
        for function in self.edits.get(site, ()):
            value = function(value)
        if site in self.observed:
            self.states[site] = value
        return value

    def attended(self, mask):
        """`mask` of an attention, `(batch, length, length)`, within the pairs of packed rows."""
        if self.segments is None:
            return mask
        same = positions.same(self.segments, self.segments)
        same = ops.expand_dims(same, 1) if len(mask.shape) == 4 else same
        return ops.where(same, mask, ops.zeros_like(mask))

    def at(self, where, value):
        """`where`, `(batch, length, ...)`, at the positions that `value` holds.

        Those are all of them, or in a cached step the one at `index`.
        """
        is_cached_step = self.index is not None and value.shape[1] == 1
        return ops.take(where, self.index, axis=1)[:, None] if is_cached_step else where


@dataclasses.dataclass
class PivotPass(Pass):
    """The pass over the pivot prompt.

    Attributes:
        mask: bool tensor `(batch, pivot_length)`, True at the tokens that are aligned. A
            row without one has no pivot.
        activations: what each `CCFeedForward` computed, by the layer's id,
            `(batch, pivot_length, dim)`.
    """

    mask: Any
    activations: dict[int, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class TargetPass(Pass):
    """The pass over the target sequence, which reads what the pivot's pass left.

    Attributes:
        pivot: the finished `PivotPass` of the same rows.
        mask: bool tensor `(batch, length)`, True at the real tokens of rows that have a
            pivot: where the alignment error is taken.
        fused: bool tensor `(batch, length)`, True at the positions that are fused.
        places: None, or int tensor `(batch, length)`: the pivot's position of each of the
            target's, where there is one.
        readable: None, or in packed rows bool tensor `(batch, length, pivot_length)`: the aligned
            tokens of the pivot that each target token may read, those of its own pair.
        through_transform: bool tensor `(batch, 1)`, in packed rows `(batch, length)`, True for
            the pairs that connection dropout sends through the transform, or None without
            connection dropout.
        alignment_errors: one `(batch,)` float32 tensor a layer: the squared error
            summed over `mask`.
        gate_sums: one `(batch,)` float32 tensor a layer: the mean gate over the
            dimensions, summed over `fused`.
        samples: None, or a list that each layer appends `(F(x), fused)` to.
        dimension_sums: None, or a list that each layer appends its gate to, summed over
            `fused`: float32 `(batch, d)`, or `(batch, 1)` where it is one a token.
    """

    pivot: PivotPass
    mask: Any
    fused: Any
    places: Any = None
    readable: Any = None
    through_transform: Any = None
    alignment_errors: list = dataclasses.field(default_factory=list)
    gate_sums: list = dataclasses.field(default_factory=list)
    samples: list | None = None
    dimension_sums: list | None = None


@contextlib.contextmanager
def enter(current):
    """Make `current`, a `Pass` or None, the pass that layers see."""
    token = _scope.set(current)
    try:
        yield current
    finally:
        _scope.reset(token)


def current():
    """The pass under way, or None: then a layer computes its monolingual output."""
    return _scope.get()


@contextlib.contextmanager
def scoring():
    """While open, the model scores its monolingual path, the connected one beside it."""
    token = _scoring.set(True)
    try:
        yield
    finally:
        _scoring.reset(token)


def is_scoring():
    """Whether `scoring()` is open."""
    return _scoring.get()
