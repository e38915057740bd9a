import os
from typing import Any

import keras

from keras_cc.callbacks.event_file import EventFile, check_tensorboard
from keras_cc.options import choice_or_count


class Periodic(keras.callbacks.Callback):
    """A callback that looks at the model now and then while it trains, and changes nothing.

    The first look is before the first step: there is something to compare with, and what cannot
    work fails before hours of training. A subclass gives `look`.

    Args:
        every: `"epoch"`, or an int, that many steps (batches).
        log_dir: TensorBoard's folder, or None.
        run: the name of the subfolder that events go to, a run of its own in TensorBoard.

    Attributes:
        history: list of `(step, what was seen)`. Steps are batches trained on since the callback
            was made; 0 is the model as it was before.

    Raises:
        ValueError: for another `every`.
        ModuleNotFoundError: for a `log_dir` where `tensorboard` is not installed.
    """

    def __init__(
        self, every: "int | str", log_dir: "str | os.PathLike[str] | None", run: str
    ) -> None:
        super().__init__()
        self.every = choice_or_count("every", every, ("epoch",))
        self.folder = None
        if log_dir is not None:
            check_tensorboard(log_dir)
            self.folder = os.path.join(log_dir, run)
        self.history: list[tuple[int, Any]] = []
        self.step = 0
        self._last_batch = -1
        self._events: EventFile | None = None

    def look(self) -> Any:
        """What there is to see now; it goes into `history`."""
        raise NotImplementedError

    def write(self, events: EventFile, seen: Any) -> None:
        """Write what was seen at `self.step` for TensorBoard."""
        raise NotImplementedError

    def on_train_begin(self, logs=None):
        self.on_train_end()  # of a fit that failed
        if self.folder is not None:
            self._events = EventFile(self.folder)
        self._look()

    def on_epoch_begin(self, epoch, logs=None):
        self._last_batch = -1

    def on_train_batch_end(self, batch, logs=None):
        # Keras may run several steps at once, and then names the last one.
        before, self.step = self.step, self.step + batch - self._last_batch
        self._last_batch = batch
        if isinstance(self.every, int) and self.step // self.every > before // self.every:
            self._look()

    def on_epoch_end(self, epoch, logs=None):
        if self.every == "epoch":
            self._look()

    def on_train_end(self, logs=None):
        if self._events is not None:
            self._events.close()
            self._events = None

    def _look(self):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # JAX keeps the state outside the model while it trains
        seen = self.look()
        self.history.append((self.step, seen))
        if self._events is not None:
            self.write(self._events, seen)
            self._events.flush()
