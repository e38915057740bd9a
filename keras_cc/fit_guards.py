"""What stands around a fit or an evaluation: the rows at hand, how it fails, what it cut."""

import contextlib
import warnings

import keras
from keras import ops

from keras_cc.callbacks import KeepWeights


class LastRows(keras.metrics.Metric):
    """Remembers which rows the last batch had, for the message when a step fails.

    A metric only in that its state travels with the metrics' through every backend's
    train step; it is never shown. Of a batch beyond `size` rows it keeps the first.

    Args:
        size: int, the most rows that are kept.

    Example:

    ```python
    rows = LastRows(size=4)
    rows.update_state(keras.ops.array([7, 8]))
    rows.result()  # [7, 8, -1, -1]
    ```
    """

    def __init__(self, size=256, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.rows = self.add_variable((size,), initializer=_minus_one, dtype="int32", name="rows")

    def update_state(self, row_ids):
        filler = ops.full((self.size,), -1, dtype="int32")
        self.rows.assign(ops.concatenate([ops.cast(row_ids, "int32"), filler])[: self.size])

    def result(self):
        return self.rows


@contextlib.contextmanager
def failing_well(*sources):
    """When a fit or an evaluation fails: a model that still works, and the error of the data."""
    keep = KeepWeights()
    try:
        yield keep
    except BaseException:
        keep.restore()
        for source in sources:
            if source.error is not None:
                raise source.error from None
        raise


class reporting_truncation:
    """Says, after a fit or an evaluation, how many prompts it cut."""

    def __init__(self, preprocessor):
        self.preprocessor = preprocessor

    def __enter__(self):
        self.before = getattr(self.preprocessor, "truncated_count", 0)

    def __exit__(self, error, *_):
        count = getattr(self.preprocessor, "truncated_count", 0) - self.before
        if count and error is None:
            warnings.warn(
                f"{count} prompts (counted once an epoch) were truncated from the left to fit "
                f"max_length={self.preprocessor.max_length} tokens with their answer: raise "
                "`CCPreprocessor(max_length=...)` to keep them whole.",
                stacklevel=3,
            )


def _minus_one(shape, dtype):
    return ops.full(shape, -1, dtype=dtype)
