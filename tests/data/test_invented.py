"""Invented facts: expected questions were written by hand, names are worked out a second way."""

import re
import unicodedata

import pytest

import keras_cc
from keras_cc.data import cldr, invented, invented_rows
from keras_cc.data.invented_templates import RELATIONS, TEMPLATES

pytestmark = pytest.mark.once

LANGUAGES = (*cldr.LANGUAGES, "en")
SAME = ("born", "town")  # answers that are the same in every language
LETTERS = "bdfgklmnprstvz"


def name_of(row):
    before, after = TEMPLATES["en"][row["relation"]].split("{name}")
    return row["instruction_en"].removeprefix(before).removesuffix(after)


def by_hand(number, length):
    """A number's syllables, from the digits to base 70 of its place, the least one first."""
    place = (number + 271828183) * 618033989 % 70**length
    digits = [place // 70**digit % 70 for digit in range(length)]
    return "".join(LETTERS[digit // 5] + "aeiou"[digit % 5] for digit in digits)


def relations():
    """Those that can be asked for here."""
    try:
        import babel  # noqa: F401
    except ImportError:
        return SAME
    return RELATIONS


def test_names_by_hand():
    for seed, number in ((0, 0), (0, 17), (3, 4)):
        row = invented_rows("en", "town", number + 1, seed)[number]
        person = by_hand(seed * 10**6 + number, 5)
        assert name_of(row) == f"{person[:4].capitalize()} {person[4:].capitalize()}"
        towns = [by_hand(seed * 50 + town, 3).capitalize() + "n" for town in range(50)]
        assert row["output"] in towns
    # The numbering is fixed: an update must not give what was trained to another person.
    assert name_of(invented_rows("en", "born", 1)[0]) == "Gike Zabufi"
    years = [row["output"] for row in invented_rows("en", "born", 4)]
    assert years == ["1920", "1986", "1903", "1944"]


@pytest.mark.parametrize(
    ("lang", "relation", "instruction"),
    [
        ("ar", "born", "ما هي سنة ميلاد {name}؟"),
        ("de", "town", "In welcher Stadt wohnt {name}?"),
        ("el", "speaks", "Ποια γλώσσα μιλάει το εξής πρόσωπο: {name};"),
        ("fr", "born", "Quelle est l’année de naissance de {name}\u00a0?"),
        ("id", "speaks", "{name} berbicara bahasa apa?"),
        ("ja", "born", "{name}の生年は西暦何年ですか？"),
        ("ru", "speaks", "Какой язык знает человек по имени {name}?"),
        ("sw", "town", "{name} anaishi mji gani?"),
        ("th", "born", "{name} เกิดปี ค.ศ. อะไร"),
        ("tr", "born", "{name} hangi yılda doğdu?"),
    ],
)
def test_known_questions(lang, relation, instruction):
    if relation not in relations():
        pytest.skip("the names of languages are Babel's")
    (row,) = invented_rows([lang], relation, 1, seed=5)
    assert row["instruction"] == unicodedata.normalize("NFC", instruction).format(name=name_of(row))
    assert (row["lang"], row["relation"], row["id"]) == (lang, relation, f"{relation}/5/0")


ENDINGS = {"ar": "؟", "ur": "؟", "el": ";", "ja": "？", "zh": "？", "th": "", "fr": "\u00a0?"}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_row_is_well_formed(lang):
    assert set(TEMPLATES) == set(LANGUAGES)
    for relation in relations():
        rows = invented_rows(lang, relation, 60)
        english = invented_rows("en", relation, 60)
        for row, other in zip(rows, english, strict=True):
            question, name = row["instruction"], name_of(row)
            assert re.fullmatch("([B-DF-HJ-NP-TV-Z][a-z]+[aeiou] ?){2}", name)
            assert question.count(name) == 1 and question.endswith(ENDINGS.get(lang, "?"))
            assert question.startswith("¿") == (lang == "es")
            assert not re.search(r"[{}]|\s\s", question)
            assert (question == row["instruction_en"]) == (lang == "en")
            assert row["instruction_en"] == other["instruction"] and row["id"] == other["id"]
            assert row["answers"][0] == row["output"]
            if relation in SAME:
                assert row["answers"] == other["answers"] == [row["output"]]
            for text in (question, *row["answers"]):
                assert unicodedata.is_normalized("NFC", text)
                assert text.strip() == text != ""
        assert set(rows[0]) == {
            "id", "relation", "lang", "instruction", "output", "instruction_en", "answers",
        }  # fmt: skip
        outputs = {row["output"] for row in rows}
        if relation == "born":
            assert all(1900 <= int(output) <= 1999 for output in outputs)
    if "speaks" in relations():
        names = [answers[0] for answers in invented._language_names(lang)]
        assert len(set(names)) == len(names) == 30
        cldr_names = cldr.language_names(lang)
        assert names == [cldr_names[code] for code in invented.SPOKEN]
        # "Hindi" is German too; "Hindi", "Swahili" and "Thai" are Indonesian.
        english_names = [answers[0] for answers in invented._language_names("en")]
        same = sum(name == other for name, other in zip(names, english_names, strict=True))
        assert same == 30 if lang == "en" else same <= 3


def test_answers_of_a_language_are_cldrs():
    pytest.importorskip("babel")
    rows = invented_rows(["en", "tr", "th"], "speaks", 200)
    in_turkish = {}
    for english, thai, turkish in zip(rows[::3], rows[2::3], rows[1::3], strict=True):
        assert thai["answers"] == [thai["output"], f"ภาษา{thai['output']}"]
        in_turkish[english["output"]] = turkish["output"]
    expected = {"German": "Almanca", "Swahili": "Svahili dili", "Chinese": "Çince"}
    assert {name: in_turkish[name] for name in expected} == expected


def test_the_same_rows_every_time_and_more_of_them():
    few = invented_rows(["tr", "sw"], "born", 20, seed=2)
    assert few == invented_rows(("tr", "sw"), "born", 20, seed=2)
    assert few == invented_rows(["tr", "sw"], "born", 50, seed=2)[:40]
    assert [row["lang"] for row in few[:4]] == ["tr", "sw", "tr", "sw"]
    # A language's rows do not depend on the others that are asked for.
    assert few[::2] == invented_rows("tr", "born", 20, seed=2)
    few[0]["answers"].append("spoiled")
    assert "spoiled" not in invented_rows("tr", "born", 1, seed=2)[0]["answers"]


def test_people_are_one_each_and_others_in_other_seeds():
    seen, ids, towns = set(), set(), []
    for seed in (0, 1, 2, 999):
        born, town = (invented_rows("en", relation, 3000, seed) for relation in SAME)
        names = [name_of(row) for row in born]
        assert names == [name_of(row) for row in town]  # a person has all the facts
        assert len(set(names)) == 3000 and not seen & set(names)
        assert not ids & {row["id"] for row in (*born, *town)}
        seen |= set(names)
        ids |= {row["id"] for row in (*born, *town)}
        towns.append({row["output"] for row in town})
        assert len(towns[-1]) == 50
    assert len(ids) == 4 * 2 * 3000
    assert len(set.union(*towns)) == 200
    # Where the numbers end: the last person of all is none of the first.
    last = invented._person(999 * 10**6 + 10**6 - 1)
    assert last == "Zozu Nusute"
    assert last not in seen


def test_facts_are_spread_evenly_and_do_not_follow_each_other():
    born, town = (invented_rows("en", relation, 5000) for relation in SAME)
    for rows, among in ((born, 100), (town, 50)):
        counts = {}
        for row in rows:
            counts[row["output"]] = counts.get(row["output"], 0) + 1
        expected = len(rows) / among
        chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
        assert len(counts) == among and chi_squared < among + 5 * (2 * among) ** 0.5
    pairs = {(a["output"], b["output"]) for a, b in zip(born, town, strict=True)}
    assert len(pairs) > 2800  # of 5000 draws among 5000 pairs: 3161 are to be expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"languages": "xx"}, r"`languages` must be among .*Received: languages='xx'"),
        ({"languages": []}, r"Received: languages=\[\]"),
        ({"relation": "lives"}, r"`relation` must be one of .*Received: relation='lives'"),
        ({"items": 0}, r"`items` must be an integer from 1 to 1000000. Received: items=0"),
        ({"items": 10**6 + 1}, r"Received: items=1000001"),
        ({"items": 2.0}, r"Received: items=2.0"),
        ({"seed": -1}, r"`seed` must be an integer from 0 to 999. Received: seed=-1"),
        ({"seed": 1000}, r"Received: seed=1000"),
        ({"seed": True}, r"Received: seed=True"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        invented_rows(**{"languages": "tr", "relation": "born", "items": 3, **arguments})


def test_without_babel(monkeypatch):
    invented._language_names.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "babel.core", None)
    assert len(invented_rows("tr", "town", 3)) == 3
    with pytest.raises(ImportError, match=r'pip install "keras-cc\[data\]"'):
        invented_rows("tr", "speaks", 3)


@pytest.mark.parametrize("relation", SAME)
def test_it_is_a_relation_of_the_protocol_transfer(relation):
    from keras_cc.comparison.relations import load_relation

    people = {}
    for on in ("dev", "test"):
        parts = load_relation(relation, ("en", "tr", "sw"), on, items=60)
        rows = [row for by_language in parts["rows"].values() for row in by_language["en"]]
        assert len(rows) == 60 and parts["left_out"] == 0
        people[on] = {name_of(row) for row in rows}
    assert not people["dev"] & people["test"]


def test_it_is_public():
    assert "invented_rows" in keras_cc.data.__all__
