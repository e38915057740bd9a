"""Metrics of generated answers: hand-computed, in many scripts."""

import random
import sys

import pytest
from rouge_score import rouge_scorer

from keras_cc.evaluation import metrics
from keras_cc.evaluation.metrics import (
    contains,
    exact_match,
    f1,
    first_line,
    last_number,
    normalize,
    number,
    rouge_l,
    tokens,
)

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n  Nairobi \nWhat is", "Nairobi"),
        ("شلن", "شلن"),
        ("a\u2028b", "a"),
        (" \n\t", ""),
        ("", ""),
    ],
)
def test_first_line(text, expected):
    assert first_line(text) == expected


class TestNormalize:
    @pytest.mark.parametrize(
        ("text", "language", "expected"),
        [
            ("  The U.S.,\t２０ % ", "en", "us 20"),
            ("The U.S.", "de", "the us"),  # an article in English alone
            ("a Theatre an", "en", "theatre"),
            ("«Straße»!", "de", "strasse"),
            ("¿Qué?", "es", "qué"),
            ("الكورتيزول، والكاتيكولامينات؟", "ar", "الكورتيزول والكاتيكولامينات"),
            ("क्या है?।", "hi", "क्या है"),
            ("「東京」・京都。", "ja", "東京京都"),
            ("ﾄｳｷｮｳ", "ja", "トウキョウ"),  # half-width kana
            ("e\u0301te\u0301", "fr", "\u00e9t\u00e9"),  # decomposed, composed
            ("\u200fشلن\u200e", "ar", "شلن"),  # marks of direction
            ("İSTANBUL IĞDIR", "tr", "istanbul ığdır"),
            ("IGDIR", "en-GB", "igdir"),
        ],
    )
    def test_by_hand(self, text, language, expected):
        assert normalize(text, language) == expected

    @pytest.mark.parametrize(("text", "expected"), [("The", "the"), ("%", "%"), ("An a", "an a")])
    def test_what_would_leave_nothing_is_not_done(self, text, expected):
        assert normalize(text, "en") == expected

    @pytest.mark.parametrize("text", ["", " ", "\n\t", "\u3000"])
    def test_blank_texts_are_empty(self, text):
        assert normalize(text, "en") == ""


class TestTokens:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("हिन्दी, 漢字 ABC", ["हिन्दी", "漢", "字", "abc"]),
            ("مُحَمَّد، علي", ["مُحَمَّد", "علي"]),
            # the marks stay with their letters, U+0E33 is U+0E4D and U+0E32 in NFKC
            ("ที่นี่", ["ที่", "นี่"]),
            ("กำ", ["ก\u0e4d", "า"]),
            ("क\u094d\u200dष", ["क\u094dष"]),  # a joiner is inside a word
            ("한국어 단어", ["한국어", "단어"]),  # Korean has spaces
            ("iPhone15を買う", ["iphone15", "を", "買", "う"]),
            ("don't 2019-09", ["don", "t", "2019", "09"]),
            ("...", []),
            ("\u0301a", ["a"]),  # a mark of nothing
        ],
    )
    def test_by_hand(self, text, expected):
        assert tokens(text) == expected


class TestExactMatch:
    def test_any_of_the_answers(self):
        assert exact_match("kenya şilini.", ["shilling", "Kenya şilini"], "tr") == 1.0
        assert exact_match("kenya şilini parası", ["Kenya şilini"], "tr") == 0.0

    def test_articles_of_english_alone(self):
        assert exact_match("the Nile", ["Nile"], "en") == 1.0
        assert exact_match("the Nile", ["Nile"], "sw") == 0.0

    def test_case_of_turkish(self):
        assert exact_match("IĞDIR", ["Iğdır"], "tr") == 1.0
        assert exact_match("IĞDIR", ["Iğdır"], "en") == 0.0


class TestF1:
    def test_by_hand(self):
        # "red fox" against "fox": 1 common, precision 1/2, recall 1
        assert f1("the red fox", ["a fox"], "en") == pytest.approx(2 / 3)
        # 3 tokens against 2 (articles stay), none but "fox" in common
        assert f1("the red fox", ["a fox"], "de") == pytest.approx(2 / 5)

    def test_counts_a_token_as_often_as_both_have_it(self):
        assert f1("ha ha ha", ["ha ha"]) == pytest.approx(2 * 2 / 5)

    def test_the_best_answer_counts(self):
        assert f1("Nairobi", ["Mombasa Nairobi", "Nairobi"]) == 1.0

    def test_chinese_is_compared_by_character(self):
        # 肯尼亚先令 and 先令: 2 common of 5 and 2
        assert f1("肯尼亚先令", ["先令"], "zh") == pytest.approx(4 / 7)

    def test_thai_is_compared_by_letters_with_their_marks(self):
        # ที่ นี่ and ที่ ดี: 1 common of 2 and 2
        assert f1("ที่นี่", ["ที่ดี"], "th") == pytest.approx(1 / 2)

    def test_hindi_vowels_are_no_tokens(self):
        assert f1("की", ["का"], "hi") == 0.0


BLANK = [("", "", 1.0), (" ", "\n", 1.0), ("", "a b", 0.0), ("a b", "", 0.0)]
SCORES = (exact_match, f1, contains, rouge_l)


class TestBlank:
    @pytest.mark.parametrize("metric", SCORES)
    @pytest.mark.parametrize(("prediction", "answer", "expected"), BLANK)
    def test_blank_texts(self, metric, prediction, answer, expected):
        assert metric(prediction, [answer]) == expected

    @pytest.mark.parametrize("metric", SCORES)
    def test_punctuation_is_not_blank(self, metric):
        assert metric("%", ["%"]) == 1.0
        assert metric("%", [""]) == 0.0
        assert metric("%", ["one"]) == 0.0
        assert metric("", ["%"]) == 0.0
        assert metric("one", ["%", "one"]) == 1.0

    @pytest.mark.parametrize("metric", [*SCORES, number])
    def test_no_answers(self, metric):
        with pytest.raises(ValueError, match="`answers` must have at least one"):
            metric("x", [])
        with pytest.raises(TypeError, match="`answers` must be a list of strings"):
            metric("x", "x")


class TestContains:
    def test_lower_cased_substring_and_nothing_else(self):
        assert contains("I think NAIROBI, no?", ["mombasa", "Nairobi "]) == 1.0
        assert contains("Nai robi", ["Nairobi"]) == 0.0
        assert contains("Nairobi", ["Nairobi city"]) == 0.0


class TestRougeL:
    def test_by_hand(self):
        # subsequence "the cat sat", 3 of 3 and 3 of 4
        assert rouge_l("the cat sat", ["The cat sat down."]) == pytest.approx(6 / 7)
        # order counts: "b c" or "a"
        assert rouge_l("a b c", ["b c a"]) == pytest.approx(2 / 3)

    def test_arabic(self):
        # 3 words each, the outer two in common
        assert rouge_l("قرر البرلمان، أمس", ["قرر المجلس أمس"], "ar") == pytest.approx(2 / 3)

    def test_arabic_vowel_signs_do_not_split_words(self):
        assert rouge_l("مُحَمَّد", ["مُحِبّ"], "ar") == 0.0

    def test_thai(self):
        # ที่ นี่ ดี against ที่ ดี: 2 of 3 and 2 of 2
        assert rouge_l("ที่นี่ดี", ["ที่ดี"], "th") == pytest.approx(4 / 5)

    def test_chinese(self):
        assert rouge_l("肯尼亚先令。", ["肯先令"], "zh") == pytest.approx(2 * 3 / 8)

    def test_hindi(self):
        assert rouge_l("यह अच्छा है", ["यह बुरा है"], "hi") == pytest.approx(2 / 3)

    def test_turkish_case(self):
        assert rouge_l("IŞIK", ["ışık"], "tr") == 1.0
        assert rouge_l("IŞIK", ["ışık"], "en") == 0.0

    def test_agrees_with_the_package_on_ascii(self):
        draw = random.Random(0)
        words = ["The", "cat", "don't", "sat", "U.S.", "2019-09", "on", "mat,", "dog"]
        theirs = rouge_scorer.RougeScorer(["rougeL"])
        for _ in range(200):
            one, two = (" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in "ab")
            expected = theirs.score(two, one)["rougeL"].fmeasure
            assert rouge_l(one, [two]) == pytest.approx(expected)

    def test_names_the_extra_where_the_package_is_missing(self, monkeypatch):
        metrics._rouge.cache_clear()
        monkeypatch.setitem(sys.modules, "rouge_score", None)
        with pytest.raises(ModuleNotFoundError, match=r"keras-cc\[evaluation\]"):
            rouge_l("a", ["a"])


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "language", "expected"),
        [
            ("16 - 7 = 9, so $18.00.", None, 18.0),
            ("18.", None, 18.0),
            ("1,000", None, 1000.0),
            ("1 000", None, 1000.0),
            ("1\u00a0000\u202f000 €", "fr", 1e6),
            ("1'000", None, 1000.0),
            ("1,234,567.89", None, 1234567.89),
            ("1,5", None, 1.5),
            ("1.500", None, 1.5),
            ("1.500", "de", 1500.0),
            ("1,500", "de", 1.5),
            ("1,500", "en", 1500.0),
            ("1.234,5", None, 1234.5),
            ("1,234.5", "de", 1234.5),
            ("1.234.567", None, 1234567.0),
            ("في ٢٠١٩: ١٬٥٠٠", "ar", 1500.0),
            ("١٢٫٥", "ar", 12.5),
            ("१८ रुपये", "hi", 18.0),
            ("答えは２５個", "ja", 25.0),
            ("in 2019 1000 of them", None, 1000.0),
            ("2, 3", None, 3.0),
            ("12345 678", None, 678.0),
            ("-5", None, -5.0),
            ("x = \u22125", None, -5.0),
            ("10-5", None, 5.0),
            ("1,50,000", "hi", 150000.0),
            ("१२,३४,५६७.५", "hi", 1234567.5),
            ("1,50, 000", None, 0.0),
            ("50 m²", None, 50.0),
            ("50㎡", None, 50.0),
            ("1½", None, 1.0),
            ("１，５００", None, 1500.0),
            ("十八", "zh", None),
            ("", None, None),
        ],
    )
    def test_last_number(self, text, language, expected):
        assert last_number(text, language) == expected

    def test_number(self):
        assert number("3 + 15 = 18 eggs", ["18"]) == 1.0
        assert number("18 of 20", ["18"]) == 0.0
        assert number("none", ["18"]) == 0.0
        with pytest.raises(ValueError, match="a number in each"):
            number("18", ["eighteen"])
