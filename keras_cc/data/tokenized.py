"""Rows that were tokenised once, in shards that are read at any place. See `tokenizing`."""

import hashlib
import itertools
import json
import os
import pathlib
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_cc.data.prepared import PackedRow, PackedRows

FORMAT = "keras_cc tokenized 1"
MANIFEST = "tokenized.json"
_KEYS = {"rows", "unanswered", "truncated", "shards", "preprocessor", "first"}  # of the manifest
# What a record begins with: tokens of the row, of these the prompt's, tokens of the pivot, whether
# the prompt was cut. The ids follow, the row's before the pivot's, and the row's id as text.
_HEADER = struct.Struct("<IIIB")
# Options of a preprocessor that change no token.
_NOT_OF_TOKENS = ("preprocessor", "padding", "widths", "add_start_token")


class TokenizedRows:
    """Paired rows as token ids, which `keras_cc.data.tokenize` has written.

    `fit`, `evaluate` and whatever else takes rows takes them: they are what the rows they were
    made of are, in the same batches, and nothing is tokenised. Rows are read where they are asked
    for, so a data set need not fit into memory; of each row eight bytes do, where `fit` shuffles.

    Args:
        *folders: one or several folders of `keras_cc.data.tokenize`, joined in this order, as
            where several machines have each tokenised a part.

    Attributes:
        unanswered: int, the rows without an answer.
        truncated: int, the rows whose prompt was cut to fit `max_length`.

    Raises:
        ValueError: for a folder that is not such a one or lacks a part of a file, and for folders
            of different preprocessors.
        ImportError: where grain is not installed, which reads the files.
        RuntimeError: later, where a row is read whose bytes are damaged.

    Example:

    ```python
    keras_cc.data.tokenize(rows, model.preprocessor, "tokens")  # once
    model.fit(keras_cc.data.TokenizedRows("tokens"), batch_size=32)
    ```
    """

    def __init__(self, *folders: "str | os.PathLike[str]") -> None:
        if not folders:
            raise ValueError("`folders` must be at least one folder. Received: none")
        manifests = [_manifest(pathlib.Path(folder)) for folder in folders]
        self._folders = [str(folder) for folder in folders]
        self.facts = manifests[0]["preprocessor"]
        for folder, manifest in zip(self._folders, manifests, strict=True):
            _check_same(self.facts, manifest["preprocessor"], self._folders[0], folder)
        self._first_texts = [manifest["first"] for manifest in manifests]
        self.unanswered = sum(manifest["unanswered"] for manifest in manifests)
        self.truncated = sum(manifest["truncated"] for manifest in manifests)
        ends = itertools.accumulate(manifest["rows"] for manifest in manifests)
        self._starts = [0, *ends]  # of each folder, and the end of the last
        self._records = grain_sources().ArrayRecordDataSource(
            [
                str(pathlib.Path(folder) / shard["file"])
                for folder, manifest in zip(folders, manifests, strict=True)
                for shard in manifest["shards"]
            ]
        )
        if len(self._records) != len(self):
            raise ValueError(
                f"`folders` must be whole. Received: {self!r}, in whose files "
                f"{len(self._records)} are"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def __repr__(self) -> str:
        return f"<TokenizedRows {self._folders}: {len(self)} rows>"

    def take(self, indices: Iterable[int]) -> PackedRows:
        """The rows at these places, as `CCPreprocessor.pack` gives them."""
        return PackedRows(row for row, _ in self._read(indices))

    def id(self, index: int) -> "str | None":
        """The id of a row as text, None where it has none."""
        ((_, found),) = self._read([index])
        return found

    def check(self, preprocessor: Any) -> None:
        """Refuse another preprocessor than the rows were tokenised with.

        Raises:
            ValueError: naming what differs.
        """
        if preprocessor is None:
            raise ValueError(
                "Tokenised rows are padded by the preprocessor that they were made with: build the "
                f"model with it. Received: {self!r} and a model without a preprocessor"
            )
        _check_same(self.facts, facts_of(preprocessor), repr(self), "the model's preprocessor")
        for start, texts in zip(self._starts[:-1], self._first_texts, strict=True):
            if preprocessor.pack([texts]) != self.take([start]):
                raise ValueError(
                    "Rows must have been tokenised as the model's preprocessor does: tokenise them "
                    f"again. Received: {self!r}, whose row {start} has other tokens here"
                )

    def _read(self, indices: Iterable[int]) -> "list[tuple[PackedRow, str | None]]":
        places = np.asarray(indices, "int64").tolist()
        return [_decoded(record) for record in self._records.__getitems__(places)]


def encoded(row: PackedRow, row_id: "str | None") -> bytes:
    """A row as the bytes of a record."""
    header = _HEADER.pack(len(row.ids), row.prompt_length, len(row.pivot), row.is_cut)
    ids = np.array([*row.ids, *row.pivot], "<u4").tobytes()
    return (
        header
        + ids
        + (b"" if row_id is None else b"\0" + row_id.encode("utf-8", "backslashreplace"))
    )


def facts_of(preprocessor: Any) -> dict[str, Any]:
    """What the tokens of a row depend on, as it comes back from JSON."""
    config = preprocessor.get_config()
    tokenizer = preprocessor.tokenizer
    vocabulary = hashlib.sha256()
    for index in range(tokenizer.vocabulary_size()):
        vocabulary.update(f"{tokenizer.id_to_token(index)!r}\n".encode("utf-8", "surrogatepass"))
    facts = {
        **{name: value for name, value in config.items() if name not in _NOT_OF_TOKENS},
        "start_token_id": preprocessor.start_token_id,
        "end_token_id": preprocessor.end_token_id,
        "tokenizer": type(tokenizer).__name__,
        "vocabulary_sha256": vocabulary.hexdigest(),
    }
    return json.loads(json.dumps(facts))


def _decoded(record: bytes) -> "tuple[PackedRow, str | None]":
    length, prompt, pivot, is_cut = _HEADER.unpack_from(record)
    ids = np.frombuffer(record, "<u4", length + pivot, _HEADER.size).tolist()
    rest = record[_HEADER.size + 4 * (length + pivot) :]
    row = PackedRow(ids[:length], prompt, bool(is_cut), ids[length:])
    return row, rest[1:].decode() if rest else None


def _manifest(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(found, dict) and found.get("format") == FORMAT and set(found) >= _KEYS
    except (OSError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"`folders` must be what `keras_cc.data.tokenize` wrote ({FORMAT!r}). Received: "
            f"{str(folder)!r}, which has no {MANIFEST} of that kind"
        )
    for shard in found["shards"]:
        file = folder / shard["file"]
        size = file.stat().st_size if file.exists() else None
        if size != shard["bytes"]:
            raise ValueError(
                f"`folders` must be whole: copy the folder again, or tokenise again. Received: "
                f"{str(file)!r} of {size} bytes, where {shard['bytes']} were written"
            )
    return found


def _check_same(made: dict[str, Any], other: dict[str, Any], where: str, who: str) -> None:
    different = [
        f"{name} {value!r} and not {other.get(name)!r}"
        for name, value in made.items()
        if other.get(name) != value
    ]
    if different:
        raise ValueError(
            "Rows must be tokenised by the preprocessor that they are used with: give the model "
            f"that one, or tokenise them again. Received: {where}, made with "
            f"{'; '.join(different)}, as {who} has"
        )


def grain_sources() -> Any:
    """`grain.sources`, which reads ArrayRecord files."""
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "Tokenised rows lie in ArrayRecord files, which grain reads: "
            'pip install "keras-cc[data]"'
        ) from error
    return grain.sources
