"""What rows are as ids, and what a preprocessed batch `(x, y, sample_weight)` holds. Not public."""

from typing import Any, NamedTuple

import numpy as np

Batch = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]

TARGET_KEYS = ("token_ids", "padding_mask", "answer_mask")
PIVOT_KEYS = ("pivot_token_ids", "pivot_padding_mask")
MIN_ANSWER_WINDOW = 4


class PackedRow(NamedTuple):
    """A row as ids, not padded yet."""

    ids: list[int]
    prompt_length: int  # of them, the start token included
    is_cut: bool  # whether the prompt lost tokens
    pivot: list[int]  # empty: a row without a pivot

    @property
    def is_unanswered(self) -> bool:
        """Whether it is a pair of prompts without an answer."""
        return self.prompt_length == len(self.ids)


class PackedRows(list[PackedRow]):
    """A raw batch of rows that are packed already."""


def answer_positions(answer_mask: np.ndarray, width: int | None = None) -> np.ndarray:
    """Returns the window of positions that covers each row's answer.

    Args:
        answer_mask: int (B, T), 1 where the next token belongs to the answer.
        width: int, K where it is known; it must cover every answer.

    Returns:
        int32 (B, K): consecutive positions, from the first 1 of the row, moved left where the row
        would end. K is the largest span from a row's first 1 to its last, rounded up to a power of
        two, at least 4, at most T.
    """
    mask = np.asarray(answer_mask) != 0
    length = mask.shape[1]
    first = np.argmax(mask, axis=1)  # 0 in a row without an answer
    last = length - 1 - np.argmax(mask[:, ::-1], axis=1)
    span = np.where(mask.any(axis=1), last - first + 1, 0)
    count = window(int(span.max()), length) if width is None else width
    start = np.minimum(first, length - count)
    return (start[:, None] + np.arange(count)).astype("int32")


def window(span: int, length: int) -> int:
    """The width of the positions that cover answers of at most `span`, in rows of `length`."""
    return min(length, max(MIN_ANSWER_WINDOW, 1 << (span - 1).bit_length()))


def unanswered(x: dict[str, np.ndarray]) -> np.ndarray:
    """Whether a row is a pair of prompts without an answer, bool (B,)."""
    has_pivot = (np.asarray(x["pivot_padding_mask"]) != 0).any(axis=1)
    return has_pivot & (np.asarray(x["answer_mask"]) == 0).all(axis=1)


def token_counts(batch: Batch, align_all: bool) -> np.ndarray:
    """Returns the five counts that `loss_scale` is made of, float64."""
    x, _, sample_weight = batch
    has_pivot = (np.asarray(x["pivot_padding_mask"]) != 0).any(axis=1)
    tokens = (x["padding_mask"] != 0)[has_pivot | align_all].sum()
    answers = (x["answer_mask"] != 0)[has_pivot].sum()
    own = (x["answer_mask"] != 0)[x.get("own_answer", np.zeros(len(has_pivot))) != 0].sum()
    return np.array([sample_weight.sum(), tokens, has_pivot.sum(), answers, own], "float64")


def checked(batch: Any) -> Batch:
    """Gives a preprocessed batch as int32 and float32, if its keys, shapes and masks are right."""
    x, y, sample_weight = batch
    expected = set(TARGET_KEYS + PIVOT_KEYS)
    if set(x) != expected:
        raise ValueError(
            f"x must hold exactly {sorted(expected)}: missing {sorted(expected - set(x))}, "
            f"unknown {sorted(set(x) - expected)}. Received: keys {sorted(x)}"
        )
    x = {k: np.asarray(v).astype("int32", copy=False) for k, v in x.items()}
    y = np.asarray(y).astype("int32", copy=False)
    sample_weight = np.asarray(sample_weight).astype("float32", copy=False)
    target, pivot = x["token_ids"].shape, x["pivot_token_ids"].shape
    if len(target) != 2 or len(pivot) != 2 or target[0] != pivot[0]:
        raise ValueError(
            "token_ids must have shape (B, T) and pivot_token_ids (B, S), with one B. "
            f"Received: token_ids.shape={target}, pivot_token_ids.shape={pivot}"
        )
    for name, value in {**x, "y": y, "sample_weight": sample_weight}.items():
        wanted = pivot if name in PIVOT_KEYS else target
        if value.shape != wanted:
            raise ValueError(
                f"{name} must have shape {wanted}. Received: {name}.shape={value.shape}"
            )
    outside = np.count_nonzero((sample_weight != 0) & (x["answer_mask"] == 0))
    if outside:
        raise ValueError(
            "sample_weight must be 0 wherever answer_mask is 0: the loss is computed only there. "
            f"Received: {outside} such positions"
        )
    return x, y, sample_weight
