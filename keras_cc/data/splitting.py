"""One batch for several replicas: rows that fill it up, the parts, and what each part counts."""

import dataclasses

import numpy as np

from keras_cc.data import prepared
from keras_cc.data.prepared import Batch


@dataclasses.dataclass(frozen=True)
class Split:
    """How batches are shared out.

    Attributes:
        multiple: batches have a multiple of so many rows; the last one of a pass is filled up
            with rows that count nowhere.
        parts: in so many parts, one after the other, losses are means over a part's own tokens,
            and gradients are averaged over the parts: each part's `loss_scale` makes that the
            mean over all. 1 where the backend takes means over all replicas by itself.
        processes: so many processes read the same rows; each keeps its part of each batch.
        process: which of them this one is.
    """

    multiple: int = 1
    parts: int = 1
    processes: int = 1
    process: int = 0

    def filled(self, batch: Batch) -> Batch:
        """The batch with rows of no token behind its own, where it needs them."""
        x, y, sample_weight = batch
        lacking = -len(y) % self.multiple
        if not lacking:
            return batch
        return (
            {name: _with_rows(name, value, lacking) for name, value in x.items()},
            np.pad(y, [(0, lacking), (0, 0)]),
            np.pad(sample_weight, [(0, lacking), (0, 0)]),
        )

    def counts(self, batch: Batch, align_all: bool) -> np.ndarray:
        """The counts that `loss_scale` is made of, float64 (parts, 5)."""
        of_parts = (self._part(batch, n, self.parts) for n in range(self.parts))
        return np.array([prepared.token_counts(part, align_all) for part in of_parts])

    def of_rows(self, scales: np.ndarray, rows: int) -> np.ndarray:
        """From a factor a part, (parts, 5), to one a row, float32 (rows, 5)."""
        return np.repeat(scales, rows // self.parts, axis=0).astype("float32")

    def own(self, batch: Batch) -> Batch:
        """This process' part."""
        return batch if self.processes == 1 else self._part(batch, self.process, self.processes)

    @staticmethod
    def _part(batch: Batch, number: int, of: int) -> Batch:
        x, y, sample_weight = batch
        size = len(y) // of
        rows = slice(number * size, (number + 1) * size)
        return {name: value[rows] for name, value in x.items()}, y[rows], sample_weight[rows]


WHOLE = Split()


def _with_rows(name, value, count):
    if name == "row_ids":
        return np.pad(value, (0, count), constant_values=-1)
    if name in ("objective_turn", "answer_positions"):  # as the first row's: they count nothing
        return np.concatenate([value, np.repeat(value[:1], count, axis=0)])
    return np.pad(value, [(0, count)] + [(0, 0)] * (value.ndim - 1))
