"""Several short pairs of a batch in one row. Not public; `CCCausalLM.fit(pack=...)`."""

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_cc.data.prepared import PIVOT_KEYS, Batch, window
from keras_cc.data.widths import width_of

# What says something of a whole batch, or names its pairs, and does not lie in rows.
_NAMES = "row_ids"
_FACTORS = "loss_scale"


class Packing:
    """Puts the pairs of a batch into few rows, each pair whole, its target and its pivot.

    A row holds as many pairs as fit into it: no more than `width` tokens of targets and no more
    than `width` of pivots; the longest pairs come first, each into the first row with room. The
    batch has the same pairs as before, so a step trains on the same tokens.

    Rows and widths never become less from one batch to the next, so that few shapes occur.

    Args:
        width: int, tokens of a row.
        multiple: int, batches have a multiple of so many rows.

    Returns:
        From a call with `(x, y, sample_weight)` of `PreparedBatches`, and its `describe`: the same
        in `(R, width)`, of the pivots `(R, S)`, with these keys in x:

        - `segment_ids` `(R, width)` and `pivot_segment_ids` `(R, S)`, int32: 1 at the tokens of a
          row's first pair, 2 at those of its second, ...; 0 at padding.
        - `answer_positions`, int32 `(R, K)`: the positions of all answers of a row, and as many
          of weight 0 as it takes.

        `row_ids` stays `(B,)`, a number for each pair.

    Raises:
        ValueError: from a call, for a pair that is longer than a row, naming it.
    """

    def __init__(self, width: int, multiple: int = 1) -> None:
        self.width, self.multiple = width, multiple
        self.rows = self.pivot_width = self.answers = 0
        self.token_count = self.padding_count = 0  # of targets and pivots, batch by batch

    def __call__(self, batch: Batch, describe: "Callable[[Any], list[str]]") -> Batch:
        x, y, sample_weight = batch
        real, real_pivot = (x[name] != 0 for name in ("padding_mask", "pivot_padding_mask"))
        longest = np.maximum(real.sum(axis=1), real_pivot.sum(axis=1))
        if longest.max() > self.width:
            (name,) = describe(x["row_ids"][[longest.argmax()]])
            raise ValueError(
                f"{name}: {longest.max()} tokens, of the target or of the pivot, do not fit into a "
                f"packed row: raise `pack` to as many or more, or lower the preprocessor's "
                f"`max_length` and `pivot_max_length`. Received: pack={self.width}, and "
                f"{np.count_nonzero(longest > self.width)} of the batch's {len(y)} pairs that are "
                "longer"
            )
        rows = self._rows(real.sum(axis=1), real_pivot.sum(axis=1))
        self._grow(rows, x["answer_mask"].sum(axis=1), real_pivot.sum(axis=1))

        def laid(values, masks, width):
            values, masks = np.asarray(values), np.asarray(masks)
            found = np.zeros((self.rows, width), values.dtype)
            for row, pairs in enumerate(rows):
                joined = np.concatenate([values[pair][masks[pair]] for pair in pairs])
                found[row, : len(joined)] = joined
            return found

        numbers = np.zeros(len(y), "int32")
        for pairs in rows:
            numbers[pairs] = np.arange(1, len(pairs) + 1)
        packed = {}
        for name, value in x.items():
            if name == _NAMES:
                packed[name] = value
            elif name == _FACTORS:
                packed[name] = np.repeat(value[:1], self.rows, axis=0)
            elif name in PIVOT_KEYS:
                packed[name] = laid(value, real_pivot, self.pivot_width)
            elif name != "answer_positions":
                packed[name] = laid(value, real, self.width)
        segments = numbers[:, None]
        packed["segment_ids"] = laid(segments * real, real, self.width)
        packed["pivot_segment_ids"] = laid(segments * real_pivot, real_pivot, self.pivot_width)
        packed["answer_positions"] = _positions(packed["answer_mask"], self.answers)
        for name in ("padding_mask", "pivot_padding_mask"):
            self.token_count += packed[name].size
            self.padding_count += np.count_nonzero(packed[name] == 0)
        return packed, laid(y, real, self.width), laid(sample_weight, real, self.width)

    def _rows(self, lengths: np.ndarray, pivots: np.ndarray) -> list[list[int]]:
        """The pairs of each row: the longest first, each into the first row that has room."""
        rows: list[list[int]] = []
        room: list[list[int]] = []
        for pair in np.argsort(-(lengths + pivots), kind="stable").tolist():
            if not lengths[pair]:  # of a batch that was filled up
                continue
            needed = (int(lengths[pair]), int(pivots[pair]))
            fits = (all(np.greater_equal(left, needed)) for left in room)
            row = next((row for row, is_room in enumerate(fits) if is_room), len(rows))
            if row == len(rows):
                rows.append([])
                room.append([self.width, self.width])
            rows[row].append(pair)
            room[row] = [a - b for a, b in zip(room[row], needed, strict=True)]
        return rows

    def _grow(self, rows: list[list[int]], answers: np.ndarray, pivots: np.ndarray) -> None:
        """Widens the shape, where these rows need it."""
        self.rows = max(self.rows, len(rows) + -len(rows) % self.multiple)
        longest = [max(int(sizes[pairs].sum()) for pairs in rows) for sizes in (answers, pivots)]
        self.answers = max(self.answers, window(longest[0], self.width))
        self.pivot_width = max(self.pivot_width, min(self.width, width_of(max(longest[1], 1))))


def _positions(answer_mask: np.ndarray, count: int) -> np.ndarray:
    """The positions of each row's answers, int32 `(R, count)`, filled up with one of none."""
    positions = np.argmin(answer_mask != 0, axis=1)[:, None].repeat(count, axis=1)
    for row, mask in enumerate(answer_mask):
        (places,) = np.nonzero(mask)
        positions[row, : len(places)] = places
    return positions.astype("int32")
