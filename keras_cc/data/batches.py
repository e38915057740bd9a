"""From any dataset to the batches that `CCCausalLM.fit` trains on.

Notable choices:

- One class, `PreparedBatches`, whatever the source: what it yields does not depend on the backend.
- Rows are padded to what their batch needs, and rows of like length come together: padding is work
  for nothing. The widths are those of a ladder, so that few shapes occur.
- The answers sit at few positions, and logits are the most expensive part of a step. So every
  batch carries the window of its answers; its width is a power of two.
- Gradient accumulation averages over micro-batches. Each batch carries the factors that turn this
  into the mean over the tokens of the whole group.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from keras_cc.data import columns, pairs, prepared, sources
from keras_cc.data.packing import Packing
from keras_cc.data.prepared import Batch, PackedRows
from keras_cc.data.splitting import WHOLE, Split
from keras_cc.data.widths import MAX_SHAPES, Shape, Shapes

#: Batches of rows that are sorted by length together. Beyond it, order stays as it was drawn.
POOL = 64
#: Rows of a stream whose names are kept, the newest.
NAMED = 65_536
#: Rows whose answers are looked for at a time, before any is tokenised.
CHUNK = 4096


class PreparedBatches:
    """Re-iterable NumPy batches `(x, y, sample_weight)` from any source of paired data.

    Args:
        source: one of
            a list of row dicts; a dict of columns; a tuple `(x, y, sample_weight)` of arrays, as
            `CCPreprocessor` returns; `TokenizedRows`; a `tf.data.Dataset`, `grain` dataset or
            `DataLoader`, torch `DataLoader`, `keras.utils.PyDataset`, generator or any iterable of
            rows, of batches (dicts of columns, lists of rows) or of preprocessed tuples; a function
            that returns such an iterator.
        prepare: callable, raw batch -> `(x, y, sample_weight)`: a `CCPreprocessor`. `None` where
            the source is preprocessed.
        batch_size: int. Rows a batch, 32 by default. Applies where the source gives rows; where
            it gives batches, those pass as they are.
        shuffle: bool. Draws a new order of rows for every pass. Only for lists, columns and
            arrays; the order of another source is its own.
        group: bool. Whether rows of like length may come together, out of their order, where the
            source is a list or columns of text and `prepare` pads to the longest row: within each
            `POOL` batches, which come in a random order then if `shuffle`. Every row comes once a
            pass, and rows that do not fill a batch come last, as without it.
        seed: int. Seed of the orders. `None` draws one from NumPy's generator, which
            `keras.utils.set_random_seed` seeds.
        most_shapes: int. How many shapes batches of text come in, see there. None: as many as
            there are, in widths of the multiples of 8; where shapes are not compiled.
        accumulate: int. The optimizer's `gradient_accumulation_steps`.
        alternate: bool. Whether optimizer steps take turns between the task and the objectives
            that alternate with it.
        align_all: bool. Whether rows without a pivot have aligned tokens too, see `loss_scale`.
        least_rows: int. The fewest rows that a batch must have; the last ones of a pass may
            have fewer.
        answers: string. Which rows must have an answer: `"all"`, `"some"` (one of a pass, at the
            least: the others are pairs of prompts), or `"any"` number of them.
        method: string. What trains or scores, as a message calls it.
        own_answers: a `keras_cc.training.own_answers.OwnAnswers`, which gives answers to rows that
            have none, or None.
        step: int. Number of micro-batches that the optimizer has seen, where it is not new.
        split: a `keras_cc.data.splitting.Split`: how batches are shared out among replicas.
        packing: a `keras_cc.data.packing.Packing`, which puts a batch's pairs into few rows, or
            None. The batches are as it says.

    Yields:
        `(x, y, sample_weight)` of `CCPreprocessor`, with these keys added to x:

        - `answer_positions`, int32 (B, K): a window of target positions that covers every answer
          position of its row. K is the longest such span in the batch, rounded up to a power of
          two, at least 4 and at most T. Where `prepare` pads to the longest row, (T, S, K) takes
          few values, see `keras_cc.data.widths.Shapes`, and K may be larger for it.
        - `row_ids`, int32 (B,): the number of each row in its dataset; see `describe`.
        - `loss_scale`, float32 (B, 5), where `accumulate > 1` or `split` has parts, each of which
          is a micro-batch then: five factors, repeated for each row: `n_k * m / sum_j n_j` over
          the `m` micro-batches of a group, n being the sum of sample weights (column 0), the
          number of target tokens in rows with a pivot, or in all rows where `align_all`
          (column 1), that of rows with a pivot (column 2), that of their answer tokens
          (column 3), and of these, those of the model's own (column 4).
          Micro-batch means times these factors, averaged over the group, are the means of the
          group. (A pivot of no more than its `sink_tokens` counts here as one, though nothing is
          aligned with it.)
        - `own_answer`, int32 (B,), where there are `own_answers`: 1 in a row with such an answer,
          which has a 0 for each `sample_weight`: it is no task to learn.
        - `objective_turn`, int32 (B,), where `alternate`: 0 in the steps of the task, 1 in those
          of the objectives, in turn.

    Groups of `accumulate` batches go on across the end of a pass, as the optimizer's do: `step`
    counts batches. For lists, columns and arrays a group that straddles two passes is scaled as
    one. For other sources, whose next pass cannot be foreseen, it is two parts, each scaled as
    complete with the batches it has and so weighted by its share of batches. An incomplete group
    at the end of training has no effect before training goes on: the optimizer holds it back.

    Raises:
        ValueError: for an empty dataset, for raw text without a `prepare`, and for a preprocessed
            batch with wrong keys, shapes or masks.
        RuntimeError: for a second pass over a one-shot iterator.

    Example:

    ```python
    batches = PreparedBatches(rows, cc_preprocessor, batch_size=8, shuffle=True, seed=0)
    for x, y, sample_weight in batches:
        ...
    ```
    """

    def __init__(
        self,
        source: Any,
        prepare: Callable[[Any], Batch] | None = None,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int | None = None,
        group: bool = False,
        most_shapes: int | None = MAX_SHAPES,
        accumulate: int | None = 1,
        alternate: bool = False,
        align_all: bool = False,
        least_rows: int = 1,
        answers: str = "any",
        method: str = "this",
        own_answers: Any = None,
        step: int = 0,
        split: Split = WHOLE,
        packing: Packing | None = None,
    ) -> None:
        self.prepare: Any = prepare
        self.accumulate = 1 if accumulate is None else int(accumulate)
        if self.accumulate < 1:
            raise ValueError(f"`accumulate` must be positive. Received: accumulate={accumulate}")
        self.alternate = alternate
        self.align_all = align_all
        self.least_rows = least_rows
        self.answers, self.method = answers, method
        self.own_answers = own_answers
        self.split, self.packing = split, packing
        self.step = self.first_step = int(step)
        self._source = sources.make_source(source, batch_size)
        self._source.check(prepare)
        self._seed, self._given_seed, self._shuffle = None, seed, bool(shuffle)
        if shuffle and self._source.shuffles:
            # NumPy's global generator, which `keras.utils.set_random_seed` seeds.
            self._seed = int(np.random.randint(2**31)) if seed is None else seed
        self._packs = getattr(prepare, "padding", None) == "longest"
        self._groups = group and self._packs and self._source.is_text
        self._shapes = Shapes(most_shapes)
        self._is_fine = most_shapes is None
        self.token_count = self.padding_count = 0  # of targets and pivots, batch by batch
        self.row_count = self.unanswered_count = 0  # so far, batch by batch
        self._id_column = getattr(prepare, "id_column", "id")
        self._ids: dict[int, str] = {}  # of streamed rows, by number
        self._count: int | float | None = None
        self._carried: dict[int, np.ndarray] = {}  # step -> token counts of the group open there
        self._begun: int | None = None  # a step that lies within a pass: training goes on there
        self._ahead: dict[tuple[int, int], Batch] = {}  # (pass, batch) -> prepared ahead of time
        self.error: Exception | None = None  # what went wrong while batches were made
        self.counted_outside = False  # whether `step` is kept by a callback
        #: Rows without an answer, where that is known before they are read; else 0.
        self.known_unanswered = self._check_answers()

    # --- length ---

    @property
    def one_shot(self) -> bool:
        """Whether the source can be read only once, as a generator."""
        return self._source.one_shot

    @property
    def num_batches(self) -> "int | float | None":
        """Batches in a pass: an int, `math.inf`, or `None` where it is not known."""
        if self._count is None:
            self._count = self._source.num_batches()
        return self._count

    def count_batches(self) -> "int | float | None":
        """Like `num_batches`, but reads a re-iterable source once, unprepared, to know."""
        if self.num_batches is None and not self.one_shot:
            self._count = sum(1 for _ in self._source.batches(0, None))
        return self._count

    def __len__(self) -> int:
        if not isinstance(self.num_batches, int):
            raise TypeError(f"The number of batches is {self.num_batches or 'not known'}.")
        return self.num_batches

    def __bool__(self) -> bool:
        return True

    @property
    def is_scaled(self) -> bool:
        """Whether batches carry a `loss_scale`."""
        return self.accumulate > 1 or self.split.parts > 1

    # --- iteration ---

    def __iter__(self) -> Iterator[Batch]:
        return self.from_step(self.step)

    def from_step(self, step: int) -> Iterator[Batch]:
        """Iterates over one pass whose first batch is the optimizer's micro-batch `step`."""
        # No state of a pass is kept on `self`: a trainer opens passes that it abandons.
        done = skipped = self._skipped(step)
        start = step - skipped
        opened = self._scaled if self.is_scaled else self._pass
        for batch in opened(step, skipped):
            done += 1
            if done == self._count:
                # Before the last batch leaves: who reads ahead may open the next pass already.
                self._advance(start + done)
            if self.packing is not None:
                batch = self.packing(batch, self.describe)
            yield self.split.own(batch)
        if done == skipped:
            raise ValueError(
                "Empty dataset: the source gave no batch"
                + (f" after the {skipped} that were trained on before" if skipped else "")
                + ". Received: 0 batches"
            )
        if self._count is None:
            self._count = done
            self._advance(start + done)

    # --- a training that was ended ---

    def position(self) -> dict[str, Any]:
        """Where the training is in its data, for `go_on`."""
        count = self._count if isinstance(self._count, int) else None
        return {
            "step": self.step,
            "first_step": self.first_step,
            "seed": self._seed,
            "num_batches": count,
        }

    def go_on(self, position: dict[str, Any]) -> None:
        """Have the next pass begin where another training over these rows was."""
        self.step = self._begun = position["step"]
        self.first_step, self._seed = position["first_step"], position["seed"]
        if self._count is None:
            self._count = position["num_batches"]

    def go_on_here(self) -> None:
        """Have the pass that is opened at `step` begin there, wherever in a pass that lies."""
        self._begun = self.step

    def left_of_pass(self) -> "int | None":
        """The batches that are left of the pass that `step` lies in, or None: it does not end."""
        if not isinstance(self.num_batches, int):
            return None
        return self.num_batches - (self.step - self.first_step) % self.num_batches

    def arguments(self) -> dict[str, Any]:
        """What decides which rows come when, as arguments of `fit`."""
        source = self._source
        return {
            "x": f"{source.size} rows" if isinstance(source, sources.IndexedSource) else "a stream",
            "batch_size": source.batch_size,
            "shuffle": self._shuffle,
            "seed": self._given_seed,
            "gradient_accumulation_steps": self.accumulate,
        }

    def _skipped(self, step: int) -> int:
        """How many batches of its pass lie before a step."""
        if step != self._begun:
            return 0
        behind = step - self.first_step
        return behind % self._count if isinstance(self._count, int) else behind

    def _advance(self, step: int) -> None:
        if not self.counted_outside:
            self.step = step

    def _pass(self, step: int, skipped: int = 0) -> Iterator[Batch]:
        """Yields a pass from a step on, before which `skipped` of its batches lie."""
        pass_index = 0
        if isinstance(self.num_batches, int) and self.num_batches > 0:
            pass_index = (step - self.first_step) // self.num_batches
        first_row = 0
        source = self._source.batches(pass_index, self._seed)
        if self._groups:
            source = self._grouped(pass_index)
        is_stream = not isinstance(self._source, sources.IndexedSource)
        rows, without = self.row_count, self.unanswered_count
        for index, (raw, numbers) in enumerate(source):
            if index < skipped:
                if numbers is None:
                    self._remember_ids(raw, first_row)
                    first_row += columns.row_count(raw)
                continue
            key = (pass_index, index)
            if key in self._ahead:
                yield self._ahead.pop(key)
                continue
            x, y, sample_weight = self._prepared(raw)
            self._count_padding(x)
            unanswered = prepared.unanswered(x) | (x.get("own_answer", np.zeros(len(y))) != 0)
            self.row_count += len(y)
            self.unanswered_count += int(np.count_nonzero(unanswered))
            if numbers is None:
                numbers = np.arange(first_row, first_row + len(y))
                self._remember_ids(raw, first_row)
                first_row += len(y)
            if self.answers == "all" and unanswered.any():
                self._refuse(np.asarray(numbers)[unanswered].tolist())
            if index == skipped and len(y) < self.least_rows:
                raise ValueError(
                    f"A batch must have at least {self.least_rows} rows: an objective compares the "
                    "rows of a batch with each other. Raise `batch_size`, or leave the objective "
                    f"out. Received: a first batch of {len(y)} row"
                )
            if self.alternate:
                turn = (step + index - skipped) // self.accumulate % 2
                x["objective_turn"] = np.full(len(y), turn, "int32")
            x["row_ids"] = np.asarray(numbers, "int32")
            if "answer_positions" not in x:
                x["answer_positions"] = prepared.answer_positions(x["answer_mask"])
            if is_stream and not skipped and index + 1 == self._count:
                # Who knows where a pass ends asks for no more.
                self._check_some(self.row_count - rows, self.unanswered_count - without)
            yield self.split.filled((x, y, sample_weight))
        if is_stream and not skipped:
            self._check_some(self.row_count - rows, self.unanswered_count - without)

    # --- answers ---

    def _check_answers(self) -> int:
        """Counts the rows without an answer, and refuses them where they are of no use.

        Nothing is tokenised. Of a stream nothing is known before it is read: 0, and what is to be
        refused is refused when it comes.
        """
        source = self._source
        if self.answers == "any" or not isinstance(source, sources.IndexedSource):
            return 0  # nothing to refuse, or nothing known before it is read
        if source.is_answered:
            return 0
        found: list[int] = []
        for start in range(0, source.size, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, source.size))
            found += numbers[self._lacks_answers(source.take(numbers))].tolist()
        if found and self.answers == "all":
            self._refuse(found)
        self._check_some(source.size, len(found))
        return len(found)

    def packed_unanswered(self) -> Iterator[Any]:
        """Yields the rows without an answer, packed, where they are known before they are read."""
        source = self._source
        if not self.known_unanswered or not isinstance(source, sources.IndexedSource):
            return
        for start in range(0, source.size, CHUNK):
            numbers = np.arange(start, min(start + CHUNK, source.size))
            lacking = numbers[self._lacks_answers(source.take(numbers))]
            if len(lacking):
                self._check_text(raw := source.take(lacking))
                yield self._packed(raw)

    def _check_text(self, raw: Any) -> None:
        if columns.is_prepared(raw):
            raise ValueError(
                "The model's own answers are given to rows of text: take rows that are not "
                "preprocessed, or an objective without `refresh`. "
                f"Received: {columns.describe(raw)}"
            )

    def _lacks_answers(self, raw: Any) -> np.ndarray:
        if columns.is_prepared(raw):
            return prepared.unanswered(prepared.checked(raw)[0])
        if isinstance(raw, PackedRows):
            return np.array([row.is_unanswered for row in raw])
        name = getattr(self.prepare, "output_column", "output")
        if isinstance(raw, dict):
            size = len(next(iter(raw.values())))
            values = raw.get(name, [None] * size)
        else:
            values = [row.get(name) for row in raw]
        return np.array([pairs.is_unanswered(value) for value in values])

    def _refuse(self, numbers: list[int]) -> None:
        (first,) = self.describe(numbers[:1])
        raise ValueError(
            f"{first}: no answer, and {self.method} has no use for a pair of prompts without one: "
            "leave such rows out, answer them (`keras_cc.distill`), or name your columns "
            "(`output_column=` of CCPreprocessor); a connection with an alignment loss and "
            "objectives that compare prompts, as `keras_cc.DFT` does, learn from them. "
            f"Received: {len(numbers)} such rows"
        )

    def _check_some(self, rows: int, unanswered: int) -> None:
        if self.answers == "some" and rows and rows == unanswered:
            raise ValueError(
                "No row has an answer, so there is no task to learn beside the alignment of "
                "prompts: add rows with answers (in any language), or name their column "
                f"(`output_column=` of CCPreprocessor). Received: {rows} rows without an answer"
            )

    def _grouped(self, pass_index: int) -> Iterator[tuple[Any, Any]]:
        """Yields (packed rows, their numbers) of a pass, rows of like length together."""
        source = cast(sources.IndexedSource, self._source)
        order, size = source.order(pass_index, self._seed), source.batch_size
        whole = len(order) - len(order) % size
        for start in range(0, whole, POOL * size):
            pool = order[start : min(start + POOL * size, whole)]
            rows = self._packed(source.take(pool))
            # By the target's width alone, and stable: what is alike in more than that (an answer's
            # length, a language) stays mixed, as training needs it.
            widths = [self._shape([row]).target for row in rows]
            batches = np.argsort(widths, kind="stable").reshape(-1, size)
            self._shapes.plan(self._shape([rows[i] for i in places]) for places in batches)
            if self._seed is not None:
                random = np.random.default_rng([self._seed, pass_index, start])
                batches = random.permutation(batches)
            for places in batches:
                yield PackedRows(rows[i] for i in places), pool[places]
        if whole < len(order):
            yield source.take(order[whole:]), order[whole:]

    def _scaled(self, step: int, skipped: int = 0) -> Iterator[Batch]:
        total = self._carried.get(step)  # token counts of the open group, known from the last pass
        trained = 0  # batches of that group that were trained on, and are read for their counts
        if step == self._begun and total is None:
            if self._source.shuffles:
                total = self._open_group(step)
            else:
                trained = min(step % self.accumulate, skipped)
        step -= trained
        lacking = self.accumulate - step % self.accumulate  # batches that close the open group
        group: list[Batch] = []
        for batch in self._pass(step, skipped - trained):
            step += 1
            group.append(batch)
            if len(group) == lacking:
                yield from self._with_loss_scale(group, total)[trained:]
                group, total, lacking, trained = [], None, self.accumulate, 0
        if group and total is None and self._source.shuffles:
            # The source can tell what the next pass begins with: close the group over its edge.
            following = list(itertools.islice(self._passes(step), lacking - len(group)))
            total = self._counted([*group, *following])
            places = (divmod(step - self.first_step + i, len(self)) for i in range(len(following)))
            self._ahead = dict(zip(places, following, strict=True))
        self._carried = {} if total is None else {step: total}
        yield from self._with_loss_scale(group, total)[trained:]

    def _open_group(self, step: int) -> "np.ndarray | None":
        """The token counts of the group that a step lies within, read once more; None for none."""
        end = step - step % self.accumulate + self.accumulate
        start = max(end - self.accumulate, self.first_step)
        if start == step:
            return None
        reading = self._passes(start, (start - self.first_step) % len(self))
        group = list(itertools.islice(reading, end - start))
        # `_with_loss_scale` takes a total for one of `accumulate` batches.
        return self._counted(group) * self.accumulate / len(group)

    def _counted(self, group: list[Batch]) -> np.ndarray:
        """The token counts of several batches together."""
        return np.sum([self.split.counts(batch, self.align_all) for batch in group], axis=(0, 1))

    def _passes(self, step: int, skipped: int = 0) -> Iterator[Batch]:
        while True:
            for batch in self._pass(step, skipped):
                step += 1
                yield batch
            skipped = 0

    def _with_loss_scale(self, group: list[Batch], total: "np.ndarray | None") -> list[Batch]:
        counts = [self.split.counts(batch, self.align_all) for batch in group]
        counts = np.array(counts).reshape(-1, self.split.parts, 5)
        # Without the total of a whole group, its part here counts as one.
        size = len(group) if total is None else self.accumulate
        total = np.asarray(counts.sum(axis=(0, 1)) if total is None else total)
        size *= self.split.parts
        # No token in the whole group: the loss is 0, any factor does.
        scales = np.where(total > 0, counts * size / np.where(total > 0, total, 1), 1)
        for (x, y, _), scale in zip(group, scales, strict=True):
            x["loss_scale"] = self.split.of_rows(scale, len(y))
        return group

    def _prepared(self, raw: Any) -> Batch:
        if columns.is_prepared(raw):
            if self.own_answers is not None:
                self._check_text(raw)
            return prepared.checked(raw)
        if self.prepare is None:
            raise ValueError(
                "The data is raw text, and there is no preprocessor to prepare it: build the model "
                f"with a CCPreprocessor. Received: {columns.describe(raw)}"
            )
        is_packed = isinstance(raw, PackedRows)
        if not self._packs and self.own_answers is None and not is_packed:
            x, y, sample_weight = self.prepare(raw)
            return dict(x), y, sample_weight
        rows, is_own = self._packed(raw), None
        if self.own_answers is not None:
            rows, is_own = self.own_answers.give(rows)
        x, y, sample_weight = self._padded(rows) if self._packs else self.prepare.pad(rows)
        if is_own is not None:
            x["own_answer"] = is_own.astype("int32")
            sample_weight[is_own] = 0.0
        return x, y, sample_weight

    def _packed(self, raw: Any) -> PackedRows:
        return raw if isinstance(raw, PackedRows) else self.prepare.pack(raw)

    # --- widths ---

    def _padded(self, rows: Any) -> Batch:
        shape = self._shapes.holding(self._shape(rows))
        x, y, sample_weight = self.prepare.pad(rows, shape.target, shape.pivot)
        x["answer_positions"] = prepared.answer_positions(x["answer_mask"], shape.answers)
        return x, y, sample_weight

    def _shape(self, rows: Any) -> Shape:
        target, pivot = self.prepare.widths_of(rows, self._is_fine)
        span = max(len(row.ids) - row.prompt_length for row in rows)
        return Shape(target, pivot, prepared.window(span, target))

    def _count_padding(self, x: dict[str, np.ndarray]) -> None:
        for mask in (x["padding_mask"], x["pivot_padding_mask"]):
            self.token_count += mask.size
            self.padding_count += np.count_nonzero(mask == 0)

    def padding_share(self) -> str:
        """Says how much of the tokens so far was padding, and in how many shapes they came."""
        counted = self if self.packing is None else self.packing
        share = counted.padding_count / max(counted.token_count, 1)
        shapes = len(self._shapes.known) if self.packing is None else 0
        return f"{share:.0%} of the tokens were padding" + (f", {shapes} shapes" if shapes else "")

    # --- names of rows ---

    def _remember_ids(self, raw: Any, first_row: int) -> None:
        ids = pairs.ids_of(raw, self._id_column)
        self._ids.update({first_row + i: _name(v) for i, v in enumerate(ids) if v is not None})
        # A stream has no end: names are asked for of rows that have just been trained on.
        for number in list(itertools.islice(self._ids, max(0, len(self._ids) - NAMED))):
            del self._ids[number]

    def describe(self, row_ids: Any) -> list[str]:
        """Names rows for a message: their id column, or `"row 17"` where there is none.

        Args:
            row_ids: int array (N,), from `x["row_ids"]`.

        Returns:
            List of N strings.
        """
        names = []
        for number in np.asarray(row_ids).reshape(-1).tolist():
            row = self._source.row(number)
            value = self._ids.get(number)
            if row is not None:
                row = row[0] if isinstance(row, list) else row
                value = row.get(self._id_column)
                value = value[0] if isinstance(value, list) and value else value
            names.append(f"row {number}" if value is None else _name(value))
        return names


def _name(value: Any) -> str:
    return str(pairs.plain_id(value.item() if hasattr(value, "item") else value))
