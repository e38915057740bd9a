"""Tokenises rows once, into files that `TokenizedRows` reads."""

import json
import os
import pathlib
import warnings
from typing import Any

import keras

from keras_cc import options
from keras_cc.data import columns, pairs, sources, tokenized
from keras_cc.data.prepared import PackedRow, PackedRows
from keras_cc.whole_files import whole_folder

#: Rows that are tokenised at a time.
CHUNK = 512


def tokenize(
    rows: Any,
    preprocessor: Any,
    folder: "str | os.PathLike[str]",
    *,
    shard_rows: int = 1_000_000,
    verbose: "int | str" = "auto",
) -> tokenized.TokenizedRows:
    """Tokenises paired rows and writes their ids, so that no training needs to do it again.

    It takes one process and reads the rows once, as a stream. A large data set is tokenised in
    parts, each by a process of its own and into a folder of its own, and read as one:
    `TokenizedRows(folder, folder, ...)`.

    The files are ArrayRecord (`rows-00000.array_record`, ...), a record a row: lengths, ids of 4
    bytes, and the row's id. Beside them `tokenized.json` says what the ids depend on, how many
    rows there are, and of the first one its texts.

    Args:
        rows: whatever `fit` takes as rows of text, a generator too.
        preprocessor: a `CCPreprocessor`. The tokens are those that it makes: of its tokenizer,
            template, columns, `max_length` and `pivot_max_length`. How it pads is not in them.
        folder: where to write. It must not be there; it appears when it is whole.
        shard_rows: int, the rows of a file.
        verbose: whether to show progress: `"auto"`, 0 or 1.

    Returns:
        The `keras_cc.data.TokenizedRows` of the folder.

    Raises:
        ValueError: for a folder that is there, for rows without texts (those that a preprocessor
            has made arrays or tokens of), and for a row that cannot be used, naming it: nothing is
            written then.
        TypeError: where `preprocessor` is something else.
        ImportError: where grain is not installed.

    Warns:
        UserWarning: where prompts are cut to fit `max_length`, with their number.

    Example:

    ```python
    tokens = keras_cc.data.tokenize(rows, model.preprocessor, "tokens")
    model.fit(tokens, batch_size=32)
    ```
    """
    folder = pathlib.Path(folder)
    shard_rows = options.count("shard_rows", shard_rows, least=1)
    if folder.exists():
        raise ValueError(
            "`folder` must not be there yet: nothing is written over. Open it with "
            f"`keras_cc.data.TokenizedRows`, or give another. Received: folder={str(folder)!r}"
        )
    if not hasattr(preprocessor, "pack"):
        raise TypeError(
            "`preprocessor` must be a `keras_cc.CCPreprocessor`. "
            f"Received: preprocessor={preprocessor!r}"
        )
    tokenized.grain_sources()
    facts = tokenized.facts_of(preprocessor)
    source = sources.make_source(rows, CHUNK)
    count = source.num_batches()
    progress = keras.utils.Progbar(
        count if isinstance(count, int) else None,
        verbose=1 if verbose == "auto" else int(verbose),
        unit_name="batch",
    )
    with whole_folder(folder) as unfinished:
        writer = _ShardWriter(unfinished, shard_rows)
        first = None
        for number, (raw, _) in enumerate(source.batches(0, None)):
            if columns.is_prepared(raw) or isinstance(raw, PackedRows):
                raise ValueError(f"`rows` must be rows of text. Received: {columns.describe(raw)}")
            packed = preprocessor.pack(raw)
            first = _texts(raw, preprocessor) if first is None else first
            ids = pairs.ids_of(raw, preprocessor.id_column) or [None] * len(packed)
            for row, row_id in zip(packed, ids, strict=True):
                writer.write(row, None if row_id is None else str(pairs.plain_id(row_id)))
            progress.update(number + 1)
        writer.close()
        if first is None:
            raise ValueError("Empty dataset: there is no row to tokenise. Received: 0 rows")
        if not isinstance(count, int):
            progress.update(number + 1, finalize=True)
        manifest = {
            "format": tokenized.FORMAT,
            "rows": sum(shard["rows"] for shard in writer.shards),
            "unanswered": writer.unanswered,
            "truncated": writer.truncated,
            "shards": writer.shards,
            "preprocessor": facts,
            "first": first,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (unfinished / tokenized.MANIFEST).write_text(text, encoding="utf-8")
    found = tokenized.TokenizedRows(folder)
    if found.truncated:
        warnings.warn(
            f"{found.truncated} of the {len(found)} prompts were truncated from the left to fit "
            f"max_length={preprocessor.max_length} tokens with their answer: raise "
            "`CCPreprocessor(max_length=...)` to keep them whole.",
            stacklevel=2,
        )
    return found


class _ShardWriter:
    """Records into files of so many rows, one after the other."""

    def __init__(self, folder: pathlib.Path, shard_rows: int) -> None:
        self._folder, self._shard_rows = folder, shard_rows
        self._open: Any = None
        self.shards: list[dict[str, Any]] = []
        self.unanswered = self.truncated = 0

    def write(self, row: PackedRow, row_id: "str | None") -> None:
        """Add a row."""
        from array_record.python.array_record_module import ArrayRecordWriter  # grain's own

        if self._open is None:
            name = f"rows-{len(self.shards):05}.array_record"
            # A group is read whole: of one row, since rows are read in any order.
            self._open = ArrayRecordWriter(str(self._folder / name), "group_size:1")
            self.shards.append({"file": name, "rows": 0})
        self._open.write(tokenized.encoded(row, row_id))
        shard = self.shards[-1]
        shard["rows"] += 1
        self.unanswered += row.is_unanswered
        self.truncated += row.is_cut
        if shard["rows"] == self._shard_rows:
            self.close()

    def close(self) -> None:
        """End the file that is open."""
        if self._open is None:
            return
        self._open.close()
        self._open = None
        shard = self.shards[-1]
        shard["bytes"] = (self._folder / shard["file"]).stat().st_size


def _texts(raw: Any, preprocessor: Any) -> dict[str, Any]:
    """The texts of the first row of a batch, as a row."""
    names = set(pairs.columns_of(preprocessor).values()) - {preprocessor.id_column}
    found = columns.to_columns(raw, names)
    return {name: columns.plain_text(values[0]) for name, values in found.items()}
