"""What is odd about rows, before anything is trained on them."""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from keras_cc.data import pairs

#: Control characters that are no white space. A text that has one was damaged, or is no text.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")
# Embeddings, overrides and isolates change the order of what stands beside them. Arabic and Hebrew
# texts have them by right; elsewhere they can make a text look like another one.
_BIDIRECTIONAL = re.compile("[\u202a-\u202e\u2066-\u2069]")
# `<|im_start|>`, `<start_of_turn>`, `[INST]`: what chat templates put between turns.
_MARKERS = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|\[/?INST\]")
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found: the names of rows (their ids, or `"row 17"`), of each kind.

    Attributes:
        rows: int, how many rows there are.
        unanswered: rows without an answer, pairs of prompts.
        without_pivot: rows in another language than the pivot's that have no prompt in it.
        duplicates: rows with the prompt, answer and language of an earlier one.
        contradictions: rows with the prompt and language of an earlier one, and another answer.
        control: rows with control characters in a text, or the mark of a lost one (U+FFFD).
        bidirectional: rows with characters that change the order of others.
        markers: rows with a chat template's marker in a text. It stays text; where markers come
            from a template that was applied before, the rows have it twice.
        overlap: of the rows to test on, those whose prompt, or prompt in the pivot's language, is
            that of a row to train on, or whose id is.
    """

    rows: int
    unanswered: tuple[str, ...] = ()
    without_pivot: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()
    contradictions: tuple[str, ...] = ()
    control: tuple[str, ...] = ()
    bidirectional: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    overlap: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.rows} rows"]
        for field in dataclasses.fields(self)[1:]:
            names = getattr(self, field.name)
            if names:
                shown = ", ".join(names[:_EXAMPLES]) + (", ..." if names[_EXAMPLES:] else "")
                lines.append(f"{len(names):>7} {field.name.replace('_', ' ')}: {shown}")
        return "\n".join(lines)


def audit(
    rows: Iterable[Mapping[str, Any]],
    test_rows: "Iterable[Mapping[str, Any]] | None" = None,
    *,
    instruction_column: str = "instruction",
    output_column: str = "output",
    pivot_column: str = "instruction_en",
    lang_column: str = "lang",
    id_column: str = "id",
    pivot_language: str = "en",
) -> Audit:
    """Says what is odd about rows; nothing is changed or left out.

    Texts are compared without regard to case, white space and Unicode's forms of the same
    characters (NFKC).

    Args:
        rows: list of dicts, the rows to train on.
        test_rows: list of dicts or `None`. Rows that are to be scored: which of them have been
            trained on?
        instruction_column, output_column, pivot_column, lang_column, id_column, pivot_language:
            as `CCPreprocessor` has them.

    Returns:
        An `Audit`; print it.

    Raises:
        TypeError, ValueError: for what is not a list of rows, or a text that is none, by its row.

    Example:

    ```python
    train, test = rows[:-2], rows[-2:]
    print(keras_cc.data.audit(train, test))
    ```
    """
    names = {
        "instruction_column": instruction_column,
        "output_column": output_column,
        "pivot_column": pivot_column,
        "lang_column": lang_column,
        "id_column": id_column,
    }
    pairs.check_names(**names, pivot_language=pivot_language)
    found: dict[str, list[str]] = collections.defaultdict(list)
    answers: dict[tuple[str, str | None], str | None] = {}
    prompts: set[str] = set()
    ids: set[Any] = set()
    training = [_texts(n, row, names) for n, row in enumerate(pairs.check_rows(rows))]
    for one in training:
        texts = [text for text in (one.instruction, one.pivot, one.output) if text]
        key = (_same(one.instruction), one.lang)
        answer = None if one.output is None else _same(one.output)
        if one.output is None:
            found["unanswered"].append(one.name)
        is_pivot = pairs.is_in_pivot_language(one.lang, one.instruction, one.pivot, pivot_language)
        if one.pivot is None and one.lang and not is_pivot:
            found["without_pivot"].append(one.name)
        if key in answers:
            again = answers[key] == answer
            found["duplicates" if again else "contradictions"].append(one.name)
        answers.setdefault(key, answer)
        for kind, pattern in (
            ("control", _CONTROL),
            ("bidirectional", _BIDIRECTIONAL),
            ("markers", _MARKERS),
        ):
            if any(pattern.search(text) for text in texts):
                found[kind].append(one.name)
        prompts |= {_same(text) for text in (one.instruction, one.pivot) if text}
        if one.id is not None:
            ids.add(str(one.id))
    scored = [] if test_rows is None else pairs.check_rows(test_rows)
    for one in (_texts(n, row, names) for n, row in enumerate(scored)):
        asked = {_same(text) for text in (one.instruction, one.pivot) if text}
        if asked & prompts or (one.id is not None and str(one.id) in ids):
            found["overlap"].append(one.name)
    return Audit(len(training), **{kind: tuple(some) for kind, some in found.items()})


@dataclasses.dataclass(frozen=True)
class _Texts:
    name: str
    id: Any
    instruction: str
    output: str | None
    pivot: str | None
    lang: str | None


def _texts(number: int, row: Mapping[str, Any], names: dict[str, str]) -> _Texts:
    row_id = pairs.plain_id(row.get(names["id_column"]))
    name = f"row {number}" if row_id is None else str(row_id)
    instruction, output, pivot, lang = (
        pairs.read_text(row, names[f"{kind}_column"], name)
        for kind in ("instruction", "output", "pivot", "lang")
    )
    if instruction is None:
        raise ValueError(
            f"{name}: no {names['instruction_column']!r}. Name yours with `instruction_column=`. "
            f"Received: keys {sorted(map(str, row))}"
        )
    return _Texts(name, row_id, instruction, output, pivot, lang)


def _same(text: str) -> str:
    """A text as it is compared."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
