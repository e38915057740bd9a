"""From `PreparedBatches` to what Keras iterates, on each backend. Not public."""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from keras_cc.data.batches import PreparedBatches
from keras_cc.data.prepared import Batch

_INT_KEYS = (
    "token_ids",
    "padding_mask",
    "answer_mask",
    "pivot_token_ids",
    "pivot_padding_mask",
    "answer_positions",
)


class StepCounter(keras.callbacks.Callback):
    """Keeps `batches.step` at the number of micro-batches trained on.

    Without it, `step` moves at the end of each full pass, which is the same unless an epoch ends
    early (`steps_per_epoch`, an interrupt) or a trainer reads ahead.
    """

    def __init__(self, batches: PreparedBatches) -> None:
        super().__init__()
        self._batches = batches
        self._first = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._batches.counted_outside = True

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._first = batch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Keras may run several at once, and names the last of them, in an epoch that has fewer too.
        last = min(batch, (self.params.get("steps") or math.inf) - 1)
        self._batches.step += int(last) - self._first + 1


def as_keras_data(
    batches: PreparedBatches,
    steps_per_epoch: int | None = None,
    epochs: int = 1,
    left: int | None = None,
) -> Any:
    """Wraps prepared batches in what Keras iterates afresh in every epoch.

    That is a `tf.data.Dataset` on the TensorFlow backend, a `keras.utils.PyDataset` on JAX and
    torch, and a generator there for a one-shot source. A re-iterable source of unknown length is
    read once, unprepared, to count its batches, so that Keras knows where an epoch ends.

    Args:
        batches: a `PreparedBatches`.
        steps_per_epoch: int or `None`. As it will be passed to `fit`.
        epochs: int. As it will be passed to `fit`.
        left: int or `None`. How many batches there are before the end of the pass, where training
            goes on within one.

    Returns:
        An object for `keras.Model.fit(x=..., shuffle=False)`.

    Raises:
        ValueError: for an infinite source without `steps_per_epoch`, and for a one-shot source
            with `epochs > 1` and no `steps_per_epoch`.
    """
    length = batches.count_batches() if steps_per_epoch is None else batches.num_batches
    if length == math.inf and steps_per_epoch is None:
        raise ValueError(
            "The data never ends (`.repeat()`), so an epoch needs a length: pass "
            "`steps_per_epoch`. Received: steps_per_epoch=None"
        )
    if batches.one_shot and epochs > 1 and steps_per_epoch is None:
        raise ValueError(
            "The data is a generator (or another one-shot iterator): it is used up after one "
            "epoch. Pass the function that makes the generator, a list, or `steps_per_epoch`. "
            f"Received: epochs={epochs}"
        )
    if length == 0:
        raise ValueError("Empty dataset: the source gave no batch. Received: 0 batches")
    length = length if left is None else left
    if keras.backend.backend() == "tensorflow":
        return _as_tf_dataset(batches, length)
    if isinstance(length, int):
        return _SequentialPyDataset(batches, length)
    return _generate(batches, length)


def as_scored_data(batches: PreparedBatches, steps: int | None) -> Any:
    """Wraps what is scored while a model trains: each evaluation begins at the first batch.

    Args:
        batches: a `PreparedBatches` that can be read again.
        steps: int or `None`, `validation_steps`: the batches of an evaluation. They are cut here,
            so that Keras is not to be told of them.

    Returns:
        An object for `keras.Model.fit(validation_data=...)`.
    """
    if steps is None:
        return as_keras_data(batches)
    there = batches.num_batches
    if isinstance(there, int) and there < steps:
        warnings.warn(
            f"`validation_steps` is {steps}, and `validation_data` has {there} batches: all of "
            "them are scored.",
            stacklevel=4,
        )
        steps = there
    if keras.backend.backend() == "tensorflow":
        return _as_tf_dataset(batches, math.inf, steps)
    return _SequentialPyDataset(batches, steps, is_whole=False)


def _generate(batches: PreparedBatches, length: "int | float | None") -> Iterator[Any]:
    """Yields batches; over and over where `steps_per_epoch` cuts passes of unknown length."""
    step = batches.step  # counted here: `batches.step` lags where a trainer reads ahead
    try:
        for batch in batches.from_step(step):
            step += 1
            yield batch
        while length is None and not batches.one_shot:
            for batch in batches.from_step(step):
                step += 1
                yield batch
    except Exception as error:
        batches.error = error  # TensorFlow raises one of its own instead
        raise


class _SequentialPyDataset(keras.utils.PyDataset):
    """Batch 0 opens a new pass; the others follow in order, as Keras asks for them."""

    def __init__(self, batches: PreparedBatches, length: int, is_whole: bool = True) -> None:
        super().__init__(workers=1, use_multiprocessing=False)
        self._batches, self._length, self._is_whole = batches, length, is_whole
        self._iterator: Iterator[Any] = iter(())
        self._next = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if index == 0:
            self._iterator, self._next = iter(self._batches), 0
        if index != self._next:
            raise IndexError(
                "Batches are read in order: pass `shuffle=False` to `keras.Model.fit` (rows are "
                "shuffled by `PreparedBatches`). "
                f"Received: index={index}, expected {self._next}"
            )
        self._next += 1
        try:
            batch = next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"The source gave fewer batches than the {self._length} of its first pass or its "
                f"stated length. Received: {index} batches"
            ) from None
        is_last = self._is_whole and self._next == self._length
        if is_last and next(self._iterator, None) is not None:
            raise ValueError(
                f"The source gives more batches than the {self._length} of its first pass or its "
                "stated length."
            )
        return batch


def _as_tf_dataset(
    batches: PreparedBatches, length: "int | float | None", first: int | None = None
) -> Any:
    """A `tf.data.Dataset` of the batches, or of the `first` so many of each pass."""
    import tensorflow as tf

    def spec(rank: int, dtype: str) -> Any:
        return tf.TensorSpec([None] * rank, dtype)

    x = {key: spec(2, "int32") for key in _INT_KEYS}
    x["row_ids"] = spec(1, "int32")
    if batches.is_scaled:
        x["loss_scale"] = spec(2, "float32")
    if batches.packing is not None:
        x |= {key: spec(2, "int32") for key in ("segment_ids", "pivot_segment_ids")}
    if batches.own_answers is not None:
        x["own_answer"] = spec(1, "int32")
    if batches.alternate:
        x["objective_turn"] = spec(1, "int32")
    signature = (x, spec(2, "int32"), spec(2, "float32"))
    # A generator, not a map: the width of `answer_positions` changes from batch to batch.
    dataset = tf.data.Dataset.from_generator(
        lambda: _generate(batches, length), output_signature=signature
    )
    if first is not None:
        dataset = dataset.take(first)
        length = first
    if isinstance(length, int):
        dataset = dataset.apply(tf.data.experimental.assert_cardinality(length))
    elif length == math.inf:
        dataset = dataset.apply(
            tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        )
    return dataset.prefetch(2)
