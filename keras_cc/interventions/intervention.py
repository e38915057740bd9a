import abc
from typing import Any

from keras_cc.options import Options, choice
from keras_cc.passes import positions

SITES = ("hidden", "ffn", "attention")


class Intervention(Options):
    """A transform at inference: states of the forward pass are changed, nothing is trained.

    It is set on a model, `model.intervention = ...`, and takes part in `generate`, `evaluate` and
    a call on the path that a user gets; training does not see it.

    Subclasses are `XTransplant`, `Incline` and `Shift`.

    Args:
        site: `"hidden"` (a block's output), `"ffn"` or `"attention"` (the sublayer's output,
            before any norm and the residual sum).
    """

    #: Whether it reads the pivot prompt's pass; else it reads a plain pass over the target's own.
    needs_pivot = False
    #: The options that a search tries values of; each is one number.
    swept_options = ()

    def __init__(self, site):
        self.site = choice("site", site, SITES)
        self.matrices: dict[int, Any] = {}  # by block number, of the model that it is set on

    def check(self, num_blocks):
        """Raise a `ValueError` if the intervention does not fit a model of `num_blocks`."""
        return None

    def build(self, num_blocks, dim):
        """Make the layers that are attached to the model's blocks, `matrices`, if not made yet."""
        return None

    def sites(self, num_blocks):
        """The sites of the pass before that it reads."""
        return {(self.site, number) for number in range(num_blocks)}

    def swept(self):
        """The values of `swept_options`; `edit` can be given others."""
        return tuple(getattr(self, name) for name in self.swept_options)

    def read(self, value, prompt, last):
        """What `edit` is given of a site: the state at the last prompt token.

        Args:
            value: float tensor `(batch, length, dim)`, of the pass before.
            prompt: bool tensor `(batch, length)`, True at the prompt's tokens.
            last: the same, True at the last of them.

        Returns:
            float tensor `(batch, dim)`.
        """
        return positions.pick(value, last)

    def constants(self, num_blocks):
        """Where all that it does is to add a vector to the output of some blocks: from block
        number to the vector, `(dim,)`. Else None: `merge()` cannot fold it."""
        return None

    @abc.abstractmethod
    def edit(self, scope, where, states, swept=None):
        """Have `scope` change the states at `where`.

        Args:
            scope: a `keras_cc.passes.pairing.Pass`, not run yet.
            where: bool tensor `(batch, length)`, True at the last prompt token, in the rows that
                have a pivot where the pivot is read.
            states: a dict from site to float tensor `(batch, dim)`, what `read` gave of the pass
                before.
            swept: None, or float tensor `(batch, number of swept options)` in place of `swept()`,
                the same in each row: one compiled function then serves a whole search.
        """
