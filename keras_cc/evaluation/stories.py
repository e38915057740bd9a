"""Stories and their endings, taken out of the instructions of XStoryCloze and XCOPA. Not public."""

import re
from collections.abc import Mapping
from typing import Any

from keras_cc.data.languages import SPACELESS, base_language, lower_i

_NUMBERS = ("1", "2")
_PARTS = re.compile(r"(.+?)\n\(1\)(.+?)\n\(2\)(.+?)\n.*", re.DOTALL)
_QUESTIONS = {"What was the cause?": 0, "What happened as a result?": 1}
_CONNECTORS = {
    "en": ("because", "so"), "et": ("sest", "seetõttu"), "ht": ("poukisa", "donk sa"),
    "id": ("karena", "maka"), "it": ("perché", "quindi"), "qu": ("imataq", "chaymi"),
    "sw": ("kwa sababu", "kwa hiyo"), "ta": ("காரணமாக", "எனவே"), "th": ("เพราะ", "ดังนั้น"),
    "tr": ("çünkü", "bu yüzden"), "vi": ("bởi vì", "vì vậy"), "zh": ("因为", "所以"),
}  # fmt: skip


def ending_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A row that asks which of two endings is right, as a story with its ending.

    Args:
        row: dict with `lang`, `instruction` (a story, then the lines "(1) ..." and "(2) ...", then
            a question), `answers` ("1" or "2"), and maybe `instruction_en`, as `instruction`.
        place: string, what an error calls the row.

    Returns:
        The row with the story in `instruction` and `instruction_en`, both `endings`, the right one
        in `output` and `answers`. An ending begins with the space that a reader expects before it.

    Raises:
        ValueError: for an instruction or an answer that is something else.
    """
    story, *endings = _story(row["instruction"], row["lang"], place)
    if not set(row["answers"]) <= set(_NUMBERS):
        raise ValueError(
            f"{place}: the answers must be among {_NUMBERS}. Received: answers={row['answers']!r}"
        )
    space = "" if base_language(row["lang"]) in SPACELESS else " "
    endings = [space + ending for ending in endings]
    right = [endings[_NUMBERS.index(answer)] for answer in row["answers"]]
    found = {
        **row,
        "instruction": story,
        "endings": endings,
        "output": right[0],
        "answers": [ending.strip() for ending in right],
    }
    if row.get("instruction_en"):
        found["instruction_en"] = _story(row["instruction_en"], "en", place)[0]
    return found


def _story(instruction, language, place):
    """The story of an instruction, up to where its ending begins, and its two endings.

    XCOPA's question becomes a word, as in lm-evaluation-harness: "The man turned on the tap
    because", "the toilet filled with water."
    """
    match = _PARTS.fullmatch(instruction)
    if match is None:
        raise ValueError(
            f"{place}: the instruction must be a story and then the lines '(1) ...' and '(2) ...', "
            f"with a question after them. Received: instruction={instruction!r}"
        )
    story, *endings = (part.strip() for part in match.groups())
    before, _, question = story.rpartition("\n")
    if question not in _QUESTIONS:
        return story, *endings
    if language not in _CONNECTORS:
        raise ValueError(
            f"{place}: {question!r} can be asked in {sorted(_CONNECTORS)}. "
            f"Received: language={language!r}"
        )
    space = "" if base_language(language) in SPACELESS else " "
    story = (
        re.sub(r"[.。!?！？\s]+$", "", before) + space + _CONNECTORS[language][_QUESTIONS[question]]
    )
    return story, *(_lower_first(ending, language) for ending in endings)


def _lower_first(text, language):
    return lower_i(text[:1], language).lower() + text[1:]
