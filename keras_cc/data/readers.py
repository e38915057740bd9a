"""Readers: files of paired rows in, lists of row dicts out."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_cc.options import count


def load_jsonl(
    path: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    *,
    instruction_column: str = "instruction",
    output_column: str = "output",
    pivot_column: str = "instruction_en",
    lang_column: str = "lang",
    languages: Collection[str] | None = None,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Reads paired rows from JSON Lines files, one JSON object a line.

    Args:
        path: a file, a folder (all its `*.jsonl` and `*.jsonl.gz`, in the order of their names), a
            glob pattern (`**` included), or a list of these. What ends in `.gz` is unpacked.
        instruction_column: string. Key of the prompt in the target language.
        output_column: string. Key of the answer; a row with a pivot may be without it.
        pivot_column: string. Key of the prompt in the pivot language.
        lang_column: string. Key of the row's language; only `languages` needs it.
        languages: list of strings. Keep only rows in these languages.
        limit: int. Stop after this many rows in all.

    Returns:
        List of dicts, one a row, in file order, with every key that the line had.

    Raises:
        FileNotFoundError: where a path or pattern matches no file.
        TypeError: where `languages` is one string.
        ValueError: for a line that is not a JSON object, whose instruction is missing or not a
            string, or whose answer is so (missing or null beside a pivot, it is no error); the
            message names file and line. Where no row is left.

    Example:

    ```python
    rows = keras_cc.data.load_jsonl("train/*/tr.jsonl", limit=1000)
    rows = keras_cc.data.load_jsonl("train/xnli", languages=["sw", "hi"])
    ```

    Blank lines are skipped. UTF-8, with or without a byte order mark. Source of the column names:
    YYF-Tommy/CC-Tuning.
    """
    if isinstance(languages, str):
        raise TypeError(f"`languages` must be a list of names. Received: languages={languages!r}")
    if limit is not None:
        limit = count("limit", limit, least=1)
    files = _expand(path)
    rows: list[dict[str, Any]] = []
    for file in files:
        for place, row in _read(file):
            is_pair = row.get(output_column) is None and _is_text(row.get(pivot_column))
            for column in (instruction_column, *([] if is_pair else [output_column])):
                if not _is_text(row.get(column)):
                    raise ValueError(
                        f"{place}: {column!r} must be a string. Received: "
                        + (repr(row[column]) if column in row else f"keys {sorted(row)}")
                    )
            if languages is not None:
                if lang_column not in row:
                    raise ValueError(
                        f"{place}: no {lang_column!r} to select languages by. "
                        f"Received: keys {sorted(row)}"
                    )
                if row[lang_column] not in languages:
                    continue
            rows.append(row)
            if limit is not None and len(rows) == limit:
                return rows
    if not rows:
        raise ValueError(
            f"Empty dataset: no row in {len(files)} file(s)"
            + (f" is in the languages {sorted(languages)}" if languages is not None else "")
            + f". Received: path={path!r}"
        )
    return rows


def _expand(path: Any) -> list[Path]:
    if isinstance(path, str | os.PathLike):
        file = Path(path)
        if file.is_file():
            return [file]
        patterns = [str(path)]
        if file.is_dir():
            folder = Path(glob.escape(str(file)))
            patterns = [str(folder / ending) for ending in ("*.jsonl", "*.jsonl.gz")]
        files = sorted(Path(p) for one in patterns for p in glob.glob(one, recursive=True))
        files = [f for f in files if f.is_file()]
        if not files:
            raise FileNotFoundError(f"No file matches. Received: path={str(path)!r}")
        return files
    if not isinstance(path, Sequence) or not path:
        raise ValueError(f"`path` must be a path, or a list of some. Received: path={path!r}")
    return [file for part in path for file in _expand(part)]


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("file:line", object). Bytes are split at "\\n" alone: U+2028 may stand in a text."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as lines:
        for number, line in enumerate(_unpacked(lines, file), 1):
            place = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text) if text.strip() else None
            except ValueError as error:  # not UTF-8, or not JSON
                raise ValueError(f"{place}: {error}. Received: {line[:80]!r}") from error
            if not text.strip():
                continue
            if not _is_object(row):
                raise ValueError(f"{place}: not a JSON object. Received: {text.strip()[:80]}")
            yield place, row


def _unpacked(lines: Any, file: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error})") from error


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)
