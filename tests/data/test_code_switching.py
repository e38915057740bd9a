"""Code-switched prompts: what is replaced, what stays as it was, and what is counted and said."""

import copy
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_cc.data import code_switch, code_switching, code_switching_curriculum

pytestmark = pytest.mark.once

TR = {
    "id": 1,
    "lang": "tr",
    "instruction": "Kedi uyuyor. Köpek ne yapıyor?\n(1) Uyuyor\n(2) Koşuyor",
    "instruction_en": "The cat sleeps. What does the dog do?\n(1) Sleeps\n(2) Runs",
    "output": "2",
    "answers": ["2"],
}
SW = {
    "lang": "sw",
    "instruction": "Paka analala. Mbwa anafanya nini?",
    "instruction_en": "The cat sleeps. What does the dog do?",
    "output": "Anakimbia",
}
ZH = {**SW, "lang": "zh", "instruction": "猫在睡觉。狗在做什么？", "output": "它在跑"}
AR = {**SW, "lang": "ar", "instruction": "القطة نائمة. ماذا يفعل الكلب؟", "output": "يركض"}
EN = {"lang": "en", "instruction": "What is it?", "instruction_en": "What is it?", "output": "?"}

LEXICONS = {
    "tr": {"cat": "kedi", "dog": ("köpek", "it"), "sleeps": ["uyuyor"]},
    "sw": {"cat": "paka", "dog": "mbwa", "the": "ile"},
    "zh": {"cat": "猫", "dog": "狗"},
    "ar": {"cat": "قطة", "dog": "كلب"},
}


def switched(english, lexicon, ratio=1, lang="tr", **options):
    row = {**TR, "instruction_en": english, "lang": lang}
    return code_switch([row], lexicon, ratio=ratio, **options)[0]["instruction"]


class TestWords:
    def test_every_language_by_its_own_lexicon(self):
        rows = [TR, SW, ZH, AR]
        lexicons = {**LEXICONS, "tr": {**LEXICONS["tr"], "dog": "köpek"}}
        result = code_switch(rows, lexicons, ratio=1)
        assert [row["instruction"] for row in result] == [
            "The kedi uyuyor. What does the köpek do?\n(1) Uyuyor\n(2) Runs",
            "Ile paka sleeps. What does ile mbwa do?",
            "The 猫 sleeps. What does the 狗 do?",
            "The قطة sleeps. What does the كلب do?",
        ]
        kept = [{key: row[key] for key in row if key != "instruction"} for row in rows]
        assert [{key: row[key] for key in row if key != "instruction"} for row in result] == kept

    @pytest.mark.parametrize(
        ("english", "expected"),
        [
            ("cats, CAT; cat-like  cat!\t(cat)", "cats, Kedi; kedi-like  kedi!\t(kedi)"),
            ("a_cat cat2 concat", "a_cat cat2 concat"),
            ("the cat's cat’s don't", "the cat's cat’s don't"),
            ("'cat' “cat” cat… cat.", "'kedi' “kedi” kedi… kedi."),
            ("a cat\u0301 cat", "a cat\u0301 kedi"),  # another letter: "t" with an accent
            ("chat écat caté cat", "chat écat caté kedi"),
            ("猫 cat 猫cat", "猫 kedi 猫cat"),
            (" cat \r\n cat\u00a0cat ", " kedi \r\n kedi\u00a0kedi "),
        ],
    )
    def test_word_boundaries_and_spacing(self, english, expected):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = [TR, {**TR, "instruction_en": english}]
            result = code_switch(rows, {"cat": "kedi", "don": "x", "s": "y", "t": "z"}, ratio=1)
        assert result[1]["instruction"] == expected

    @pytest.mark.parametrize(
        "kept",
        ["(A)", "(1)", "{a}", "{{a}}", "<a>", "[a]", "https://a.b/a", "\nA. x", "\na) x", "(12)"],
    )
    def test_markers_and_placeholders_stay(self, kept):
        lexicon = {"a": "bir", "1": "bir", "12": "on iki", "https": "x", "cat": "kedi"}
        assert switched(f"A cat {kept} cat a", lexicon) == f"Bir kedi {kept} kedi bir"

    def test_the_first_letter_keeps_its_case(self):
        lexicon = {"work": "iş", "light": "ışık", "dog": "Hund", "eye": "öga", "what": "რა"}
        assert switched("Work Light work", lexicon) == "İş Işık iş"
        assert switched("Work", lexicon, lang="az-AZ") == "İş"
        assert switched("Work", lexicon, lang="de") == "Iş"
        assert switched("dog Eye What", lexicon, lang="sv") == "Hund Öga რა"

    def test_a_word_is_looked_up_as_it_stands_first(self):
        lexicon = {"Turkey": "Türkiye", "turkey": "hindi", "china": "Çin"}
        assert switched("Turkey turkey China", lexicon) == "Türkiye hindi Çin"

    def test_translations_of_several_words_and_of_the_same_words(self):
        lexicon = {"currency": "para birimi", "para": "x", "birimi": "y"}
        assert switched("The currency {x}", lexicon) == "The para birimi {x}"

    def test_one_of_several_translations_is_drawn(self):
        drawn = {switched("dog", LEXICONS["tr"], seed=seed) for seed in range(20)}
        assert drawn == {"köpek", "it"}

    def test_the_ratio_is_met_on_average(self):
        rows = [{**TR, "instruction_en": "cat cat cat"} for _ in range(400)]
        result = code_switch(rows, {"cat": "kedi"}, ratio=0.5)
        counts = [row["instruction"].split().count("kedi") for row in result]
        assert set(counts) == {1, 2}  # 1.5, rounded either way
        assert sum(counts) / 1200 == pytest.approx(0.5, abs=0.03)

    def test_rows_do_not_disturb_each_other(self):
        other = {**TR, "instruction_en": "dog " * 9}
        first = code_switch([TR, TR, TR], LEXICONS, seed=3)
        second = code_switch([other, TR], LEXICONS, seed=3)
        assert first[1] == second[1]
        assert len({str(row) for row in code_switch([TR] * 9, LEXICONS)}) > 1

    def test_a_region_s_code_finds_its_language(self):
        assert switched("cat", {"pt": {"cat": "gato"}}, lang="pt-BR") == "gato"
        assert switched("cat", {"pt": {"cat": "x"}, "pt-BR": {"cat": "y"}}, lang="pt-BR") == "y"

    def test_rows_in_which_nothing_is_switched_are_counted(self):
        rows = [TR, {**TR, "instruction_en": "Nothing here."}, EN, {**TR, "instruction_en": "!"}]
        with pytest.warns(UserWarning, match="^In 2 of 3 rows nothing is switched") as caught:
            result = code_switch(rows, LEXICONS)
        assert len(caught) == 1
        assert result[1]["instruction"] == "Nothing here." and result[2] == EN

    def test_no_word_known_is_refused(self):
        with pytest.raises(ValueError, match=r"no word of any row.*\['Katze'\].*'The cat"):
            code_switch([TR], {"Katze": "kedi"})


class TestSentences:
    def choices(self, row, seeds=40, **options):
        return {
            code_switch([row], level="sentence", seed=seed, **options)[0]["instruction"]
            for seed in range(seeds)
        }

    def test_half_of_four_sentences(self):
        pairs = list(
            zip(
                ["The cat sleeps. ", "What does the dog do?\n", "(1) Sleeps\n", "(2) Runs"],
                ["Kedi uyuyor. ", "Köpek ne yapıyor?\n", "(1) Uyuyor\n", "(2) Koşuyor"],
                strict=True,
            )
        )
        expected = {
            "".join(pair[(mask >> i) & 1] for i, pair in enumerate(pairs))
            for mask in range(16)
            if mask.bit_count() == 2
        }
        assert self.choices(TR, 60) == expected

    def test_full_stops_of_other_scripts(self):
        assert self.choices(ZH) == {
            "The cat sleeps. 狗在做什么？",
            "猫在睡觉。What does the dog do?",
        }
        assert "القطة نائمة. What does the dog do?" in self.choices(AR)
        hindi = {**SW, "lang": "hi", "instruction": "बिल्ली सोती है। कुत्ता क्या करता है?"}
        assert "बिल्ली सोती है। What does the dog do?" in self.choices(hindi)

    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("One. Two! Three?", 3),
            ("It was 3.5 kg. Then", 2),
            ("J. Smith of the U.S. Army came.", 1),
            ("in 2011.I was ill.Then not", 3),
            ("see example.com now", 1),
            ('He said "no." She left...', 2),
            ("A. Yes\nB. No\n\nYour answer:", 3),
            ("猫。狗？鸟", 3),
            ("یہ ہے۔ کیا؟ ہاں", 3),
        ],
    )
    def test_what_a_sentence_is(self, text, count):
        parts = code_switching._sentences(text)
        assert len(parts) == count
        assert "".join(parts) == text

    def test_a_line_that_does_not_match_switches_as_a_whole(self):
        row = {**TR, "instruction": "Bir iki.\nSon", "instruction_en": "One. Two.\n\nEnd"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert self.choices(row) == {"Bir iki.\nEnd", "One. Two.\n\nSon"}

    def test_counts_that_agree_by_chance_are_not_aligned(self):
        row = {**TR, "instruction": "Bir. İki.\nÜç", "instruction_en": "One\nTwo. Three."}
        assert self.choices(row) == {"Bir. İki.\nTwo. Three.", "One\nÜç"}

    def test_a_prompt_that_does_not_match_switches_as_a_whole(self):
        row = {**TR, "instruction": "Bir iki üç"}
        with pytest.warns(UserWarning, match="^1 of 2 prompts switch as a whole"):
            result = code_switch([row, TR], level="sentence")
        assert result[0]["instruction"] in (row["instruction"], row["instruction_en"])
        with pytest.warns(UserWarning, match="1 of 1 prompts"):
            assert self.choices(row, 20) == {row["instruction"], row["instruction_en"]}

    def test_one_sentence_alone_is_no_fallback(self):
        row = {**TR, "instruction": "Ne?", "instruction_en": "What?"}
        assert self.choices(row) == {"Ne?", "What?"}

    @pytest.mark.parametrize("row", [TR, SW, ZH, AR])
    def test_the_ends(self, row):
        assert self.choices(row, 3, ratio=0) == {row["instruction_en"]}
        assert self.choices(row, 3, ratio=1) == {row["instruction"]}


class TestCurriculum:
    def test_three_stages(self):
        rows = [TR, SW, EN]
        stages = code_switching_curriculum(iter(rows), LEXICONS, ratio=1)
        assert [name for name, _ in stages] == ["token", "sentence", "monolingual"]
        words, sentences, plain = (stage for _, stage in stages)
        assert words == code_switch(rows, LEXICONS, "token", 1)
        assert words[1]["instruction"] == "Ile paka sleeps. What does ile mbwa do?"
        assert sentences == plain == rows
        assert plain[0] is not rows[0]

    def test_columns_and_seed_go_through(self):
        rows = [
            {"q": r["instruction"], "en": r["instruction_en"], "l": r["lang"]} for r in [TR] * 5
        ]
        names = {"instruction_column": "q", "pivot_column": "en", "lang_column": "l"}
        stages = [code_switching_curriculum(rows, LEXICONS, seed=s, **names) for s in (0, 0, 1)]
        assert stages[0] == stages[1] != stages[2]
        assert set(stages[0][0][1][0]) == {"q", "en", "l"}

    def test_rows_that_pass_unchanged(self):
        alone = {"lang": "sw", "instruction": "Habari?", "output": "Nzuri"}
        plain_english = {"lang": "en", "instruction": "A cat", "output": "x"}
        rows = [TR, alone, plain_english, EN]
        for level in ("token", "sentence"):
            with pytest.warns(UserWarning, match="^1 of 4 rows have no 'instruction_en'"):
                assert code_switch(rows, LEXICONS, level)[1:] == rows[1:]
        assert code_switch(rows, None, "monolingual") == rows


words = st.sampled_from(["cat", "Dog", "house", "the", "naïve", "e\u0301te", "2011", "(1)", "{x}"])
gaps = st.sampled_from([" ", ", ", ".\n", " — ", "; ", "\u00a0", "。", " (", ") "])
LEXICON = {"cat": ["kedi", "pisi"], "dog": "köpek", "naïve": "saf", "1": "bir", "x": "iks"}


class TestProperties:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(words, gaps), min_size=1), st.floats(0, 1), st.integers())
    def test_words(self, parts, ratio, seed):
        prompt = "cat " + "".join(word + gap for word, gap in parts)
        rows = [{**TR, "instruction_en": prompt}]
        before = copy.deepcopy(rows)
        (row,) = code_switch(rows, LEXICON, ratio=ratio, seed=seed)
        assert rows == before
        assert code_switch(rows, LEXICON, ratio=ratio, seed=seed) == [row]
        # Taken apart another way than the library does: between the known words, all is kept.
        known = r"(?<![\w\u0301])(?:cat|Dog|naïve)(?![\w\u0301])"
        english = re.findall(known, prompt)
        allowed = {"cat": "cat|kedi|pisi", "Dog": "Dog|Köpek", "naïve": "naïve|saf"}
        between = [re.escape(part) for part in re.split(known, prompt)]
        pattern = between[0] + "".join(
            f"({allowed[word]}){rest}" for word, rest in zip(english, between[1:], strict=True)
        )
        found = re.fullmatch(pattern, row["instruction"])
        assert found
        changed = sum(a != b for a, b in zip(found.groups(), english, strict=True))
        assert int(ratio * len(english)) <= changed <= int(ratio * len(english)) + 1
        if ratio == 0:
            assert row["instruction"] == prompt

    @settings(max_examples=100, deadline=None)
    @given(st.text("aA.!?。\n 1)\r", min_size=1), st.text("bB.!?。\n 1)", min_size=1))
    def test_pieces_put_together_are_the_prompts(self, english, target):
        units = code_switching._align(english, target)
        assert "".join(unit[0] for unit in units) == english
        assert "".join(unit[1] for unit in units) == target
        assert all(all(unit) for unit in units)


BAD = {
    "level": (ValueError, [TR], {"level": "word"}, "`level` must be one of.*level='word'"),
    "ratio": (
        ValueError,
        [TR],
        {"ratio": 1.5},
        "`ratio` must be a number .*<= 1.*ratio=1.5",
    ),
    "ratio nan": (ValueError, [TR], {"ratio": float("nan")}, "ratio=nan"),
    "ratio text": (ValueError, [TR], {"ratio": "1"}, "ratio='1'"),
    "seed": (ValueError, [TR], {"seed": 1.0}, "`seed` must be an integer.*seed=1.0"),
    "rows": (TypeError, TR, {}, "`rows` must be a list of dicts"),
    "none": (ValueError, [], {}, "at least one row"),
    "no pair": (ValueError, [EN], {}, "No row has a prompt in two languages"),
    "no pairs": (ValueError, [EN], {"level": "sentence"}, "No row has a prompt in two languages"),
    "column": (ValueError, [TR], {"pivot_column": "en"}, "No row has a prompt.*`pivot_column=`"),
    "text": (TypeError, [{**TR, "instruction_en": 3}], {}, "'instruction_en' must be a string.*3"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    error, rows, options, message = BAD[case]
    with pytest.raises(error, match=f"(?s){message}") as caught:
        code_switch(rows, **{"lexicon": LEXICONS, **options})
    assert "Received" in str(caught.value)
