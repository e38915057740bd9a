"""Callbacks that `CCCausalLM.fit` adds."""

import keras
import numpy as np


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
            f"The loss of step {batch} (from 0) of epoch {self.epoch + 1} is not finite. The weights "
            "are those before that step, and training has stopped: look at the rows, lower the "
            "learning rate, or clip gradients (`global_clipnorm` of the optimizer). "
            f"Received: loss={float(np.asarray(loss))} for rows {', '.join(names)}"
        )
