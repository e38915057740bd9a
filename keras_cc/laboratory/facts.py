"""Facts that the laboratory's model has not read: the rows of its relations."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from keras_cc.laboratory import grammar as words
from keras_cc.laboratory.corpus import values, world
from keras_cc.options import choice

#: The relations of the laboratory, and what is asked of a place; and how many places each has.
RELATIONS: dict[str, str] = {"lab_code": "code", "lab_word": "emblem"}
MOST_ITEMS: dict[str, int] = {"lab_code": 500, "lab_word": len(words.THINGS)}
_SEEDS = 2


def laboratory_rows(
    languages: str | Iterable[str], relation: str, items: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Asks for a fact of each of some places, in the laboratory's languages.

        "lab_code"  one of 32 codes       the same answer in every language
        "lab_word"  one of 128 things,    the word of the language that asks
                    each of one place

    The pre-training text asks the same questions about other places. What has to cross is the
    place's name: two words, 0 to 2 of them common to the languages.

    Args:
        languages: some of `"en"`, `"xa"`, `"xb"`.
        relation: `"lab_code"` or `"lab_word"`.
        items: int, how many places: 1 to 500, of `"lab_word"` 1 to 128.
        seed: int, 0 or 1: other places, and other facts.

    Returns:
        One dict a row, `items` of each language: `id` (`"lab_code/0/17"`, relation, seed and place:
        the same item in every language), `relation`, `lang`, `instruction`, `output`,
        `instruction_en`, `answers`, and `shared_words`, how many words of the place's name all
        languages have in common. In the order of the places, then of the languages.

    Raises:
        ValueError: for an unknown language or relation, and numbers out of range.

    Example:

    ```python
    rows = keras_cc.laboratory.laboratory_rows(["en", "xa"], "lab_code", items=10)
    rows[0]["output"] == rows[1]["output"]  # True
    ```
    """
    languages = [languages] if isinstance(languages, str) else list(languages)
    for language in languages:
        choice("languages", language, words.LANGUAGES)
    choice("relation", relation, RELATIONS)
    _between("items", items, 1, MOST_ITEMS[relation])
    _between("seed", seed, 0, _SEEDS - 1)
    spoken, asked, shared = words.languages(), RELATIONS[relation], words.shared_words()
    first = seed * max(MOST_ITEMS.values())
    places = world().items[first : first + items]
    rows = []
    for number, (place, value) in enumerate(zip(places, _values(relation, seed), strict=False)):
        for code in languages:
            answer = spoken[code].word(value)
            rows.append(
                {
                    "id": f"{relation}/{seed}/{number}",
                    "relation": relation,
                    "lang": code,
                    "instruction": spoken[code].question(asked, place),
                    "output": answer,
                    "instruction_en": spoken["en"].question(asked, place),
                    "answers": [answer],
                    "shared_words": sum(word in shared for word in place),
                }
            )
    return rows


def _values(relation, seed):
    """The value of each place: codes are drawn, things stand for one place each."""
    random = np.random.default_rng([seed, 30])
    among = values(RELATIONS[relation])
    if relation == "lab_word":
        return [among[n] for n in random.permutation(len(among))]
    return [among[n] for n in random.integers(len(among), size=MOST_ITEMS[relation])]


def _between(argument: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(
            f"`{argument}` must be an integer from {least} to {most}. "
            f"Received: {argument}={value!r}"
        )
