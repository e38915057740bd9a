"""Questions and answers from Unicode CLDR: a parallel set in 22 languages, with no download.

Babel carries CLDR's names of territories, currencies and languages, and says which territory uses
which. What it does not carry is the continent of a territory: that is in `cldr_tables.py`.
Source: Unicode CLDR (https://cldr.unicode.org) through Babel; licence Unicode-3.0.

Notable choices:

- The gold answer must be the only one. A territory with two currencies, two official languages
  or two continents gives no question; `cldr_report` names each one left out and the reason.
- Splits go by territory, in every language and relation at once, so nothing about a test
  territory is ever seen in training. (An answer can recur: many territories use the euro.)
- Facts are CLDR's of the installed Babel: a recent change of currency may not be in it yet.
- Calling codes, which CLDR no longer has, are libphonenumber's, through phonenumbers.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from keras_cc.data.cldr_tables import CONTINENTS, DISPUTED, SCRIPTS, SKIPPED_TERRITORIES
from keras_cc.data.cldr_templates import (
    BY_NAME,
    LANGUAGE_ANSWER_VARIANTS,
    RELATIONS,
    TEMPLATES,
    question,
)

LANGUAGES: tuple[str, ...] = tuple(sorted(set(TEMPLATES) - {"en"}))
"""The 21 target languages. "en" can be asked for too: its rows are their own pivot."""

SPLITS: tuple[str, ...] = ("train", "validation", "test")

_BRACKETED = re.compile(r"\s*[(（][^)）]*[)）]")

Item = tuple[str, str, tuple[str, ...]]
"""A relation, a territory's code, and the CLDR keys of its accepted answers, best first."""


def cldr_rows(
    languages: str | Iterable[str] | None = None,
    relations: str | Iterable[str] | None = None,
    split: str = "train",
    seed: int | None = None,
) -> list[dict[str, Any]]:
    """Builds the rows of the CLDR question answering set.

    Needs Babel, and neither TensorFlow nor a network.

    Args:
        languages: ISO 639-1 codes, one or several, of `LANGUAGES` or `"en"`. `None` takes the 21
            of `LANGUAGES`.
        relations: names, one or several, of `RELATIONS`. `None` takes all of them. By its name
            alone there are `"currency_code"`, the ISO 4217 code ("KES") of the items of
            `"currency"`, and `"calling_code"` ("+254"): the same answer in every language.
        split: `"train"` (about 70 % of the territories), `"validation"` (10 %) or `"test"` (20 %).
        seed: shuffles the rows. `None` keeps them in the order of id, then language.

    Returns:
        One dict a row. `id` (`"currency/KE"`, the same item in every language), `relation`,
        `lang`, `instruction` (the question in `lang`), `output` (the gold answer),
        `instruction_en` (the question in English) are strings; `answers` is a list of every
        accepted answer, `output` first.

    Raises:
        ValueError: for an unknown language, relation or split.
        ImportError: if Babel is not installed, or phonenumbers for `"calling_code"`.

    Example:

    ```python
    rows = keras_cc.data.cldr_rows("tr", relations="currency", split="train")
    (kenya,) = [row for row in rows if row["id"] == "currency/KE"]
    kenya["instruction"], kenya["output"]  # "Kenya'nın para birimi nedir?", "Kenya şilini"
    ```

    Source: Unicode CLDR through Babel (Unicode-3.0); calling codes: Google's libphonenumber through
    phonenumbers (Apache-2.0).
    """
    languages = choices("languages", languages, (*LANGUAGES, "en"), LANGUAGES)
    relations = choices("relations", relations, (*RELATIONS, *BY_NAME), RELATIONS)
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {SPLITS}. Received: split={split!r}")
    by_name = [relation for relation in BY_NAME if relation in relations]
    rows = [
        dict(row, answers=list(row["answers"]))  # a copy: the rows are cached
        for lang in languages
        for some in (_language_rows(lang)[0], *(_rows_by_name(lang, name) for name in by_name))
        for row in some
        if row["relation"] in relations and territory_split(row["id"][-2:]) == split
    ]
    rows.sort(key=lambda row: (row["id"], row["lang"]))
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return rows


def cldr_report() -> dict[str, Any]:
    """Counts what the set holds and names what it leaves out.

    Returns:
        A dict. `territories`: how many take part. `skipped_territories`: reason to codes.
        `skipped_items`: relation, then reason, to codes. `languages`: for each language, `en`
        included, `rows` (split to count) and `skipped` (reason to ids).

    Raises:
        ImportError: if Babel is not installed.

    Example:

    ```python
    keras_cc.data.cldr_report()["skipped_territories"]["name_is_a_label"]  # ["HK", "MO"]
    ```
    """
    _, skipped_items = _items()
    report: dict[str, Any] = {
        "territories": len(_territories()),
        "skipped_territories": {k: v.split() for k, v in SKIPPED_TERRITORIES.items()},
        "skipped_items": {r: {k: list(v) for k, v in s.items()} for r, s in skipped_items.items()},
        "languages": {},
    }
    for lang in (*LANGUAGES, "en"):
        rows, skipped = _language_rows(lang)
        splits = [territory_split(row["id"][-2:]) for row in rows]
        report["languages"][lang] = {
            "rows": {split: splits.count(split) for split in SPLITS},
            "skipped": {reason: list(ids) for reason, ids in skipped.items()},
        }
    return report


def territory_split(code: str) -> str:
    """Gives the split of a territory, from a hash of its code alone.

    Args:
        code: ISO 3166-1 alpha-2 code.

    Returns:
        `"train"`, `"validation"` or `"test"`.
    """
    digest = hashlib.sha256(f"cldr_qa/{code}".encode()).digest()
    percent = int.from_bytes(digest[:8], "big") * 100 >> 64
    return "train" if percent < 70 else "validation" if percent < 80 else "test"


def choices(
    argument: str, value: str | Iterable[str] | None, known: tuple[str, ...], default: tuple
) -> tuple[str, ...]:
    """One or several of what is known, each once; None takes the default."""
    chosen = default if value is None else (value,) if isinstance(value, str) else tuple(value)
    if not chosen or any(choice not in known for choice in chosen):
        raise ValueError(f"`{argument}` must be among {known}. Received: {argument}={value!r}")
    return tuple(dict.fromkeys(chosen))


def _babel() -> tuple[Any, Any]:
    try:
        from babel.core import Locale, get_global
    except ImportError as error:
        raise ImportError(
            "The CLDR question answering set reads CLDR through Babel, which is not installed. "
            'Install it with: pip install "keras-cc[data]"'
        ) from error
    return Locale, get_global


def language_names(lang: str) -> Mapping[str, str]:
    """CLDR's names of languages in one language, by code."""
    return _babel()[0].parse(lang).languages


def _territories() -> list[str]:
    return sorted(code for codes in CONTINENTS.values() for code in codes.split())


@functools.cache
def _items() -> tuple[list[Item], dict[str, dict[str, list[str]]]]:
    """Lists the questions that have one gold answer, and the territories that have none."""
    _, get_global = _babel()
    continent_of = {c: number for number, codes in CONTINENTS.items() for c in codes.split()}
    items: list[Item] = []
    skipped: dict[str, dict[str, list[str]]] = {relation: {} for relation in RELATIONS}
    for code in _territories():
        # (currency, from, to, is legal tender); no end date is today.
        currencies = [
            currency
            for currency, _, end, tender in get_global("territory_currencies").get(code, ())
            if tender and end is None
        ]
        # "uz_Cyrl" and "uz" are one language.
        languages = {
            key.split("_")[0]
            for key, facts in get_global("territory_languages").get(code, {}).items()
            if facts["official_status"] in ("official", "de_facto_official")
        }
        continent = continent_of[code]
        # America is one continent to some and two to others.
        continents = (continent, "019") if continent in ("003", "005") else (continent,)
        for relation, gold, answers in (
            ("currency", currencies, tuple(currencies)),
            ("language", languages, tuple(languages)),
            ("continent", [continent], continents),
        ):
            if code in DISPUTED[relation].split():
                skipped[relation].setdefault("disputed", []).append(code)
            elif len(gold) != 1:
                reason = "several_answers" if gold else "no_answer"
                skipped[relation].setdefault(reason, []).append(code)
            else:
                items.append((relation, code, answers))
    return items, skipped


@functools.cache
def _names(lang: str) -> dict[str, str]:
    """Gives the names of all territories in one language, ready to stand in a question."""
    locale = _babel()[0].parse(lang)
    full = {c: locale.territories[c] for c in _territories() if c in locale.territories}
    full = {code: unicodedata.normalize("NFC", name) for code, name in full.items()}
    plain = {code: _BRACKETED.sub("", name) for code, name in full.items()}
    names = {}
    for code, name in plain.items():
        # "Myanmar (Burma)" is plain Myanmar, unless the bracket tells two names apart.
        if list(plain.values()).count(name) > 1:
            name = full[code]
        name = re.sub(r"\s[-–]\s", "-", name)  # "Congo - Kinshasa"
        if lang == "te":
            name = name.replace("- ", "-")  # the same, set without its first space
        if lang == "en":
            name = name.replace(" & Gren", " & the Gren").replace(" & ", " and ")
        if lang == "ru":  # abbreviated in CLDR: острова, остров
            name = name.replace("о-ва", "острова").replace("о-в", "остров")
        names[code] = name
    return names


def _is_translated(text: str, key: str, lang: str) -> bool:
    script = SCRIPTS.get(lang)
    if script is None:
        return text != key
    return any(re.match(script, unicodedata.name(letter, "")) for letter in text)


@functools.cache
def _language_rows(lang: str) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Builds every row of one language, and lists the ids it cannot word by reason."""
    locale = _babel()[0].parse(lang)
    regions = locale.territories
    tables = {"currency": locale.currencies, "language": locale.languages, "continent": regions}
    rows: list[dict[str, Any]] = []
    skipped: dict[str, list[str]] = {}
    for relation, code, keys in _items()[0]:
        found = [tables[relation][key] for key in keys if key in tables[relation]]
        reason = _cannot_name(lang, code)
        if reason is None and (not found or not _is_translated(found[0], keys[0], lang)):
            reason = "answer_not_translated"
        if reason is not None:
            skipped.setdefault(reason, []).append(f"{relation}/{code}")
        else:
            answers = [unicodedata.normalize("NFC", answer) for answer in found]
            rows.append(_row(lang, relation, code, with_variants(answers, relation, lang)))
    return rows, skipped


def _cannot_name(lang: str, code: str) -> str | None:
    """Why no question of a language can be about a territory."""
    names = _names(lang)
    name = names.get(code, "")
    if not name or not _is_translated(name, code, lang):
        return "name_not_translated"
    if list(names.values()).count(name) > 1:
        return "name_shared_with_another_territory"
    return None


def _row(lang: str, relation: str, code: str, answers: list[str]) -> dict[str, Any]:
    return {
        "id": f"{relation}/{code}",
        "relation": relation,
        "lang": lang,
        "instruction": question(lang, relation, code, _names(lang)[code]),
        "output": answers[0],
        "instruction_en": question("en", relation, code, _names("en")[code]),
        "answers": answers,
    }


def _rows_by_name(lang: str, relation: str) -> list[dict[str, Any]]:
    """The rows of a relation of `BY_NAME`, whose answers are the same in every language."""
    if relation == "calling_code":
        return _calling_code_rows(lang)
    keys = {code: keys[0] for relation, code, keys in _items()[0] if relation == "currency"}
    codes = [row["id"][-2:] for row in _language_rows(lang)[0] if row["relation"] == "currency"]
    return [_row(lang, relation, code, [keys[code]]) for code in codes]


@functools.cache
def _calling_code_rows(lang: str) -> list[dict[str, Any]]:
    try:
        from phonenumbers import country_code_for_region
    except ImportError as error:
        raise ImportError(
            'The relation "calling_code" reads the codes from phonenumbers, which is not '
            'installed. Install it with: pip install "keras-cc[data]"'
        ) from error
    rows = []
    for code in _territories():
        number = country_code_for_region(code)  # 0: it has none
        # Territories of the North American plan have +1 and an area code beside it.
        alone = number and (number != 1 or code in ("US", "CA"))
        if alone and _cannot_name(lang, code) is None:
            rows.append(_row(lang, "calling_code", code, [f"+{number}", str(number)]))
    return rows


def with_variants(answers: list[str], relation: str, lang: str) -> list[str]:
    """Adds the answer without its brackets, and the long form of a language's name."""
    # CLDR marks an acronym with square brackets, "[CFP] franc", and a remark with round ones.
    plain = re.sub(r"[\[\]]", "", answers[0])
    variants = [*answers, plain, _BRACKETED.sub("", plain)]
    if relation == "language" and lang in LANGUAGE_ANSWER_VARIANTS:
        variants.append(LANGUAGE_ANSWER_VARIANTS[lang].format(answer=answers[0]))
    return list(dict.fromkeys(variants))
