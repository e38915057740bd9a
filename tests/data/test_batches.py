"""`PreparedBatches`: every source gives the same batches, on every backend and in every epoch."""

import itertools
import math
import sys

import keras
import numpy as np
import pytest

from keras_cc.data.batches import PreparedBatches
from keras_cc.data.feeding import StepCounter, as_keras_data
from keras_cc.data.prepared import answer_positions

grain = pytest.importorskip("grain", reason="grain is not installed")
tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

T, S = 16, 6
ROWS = [
    {
        "instruction": f"instruction {i}",
        "output": "x" * (1 + i % 5),
        "instruction_en": "" if i % 3 == 0 else f"pivot {i}",
        "id": f"id-{i}",
    }
    for i in range(7)
]


def to_rows(raw):
    if isinstance(raw, dict):
        keys = list(raw)
        raw = [dict(zip(keys, values, strict=True)) for values in zip(*raw.values(), strict=True)]
    text = lambda v: v.decode() if isinstance(v, bytes) else str(v)  # noqa: E731
    return [{k: text(v) for k, v in row.items()} for row in raw]


def prepare(raw):
    """A stand-in for CCPreprocessor: row i is i in every token, its answer len(output) long."""
    rows = to_rows(raw)
    number = np.array([int(r["instruction"].split()[1]) for r in rows], "int32")
    answer = np.zeros((len(rows), T), "int32")
    pivot = np.zeros((len(rows), S), "int32")
    padding = np.zeros((len(rows), T), "int32")
    for i, r in enumerate(rows):
        start = 2 + number[i]  # the prompt's last position
        answer[i, start : start + len(r["output"])] = 1
        padding[i, : start + len(r["output"]) + 1] = 1
        pivot[i] = bool(r["instruction_en"])
    x = {
        "token_ids": np.tile(number[:, None], (1, T)),
        "padding_mask": padding,
        "answer_mask": answer,
        "pivot_token_ids": pivot * number[:, None],
        "pivot_padding_mask": pivot,
    }
    return x, x["token_ids"].copy(), answer.astype("float32")


prepare.id_column = "id"


def columns(rows):
    return {k: [r[k] for r in rows] for k in rows[0]}


def chunks(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class Columns(keras.utils.PyDataset):
    def __init__(self, items):
        super().__init__()
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Loader:
    """Re-iterable, of unknown length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def prepared_arrays():
    return prepare(ROWS)


def tensors(convert):
    x, y, weight = prepared_arrays()
    return {k: convert(v) for k, v in x.items()}, convert(y), convert(weight)


def tf_rows():
    return tf.data.Dataset.from_tensor_slices(columns(ROWS))


def _module(name):
    return pytest.importorskip(name, reason=f"a source of {name}")


BATCHES = [prepare(rows) for rows in chunks(ROWS, 3)]

SOURCES = {
    "rows": lambda: ROWS,
    "tuple of rows": lambda: tuple(ROWS),
    "columns": lambda: columns(ROWS),
    "numpy columns": lambda: {k: np.array(v) for k, v in columns(ROWS).items()},
    "bytes columns": lambda: {
        k: np.array([t.encode() for t in v], object) for k, v in columns(ROWS).items()
    },
    "tf columns": lambda: {k: tf.constant(v) for k, v in columns(ROWS).items()},
    "arrays": prepared_arrays,
    "tf arrays": lambda: tensors(tf.constant),
    "torch arrays": lambda: tensors(torch.tensor),
    "backend arrays": lambda: tensors(keras.ops.convert_to_tensor),
    "pandas": lambda: _module("pandas").DataFrame(ROWS),
    "pandas, strings of Arrow": lambda: (
        _module("pandas").DataFrame(ROWS).convert_dtypes(dtype_backend="pyarrow")
    ),
    "polars": lambda: _module("polars").DataFrame(ROWS),
    "datasets": lambda: _module("datasets").Dataset.from_list(ROWS),
    "datasets, as pandas": lambda: (
        _module("datasets").Dataset.from_list(ROWS).with_format("pandas")
    ),
    "datasets, a stream": lambda: _module("datasets").Dataset.from_list(ROWS).to_iterable_dataset(),
    "tf.data rows": tf_rows,
    "tf.data batches": lambda: tf_rows().batch(3),
    "tf.data unknown length": lambda: tf_rows().filter(lambda row: True).batch(3),
    "tf.data prepared": lambda: tf.data.Dataset.from_tensor_slices(prepared_arrays()).batch(3),
    "grain map rows": lambda: grain.MapDataset.source(ROWS),
    "grain map filtered": lambda: grain.MapDataset.source(
        [*ROWS, {**ROWS[0], "id": "drop"}]
    ).filter(lambda row: row["id"] != "drop"),
    "grain map batches": lambda: grain.MapDataset.source(ROWS).batch(3),
    "grain iter": lambda: grain.MapDataset.source(ROWS).to_iter_dataset().batch(3),
    "grain prepared": lambda: grain.MapDataset.source(BATCHES),
    "grain loader": lambda: grain.DataLoader(
        data_source=ROWS,
        sampler=grain.samplers.SequentialSampler(len(ROWS)),
        operations=[grain.transforms.Batch(3)],
    ),
    "torch loader": lambda: torch.utils.data.DataLoader(ROWS, batch_size=3),
    "torch loader rows": lambda: torch.utils.data.DataLoader(ROWS, batch_size=None),
    "torch loader lists": lambda: torch.utils.data.DataLoader(ROWS, 3, collate_fn=list),
    "torch loader prepared": lambda: torch.utils.data.DataLoader(
        [tensors_row(i) for i in range(len(ROWS))], batch_size=3
    ),
    "PyDataset columns": lambda: Columns([columns(c) for c in chunks(ROWS, 3)]),
    "PyDataset prepared": lambda: Columns(BATCHES),
    "iterable of rows": lambda: Loader(ROWS),
    "iterable of batches": lambda: Loader([columns(c) for c in chunks(ROWS, 3)]),
    "iterable of prepared": lambda: Loader(BATCHES),
    "list of batches": lambda: [columns(c) for c in chunks(ROWS, 3)],
    "list of prepared": lambda: BATCHES,
    "function": lambda: lambda: iter(ROWS),
    "generator function": lambda: lambda: (row for row in ROWS),
}
ONE_SHOT = {
    "generator of rows": lambda: (row for row in ROWS),
    "generator of batches": lambda: (columns(c) for c in chunks(ROWS, 3)),
    "generator of prepared": lambda: iter(BATCHES),
}


def tensors_row(i):
    x, y, weight = prepared_arrays()
    return {k: torch.tensor(v[i]) for k, v in x.items()}, torch.tensor(y[i]), weight[i]


class Recorder(keras.Model):
    """Learns one number, and logs which rows each step saw."""

    def __init__(self):
        super().__init__()
        # [step, row]: the row's place in that step's batch, from 1; 0 where it was not there.
        self.seen = self.add_weight(shape=(64, 8), initializer="zeros", trainable=False)
        self.at = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.built = True

    def call(self, x):
        return keras.ops.cast(x["token_ids"], "float32") * self.scale

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        ops = keras.ops
        rows = ops.one_hot(x["token_ids"][:, 0], 8)  # (B, 8)
        places = ops.sum(rows * ops.cumsum(ops.ones_like(rows), axis=0), axis=0)
        self.seen.assign_add(ops.one_hot(self.at, 64)[:, None] * places)
        self.at.assign(self.at + 1)
        picked = ops.take_along_axis(y_pred, x["answer_positions"], axis=1)
        return ops.mean(ops.square(picked))

    def order(self):
        seen = keras.ops.convert_to_numpy(self.seen + 0)
        order = [[int(i) for i in np.argsort(row) if row[i]] for row in seen]
        return [rows for rows in order if rows]


class Steps(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.per_epoch = []

    def on_epoch_begin(self, epoch, logs=None):
        self.per_epoch.append(0)

    def on_train_batch_end(self, batch, logs=None):
        self.per_epoch[-1] += 1


def fit(batches, epochs=2, **kwargs):
    model, steps = Recorder(), Steps()
    model.compile(optimizer=keras.optimizers.SGD(0.0))
    data = as_keras_data(batches, kwargs.get("steps_per_epoch"), epochs)
    callbacks = [steps, StepCounter(batches)]
    model.fit(data, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks, **kwargs)
    return model, steps


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for (x1, y1, w1), (x2, y2, w2) in zip(first, second, strict=True):
        assert x1.keys() == x2.keys()
        for key in x1:
            np.testing.assert_array_equal(x1[key], x2[key], err_msg=key)
            assert x1[key].dtype == x2[key].dtype
        np.testing.assert_array_equal(y1, y2)
        np.testing.assert_array_equal(w1, w2)
        assert (y2.dtype, w2.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_batches_twice(name):
    batches = PreparedBatches(SOURCES[name](), prepare, batch_size=3)
    for _ in range(2):
        seen = list(batches)
        assert [x["token_ids"][:, 0].tolist() for x, _, _ in seen] == [[0, 1, 2], [3, 4, 5], [6]]
        assert [x["row_ids"].tolist() for x, _, _ in seen] == [[0, 1, 2], [3, 4, 5], [6]]
        assert_same_batches(seen, list(PreparedBatches(ROWS, prepare, batch_size=3)))
    assert batches.count_batches() == 3
    assert len(batches) == 3


@pytest.mark.parametrize("name", ["pandas", "polars", "datasets", "datasets, as pandas"])
def test_tables_are_shuffled_and_a_row_is_found_again(name):
    batches = PreparedBatches(SOURCES[name](), prepare, 3, shuffle=True, seed=5)
    again = PreparedBatches(ROWS, prepare, 3, shuffle=True, seed=5)
    orders = [[x["row_ids"].tolist() for x, _, _ in batches] for _ in range(2)]
    assert orders == [[x["row_ids"].tolist() for x, _, _ in again] for _ in range(2)]
    assert orders[0] != orders[1]
    assert batches.describe([2]) == again.describe([2])


def test_several_splits_are_no_data():
    datasets = _module("datasets")
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(TypeError, match=r"one split, such as `dataset\['test'\]`.*DatasetDict"):
        PreparedBatches(splits, prepare)


# A trainer is given a number of batches that is known or was counted; who makes them may be
# another framework, in a thread or a pass of its own. What they hold is equal: see above.
@pytest.mark.parametrize(
    "name", ["rows", "iterable of rows", "tf.data unknown length", "torch loader"]
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_fit_reads_every_row_in_order_in_two_epochs(name):
    batches = PreparedBatches(SOURCES[name](), prepare, batch_size=3)
    model, steps = fit(batches)
    assert model.order() == 2 * [[0, 1, 2], [3, 4, 5], [6]]
    assert steps.per_epoch == [3, 3]
    assert steps.params["steps"] == 3  # what the progress bar counts to


@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_generator_gives_the_same_batches_once(name):
    batches = PreparedBatches(ONE_SHOT[name](), prepare, batch_size=3)
    assert batches.one_shot
    with pytest.raises(TypeError, match="not known"):
        len(batches)
    assert_same_batches(list(batches), list(PreparedBatches(ROWS, prepare, batch_size=3)))
    with pytest.raises(RuntimeError, match="used up"):
        list(batches)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_fit_reads_a_generator_once():
    batches = PreparedBatches(ONE_SHOT["generator of rows"](), prepare, batch_size=3)
    model, steps = fit(batches, epochs=1)
    assert model.order() == [[0, 1, 2], [3, 4, 5], [6]]
    assert steps.per_epoch == [3]
    with pytest.raises(RuntimeError, match="used up"):
        list(batches)


def test_a_generator_for_two_epochs_is_refused_at_the_door():
    batches = PreparedBatches((row for row in ROWS), prepare)
    with pytest.raises(ValueError, match=r"one epoch.*epochs=2"):
        as_keras_data(batches, epochs=2)


def test_infinite_sources_need_steps_per_epoch():
    forever = tf_rows().batch(3).repeat()
    batches = PreparedBatches(forever, prepare)
    assert batches.num_batches == math.inf
    with pytest.raises(ValueError, match="steps_per_epoch"):
        as_keras_data(batches)
    model, steps = fit(batches, epochs=2, steps_per_epoch=2)
    assert steps.per_epoch == [2, 2]
    assert model.order() == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]


def test_endless_functions_are_not_counted_when_steps_per_epoch_is_given():
    batches = PreparedBatches(lambda: itertools.cycle(ROWS), prepare, batch_size=3)
    model, _ = fit(batches, epochs=2, steps_per_epoch=2)
    assert model.order() == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


@pytest.mark.parametrize("source", ["rows", "iterable of rows"])
def test_steps_per_epoch_goes_on_where_the_last_epoch_ended(source):
    batches = PreparedBatches(SOURCES[source](), prepare, batch_size=3)
    model, _ = fit(batches, epochs=3, steps_per_epoch=1)
    assert model.order() == [[0, 1, 2], [3, 4, 5], [6]]


def test_steps_per_epoch_crosses_passes_of_unknown_length():
    batches = PreparedBatches(SOURCES["iterable of rows"](), prepare, batch_size=3)
    model, _ = fit(batches, epochs=2, steps_per_epoch=2)
    assert model.order() == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]


@pytest.mark.parametrize("source", ["rows", "columns", "arrays"])
def test_shuffle_draws_a_new_seeded_order_for_each_epoch(source):
    def epochs_of(seed):
        batches = PreparedBatches(SOURCES[source](), prepare, 3, shuffle=True, seed=seed)
        return [[int(i) for x, _, _ in batches for i in x["token_ids"][:, 0]] for _ in range(3)]

    first = epochs_of(1)
    expected = [np.random.default_rng([1, e]).permutation(7).tolist() for e in range(3)]
    assert first == expected
    assert epochs_of(1) == first
    assert epochs_of(2) != first
    assert all(sorted(epoch) == list(range(7)) for epoch in first)


def test_fit_trains_in_each_epochs_order():
    batches = PreparedBatches(ROWS, prepare, 3, shuffle=True, seed=1)
    model, _ = fit(batches, epochs=3)
    orders = [np.random.default_rng([1, epoch]).permutation(7).tolist() for epoch in range(3)]
    assert model.order() == [order[i : i + 3] for order in orders for i in (0, 3, 6)]


def test_a_stream_keeps_the_names_of_its_newest_rows_alone(monkeypatch):
    monkeypatch.setattr("keras_cc.data.batches.NAMED", 4)
    rows = [{**ROWS[n % len(ROWS)], "id": f"r{n}"} for n in range(20)]
    batches = PreparedBatches(lambda: iter(rows), prepare, 3)
    for x, _, _ in batches:
        numbers = x["row_ids"].tolist()
        assert batches.describe(numbers) == [f"r{n}" for n in numbers]
        assert len(batches._ids) <= 4
    assert batches.describe([0]) == ["row 0"]


def test_shuffle_leaves_streams_in_their_own_order():
    batches = PreparedBatches(Loader(ROWS), prepare, 3, shuffle=True, seed=0)
    assert [x["token_ids"][:, 0].tolist() for x, _, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("name", ["rows", "columns", "tf.data rows", "torch loader"])
def test_describe_names_rows_by_their_id_column(name):
    batches = PreparedBatches(SOURCES[name](), prepare, 3)
    list(batches)
    assert batches.describe(np.array([5, 0])) == ["id-5", "id-0"]


def test_describe_follows_the_row_through_a_shuffle():
    batches = PreparedBatches(ROWS, prepare, 3, shuffle=True, seed=3)
    for x, _, _ in batches:
        assert batches.describe(x["row_ids"]) == [f"id-{i}" for i in x["token_ids"][:, 0]]


@pytest.mark.parametrize("source", ["arrays", "list of prepared"])
def test_describe_without_ids_counts_rows(source):
    batches = PreparedBatches(SOURCES[source](), prepare, 3)
    list(batches)
    assert batches.describe([4]) == ["row 4"]


@pytest.mark.parametrize(
    "spans, length, expected",
    [
        ([(2, 5)], 16, [[2, 3, 4, 5]]),  # span 3 -> the minimum, 4
        ([(2, 7)], 16, [[2, 3, 4, 5, 6, 7, 8, 9]]),  # span 5 -> 8
        ([(14, 16)], 16, [[12, 13, 14, 15]]),  # clipped at the end of the row
        ([(0, 9)], 10, [list(range(10))]),  # 16 would be longer than the row
        ([(0, 2)], 3, [[0, 1, 2]]),  # a row shorter than the minimum
        ([(1, 3), None], 8, [[1, 2, 3, 4], [0, 1, 2, 3]]),  # a row without an answer
        ([(1, 5), (3, 4)], 8, [[1, 2, 3, 4], [3, 4, 5, 6]]),
    ],
)
def test_answer_positions(spans, length, expected):
    mask = np.zeros((len(spans), length), "int32")
    for row, span in zip(mask, spans, strict=True):
        if span:
            row[slice(*span)] = 1
    positions = answer_positions(mask)
    assert positions.dtype == np.int32
    assert positions.tolist() == expected


def test_answer_positions_cover_every_answer_token_of_random_masks():
    rng = np.random.default_rng(0)
    for _ in range(200):
        length = int(rng.integers(2, 40))
        mask = rng.random((3, length)) < rng.random()
        window = answer_positions(mask)
        assert window.min() >= 0 and window.max() < length
        assert (np.diff(window, axis=1) == 1).all()
        for row, positions in zip(mask, window, strict=True):
            assert set(np.flatnonzero(row)) <= set(positions.tolist())


def token_means(batches, loss, weight):
    """What K averaged micro-batches amount to, per group, and the token mean over the group."""
    micro = [float((loss(b) * weight(b)).sum() / weight(b).sum()) for b in batches]
    totals = sum(float((loss(b) * weight(b)).sum()) for b in batches)
    return micro, totals / sum(float(weight(b).sum()) for b in batches)


def has_pivot(batch):
    return batch[0]["pivot_padding_mask"].any(axis=1, keepdims=True)


# What each column of `loss_scale` counts, as weights of (B, T) or (B, 1).
COUNTED = [
    lambda b: b[2],
    lambda b: b[0]["padding_mask"] * has_pivot(b),
    has_pivot,
    lambda b: b[0]["answer_mask"] * has_pivot(b),
]


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("column", range(4))
def test_loss_scale_turns_micro_batch_means_into_means_of_the_group(column, batch_size):
    # Rows 0, 3 and 6 have no pivot: there are micro-batches with two, with one and with none.
    rows = [ROWS[i] for i in (1, 2, 0, 3, 4, 5, 1, 0, 2, 4, 6, 5)]
    weight = COUNTED[column]
    loss = lambda b: np.sin(b[0]["token_ids"] + np.arange(weight(b).shape[1]))  # noqa: E731
    batches = list(PreparedBatches(rows, prepare, batch_size=batch_size, accumulate=3))
    assert len(batches) == 12 // batch_size
    assert len({weight(b).sum() for b in batches[:3]}) > 1  # else scales of one would do
    for group in chunks(batches, 3):
        assert all(b[0]["loss_scale"].shape == (batch_size, 5) for b in group)
        micro, expected = token_means([b for b in group if weight(b).any()], loss, weight)
        micro = dict(zip([id(b) for b in group if weight(b).any()], micro, strict=True))
        scaled = [b[0]["loss_scale"][0, column] * micro.get(id(b), 0.0) for b in group]
        np.testing.assert_allclose(np.mean(scaled), expected, rtol=1e-5)
    assert batches[0][0]["loss_scale"].dtype == np.float32


def answers_in(batches):
    return np.array([b[2].sum() for b in batches])


def test_loss_scale_spans_the_end_of_an_epoch_for_rows():
    # 7 batches of one row, K = 3: the groups are 012 345 6|01 234 56|0 ...
    batches = PreparedBatches(ROWS, prepare, batch_size=1, accumulate=3)
    stream = [b for _ in range(3) for b in batches]
    assert batches.step == 21
    counts = answers_in(stream)
    for start in range(0, 21, 3):
        group = stream[start : start + 3]
        expected = counts[start : start + 3] * 3 / counts[start : start + 3].sum()
        actual = [b[0]["loss_scale"][0, 0] for b in group]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_looking_over_the_end_of_an_epoch_prepares_no_row_twice():
    prepared = []

    def count(raw):
        prepared.append(raw)
        return prepare(raw)

    batches = PreparedBatches(ROWS, count, 1, shuffle=True, seed=0, accumulate=3)
    stream = [b for _ in range(3) for b in batches]
    assert len(prepared) == 21  # 7 groups: three epochs are whole groups
    plain = PreparedBatches(ROWS, prepare, 1, shuffle=True, seed=0)
    expected = [b for _ in range(3) for b in plain]
    for one, two in zip(stream, expected, strict=True):
        np.testing.assert_array_equal(one[0]["row_ids"], two[0]["row_ids"])
        np.testing.assert_array_equal(one[1], two[1])


def test_loss_scale_spans_several_short_epochs():
    batches = PreparedBatches(ROWS[:2], prepare, batch_size=1, accumulate=5)
    stream = [b for _ in range(5) for b in batches]
    counts = answers_in(stream)
    for start in (0, 5):
        expected = counts[start : start + 5] * 5 / counts[start : start + 5].sum()
        actual = [b[0]["loss_scale"][0, 0] for b in stream[start : start + 5]]
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_loss_scale_of_a_stream_splits_a_group_at_the_end_of_an_epoch():
    batches = PreparedBatches(Loader(ROWS), prepare, batch_size=1, accumulate=3)
    stream = [b for _ in range(2) for b in batches]
    counts = answers_in(stream)
    bounds = [(0, 3), (3, 6), (6, 7), (7, 9), (9, 12), (12, 14)]
    for start, end in bounds:
        part = counts[start:end]
        actual = [b[0]["loss_scale"][0, 0] for b in stream[start:end]]
        np.testing.assert_allclose(actual, part * len(part) / part.sum(), rtol=1e-6)


def test_loss_scale_is_one_where_a_whole_group_has_no_pivot():
    rows = [{**r, "instruction_en": ""} for r in ROWS[:2]]
    for x, _, _ in PreparedBatches(rows, prepare, batch_size=1, accumulate=2):
        assert x["loss_scale"][0, 1:].tolist() == [1.0] * 4


def test_the_scales_by_hand():
    # Answers of 2 and 3 tokens; prompts end at 3 and 5, so rows of 6 and 9 tokens; one pivot.
    rows = [ROWS[1], ROWS[2], {**ROWS[2], "instruction_en": ""}]
    one, two = (b[0]["loss_scale"] for b in PreparedBatches(rows, prepare, 2, accumulate=2))
    lengths = [int(prepare([row])[0]["padding_mask"].sum()) for row in rows[:2]]
    assert lengths == [1 + 2 + 1 + 2, 2 + 2 + 1 + 3]
    np.testing.assert_allclose(
        one,
        [[2 * 5 / 8, 2.0, 2.0, 2.0, 1.0]] * 2,  # no answer is the model's own
        rtol=1e-6,
    )
    np.testing.assert_allclose(two, [[2 * 3 / 8, 0.0, 0.0, 0.0, 1.0]], rtol=1e-6)


# ---------------------------------------------------------------- turns and the fewest rows


def turns(stream):
    """The turn of each batch; every row of it says the same."""
    found = [x["objective_turn"] for x, _, _ in stream]
    assert {turn.dtype for turn in found} == {np.dtype("int32")}
    assert all(len(turn) == len(b[1]) for turn, b in zip(found, stream, strict=True))
    assert all((turn == turn[0]).all() for turn in found)
    return [int(turn[0]) for turn in found]


@pytest.mark.parametrize("source", ["rows", "columns", "arrays", "iterable of rows"])
@pytest.mark.parametrize(
    "accumulate, expected",
    # Three batches a pass, three passes: turns change per optimizer step, across the passes.
    [
        (1, [0, 1, 0, 1, 0, 1, 0, 1, 0]),
        (2, [0, 0, 1, 1, 0, 0, 1, 1, 0]),
        (4, [0] * 4 + [1] * 4 + [0]),
    ],
)
def test_optimizer_steps_take_turns(source, accumulate, expected):
    options = {"batch_size": 3, "accumulate": accumulate, "alternate": True}
    batches = PreparedBatches(SOURCES[source](), prepare, **options)
    assert turns([b for _ in range(3) for b in batches]) == expected


def test_turns_go_on_with_the_optimizers_step():
    for step, expected in ((0, [0, 0, 1]), (3, [1, 0, 0]), (5, [0, 1, 1])):
        batches = PreparedBatches(ROWS, prepare, 3, accumulate=2, alternate=True, step=step)
        assert turns(list(batches)) == expected, step


def test_without_an_objective_that_alternates_there_are_no_turns():
    assert all("objective_turn" not in x for x, _, _ in PreparedBatches(ROWS, prepare, 3))


def test_a_first_batch_with_too_few_rows_is_refused_and_a_last_one_is_not():
    message = r"at least 2 rows.*Raise `batch_size`.*Received: a first batch of 1 row"
    with pytest.raises(ValueError, match=message):
        list(PreparedBatches(ROWS, prepare, batch_size=1, least_rows=2))
    batches = PreparedBatches(ROWS, prepare, batch_size=3, least_rows=2)
    assert [len(y) for _, y, _ in batches] == [3, 3, 1]
    assert len(list(PreparedBatches(ROWS, prepare, batch_size=1))) == 7


class TurnRecorder(Recorder):
    """Logs the turn of each step, plus 1, where `Recorder` logs places."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        turn = keras.ops.cast(x["objective_turn"][0], "float32") + 1.0
        row = keras.ops.one_hot(self.at, 64)[:, None] * keras.ops.one_hot(7, 8)[None]
        self.seen.assign_add(row * turn)
        return super().compute_loss(x, y, y_pred, sample_weight, training)

    def turns(self):
        last = keras.ops.convert_to_numpy(self.seen + 0)[:, 7]
        return [int(turn) - 1 for turn in last if turn]


@pytest.mark.parametrize("source", ["rows", "iterable of rows"])
def test_turns_reach_the_steps_of_fit(monkeypatch, source):
    monkeypatch.setitem(globals(), "Recorder", TurnRecorder)  # `fit` makes one
    options = {"accumulate": 2, "alternate": True}
    model, _ = fit(PreparedBatches(SOURCES[source](), prepare, batch_size=3, **options), epochs=3)
    assert model.turns() == [0, 0, 1, 1, 0, 0, 1, 1, 0]


def test_steps_stay_with_the_optimizer_in_fit():
    batches = PreparedBatches(ROWS, prepare, batch_size=3, accumulate=2)
    fit(batches, epochs=3)
    assert batches.step == 9
    follow = PreparedBatches(ROWS, prepare, batch_size=3, accumulate=2, step=batches.step)
    first = next(iter(follow))[0]["loss_scale"]  # batch 9 closes a group that an older fit began
    np.testing.assert_allclose(first[:, 0], 1.0)


BAD = {
    "empty list": (list, ValueError, "[Ee]mpty"),
    "empty columns": (lambda: {"instruction": [], "output": []}, ValueError, "[Ee]mpty"),
    "no columns": (dict, ValueError, "columns"),
    "uneven columns": (lambda: {"a": ["x"], "b": ["x", "y"]}, ValueError, "equally long"),
    "labels in x": (lambda: prepare(ROWS)[0], ValueError, "x, y, sample_weight"),
    "a string": (lambda: "text", TypeError, "not a string"),
    "a number": (lambda: 3, TypeError, "Received"),
    "none": (lambda: None, TypeError, "Received"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused_at_the_door(name):
    source, error, message = BAD[name]
    with pytest.raises(error, match=message):
        PreparedBatches(source(), prepare)


@pytest.mark.parametrize("source", [lambda: iter([]), lambda: Loader([])])
def test_empty_streams_are_refused(source):
    with pytest.raises(ValueError, match=r"[Ee]mpty"):
        list(PreparedBatches(source(), prepare))
    with pytest.raises(Exception, match=r"[Ee]mpty"):
        fit(PreparedBatches(source(), prepare), epochs=1)


def test_raw_text_without_a_preprocessor_is_refused():
    with pytest.raises(ValueError, match="CCPreprocessor"):
        list(PreparedBatches(ROWS))


def broken(change):
    x, y, weight = prepare(ROWS[:4])
    parts = {"x": dict(x), "y": y, "weight": weight}
    change(parts)
    return [(parts["x"], parts["y"], parts["weight"])]


BROKEN = {
    "fewer pivots": (
        lambda p: p["x"].update(pivot_token_ids=p["x"]["pivot_token_ids"][:3]),
        r"\(4, 16\).*\(3, 6\)",
    ),
    "unknown key": (lambda p: p["x"].update(labels=p["y"]), "unknown.*labels"),
    "missing key": (lambda p: p["x"].pop("answer_mask"), "missing.*answer_mask"),
    "short mask": (
        lambda p: p["x"].update(padding_mask=p["x"]["padding_mask"][:, :-1]),
        r"padding_mask.*\(4, 15\)",
    ),
    "flat ids": (lambda p: p["x"].update(token_ids=p["x"]["token_ids"][0]), "shape"),
    "short y": (lambda p: p.update(y=p["y"][:, :3]), r"y must have shape \(4, 16\)"),
    "weights outside": (lambda p: p["weight"].fill(1.0), "answer_mask is 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_prepared_batches_are_refused(name):
    change, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        list(PreparedBatches(Loader(broken(change))))


def test_rows_and_batches_do_not_mix():
    with pytest.raises(ValueError, match="mixes rows and batches"):
        list(PreparedBatches(Loader([ROWS[0], columns(ROWS)]), prepare))


def test_a_source_that_grows_or_shrinks_after_counting_is_an_error():
    items = list(ROWS)
    batches = PreparedBatches(Loader(items), prepare, batch_size=3)
    assert batches.count_batches() == 3
    del items[3:]
    with pytest.raises(Exception, match=r"fewer batches|expected to contain 3"):
        fit(batches, epochs=1)


def test_prepared_batches_are_not_changed_in_place():
    arrays = prepare(ROWS)
    list(PreparedBatches(arrays, batch_size=2, accumulate=2))
    assert len(arrays[0]) == 5
    items = [prepare(ROWS)]
    list(PreparedBatches(Loader(items), accumulate=2))
    assert len(items[0][0]) == 5


@pytest.mark.parametrize("accumulate, batch_size, steps", [(2, 3, 4), (3, 3, 4), (1, 2, 5)])
def test_turns_over_the_end_of_a_pass_inside_an_epoch(monkeypatch, accumulate, batch_size, steps):
    # TensorFlow reads two batches ahead, so that the next pass opens before the last has ended.
    monkeypatch.setattr(sys.modules[__name__], "Recorder", TurnRecorder)
    source = SOURCES["iterable of rows"]()
    options = {"accumulate": accumulate, "alternate": True}
    batches = PreparedBatches(source, prepare, batch_size, **options)
    model, _ = fit(batches, epochs=2, steps_per_epoch=steps)
    assert model.turns() == [step // accumulate % 2 for step in range(2 * steps)]
