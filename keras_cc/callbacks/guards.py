"""The guards that `CCCausalLM.fit` adds by itself."""

import keras
import numpy as np

from keras_cc import surgery


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


class KeepWeights(keras.callbacks.Callback):
    """Gives the model its weights back when a first batch fails, on JAX.

    There Keras takes the values out of the variables before it asks for the batch, and puts
    back what the last step returned: after none, an unusable row (or an interrupt while the
    step compiles) would leave a model without weights.

    Example:

    ```python
    keep = KeepWeights()
    try:
        model.fit(rows, callbacks=[keep])
    except BaseException:
        keep.restore()
        raise
    ```
    """

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_begin(self, batch, logs=None):
        self.values = surgery.attached_values(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self.values = []

    on_test_batch_begin = on_train_batch_begin
    on_test_batch_end = on_train_batch_end

    def restore(self):
        """Put values back into the variables that have none."""
        if self.model is not None:
            surgery.reattach(self.model, self.values)
