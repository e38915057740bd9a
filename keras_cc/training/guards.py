"""What stands around a fit or an evaluation: how it fails, and what it cut."""

import contextlib
import warnings

import keras

from keras_cc.backbones import surgery


class KeepWeights(keras.callbacks.Callback):
    """Gives the model its weights back when a first batch fails, on JAX.

    There Keras takes the values out of the variables before it asks for the batch, and puts
    back what the last step returned: after none, an unusable row (or an interrupt while the
    step compiles) would leave a model without weights.

    Example:

    ```python
    keep = keras_cc.callbacks.KeepWeights()
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


def listed(callbacks):
    """Callbacks as a list, from all that Keras takes: one, a `CallbackList`, lists in lists."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return list(callbacks.callbacks)
    return keras.tree.flatten(callbacks) if callbacks else []


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
