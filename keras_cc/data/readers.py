"""Readers: files of paired rows in, lists of row dicts out."""

import collections
import glob
import gzip
import json
import os
import warnings
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from keras_cc.data import pairs
from keras_cc.options import choice, count, number
from keras_cc.whole_files import whole_file

#: Bytes of a line. What is longer is no row of text, and would fill the memory.
LONGEST_LINE = 16 * 2**20
_SHOWN = 1000  # characters of a row in a quarantine


def load_jsonl(
    path: "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]",
    *,
    instruction_column: str = "instruction",
    output_column: str = "output",
    pivot_column: str = "instruction_en",
    lang_column: str = "lang",
    languages: Collection[str] | None = None,
    limit: int | None = None,
    on_bad_row: str = "raise",
    quarantine: "str | os.PathLike[str] | None" = None,
    most_bad: float = 0.05,
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
        on_bad_row: string. `"raise"`, or `"quarantine"`: what cannot be used is written to a file
            of its own, and counted. What is read is used, of another language, or there.
        quarantine: path of that file: JSON lines with `file`, `line`, `reason` and the line, as
            much of it as is of use. It is written when there is a bad row.
        most_bad: float in [0, 1], the share of bad rows beyond which even a quarantine raises.

    Returns:
        List of dicts, one a row, in file order, with every key that the line had.

    Raises:
        FileNotFoundError: where a path or pattern matches no file.
        TypeError: where `languages` is one string.
        ValueError: for a bad row, or more than `most_bad` of them; the message names file and line.
            That is a line that is not UTF-8, not JSON, not an object, longer than 16 MiB, nested
            too deeply, or has a key twice; and a row whose instruction is missing or empty, whose
            answer is so (missing or null beside a pivot, it is no error), or whose instruction,
            answer, pivot or language is not text that UTF-8 has. For a file of another encoding
            or a damaged `.gz`. Where no row is left.

    Example:

    ```python
    rows = keras_cc.data.load_jsonl("train/*/tr.jsonl", limit=1000)
    rows = keras_cc.data.load_jsonl("train/xnli", languages=["sw", "hi"])
    rows = keras_cc.data.load_jsonl(
        "train/xnli", on_bad_row="quarantine", quarantine="bad.jsonl"
    )
    ```

    Blank lines are skipped. UTF-8, with or without a byte order mark. Source of the column names:
    YYF-Tommy/CC-Tuning.
    """
    if isinstance(languages, str):
        raise TypeError(f"`languages` must be a list of names. Received: languages={languages!r}")
    if limit is not None:
        limit = count("limit", limit, least=1)
    choice("on_bad_row", on_bad_row, ("raise", "quarantine"))
    most_bad = number("most_bad", most_bad, most=1)
    if (on_bad_row == "quarantine") != (quarantine is not None):
        raise ValueError(
            "`quarantine` must be a path with on_bad_row='quarantine', and nothing without. "
            f"Received: on_bad_row={on_bad_row!r}, quarantine={quarantine!r}"
        )
    files = _expand(path)
    if quarantine is not None and Path(quarantine).absolute() in [f.absolute() for f in files]:
        raise ValueError(
            "`quarantine` must not be one of the files that are read, or bad rows would be read "
            f"again: name one elsewhere. Received: quarantine={os.fspath(quarantine)!r}"
        )
    names = (instruction_column, output_column, pivot_column, lang_column)
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    read = 0
    for source, number_of_line, line in (one for file in files for one in _lines(file)):
        read += 1
        try:
            row = _row(line, *names)
            if languages is not None and lang_column not in row:
                raise ValueError(
                    f"no {lang_column!r} to select languages by. "
                    f"Received: keys {sorted(row)!s:.200}"
                )
        except ValueError as error:
            if on_bad_row == "raise":
                raise ValueError(f"{source}:{number_of_line}: {error}") from error.__cause__
            shown = line.decode("utf-8", "backslashreplace")[:_SHOWN]
            bad.append({"file": str(source), "line": number_of_line, "reason": str(error)})
            bad[-1]["row"] = shown
            continue
        if languages is None or row[lang_column] in languages:
            rows.append(row)
        if len(rows) == limit:
            break
    if quarantine is not None and bad:
        _write_quarantine(quarantine, bad, read, most_bad)
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


def _row(line: bytes, instruction: str, output: str, pivot: str, lang: str) -> dict[str, Any]:
    """The row of a line, or a ValueError that says what is wrong with it."""
    if len(line) > LONGEST_LINE:
        raise ValueError(
            f"a line of more than {LONGEST_LINE} bytes is no row of text. Received: {line[:80]!r}"
        )
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"nested too deeply. Received: {line[:80]!r}") from None
    except ValueError as error:  # not UTF-8, not JSON, or a key that is there twice
        raise ValueError(f"{error}. Received: {line[:80]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object. Received: {line.decode().strip()[:80]}")
    is_pair = row.get(output) is None and bool(str(row.get(pivot) or "").strip())
    for column in (instruction, *([] if is_pair else [output])):
        if not isinstance(row.get(column), str):
            raise ValueError(
                f"{column!r} must be a string. Received: "
                + (f"{row[column]!r:.80}" if column in row else f"keys {sorted(row)!s:.200}")
            )
        if not row[column].strip():
            raise ValueError(f"{column!r} is empty. Received: {row[column]!r:.80}")
    try:
        for column in (instruction, output, pivot, lang):
            pairs.read_text(row, column, "the row")
    except TypeError as error:
        raise ValueError(str(error)) from None
    return row


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        twice, _ = collections.Counter(key for key, _ in items).most_common(1)[0]
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return row


def _write_quarantine(path: Any, bad: list[dict[str, Any]], read: int, most: float) -> None:
    with whole_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        for one in bad:
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
    first = f"{bad[0]['file']}:{bad[0]['line']}: {bad[0]['reason']}"
    if len(bad) > most * read:
        raise ValueError(
            f"`most_bad` allows {most:.1%} of the rows to be bad: mend them, or raise it. "
            f"Received: {len(bad)} of {read}, all in {os.fspath(path)!r}, the first {first}"
        )
    warnings.warn(
        f"{len(bad)} of {read} rows are bad, and in {os.fspath(path)!r}. The first is {first}",
        stacklevel=3,
    )


def _lines(file: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Yields (file, number, line). Bytes are split at "\n" alone: U+2028 may stand in a text.

    Of a line that is too long there is as much as shows that it is.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as lines:
        for number_of_line, line in enumerate(_unpacked(lines, file), 1):
            if number_of_line == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield file, number_of_line, line.rstrip(b"\r\n")


def _unpacked(lines: Any, file: Path) -> Iterator[bytes]:
    try:
        while line := lines.readline(LONGEST_LINE + 1):
            yield line
            while not line.endswith(b"\n") and len(line) > LONGEST_LINE:  # pass over the rest of it
                line = lines.readline(LONGEST_LINE + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: not a whole gzip file ({error})") from error
