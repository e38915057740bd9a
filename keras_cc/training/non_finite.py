"""A loss that is not finite stops `fit`, with the step and the rows it was of."""

import keras
import numpy as np
from keras import ops


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


class StopOnNonFiniteLoss(keras.callbacks.Callback):
    """Stops training at the first loss that is not finite, with the step and its rows.

    The weights are those before the step: `CCCausalLM.compile` leaves out an update whose
    gradients are not finite.

    Args:
        batches: what is trained on; its `describe` turns row numbers into row ids.

    Raises:
        FloatingPointError: from `on_train_batch_end`.

    Example:

    ```python
    model.fit(rows)  # adds it by itself
    ```
    """

    def __init__(self, batches):
        super().__init__()
        self.batches = batches
        self.epoch = 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        loss = (logs or {}).get("loss")
        if loss is None or np.isfinite(np.asarray(loss)).all():
            return
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # JAX keeps the state outside the model while it trains
        rows = keras.ops.convert_to_numpy(self.model.last_rows.result())
        names = self.batches.describe(rows[rows >= 0])
        raise FloatingPointError(
            f"The loss of step {batch} (from 0) of epoch {self.epoch + 1} is not finite. The "
            "weights are those before that step, and training has stopped: look at the rows, lower "
            "the learning rate, or clip gradients (`global_clipnorm` of the optimizer). "
            f"Received: loss={float(np.asarray(loss))} for rows {', '.join(names)}"
        )


def _minus_one(shape, dtype):
    return ops.full(shape, -1, dtype=dtype)
