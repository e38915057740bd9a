"""What an objective is, what it is given, and what objectives share.

Notable choices:

- An objective sees hidden states and masks alone. It runs no model: the same objective works on
  any family, and the model decides which passes it needs.
- A loss comes back as a sum and a count for each row, so that the denominator stays right over
  replicas and accumulated micro-batches.
- A row that cannot be counted gives 0 to both, and no gradient, whatever its states hold.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_cc.options import Options, flag, number
from keras_cc.passes import positions


@dataclasses.dataclass
class PairStates:
    """What the two passes over a batch of pairs leave for the objectives.

    Attributes:
        target: block number to that block's output in the target's pass, float `(B, T, d)`.
        pivot: block number to that block's output in the pivot's pass, float `(B, S, d)`.
        target_mask: bool `(B, T)`, True at the target's prompt tokens. The answer and the
            padding are left out.
        pivot_mask: bool `(B, S)`, True at the pivot prompt's real tokens.
        has_pivot: bool `(B,)`.
        pivot_token_ids: int `(B, S)`.
        answer_mask: bool `(B, K)`, True at the positions, of those that logits are taken at,
            whose next token belongs to the answer. K covers the answers of a batch.
        labels: int `(B, K)`, the next token of each of those positions.
        is_own: bool `(B,)`, whether a row's answer is not given, but the model's own.
        logits: from the name of a pass to its logits at those positions, `(B, K, vocabulary)`:
            `"student"`, what a user gets; `"connected"`; `"pivot"`, the pivot prompt in place
            of the target's; `"in_context"`, the pivot prompt in front of it. The last two go
            around the connection and its transform.
        lens: from hidden states `(B, K, d)` to logits `(B, K, vocabulary)`: the final norm
            and the head, their weights frozen.
        num_blocks: int, how many decoder blocks the model has.
        untrained: as `target`, of the same row in the model as it was before it was trained,
            around the connection and its transform; constants.
    """

    target: dict[int, Any]
    pivot: dict[int, Any]
    target_mask: Any
    pivot_mask: Any
    has_pivot: Any
    pivot_token_ids: Any
    answer_mask: Any
    labels: Any
    is_own: Any
    logits: Callable
    lens: Callable
    num_blocks: int
    untrained: dict[int, Any] = dataclasses.field(default_factory=dict)


class Objective(Options):
    """An extra loss on pairs, computed from the hidden states of both passes.

    An object of options, checked when it is made. A subclass has a `name`, says which
    blocks it wants and computes the loss; a new one needs no change anywhere else.

    Args:
        weight: float >= 0, the loss's weight beside the task loss.
        alternating: bool, whether training steps take turns between the task loss and
            this one, instead of adding them up.

    Attributes:
        name: str, the name under which the loss is reported.
        least_rows: int, how many rows with a pivot a batch needs for the loss to be any.
        learns_from_prompts: bool, whether a pair of prompts without an answer counts.
        counts: what the loss is a mean over, so that accumulated micro-batches are weighted by
            it: `"rows"` or `"answer_tokens"` (of rows with a pivot), or `"own_answer_tokens"`.

    Raises:
        ValueError: naming the option, what it takes and what was received.

    Example:

    ```python
    @keras.saving.register_keras_serializable(package="my_package")
    class LastBlockDistance(keras_cc.objectives.Objective):
        name = "distance"

        def target_blocks(self, num_blocks):
            return (num_blocks - 1,)

        pivot_blocks = target_blocks

        def __call__(self, states):
            (block,) = self.target_blocks(states.num_blocks)
            target, pivot = states.target[block][:, -1], states.pivot[block][:, -1]
            has_pivot = keras.ops.cast(states.has_pivot, "float32")
            return keras.ops.mean((target - pivot) ** 2, axis=-1) * has_pivot, has_pivot


    keras_cc.objectives.get_all(["dft", LastBlockDistance(weight=0.1)])
    ```
    """

    name: str
    least_rows = 1
    learns_from_prompts = True
    counts = "rows"

    def __init__(self, weight=1.0, alternating=False):
        self.weight = number("weight", weight)
        self.alternating = flag("alternating", alternating)

    def check(self, connection):
        """Refuse a model that has not what the loss is made of.

        Args:
            connection: the model's connection, or None.

        Raises:
            ValueError: where it lacks something.
        """
        return None

    @abc.abstractmethod
    def target_blocks(self, num_blocks):
        """The blocks whose outputs are wanted of the target's pass.

        Args:
            num_blocks: int, how many decoder blocks the model has.

        Returns:
            A tuple of block numbers from 0, in order.

        Raises:
            ValueError: if an option names a block that the model does not have.
        """

    @abc.abstractmethod
    def pivot_blocks(self, num_blocks):
        """As `target_blocks`, of the pivot's pass."""

    def untrained_blocks(self, num_blocks):
        """As `target_blocks`, of the target's row in the model as it was before it was trained."""
        return ()

    @abc.abstractmethod
    def __call__(self, states):
        """The loss of each row.

        Args:
            states: a `PairStates`.

        Returns:
            `(values, counts)`, float32 `(B,)`: the loss summed over what is counted in the
            row, and how much that is. A row that cannot be counted has 0 and 0.
        """

    def get_config(self):
        return {"weight": self.weight, "alternating": self.alternating}


# ---------------------------------------------------------------- states


def content_masks(states, sink_tokens):
    """What is pooled of each stream, and which rows have something to pool on both sides.

    Args:
        states: a `PairStates`.
        sink_tokens: int, how many real tokens at the start of a stream are left out.

    Returns:
        `(target_mask, pivot_mask, counted)`: bool `(B, T)`, `(B, S)` and `(B,)`.
    """
    masks = [
        positions.beyond(ops.cast(mask, "bool"), sink_tokens)
        for mask in (states.target_mask, states.pivot_mask)
    ]
    counted = ops.cast(states.has_pivot, "bool")
    for mask in masks:
        counted = ops.logical_and(counted, ops.any(mask, axis=1))
    return *masks, counted


def pool(hidden, mask, method):
    """One float32 vector a row, `(B, d)`: the mean or the last of the tokens in `mask`.

    Zeros for a row without any. What stands outside of the mask reaches neither the result
    nor a gradient, even where it is not finite.
    """
    hidden = ops.cast(hidden, "float32")
    if method == "last":
        return positions.pick(hidden, positions.last_prompt(mask))
    total = ops.sum(ops.where(mask[..., None], hidden, 0.0), axis=1)
    tokens = ops.sum(ops.cast(mask, "float32"), axis=1, keepdims=True)
    return total / ops.maximum(tokens, 1.0)


def unit(vectors):
    """`vectors` of length 1; a vector shorter than 1e-6 has no direction and gives zeros."""
    squared = ops.sum(ops.square(vectors), axis=-1, keepdims=True)
    has_direction = squared > 1e-12
    # A constant where there is none, so that its gradient is 0 and not 0 times infinity.
    scale = ops.rsqrt(ops.where(has_direction, squared, 1.0))
    return ops.where(has_direction, vectors * scale, 0.0)
