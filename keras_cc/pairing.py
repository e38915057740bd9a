"""Which of the two streams a forward pass is: the layers ask, the model answers.

A decoder block calls its feed-forward projection without knowing about pairs, so
the connection's layers learn from here whether they see the pivot prompt or the
target sequence, and what the pivot left for them. The scope is a context variable:
it nests, it is private to a thread (a replica, a data worker), it is closed even when
the forward pass fails, and nothing is ever kept on a layer (a traced value would leak).
"""

import contextlib
import contextvars
import dataclasses
from typing import Any

_scope: contextvars.ContextVar = contextvars.ContextVar("keras_cc_pass", default=None)
_scoring: contextvars.ContextVar = contextvars.ContextVar("keras_cc_scoring", default=False)


@dataclasses.dataclass
class PivotPass:
    """The pass over the pivot prompt, which fills `activations`.

    Attributes:
        mask: bool tensor `(batch, pivot_length)`, True at the tokens that are aligned. A
            row without one has no pivot.
        activations: what each connected layer computed, by the layer's id,
            `(batch, pivot_length, dim)`.
    """

    mask: Any
    activations: dict[int, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class TargetPass:
    """The pass over the target sequence, which reads what the pivot's pass left.

    Attributes:
        pivot: the finished `PivotPass` of the same rows.
        mask: bool tensor `(batch, length)`, True at the real tokens of rows that have a
            pivot: where the alignment error is taken.
        fused: bool tensor `(batch, length)`, True at the positions that are fused.
        through_transform: bool tensor `(batch,)`, True for the rows that connection
            dropout sends through the transform, or None without connection dropout.
        index: in cached generation, the position of the one token at hand (int scalar).
        alignment_errors: one `(batch,)` float32 tensor a layer: the squared error
            summed over `mask`.
        gate_sums: one `(batch,)` float32 tensor a layer: the mean gate over the
            dimensions, summed over `fused`.
    """

    pivot: PivotPass
    mask: Any
    fused: Any
    through_transform: Any = None
    index: Any = None
    alignment_errors: list = dataclasses.field(default_factory=list)
    gate_sums: list = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def enter(current):
    """Make `current`, a `PivotPass` or a `TargetPass`, the pass that layers see."""
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
