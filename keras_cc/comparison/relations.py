"""Facts that languages share: the rows of the protocol `transfer`, in parts that share no item.

The items of a relation are split by their ids, in every language alike:

    train     asked and answered in every language of the training
    pairs     answered in English alone; the other languages' prompts are seen without an answer
    held_out  answered in English alone; the other languages' prompts are never seen

Which items those are depends on what is scored: `"dev"` to choose by, `"test"` to report. Of the
CLDR set, `"dev"` leaves its test territories alone; of benchmarks in files, `"dev"` are rows of
their training split. Invented facts are others in each.
"""

import collections
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from keras_cc.data import cldr, load_jsonl
from keras_cc.evaluation import tasks
from keras_cc.laboratory import LANGUAGES as LABORATORY_LANGUAGES
from keras_cc.laboratory import facts, laboratory_rows
from keras_cc.options import choice

PARTS = ("train", "pairs", "held_out")
SCORED_ON = ("dev", "test")

_CLDR = (*cldr.RELATIONS, *cldr.BY_NAME)
_INVENTED = ("born", "town", "speaks")
_LABORATORY = tuple(facts.RELATIONS)
#: The model that knows the words of the laboratory's relations, and no others.
LABORATORY = "demo:laboratory"
_FILES = ("mkqa", "xquad")
#: The relations there are; `"rows"` are those of a file of yours.
RELATIONS = (*_CLDR, *_INVENTED, *_LABORATORY, *_FILES, "rows")
# Of every hundred items, by the hash of their ids: the first so many are `pairs`, and so on.
_SHARES = {"pairs": 20, "held_out": 20}
_TEXTS = ("instruction", "instruction_en", "output")


def load_relation(
    relation: str,
    languages: Sequence[str],
    score_on: str = "dev",
    *,
    data: "str | None" = None,
    items: int = 200,
) -> dict[str, Any]:
    """Reads the facts of a relation in several languages.

    Args:
        relation: one of `RELATIONS`. `"rows"` takes a JSON lines file, `data`: rows with `id`,
            `lang`, `instruction`, `output`, `instruction_en`, and maybe `answers` (all that are
            right; default: the output) and `part`, which says the part of an item, the same one
            in every row of it.
        languages: language codes, English among them.
        score_on: `"dev"` or `"test"`.
        data: a folder with `train` and `dev` for `"mkqa"` and `"xquad"`, a file for `"rows"`.
        items: int, of invented relations and the laboratory's: how many facts.

    Returns:
        A dict: `rows`, from part to language to rows, the same ids in each; `left_out`, how many
        items are not in every language.

    Raises:
        ValueError: for an unknown relation; rows without an id or a text, or twice in a language;
            no item that all languages have; a part without an item; an item in two parts; a
            relation with one answer alone.

    Example:

    ```python
    from keras_cc.comparison.relations import load_relation

    found = load_relation("currency_code", ("en", "tr"))
    found["rows"]["pairs"]["tr"][0]["output"]  # such as "KES"
    ```
    """
    choice("relation", relation, RELATIONS)
    choice("score_on", score_on, SCORED_ON)
    rows, part_of = _read(relation, tuple(languages), score_on, data, items)
    return split(rows, part_of)


def split(rows: Mapping[str, Sequence[dict[str, Any]]], part_of: Any) -> dict[str, Any]:
    """Takes rows apart by the parts of their items; see `load_relation`.

    Args:
        rows: from language to its rows.
        part_of: a function from a row to its part, or to None: the item is left alone.
    """
    by_id = {language: _by_id(language, some) for language, some in rows.items()}
    shared = set.intersection(*(set(found) for found in by_id.values()))
    every = set.union(*(set(found) for found in by_id.values()))
    if not shared:
        some = {language: sorted(found)[:3] for language, found in by_id.items()}
        raise ValueError(
            "The languages must share ids: the same id is the same item in each. "
            f"Received: none that all of {list(rows)} have, such as {some}"
        )
    parts: dict[str, str] = {}
    for language, found in by_id.items():
        for id in sorted(shared):
            part = part_of(found[id])
            if parts.setdefault(id, part) != part:
                raise ValueError(
                    f"An item must be in one part, whatever the language. Received: {id!r} in "
                    f"{parts[id]!r} and, in {language!r}, in {part!r}"
                )
    ordered = sorted(shared)
    taken = {part: [id for id in ordered if parts[id] == part] for part in PARTS}
    empty = [part for part, ids in taken.items() if not ids]
    if empty:
        raise ValueError(
            f"Each of the parts {PARTS} must have an item. Received: {len(shared)} items, none in "
            f"{empty}"
        )
    return {
        "rows": {
            part: {language: [found[id] for id in ids] for language, found in by_id.items()}
            for part, ids in taken.items()
        },
        "left_out": len(every) - len(shared),
    }


def check_laboratory(relation: str, model: str, languages: Sequence[str], items: int) -> None:
    """Raises where the laboratory's relations, languages and model come without each other.

    Args:
        relation: one of `RELATIONS`; `"rows"` may be of any language.
        model: a preset. A folder may be a laboratory of one's own.
        languages: language codes.
        items: int, how many facts.
    """
    if relation in _LABORATORY:
        if not set(languages) <= set(LABORATORY_LANGUAGES):
            raise ValueError(
                f"`languages` must be some of {LABORATORY_LANGUAGES} for {relation!r}. "
                f"Received: languages={tuple(languages)}"
            )
        if model.startswith("demo:") and model != LABORATORY:
            raise ValueError(
                f"`model` must be {LABORATORY!r}, or a preset of `keras_cc.laboratory.pretrain`, "
                f"for {relation!r}: no other one knows its words. Received: model={model!r}"
            )
        most = facts.MOST_ITEMS[relation]
        if items > most:
            raise ValueError(
                f"`items` must be at most {most} for {relation!r}. Received: items={items}"
            )
    elif relation != "rows" and (
        model == LABORATORY or set(languages) & set(LABORATORY_LANGUAGES[1:])
    ):
        raise ValueError(
            f"`task` must be one of {_LABORATORY} (or 'rows', of its words) for the laboratory's "
            f"model and languages. Received: task={relation!r}, model={model!r}, "
            f"languages={tuple(languages)}"
        )


def candidates(rows: Mapping[str, Mapping[str, Sequence[dict[str, Any]]]]) -> dict[str, list[str]]:
    """The distinct answers of a relation, by language: what an answer is chosen among.

    Args:
        rows: from part to language to rows.

    Raises:
        ValueError: for a language with one answer alone.
    """
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for by_language in rows.values():
        for language, some in by_language.items():
            found[language].update(dict.fromkeys(row["output"] for row in some))
    for language, answers in found.items():
        if len(answers) < 2:
            raise ValueError(
                "A relation must have two answers to choose among, in each language. "
                f"Received: {list(answers)} in {language!r}"
            )
    return {language: list(answers) for language, answers in found.items()}


def percent(id: str) -> int:
    """0 to 99, from the hash of an id: what the parts are drawn by."""
    digest = hashlib.sha256(f"transfer/{id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * 100 >> 64


# ---------------------------------------------------------------- sources


def _read(relation, languages, score_on, data, items):
    if relation in _CLDR:
        return _cldr(relation, languages, score_on)
    if relation in _INVENTED:
        from keras_cc.data import invented_rows

        rows = invented_rows(languages, relation, items, seed=SCORED_ON.index(score_on))
        return _by_language(rows, languages), lambda row: _part(row["id"])
    if relation in _LABORATORY:
        rows = laboratory_rows(languages, relation, items, seed=SCORED_ON.index(score_on))
        return _by_language(rows, languages), lambda row: _part(row["id"])
    if data is None:
        raise ValueError(f"`data` must be given for {relation!r}. Received: data=None")
    if relation == "rows":
        rows = _whole(load_jsonl(data))
        return _by_language(rows, languages), lambda row: row.get("part") or _part(row.get("id"))
    train = tasks.load(relation, data, "train", languages)
    if score_on == "dev":
        return train, lambda row: _part(row["id"])
    dev = tasks.load(relation, data, "dev", languages)
    held = {str(row["id"]) for some in dev.values() for row in some}
    rows = {language: [*train[language], *dev[language]] for language in languages}
    return rows, lambda row: _half(row["id"]) if str(row["id"]) in held else "train"


def _cldr(relation, languages, score_on):
    rows = [
        row
        for part in cldr.SPLITS
        if score_on == "test" or part != "test"
        for row in cldr.cldr_rows(languages, relation, part)
    ]

    def part_of(row):
        if score_on == "dev":
            return _part(row["id"])
        return _half(row["id"]) if cldr.territory_split(row["id"][-2:]) == "test" else "train"

    return _by_language(rows, languages), part_of


def _part(id):
    rest = percent(id)
    for part, share in _SHARES.items():
        if rest < share:
            return part
        rest -= share
    return "train"


def _half(id):
    return "pairs" if percent(id) % 2 else "held_out"


def _whole(rows):
    """Rows of a file, checked. Right is the output alone where there are no `answers`."""
    found = []
    for number, row in enumerate(rows):
        own = {"answers": [row.get("output")]}
        if row.get("lang") == "en":
            own["instruction_en"] = row.get("instruction")
        row = {**own, **{key: value for key, value in row.items() if value is not None}}
        wrong = [key for key in _TEXTS if not isinstance(row.get(key), str) or not row[key].strip()]
        if wrong:
            raise ValueError(
                f"`data`, row {number}: {', '.join(_TEXTS)} must be text that is not blank. "
                f"Received: {wrong[0]}={row.get(wrong[0])!r}"
            )
        found.append(row)
    return found


def _by_language(rows, languages):
    found: dict[str, list] = {language: [] for language in languages}
    for row in rows:
        if row.get("lang") in found:
            found[row["lang"]].append(row)
    missing = [language for language, some in found.items() if not some]
    if missing:
        there = sorted({str(row.get("lang")) for row in rows})
        raise ValueError(f"`languages` must be some of {there}. Received: {missing} among them")
    return found


def _by_id(language, rows):
    found = {}
    for number, row in enumerate(rows):
        id = row.get("id")
        if id is None:
            raise ValueError(
                f"{language}, row {number}: an `id` is needed, the same one in every language. "
                f"Received: keys {sorted(row)}"
            )
        if str(id) in found:
            raise ValueError(
                f"An id must come once in a language. Received: {id!r} twice in {language!r}"
            )
        found[str(id)] = row
    return found
