"""What `fit` accepts as data, reduced to one thing: an iterator of raw batches. Not public.

A raw batch is a dict of columns (strings), a list of row dicts, or a preprocessed
`(x, y, sample_weight)` of arrays. No framework is imported here: whoever hands over one of its
objects has imported it.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import keras
import numpy as np

from keras_cc.data.columns import describe, is_prepared, is_row, is_scalar, to_host
from keras_cc.data.tokenized import TokenizedRows

INFINITE = math.inf
DEFAULT_BATCH_SIZE = 32


class Source:
    """Raw batches of one dataset, pass by pass.

    Attributes:
        one_shot: bool. Whether there is a single pass only, as with a generator.
        shuffles: bool. Whether `shuffle=True` has a meaning, i.e. rows can be picked by number.
        is_text: bool. Whether those rows are known to be text, and not arrays.
        batch_size: int. Rows a batch, where the source gives rows.
    """

    batch_size: int
    one_shot = False
    shuffles = False
    is_text = False

    def batches(self, pass_index: int, shuffle_seed: int | None) -> Iterator[tuple[Any, Any]]:
        """Yields (raw batch, the numbers of its rows or `None` for running numbers)."""
        raise NotImplementedError

    def num_batches(self) -> "int | float | None":
        """Batches in a pass: an int, `INFINITE`, or `None` where only counting would tell."""
        raise NotImplementedError

    def row(self, index: int) -> "Mapping[str, Any] | list[Any] | None":
        """Returns row `index`, where rows can be picked by number."""
        return None

    def check(self, prepare: Any) -> None:
        """Refuses rows that this `CCPreprocessor`, or None, did not make as they are."""


class IndexedSource(Source):
    """Rows that can be picked by number: `take(indices)` returns them as one raw batch."""

    shuffles = True
    is_answered = False  # whether it is known that each row has an answer

    def __init__(
        self, size: int, take: Callable[[np.ndarray], Any], batch_size: int, is_text: bool = True
    ) -> None:
        self.size, self.take, self.batch_size, self.is_text = size, take, batch_size, is_text

    def order(self, pass_index: int, shuffle_seed: int | None) -> np.ndarray:
        """Returns the numbers of all rows in the order of a pass."""
        if shuffle_seed is None:
            return np.arange(self.size)
        return np.random.default_rng([shuffle_seed, pass_index]).permutation(self.size)

    def batches(self, pass_index: int, shuffle_seed: int | None) -> Iterator[tuple[Any, Any]]:
        order = self.order(pass_index, shuffle_seed)
        for start in range(0, self.size, self.batch_size):
            indices = order[start : start + self.batch_size]
            yield self.take(indices), indices

    def num_batches(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def row(self, index: int) -> "Mapping[str, Any] | list[Any] | None":
        batch = self.take(np.array([index]))
        return None if is_prepared(batch) else batch


class TokenizedSource(IndexedSource):
    """Rows that were tokenised before: a raw batch of them is `PackedRows`."""

    def __init__(self, rows: TokenizedRows, batch_size: int) -> None:
        super().__init__(len(rows), rows.take, batch_size)
        self._rows = rows
        self.is_answered = not rows.unanswered

    def row(self, index: int) -> dict[str, Any]:
        return {self._rows.facts["id_column"]: self._rows.id(index)}

    def check(self, prepare: Any) -> None:
        self._rows.check(prepare)


class StreamSource(Source):
    """Anything that is iterated: rows are grouped into batches, batches pass as they are."""

    def __init__(
        self,
        open_pass: Callable[[], Iterable[Any]],
        batch_size: int,
        length: "Callable[[], int | float | None]" = lambda: None,
        one_shot: bool = False,
    ) -> None:
        self._open_pass, self.batch_size = open_pass, batch_size
        self._length, self.one_shot = length, one_shot
        self._is_open = False

    def batches(self, pass_index: int, shuffle_seed: int | None) -> Iterator[tuple[Any, Any]]:
        if self.one_shot and self._is_open:
            raise RuntimeError(
                "The data is a generator (or another one-shot iterator), and it is used up: it "
                "cannot be read for a second epoch. Pass the function that makes the generator, "
                "or a list, or `epochs=1`."
            )
        self._is_open = True
        pending: list[Any] = []
        for item in self._open_pass():
            item = to_host(item)
            if is_row(item):
                pending.append(item)
                if len(pending) == self.batch_size:
                    yield pending, None
                    pending = []
            elif pending:
                raise ValueError(f"The data mixes rows and batches. Received: {describe(item)}")
            else:
                yield item, None
        if pending:
            yield pending, None

    def num_batches(self) -> "int | float | None":
        length = self._length()
        if length is None or length == INFINITE or self.one_shot:
            return length if not self.one_shot else None
        if length and is_row(to_host(next(iter(self._open_pass())))):
            return math.ceil(length / self.batch_size)
        return length


def make_source(source: Any, batch_size: int | None = None) -> Source:
    """Returns the `Source` for whatever a user may pass to `fit` as data.

    Raises:
        ValueError: for an empty dataset.
        TypeError: for an object that no rule covers.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or int(batch_size) < 1):
        raise ValueError(f"`batch_size` must be positive. Received: batch_size={batch_size!r}")
    size = DEFAULT_BATCH_SIZE if batch_size is None else int(batch_size)
    tf = sys.modules.get("tensorflow")
    if isinstance(source, Source):
        return source
    if isinstance(source, TokenizedRows):
        return TokenizedSource(source, size)
    if isinstance(source, str | bytes):
        raise TypeError(f"Data must be rows, not a string. Received: {describe(source)}")
    if _is_of(source, "datasets", "DatasetDict", "IterableDatasetDict"):
        raise TypeError(
            f"Data must be one split, such as `dataset[{next(iter(source), 'train')!r}]`. "
            f"Received: a {type(source).__name__} of the splits {list(source)}"
        )
    if _is_of(source, "datasets", "Dataset"):
        return _hugging_face_source(source, size)
    if any(_is_of(source, module, "DataFrame") for module in ("pandas", "polars")):
        source = {str(name): source[name].to_list() for name in source.columns}
    if isinstance(source, Mapping):
        return _columns_source(source, size)
    if is_prepared(source):
        return _arrays_source(source, size)
    if isinstance(source, list | tuple) and all(isinstance(row, Mapping) for row in source):
        _check_not_empty(len(source))
        if all(is_row(row) for row in source):
            return IndexedSource(len(source), lambda ids: [source[i] for i in ids], size)
        return StreamSource(lambda: source, size, lambda: len(source))  # batches in a list
    if tf is not None and isinstance(source, tf.data.Dataset):
        return _tf_source(source, size)
    if isinstance(source, keras.utils.PyDataset):
        return _py_dataset_source(source, size)
    to_iter_dataset = getattr(source, "to_iter_dataset", None)
    if to_iter_dataset is not None:  # grain.MapDataset; filtered rows are None in it
        return StreamSource(to_iter_dataset, size, lambda: _grain_length(source))
    if isinstance(source, Iterable):
        one_shot = iter(source) is source if isinstance(source, Iterator) else False
        return StreamSource(lambda: source, size, lambda: _len_or_none(source), one_shot)
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):

        def items() -> Iterator[Any]:
            return (source[i] for i in range(len(source)))

        return StreamSource(items, size, lambda: len(source))
    if callable(source):
        return StreamSource(cast(Any, source), size)
    raise TypeError(
        "Data must be a list of row dicts, a dict of columns, (x, y, sample_weight), a "
        "DataFrame, TokenizedRows, a datasets.Dataset, a tf.data.Dataset, a grain dataset, a "
        "torch DataLoader, a keras.utils.PyDataset, an iterable, or a function that returns an "
        "iterator. "
        f"Received: {describe(source)}"
    )


def read_once(source: Source, batches: int | None) -> Source:
    """Reads a one-shot source, or its first so many batches, so that it can be read again."""
    kept = [raw for raw, _ in itertools.islice(source.batches(0, None), batches)]
    return StreamSource(lambda: kept, DEFAULT_BATCH_SIZE, lambda: len(kept))


def _is_of(source: Any, module: str, *names: str) -> bool:
    """Whether this is of a class of another library's; who has one has imported it."""
    kinds = (getattr(sys.modules.get(module), name, None) for name in names)
    return any(isinstance(kind, type) and isinstance(source, kind) for kind in kinds)


def _hugging_face_source(dataset: Any, batch_size: int) -> Source:
    plain = dataset.with_format(None)  # Python's own values, whatever the format it has
    _check_not_prepared(plain.column_names)
    _check_not_empty(len(plain))
    return IndexedSource(len(plain), lambda ids: dict(plain[ids.tolist()]), batch_size)


def _columns_source(columns: Mapping[str, Any], batch_size: int) -> Source:
    columns = {str(k): to_host(v) for k, v in columns.items()}
    _check_not_prepared(columns)
    lengths = {k: None if is_scalar(v) else len(v) for k, v in columns.items()}
    if None in lengths.values() or len(set(lengths.values())) != 1:
        raise ValueError(
            "A dict of columns must hold equally long lists or arrays. "
            f"Received: lengths {lengths or 'none: the dict is empty'}"
        )
    size = len(next(iter(columns.values())))
    _check_not_empty(size)

    def take(indices: np.ndarray) -> dict[str, list[Any]]:
        return {k: [v[i] for i in indices] for k, v in columns.items()}

    return IndexedSource(size, take, batch_size)


def _arrays_source(arrays: Any, batch_size: int) -> Source:
    x, y, sample_weight = to_host(arrays)
    sizes = {k: len(v) for k, v in {**x, "y": y, "sample_weight": sample_weight}.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"Arrays must hold the same number of rows. Received: {sizes}")
    _check_not_empty(len(y))

    def take(indices: np.ndarray) -> Any:
        return {k: v[indices] for k, v in x.items()}, y[indices], sample_weight[indices]

    return IndexedSource(len(y), take, batch_size, is_text=False)


def _tf_source(dataset: Any, batch_size: int) -> Source:
    def length() -> "int | float | None":
        cardinality = int(dataset.cardinality())
        return {-1: INFINITE, -2: None}.get(cardinality, cardinality)

    return StreamSource(dataset.as_numpy_iterator, batch_size, length)


def _py_dataset_source(dataset: Any, batch_size: int) -> Source:
    def open_pass() -> Iterator[Any]:
        dataset.on_epoch_begin()
        yield from dataset
        dataset.on_epoch_end()

    def length() -> "int | float":
        return INFINITE if dataset.num_batches is None else int(dataset.num_batches)

    source = StreamSource(open_pass, batch_size, length)
    # Its items are batches by contract: no need to look at one to know.
    source.num_batches = length  # type: ignore[method-assign]
    return source


def _grain_length(dataset: Any) -> "int | float | None":
    # An upper bound: a filter leaves it unchanged. Only the infinite case is certain.
    return INFINITE if len(dataset) >= sys.maxsize else None


def _len_or_none(source: Any) -> "int | None":
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def _check_not_prepared(names: Iterable[str]) -> None:
    if "token_ids" in names:
        raise ValueError(
            "Preprocessed data must be a tuple (x, y, sample_weight), with the labels outside of "
            f"x. Received: a dict with keys {sorted(names)}"
        )


def _check_not_empty(size: int) -> None:
    if size == 0:
        raise ValueError("Empty dataset: there is no row to train on. Received: 0 rows")
