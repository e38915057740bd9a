"""What a piece of data is (a row, a batch, a preprocessed batch) and how to get at it. Not public.

No framework is imported: whoever hands over one of its objects has imported it.
"""

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np


def is_missing(value: Any) -> bool:
    """Whether a table has nothing here: `None`, or the NaN or NA of a DataFrame."""
    if value is None or type(value).__name__ == "NAType":  # pandas', which need not be imported
        return True
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def plain_text(value: Any) -> Any:
    """Returns a Python string for bytes, a NumPy string or a 0-d array, `None` for what is missing.

    Another value is returned as it is.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return str(value) if isinstance(value, np.str_) else value


def to_host(item: Any) -> Any:
    """Turns tensors of any framework inside dicts and preprocessed tuples into NumPy arrays."""
    if item is None or isinstance(item, str | bytes | int | float):
        return item
    if isinstance(item, Mapping):
        return {str(k): to_host(v) for k, v in item.items()}
    if is_prepared(item):
        return tuple(to_host(part) for part in item)
    if isinstance(item, list | tuple):
        return item
    if hasattr(item, "detach"):  # torch, possibly on an accelerator
        item = item.detach().cpu()
    if hasattr(item, "__array__"):
        item = np.asarray(item)
        return item.item() if item.ndim == 0 else item
    return item


def is_prepared(item: Any) -> bool:
    """Whether this is `(x, y, sample_weight)`; torch's default collate makes a list of it."""
    return (
        isinstance(item, tuple | list)
        and len(item) == 3
        and isinstance(item[0], Mapping)
        and not isinstance(item[1], Mapping)
    )


def is_scalar(value: Any) -> bool:
    """Whether a value belongs to one row."""
    if value is None or isinstance(value, str | bytes | int | float):
        return True
    return getattr(value, "ndim", None) == 0


def is_row(item: Any) -> bool:
    """Whether this is one row: a dict with a string in it. (A row may also hold a list.)"""
    return isinstance(item, Mapping) and any(
        isinstance(v, str | bytes) or (is_scalar(v) and isinstance(to_host(v), str | bytes))
        for v in item.values()
    )


def row_count(raw: Any) -> int:
    """How many rows a raw batch has."""
    if is_prepared(raw):
        return len(raw[1])
    return len(next(iter(raw.values()))) if isinstance(raw, dict) else len(raw)


def describe(item: Any) -> str:
    """Returns a short description of a value for an error message."""
    if isinstance(item, Mapping):
        return f"a dict with keys {sorted(map(str, item))}"
    return f"{type(item).__module__}.{type(item).__name__}, {str(item)[:80]}"


def to_columns(rows: Any, names: Collection[str]) -> dict[str, list[Any]]:
    """Returns the named columns of a batch as equally long lists; absent ones are left out.

    Args:
        rows: a list of row dicts, a dict of columns, or one row dict (a batch of one).
        names: the columns that matter; others, whatever they hold, are ignored.
    """
    tf = sys.modules.get("tensorflow")
    if tf is not None and not tf.executing_eagerly():
        raise RuntimeError(
            "CCPreprocessor works on Python strings and cannot run inside tf.function or "
            "`tf.data.Dataset.map`: pass the dataset of strings to `fit`."
        )
    if isinstance(rows, Mapping):
        columns = {k: _column(rows[k]) for k in names if k in rows}
        if columns and all(is_scalar(v) for v in columns.values()):
            columns = {k: [v] for k, v in columns.items()}  # one row
        known = sorted(map(str, rows))
    elif isinstance(rows, Sequence) and rows and all(isinstance(row, Mapping) for row in rows):
        columns = {k: [row.get(k) for row in rows] for k in names if any(k in row for row in rows)}
        known = sorted({str(k) for row in rows for k in row})
    else:
        raise TypeError(
            "Rows must be a list of dicts (at least one) or a dict of columns. "
            f"Received: {describe(rows)}"
        )
    lengths = {k: "a scalar" if is_scalar(v) else len(v) for k, v in columns.items()}
    if not lengths:
        raise ValueError(f"The rows have none of the columns {list(names)}. Received: {known}")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Columns must be equally long. Received: lengths {lengths}")
    if 0 in lengths.values():
        raise ValueError(f"There must be at least one row. Received: lengths {lengths}")
    return columns


def _column(value: Any) -> Any:
    """Returns a column as a list; one row's value stays a scalar."""
    value = to_host(value)
    return value if is_scalar(value) else list(value)
