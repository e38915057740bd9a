"""Numbers that go wrong while nothing fails: one warning each, which says what to try."""

import warnings

import keras
import numpy as np

#: Steps whose mean stands for now.
WINDOW = 50
#: An alignment loss is looked at after so many steps, and must have fallen by this share of itself.
PATIENCE, LEAST_FALL = 300, 0.02
#: A loss explodes where it is so many times the lowest there was, and so many nats more.
TIMES, NATS = 3.0, 2.0
#: Gates between these do something; those that begin outside of them were made so.
SHUT, OPEN = 0.005, 0.995


class WatchNumbers(keras.callbacks.Callback):
    """Warns of a loss that explodes, an alignment loss that does not fall, gates that are stuck.

    Each once in a training. All are means over `WINDOW` steps, so that one bad batch says nothing:

        loss:            above 3 times its lowest, and 2 nats above it
        alignment loss:  after 300 steps not 2 % below what it was in the first 50
        gate:            its mean below 0.005 or above 0.995, and neither at the start

    Example:

    ```python
    model.fit(rows)  # adds it by itself
    ```
    """

    def on_train_begin(self, logs=None):
        self._done = set()  # metrics of which there is no more to say
        self._steps = 0
        self._recent = {}  # metric -> its values in the last steps
        self._first = {}  # metric -> its mean in the first window
        self._lowest = np.inf

    def on_epoch_begin(self, epoch, logs=None):
        self._means, self._count = {}, 0  # Keras shows means since the epoch began

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = batch
        if not self._means:  # a training may go on within an epoch
            self._count = batch

    def on_train_batch_end(self, batch, logs=None):
        steps = batch - self._begin + 1  # Keras may run several at once
        for name in ("loss", "alignment_loss", "mean_gate"):
            value = (logs or {}).get(name)
            if value is None:
                continue
            mean = float(np.asarray(value))
            before = self._means.get(name, mean)
            now = mean + (mean - before) * self._count / steps
            self._means[name] = mean
            self._recent[name] = [*self._recent.get(name, ()), now][-WINDOW:]
        self._count += steps
        self._steps += steps
        recent = {n: np.mean(v) for n, v in self._recent.items() if len(v) == WINDOW}
        for name, mean in recent.items():
            self._first.setdefault(name, mean)
        self._look(recent)

    def _look(self, recent):
        if "loss" in recent:
            self._lowest = min(self._lowest, recent["loss"])
            if recent["loss"] > max(TIMES * self._lowest, self._lowest + NATS):
                self._warn(
                    "loss",
                    f"The loss explodes: {recent['loss']:.3g} over the last {WINDOW} steps, where "
                    f"it was {self._lowest:.3g} before (step {self._steps}). Lower the learning "
                    "rate, let it warm up, or clip gradients (`global_clipnorm` of the optimizer).",
                )
        weight = getattr(self.model.connection, "alignment_loss_weight", 0.0)
        aligned = recent.get("alignment_loss")
        if aligned is not None and weight and self._steps >= PATIENCE:
            first = self._first["alignment_loss"]
            if aligned > (1 - LEAST_FALL) * first:
                self._warn(
                    "alignment_loss",
                    f"The alignment loss has not fallen in {self._steps} steps ({first:.3g} at "
                    f"first, {aligned:.3g} now), so the transform does not learn to stand in for "
                    "the connection: raise `alignment_loss_weight` or the learning rate, or fit it "
                    "in closed form after training (`fit_transform`).",
                )
            else:
                self._done.add("alignment_loss")  # it has fallen
        gate = recent.get("mean_gate")
        if gate is not None and SHUT <= self._first["mean_gate"] <= OPEN:
            stuck = "shut" if gate < SHUT else "open" if gate > OPEN else None
            if stuck:
                self._warn(
                    "mean_gate",
                    f"The gates are {stuck} ({gate:.3f} in the mean, from "
                    f"{self._first['mean_gate']:.3f}; step {self._steps}), and hardly learn from "
                    "there: lower the learning rate, or begin elsewhere (`initial_gate`).",
                )

    def _warn(self, name, message):
        if name not in self._done:
            self._done.add(name)
            warnings.warn(message, stacklevel=3)
