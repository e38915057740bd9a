"""Rows of several kinds, mixed in stated shares, step by step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


def mix(
    kinds: Mapping[str, Sequence[Any]],
    shares: "Sequence[tuple[int, Mapping[str, float]]]",
    batch_size: int,
    seed: int = 0,
) -> list[Any]:
    """The rows of a training, batch after batch.

    Of each kind as many rows come as its share says, as near as whole rows allow, and spread
    evenly; all rows of a kind come before one comes again, in an order that is drawn anew. The
    order of a kind does not depend on the others.

    Args:
        kinds: from name to the rows of that kind.
        shares: phases, `(steps, shares)` each, the shares of the kinds summing to 1.
        batch_size: int, rows a step.
        seed: int, of the orders.

    Returns:
        A list of `steps * batch_size` rows.

    Raises:
        ValueError: for a share of a kind without rows, or shares that do not sum to 1.

    Example:

    ```python
    from keras_cc.comparison.mixing import mix

    rows = mix({"en": ["a", "b"], "tr": ["c"]}, [(2, {"en": 0.5, "tr": 0.5})], batch_size=2)
    sorted(rows)  # ["a", "b", "c", "c"]
    ```
    """
    for _, share in shares:
        empty = [name for name, value in share.items() if value > 0 and not kinds.get(name)]
        if empty or min(share.values()) < 0 or abs(sum(share.values()) - 1) > 1e-6:
            raise ValueError(
                "`shares` must be of kinds that have rows, none below 0, 1 together. "
                f"Received: shares={dict(share)}, without rows: {empty}"
            )
    streams = {
        name: _again_and_again(rows, np.random.default_rng([seed, place]))
        for place, (name, rows) in enumerate(kinds.items())
    }
    mixed, owed = [], dict.fromkeys(kinds, 0.0)
    for steps, share in shares:
        for _ in range(steps * batch_size):
            for name, value in share.items():
                owed[name] += value
            most = max(share, key=lambda name: owed[name])
            owed[most] -= 1
            mixed.append(next(streams[most]))
        owed = dict.fromkeys(kinds, 0.0)
    return mixed


def _again_and_again(rows: Sequence[Any], random: np.random.Generator) -> Iterator[Any]:
    while True:
        for number in random.permutation(len(rows)):
            yield rows[number]
