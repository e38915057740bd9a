"""Reads paired rows: how a message names them, their texts, and which of them have a pivot.

Not public. `CCPreprocessor`, `distill` and the methods of this package ask here, so that a row
with a pivot is one to all of them. Columns are those of `to_columns`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from keras_cc.data.columns import describe, is_missing, is_prepared, plain_text
from keras_cc.data.languages import is_language

#: The arguments that name the columns of a row, of `CCPreprocessor` and of whatever reads rows.
COLUMN_ARGUMENTS: tuple[str, ...] = (
    "instruction_column",
    "output_column",
    "pivot_column",
    "lang_column",
    "id_column",
)


class Pair(NamedTuple):
    """A row whose prompt is there in two languages. `index` is its place, `name` for messages."""

    index: int
    name: str
    id: Any
    lang: str | None
    instruction: str
    pivot: str


# --- languages ---


def is_in_pivot_language(lang: Any, instruction: Any, pivot: Any, pivot_language: str) -> bool:
    """Whether a row is in the pivot's language: its `lang` says so, or without one its texts."""
    return is_language(lang, pivot_language) if lang else instruction == pivot


# --- columns ---


def columns_of(preprocessor: Any) -> dict[str, str]:
    """Gives the column arguments of a `CCPreprocessor`, as keyword arguments."""
    return {name: getattr(preprocessor, name) for name in COLUMN_ARGUMENTS}


def row_names(columns: Mapping[str, Any], id_column: str, size: int) -> list[str]:
    """Gives each row the name that messages call it by."""
    return [_name(i, plain_id(v)) for i, v in enumerate(columns.get(id_column, [None] * size))]


def ids_of(raw: Any, id_column: str) -> list[Any]:
    """The values of a raw batch's id column, of text or arrays; `[]` where it has none."""
    if isinstance(raw, Mapping):
        return list(raw.get(id_column, ()))
    return [] if is_prepared(raw) else [row.get(id_column) for row in raw]


def plain_id(value: Any) -> Any:
    """An id as a message shows it: text where it is some, whatever its bytes are."""
    try:
        return plain_text(value)
    except UnicodeDecodeError:
        return value.decode("utf-8", "backslashreplace")


def read_texts(columns: Mapping[str, Any], column: str, names: list[str]) -> list[str]:
    """Gives the texts of a column that every row must have."""
    if column not in columns:
        raise ValueError(
            f"The rows have no column {column!r}. Name yours with `instruction_column=`, "
            f"`output_column=`, ... of CCPreprocessor. Received: columns {sorted(columns)}"
        )
    texts = []
    for name, value in zip(names, columns[column], strict=True):
        text = _string(value, column, name)
        if text is None:
            raise ValueError(f"{name}: no {column!r}. Received: {column}=None")
        if not text.strip():
            raise ValueError(f"{name}: {column!r} is empty. Received: {column}={text!r}")
        texts.append(text)
    return texts


def is_unanswered(value: Any) -> bool:
    """Whether an answer is not there.

    TensorFlow's strings are bytes and cannot be `None`: there an empty one stands for it.
    """
    return is_missing(value) or (isinstance(value, bytes) and not value)


def read_answers(
    columns: Mapping[str, Any], column: str, names: list[str], pivots: list[str | None]
) -> list[str | None]:
    """Gives each row's answer, `None` for a pair of prompts without one."""
    if not any(pivots):
        return list(read_texts(columns, column, names))
    answers: list[str | None] = []
    values = columns.get(column, [None] * len(names))
    for name, value, pivot in zip(names, values, pivots, strict=True):
        if is_unanswered(value):
            if pivot is None:
                raise ValueError(
                    f"{name}: no {column!r}, and no prompt in the pivot's language beside its own: "
                    "there is nothing to learn from it. Name your columns with `output_column=`, "
                    f"`pivot_column=` of CCPreprocessor. Received: columns {sorted(columns)}"
                )
            answers.append(None)
        else:
            answers += read_texts({column: [value]}, column, [name])
    return answers


def read_pivots(
    columns: Mapping[str, Any],
    instructions: list[str],
    names: list[str],
    pivot_column: str,
    lang_column: str,
    pivot_language: str,
) -> list[str | None]:
    """Gives each row's pivot, `None` where the row trains without one."""
    nothing = [None] * len(names)
    langs, values = (columns.get(column, nothing) for column in (lang_column, pivot_column))
    pivots = []
    for value, lang, instruction, name in zip(values, langs, instructions, names, strict=True):
        text = _string(value, pivot_column, name)
        lang = _string(lang, lang_column, name, received=f"{lang_column}=")
        alone = is_in_pivot_language(lang, instruction, text, pivot_language)
        pivots.append(None if alone else nonblank(text))
    return pivots


# --- row dicts ---


def find_pairs(
    rows: list[Mapping[str, Any]],
    *,
    instruction_column: str,
    pivot_column: str,
    lang_column: str,
    id_column: str,
    pivot_language: str,
) -> list[Pair]:
    """Lists the rows that have a pivot in another language than their own; there must be one."""
    check_names(
        instruction_column=instruction_column,
        pivot_column=pivot_column,
        lang_column=lang_column,
        id_column=id_column,
        pivot_language=pivot_language,
    )
    pairs = []
    for i, row in enumerate(rows):
        row_id = plain_id(row.get(id_column))
        name = _name(i, row_id)
        pivot = read_text(row, pivot_column, name)
        if pivot is None:
            continue
        instruction = read_text(row, instruction_column, name)
        if instruction is None:
            raise ValueError(
                f"{name}: a pivot needs the same prompt in {instruction_column!r}. Name yours "
                f"with `instruction_column=`. Received: {describe(row)}"
            )
        lang = read_text(row, lang_column, name)
        if not is_in_pivot_language(lang, instruction, pivot, pivot_language):
            pairs.append(Pair(i, name, row_id, lang, instruction, pivot))
    if not pairs:
        raise ValueError(
            f"No row has a prompt in two languages: a {pivot_column!r} beside an "
            f"{instruction_column!r} that is not in {pivot_language!r}. Name your columns with "
            f"`pivot_column=`, `instruction_column=`. Received: {len(rows)} rows, the first "
            f"{describe(rows[0])}"
        )
    return pairs


def read_text(row: Mapping[str, Any], column: str, name: str) -> str | None:
    """Gives a row's text, `None` where it is missing or blank."""
    return nonblank(_string(plain_text(row.get(column)), column, name, received=f"{column}="))


def nonblank(text: str | None) -> str | None:
    """Gives the text, `None` where nothing can be read in it."""
    return text if text and text.strip() else None


def _name(index: int, row_id: Any) -> str:
    return f"row {index}" if row_id is None else f"row with id {row_id}"


def _string(value: Any, column: str, name: str, received: str = "") -> str | None:
    """The one door of texts: every column of a row that is read comes through here."""
    try:
        text = plain_text(value)
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{name}: {column!r} must be a string. Received: {received}{value!r}")
        if text is not None and not text.isascii():
            text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:  # no UTF-8; half a surrogate pair
        raise ValueError(
            f"{name}: {column!r} must be text that UTF-8 has, which this is not at character "
            f"{error.start}: repair it, or leave the row out. Received: {received}{value!r:.80}"
        ) from None
    return text


# --- arguments of the methods that make rows of rows ---


def check_rows(rows: Any) -> list[Mapping[str, Any]]:
    """Refuses what is not a list of at least one row dict."""
    if isinstance(rows, Mapping | str | bytes) or not isinstance(rows, Iterable):
        raise TypeError(f"`rows` must be a list of dicts. Received: rows={describe(rows)}")
    rows = list(rows)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"`rows` must be a list of dicts. Received: {describe(row)} as row {i}")
    if not rows:
        raise ValueError("`rows` must have at least one row. Received: rows=[]")
    return rows


def check_names(**names: Any) -> None:
    """Refuses a column or language that is not a non-empty string."""
    for argument, value in names.items():
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"`{argument}` must be a non-empty string. Received: {argument}={value!r}"
            )
