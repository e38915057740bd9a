import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_cc.callbacks.periodic import Periodic


class GateStatistics(Periodic):
    """Follows the connection while it trains: gates and alignment errors by layer.

    A pass over a few rows now and then, as `keras_cc.evaluation.gate_atlas` makes it: connected,
    without dropout. Of the published connection it is the share of rows that select each layer.

    Args:
        rows: paired rows, as `CCCausalLM.fit` takes; a few, the same ones each time.
        every: `"epoch"`, or an int, that many steps. The first look is before the first step.
        log_dir: TensorBoard's folder, for a curve a layer and the histogram of the gates (by
            layer, and by dimension where there is one a dimension), or None. They are written to
            its subfolder `gates`, so that it can be that of `keras.callbacks.TensorBoard` too.
        batch_size: int, rows a batch.

    Attributes:
        history: list of `(step, seen)`, `seen` a dict with those of `"gate"`,
            `"alignment_error"` and `"selected"` that the connection has, each a list of floats,
            one a layer. Steps are batches trained on; 0 is the model as it was before.
        layers: the block numbers that they are of.

    The last look's means over layers go into the epoch's `logs` as `rows_gate` and
    `rows_alignment_error`, and so into the progress bar, `History` and callbacks that come after.

    Raises:
        ValueError: when training begins, for a model without a connection, or rows of which none
            has a pivot.
        ModuleNotFoundError: for a `log_dir` where `tensorboard` is not installed.

    Example:

    ```python
    statistics = keras_cc.callbacks.GateStatistics(dev_rows[:32], every=100)
    model.fit(rows, callbacks=[statistics])
    step, seen = statistics.history[-1]
    seen["gate"]  # [0.11, 0.18, ...], one a layer
    ```
    """

    def __init__(
        self,
        rows: Any,
        every: "int | str" = "epoch",
        log_dir: "str | os.PathLike[str] | None" = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__(every, log_dir, "gates")
        self.rows = list(rows) if isinstance(rows, Iterator) else rows  # for more than one fit
        self.batch_size = batch_size
        self.layers: tuple[int, ...] = ()
        self._probe: Any = None
        self._by_dimension: Any = None

    def on_train_begin(self, logs=None):
        # Here and not above: evaluation imports the model, and the model its callbacks.
        from keras_cc.calibration.atlas import ConnectionProbe

        # Compiled anew for each fit: between two, the model may have become another.
        self._probe = ConnectionProbe(self.model, self.rows, self.batch_size)
        super().on_train_begin(logs)

    def look(self):
        atlas = self._probe.measure()
        self.layers, self._by_dimension = atlas.layers, atlas.gate_by_dimension
        maps = {name: getattr(atlas, name) for name in ("gate", "alignment_error", "selected")}
        return {name: of[""].tolist() for name, of in maps.items() if of}

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if logs is not None:
            _, seen = self.history[-1]
            for name in seen.keys() - {"selected"}:
                logs[f"rows_{name}"] = float(np.mean(seen[name]))

    def write(self, events, seen):
        for name, values in seen.items():
            for layer, value in zip(self.layers, values, strict=True):
                events.scalar(f"{name}/block_{layer}", value, self.step)
        if "gate" in seen:
            gates = seen["gate"] if self._by_dimension is None else self._by_dimension
            events.histogram("gates", gates, self.step)
