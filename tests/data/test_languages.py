"""What is known of languages, and that nothing knows it a second time."""

import pathlib
import re

import pytest

import keras_cc
from keras_cc.data import languages
from keras_cc.data.cldr_templates import TEMPLATES
from keras_cc.evaluation.metrics import normalize

pytestmark = pytest.mark.once


class TestNames:
    def test_names_are_those_of_cldr(self):
        babel = pytest.importorskip("babel")
        differing = {}
        for code, names in languages.NAMES.items():
            locale = babel.Locale.parse(code)
            english, own = locale.get_display_name("en"), locale.get_display_name(code)
            cldr = ({"Bangla": "Bengali"}.get(english, english), own)
            if names != cldr:
                differing[code] = names, cldr
        # CLDR renames one at times: Igbo is "Igbo" in Babel 2.18 and "Asụsụ Igbo" in 2.19.
        assert len(differing) <= 3, differing

    def test_the_languages_of_the_benchmarks_are_known(self):
        codes = "ar bg bn de el en es eu et fr hi ht id it ja ko my pt qu ro ru sw ta te th tr ur"
        assert {*codes.split(), "vi", "yo", "zh"} <= set(languages.NAMES)

    def test_every_language_that_is_told_apart_has_a_name(self):
        assert {*TEMPLATES, *languages.DOTTED_I, *languages.SPACELESS} <= set(languages.NAMES)

    @pytest.mark.parametrize(
        ("code", "name"),
        [("sw", "Swahili"), ("zh_Hant-TW", "Chinese"), ("PT-br", "Portuguese"), ("fil", "Filipino")]
        + [(code, None) for code in ("tlh", "", None, 3)],
    )
    def test_english_name(self, code, name):
        assert languages.english_name(code) == name

    def test_no_other_table_of_names(self):
        tables = [
            path.name
            for path in pathlib.Path(keras_cc.__file__).parent.rglob("*.py")
            if re.search(
                r"\bTurkish\b.*\bSwahili\b|\bSwahili\b.*\bTurkish\b", path.read_text(), re.S
            )
        ]
        assert tables == ["languages.py"]


@pytest.mark.parametrize(
    "lang, pivot, expected",
    [
        ("en", "en", True),
        ("EN", "en", True),
        ("en-GB", "en", True),
        ("en_us", "EN", True),
        ("en", "en-GB", False),  # a region does not speak for its language
        ("enm", "en", False),
        ("en-GB-oxendict", "en_gb", True),
        ("eng", "en", True),
        ("eng_Latn", "en", True),
        ("English", "en", True),
        (" english ", "en", True),
        ("en", "eng", True),
        ("Turkish", "tur_Latn", True),
        ("Türkçe", "tr", True),
        ("swh_Latn", "sw", True),
        ("Anglais", "en", False),
        ("", "en", False),
        (3, "en", False),
    ],
)
def test_is_language(lang, pivot, expected):
    assert languages.is_language(lang, pivot) is expected


def test_base_language():
    codes = ["pt", "pt-BR", "PT_br", "por_Latn", "Português", "zh-Hant-TW", "cmn", "arb_Arab"]
    expected = ["pt"] * 5 + ["zh", "zh", "ar"]
    assert [languages.base_language(code) for code in codes] == expected
    # What is no code that anybody gave is a language of its own, by its own name.
    codes = ["", None, "xa", "lang1", "my dialect", 3]
    expected = ["", "", "xa", "lang1", "my dialect", "3"]
    assert [languages.base_language(code) for code in codes] == expected


@pytest.mark.parametrize("code", sorted(languages.NAMES))
def test_a_language_is_itself_by_code_and_by_name(code):
    for name in (code, code.upper(), *languages.NAMES[code]):
        assert languages.base_language(name) == code


class TestLetters:
    @pytest.mark.parametrize(
        ("text", "language", "expected"),
        [
            ("DIŞ İŞ", "tr", "dış iş"),
            ("İL", "az-Latn", "il"),
            ("DISH", "en", "dish"),
            ("DISH", None, "dish"),
        ],
    )
    def test_lower_i(self, text, language, expected):
        assert languages.lower_i(text, language).lower() == expected
        assert normalize(text, language) == expected

    @pytest.mark.parametrize(
        ("word", "language", "expected"),
        [
            ("ilaç", "tr", "İlaç"),
            ("ırmak", "tr-TR", "Irmak"),
            ("ilac", "de", "Ilac"),
            ("ǆep", "bs", "ǅep"),  # a letter whose title case is not its capital
            ("iPhone", None, "IPhone"),
            ("", "tr", ""),
        ],
    )
    def test_capitalize(self, word, language, expected):
        assert languages.capitalize(word, language) == expected
