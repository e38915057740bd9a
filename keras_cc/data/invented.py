"""Facts that nobody knows before training: people who were invented, in 22 languages.

Notable choices:

- Every person has a number, and the number gives the name. A seed has numbers of its own, so
  people and towns of two seeds are others, and more items of a seed begin with the fewer.
- A fact is drawn by a hash of the name: it depends on nothing else, and no name gives it away.
- Names of people and towns are in Latin script in every language. Transliterated, they would have
  to be read, and a wrong letter would be another person. A question in another script thus holds
  a name that its English version holds too.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Iterable
from typing import Any

from keras_cc.data import cldr
from keras_cc.data.invented_templates import RELATIONS, TEMPLATES

#: What is spoken: languages that CLDR names in all 22, each by a name of its own.
SPOKEN: tuple[str, ...] = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id"),
    *("it", "ja", "ko", "nl", "pl", "pt", "ro", "ru", "sv", "sw", "th", "tr", "uk", "vi", "zh"),
)
YEARS = range(1900, 2000)
#: How many towns a seed has.
TOWNS = 50

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_MOST_ITEMS = 10**6  # of a seed: 10^9 people are fewer than the names of 5 syllables
_SEEDS = 1000


def invented_rows(
    languages: str | Iterable[str], relation: str, items: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Invents people, and asks for a fact of each.

        "born"    a year, 1900 to 1999                 the same answer in every language
        "town"    one of 50 invented towns             the same answer in every language
        "speaks"  one of 30 languages, by CLDR's name  the answer of the language that asks

    The people of a seed are the same ones in each relation. Other seeds have other people and
    towns. The names of both are in Latin script in every language. `"speaks"` needs Babel.

    Args:
        languages: ISO 639-1 codes, one or several, of the 21 of the CLDR set or `"en"`.
        relation: `"born"`, `"town"` or `"speaks"`.
        items: int, 1 to a million: how many people.
        seed: int, 0 to 999.

    Returns:
        One dict a row, `items` of each language, with the columns of `cldr_rows`: `id`
        (`"born/0/17"`, relation, seed and person: the same item in every language), `relation`,
        `lang`, `instruction`, `output`, `instruction_en` and `answers`. In the order of the
        people, then of the languages.

    Raises:
        ValueError: for an unknown language or relation, and numbers out of range.
        ImportError: for `"speaks"`, if Babel is not installed.

    Example:

    ```python
    rows = keras_cc.data.invented_rows(["en", "tr"], "born", items=100)
    rows[0]["instruction"]  # "In which year was Gike Zabufi born?"
    rows[1]["output"] == rows[0]["output"]  # True: a year is the same in Turkish
    ```
    """
    languages = cldr.choices("languages", languages, tuple(TEMPLATES), ())
    if relation not in RELATIONS:
        raise ValueError(f"`relation` must be one of {RELATIONS}. Received: relation={relation!r}")
    _between("items", items, 1, _MOST_ITEMS)
    _between("seed", seed, 0, _SEEDS - 1)
    rows = []
    for number in range(items):
        name = _person(seed * _MOST_ITEMS + number)
        for lang in languages:
            answers = _answers(lang, relation, name, seed)
            rows.append(
                {
                    "id": f"{relation}/{seed}/{number}",
                    "relation": relation,
                    "lang": lang,
                    "instruction": _question(lang, relation, name),
                    "output": answers[0],
                    "instruction_en": _question("en", relation, name),
                    "answers": answers,
                }
            )
    return rows


def _between(argument: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(
            f"`{argument}` must be an integer from {least} to {most}. "
            f"Received: {argument}={value!r}"
        )


def _person(number: int) -> str:
    name = _syllables(number, 5)
    return f"{name[:4].capitalize()} {name[4:].capitalize()}"


def _town(number: int) -> str:
    return (_syllables(number, 3) + "n").capitalize()


def _syllables(number: int, length: int) -> str:
    """`length` syllables, others for each number below 70 ** length."""
    base = len(_SYLLABLES)
    # Numbers next to each other get names far apart: the step has no factor in common with 70.
    number = (number + 271828183) * 618033989 % base**length
    found = []
    for _ in range(length):
        number, syllable = divmod(number, base)
        found.append(_SYLLABLES[syllable])
    return "".join(found)


def _draw(relation: str, name: str, among: int) -> int:
    digest = hashlib.sha256(f"invented/{relation}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * among >> 64


def _answers(lang: str, relation: str, name: str, seed: int) -> list[str]:
    if relation == "born":
        return [str(YEARS[_draw(relation, name, len(YEARS))])]
    if relation == "town":
        return [_town(seed * TOWNS + _draw(relation, name, TOWNS))]
    return list(_language_names(lang)[_draw(relation, name, len(SPOKEN))])


@functools.cache
def _language_names(lang: str) -> list[list[str]]:
    """The accepted names of the languages of `SPOKEN`, CLDR's first."""
    names = cldr.language_names(lang)
    return [
        cldr.with_variants([unicodedata.normalize("NFC", names[code])], "language", lang)
        for code in SPOKEN
    ]


def _question(lang: str, relation: str, name: str) -> str:
    return unicodedata.normalize("NFC", TEMPLATES[lang][relation].format(name=name))
