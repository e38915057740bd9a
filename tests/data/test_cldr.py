"""The CLDR question answering set: expected rows were written by hand, not copied from the code."""

import re
import sys
import unicodedata

import pytest

pytest.importorskip("babel", reason="the CLDR set reads CLDR through Babel")

from keras_cc.data import cldr
from keras_cc.data.cldr_grammar import (
    bengali_genitive,
    korean_topic,
    name_forms,
    turkish_genitive,
)
from keras_cc.data.cldr_templates import TEMPLATES

pytestmark = pytest.mark.once

ALL_LANGUAGES = (*cldr.LANGUAGES, "en")


def rows_by_id(lang):
    rows = [row for split in cldr.SPLITS for row in cldr.cldr_rows(lang, split=split)]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.mark.parametrize(
    ("lang", "item", "instruction", "output"),
    [
        ("en", "currency/US", "What is the currency of the United States?", "US Dollar"),
        ("en", "continent/CK", "On which continent are the Cook Islands located?", "Oceania"),
        ("tr", "currency/KE", "Kenya'nın para birimi nedir?", "Kenya şilini"),
        ("tr", "language/BR", "Brezilya'nın resmî dili nedir?", "Portekizce"),
        ("sw", "currency/KE", "Sarafu ya Kenya ni ipi?", "Shilingi ya Kenya"),
        ("ja", "language/BR", "ブラジルの公用語は何ですか？", "ポルトガル語"),
        ("zh", "continent/KE", "肯尼亚位于哪个大洲？", "非洲"),
        ("ar", "currency/EG", "ما هي عملة مصر؟", "جنيه مصري"),
        ("bn", "continent/KE", "কেনিয়া কোন মহাদেশে অবস্থিত?", "আফ্রিকা"),
        ("de", "currency/CH", "Welche Währung hat die Schweiz?", "Schweizer Franken"),
        ("de", "language/US", "Welche Amtssprache haben die Vereinigten Staaten?", "Englisch"),
        ("el", "continent/JP", "Σε ποια ήπειρο βρίσκεται η ακόλουθη χώρα ή περιοχή: Ιαπωνία;",
         "Ασία"),
        ("es", "currency/GB", "¿Cuál es la moneda del Reino Unido?", "libra esterlina"),
        ("fr", "language/JP", "Quelle est la langue officielle du Japon\u00a0?", "japonais"),
        ("hi", "currency/JP", "जापान की मुद्रा क्या है?", "जापानी येन"),
        ("ko", "continent/JP", "일본은 어느 대륙에 있나요?", "아시아"),
        ("pt", "continent/PH", "Em que continente ficam as Filipinas?", "Ásia"),
        ("ru", "language/FR", "Какой официальный язык у следующей страны или территории: Франция?",
         "французский"),
        ("te", "continent/MV", "మాల్దీవులు ఏ ఖండంలో ఉన్నాయి?", "ఆసియా"),
        ("th", "language/TH", "ภาษาราชการของไทยคือภาษาอะไร", "ไทย"),
        ("ur", "continent/KE", "کینیا کا تعلق کس براعظم سے ہے؟", "افریقہ"),
        ("vi", "language/VN", "Ngôn ngữ chính thức của Việt Nam là gì?", "Tiếng Việt"),
        ("yo", "currency/KE", "Kí ni owó tí wọ́n ń ná ní Kenya?", "Ṣiili Kenya"),
        ("id", "continent/KE", "Kenya terletak di benua apa?", "Afrika"),
        ("eu", "currency/KE", "Zein da herrialde edo lurralde honetako moneta: Kenya?",
         "txelin kenyarra"),
    ],
)  # fmt: skip
def test_known_row(lang, item, instruction, output):
    row = rows_by_id(lang)[item]
    assert row["instruction"] == unicodedata.normalize("NFC", instruction)
    assert row["output"] == output
    assert row["answers"][0] == output
    assert row["lang"] == lang
    assert row["relation"] == item.split("/")[0]


@pytest.mark.parametrize(
    ("lang", "item", "instruction", "answers"),
    [
        ("en", "currency_code/KE", "What is the currency code of Kenya?", ["KES"]),
        ("tr", "currency_code/KE", "Kenya'nın para birimi kodu nedir?", ["KES"]),
        ("en", "calling_code/KE", "What is the calling code of Kenya?", ["+254", "254"]),
        ("tr", "calling_code/KE", "Kenya'nın uluslararası telefon kodu nedir?", ["+254", "254"]),
        ("de", "calling_code/CH", "Welche internationale Vorwahl hat die Schweiz?", ["+41", "41"]),
        ("ja", "calling_code/BR", "ブラジルの国際電話の国番号は何ですか？", ["+55", "55"]),
        ("sw", "calling_code/US", "Msimbo wa simu wa kimataifa wa Marekani ni upi?", ["+1", "1"]),
    ],
)
def test_known_row_of_a_relation_by_its_name(lang, item, instruction, answers):
    if item.startswith("calling"):
        pytest.importorskip("phonenumbers", reason="calling codes are read from it")
    relation = item.split("/")[0]
    rows = [row for split in cldr.SPLITS for row in cldr.cldr_rows(lang, relation, split)]
    (row,) = [row for row in rows if row["id"] == item]
    assert (row["instruction"], row["output"], row["answers"]) == (instruction, answers[0], answers)
    assert {row["relation"] for row in rows} == {relation}
    assert not {row["relation"] for row in cldr.cldr_rows(lang)} & {*cldr.BY_NAME}


def test_calling_codes_are_of_one_territory_or_shared_in_whole():
    pytest.importorskip("phonenumbers", reason="calling codes are read from it")
    rows = [row for part in cldr.SPLITS for row in cldr.cldr_rows("en", "calling_code", part)]
    of = {row["id"][-2:]: row["output"] for row in rows}
    assert len(of) > 200 and all(re.fullmatch(r"\+[1-9]\d{0,2}", code) for code in of.values())
    assert [code for code in sorted(of) if of[code] == "+1"] == ["CA", "US"]
    assert "JM" not in of and "PN" not in of  # +1 876; and none at all
    assert (of["GB"], of["JE"], of["KZ"]) == ("+44", "+44", "+7")


def test_without_phonenumbers_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    cldr._calling_code_rows.cache_clear()
    with pytest.raises(ImportError, match=r"phonenumbers, which is not installed.*keras-cc\[data"):
        cldr.cldr_rows("tr", "calling_code")
    assert cldr.cldr_rows("tr", "currency_code")


def test_known_rows_cover_every_language():
    covered = {mark[0] for mark in test_known_row.pytestmark[0].args[1]}
    assert covered == set(ALL_LANGUAGES) == set(TEMPLATES)
    assert len(cldr.LANGUAGES) == 21


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Kenya", "Kenya'nın"),
        ("Türkiye", "Türkiye'nin"),
        ("İran", "İran'ın"),
        ("Irak", "Irak'ın"),
        ("Peru", "Peru'nun"),
        ("Çin", "Çin'in"),
        ("Brezilya", "Brezilya'nın"),
        ("Kongo", "Kongo'nun"),
        ("Ürdün", "Ürdün'ün"),
        ("Lüksemburg", "Lüksemburg'un"),
        ("Birleşik Krallık", "Birleşik Krallık'ın"),
        ("Cook Adaları", "Cook Adaları'nın"),
        ("Fas", "Fas'ın"),
        ("Laos", "Laos'un"),
        ("Curaçao", "Curaçao'nun"),
    ],
)
def test_turkish_genitive(name, expected):
    assert turkish_genitive(name) == expected


def test_turkish_genitive_follows_sound_not_spelling():
    assert turkish_genitive("Nepal", "NP") == "Nepal'in"
    assert turkish_genitive("Liechtenstein", "LI") == "Liechtenstein'ın"
    with pytest.raises(ValueError, match="Received: name='Brr'"):
        turkish_genitive("Brr")


def test_other_inflections():
    assert [bengali_genitive(name) for name in ("কেনিয়া", "জাপান", "পেরু", "মালাউই")] == [
        "কেনিয়ার",
        "জাপানের",
        "পেরুর",
        "মালাউইয়ের",
    ]
    assert [korean_topic(name) for name in ("케냐", "일본")] == ["케냐는", "일본은"]
    french = {"FR": "France", "KE": "Kenya", "IN": "Inde", "PH": "Philippines", "CU": "Cuba"}
    assert [name_forms("fr", code, name)["of"] for code, name in french.items()] == [
        "de la France",
        "du Kenya",
        "de l’Inde",
        "des Philippines",
        "de Cuba",
    ]
    portuguese = {"KE": "Quênia", "FR": "França", "US": "Estados Unidos", "PT": "Portugal"}
    assert [name_forms("pt", code, name)["of"] for code, name in portuguese.items()] == [
        "do Quênia",
        "da França",
        "dos Estados Unidos",
        "de Portugal",
    ]
    assert name_forms("de", "GB", "Vereinigtes Königreich")["the"] == "das Vereinigte Königreich"
    assert name_forms("es", "NL", "Países Bajos")["está"] == "están"


# Each script by its own block, and the punctuation a question ends in.
SCRIPTS = {
    "ar": "[\u0600-\u06ff]", "bn": "[\u0980-\u09ff]", "el": "[\u0370-\u03ff]",
    "hi": "[\u0900-\u097f]", "ja": "[\u3040-\u30ff\u4e00-\u9fff]", "ko": "[\uac00-\ud7a3]",
    "ru": "[\u0400-\u04ff]", "te": "[\u0c00-\u0c7f]", "th": "[\u0e00-\u0e7f]",
    "ur": "[\u0600-\u06ff]", "zh": "[\u4e00-\u9fff]",
}  # fmt: skip
ENDINGS = {"ar": "؟", "ur": "؟", "el": ";", "ja": "？", "zh": "？", "th": "", "fr": "\u00a0?"}


@pytest.mark.parametrize("lang", ALL_LANGUAGES)
def test_every_row_is_well_formed(lang):
    from babel import Locale

    currencies = set(Locale.parse("en").currencies)
    rows = rows_by_id(lang)
    names = cldr._names(lang)
    assert len(rows) >= 590
    for row in rows.values():
        question, output = row["instruction"], row["output"]
        assert question.endswith(ENDINGS.get(lang, "?"))
        assert question.startswith("¿") == (lang == "es")
        assert ("?" in question) == (lang not in ("ar", "ur", "el", "ja", "zh", "th"))
        assert not re.search(r"[{}]|\s\s|\(\)", question)
        assert output.strip() == output != ""
        assert output not in currencies | {row["id"][-2:]}
        assert all(answer.strip() == answer != "" for answer in row["answers"])
        assert (row["instruction_en"] == question) == (lang == "en")
        for text in (question, *row["answers"]):
            assert unicodedata.is_normalized("NFC", text)
        if lang in SCRIPTS:
            assert re.search(SCRIPTS[lang], output)
            assert not re.search("[A-Za-z]", question)
        # Two languages change the name's own ending: German adjectives, Telugu and Urdu plurals.
        name = names[row["id"][-2:]]
        if lang == "de" and re.match("(Ver|Brit|Amerik.*ische|Nörd|Karib|Paläst)", name):
            name = name.split()[-1]
        assert name[: -1 if lang == "te" else -2 if lang == "ur" else None] in question


def test_no_currency_is_left_in_english():
    english = rows_by_id("en")
    for lang in cldr.LANGUAGES:
        same = {
            row["output"]
            for item, row in rows_by_id(lang).items()
            if row["relation"] == "currency" and row["output"] == english[item]["output"]
        }
        assert same <= {"Euro"}


def test_splits_are_disjoint_by_territory_everywhere():
    split_of = {}
    for lang in ALL_LANGUAGES:
        for split in cldr.SPLITS:
            for row in cldr.cldr_rows(lang, split=split):
                assert split_of.setdefault(row["id"].split("/")[1], split) == split
    shares = {split: list(split_of.values()).count(split) for split in cldr.SPLITS}
    assert 0.63 < shares["train"] / len(split_of) < 0.77
    assert 0.06 < shares["validation"] / len(split_of) < 0.14
    assert 0.14 < shares["test"] / len(split_of) < 0.26
    # The hash is fixed: a library update must not move a test territory into training.
    for split, code in (("train", "KE"), ("validation", "DE"), ("test", "FR")):
        assert cldr.territory_split(code) == split


def test_an_id_is_the_same_item_in_every_language():
    english = rows_by_id("en")
    for lang in cldr.LANGUAGES:
        for item, row in rows_by_id(lang).items():
            assert row["instruction_en"] == english[item]["instruction"]


def test_gold_answer_is_the_only_one():
    rows = rows_by_id("en")
    # Two currencies; several official languages; two continents; a fact CLDR files otherwise.
    for item in ("currency/PA", "language/CH", "language/KE", "continent/TR", "language/ZA"):
        assert item not in rows
    assert not {"AQ", "BV", "HK"} & {item.split("/")[1] for item in rows}
    # America counts as one continent or as two.
    assert rows["continent/BR"]["answers"] == ["South America", "Americas"]
    assert rows["currency/FR"]["output"] == "Euro"


def test_answers_include_the_form_without_a_bracket():
    assert rows_by_id("de")["currency/SN"]["answers"] == ["CFA-Franc (BCEAO)", "CFA-Franc"]
    assert rows_by_id("th")["language/TH"]["answers"] == ["ไทย", "ภาษาไทย"]


def test_report_accounts_for_every_question():
    report = cldr.cldr_report()
    assert report["territories"] == 241
    asked = report["territories"] * len(cldr.RELATIONS)
    dropped = sum(len(c) for reasons in report["skipped_items"].values() for c in reasons.values())
    for lang in ALL_LANGUAGES:
        stats = report["languages"][lang]
        unworded = sum(len(ids) for ids in stats["skipped"].values())
        assert sum(stats["rows"].values()) + unworded + dropped == asked
        for split in cldr.SPLITS:
            assert stats["rows"][split] == len(cldr.cldr_rows(lang, split=split))
    assert report["skipped_territories"]["name_is_a_label"] == ["HK", "MO"]
    assert "TR" in report["skipped_items"]["continent"]["disputed"]


def test_selection_order_and_seed():
    rows = cldr.cldr_rows(["tr", "sw"], relations="currency", split="test")
    assert {row["lang"] for row in rows} == {"tr", "sw"}
    assert {row["relation"] for row in rows} == {"currency"}
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    shuffled = cldr.cldr_rows(["tr", "sw"], relations="currency", split="test", seed=1)
    assert shuffled != rows
    assert shuffled == cldr.cldr_rows(["tr", "sw"], relations="currency", split="test", seed=1)
    assert sorted(map(repr, shuffled)) == sorted(map(repr, rows))
    assert {row["lang"] for row in cldr.cldr_rows()} == set(cldr.LANGUAGES)
    rows[0]["answers"].append("spoiled")  # a caller's change must not reach the next caller
    assert "spoiled" not in cldr.cldr_rows(["tr", "sw"], "currency", "test")[0]["answers"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"languages": "xx"}, r"`languages` must be among .*Received: languages='xx'"),
        ({"languages": ["tr", "xx"]}, r"Received: languages=\['tr', 'xx'\]"),
        ({"languages": []}, r"Received: languages=\[\]"),
        ({"relations": "capital"}, r"`relations` must be among .*Received: relations='capital'"),
        ({"split": "dev"}, r"`split` must be one of .*Received: split='dev'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        cldr.cldr_rows(**arguments)


def test_without_babel_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel.core", None)
    with pytest.raises(ImportError, match=r'pip install "keras-cc\[data\]"'):
        cldr._babel()
