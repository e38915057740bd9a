"""`augment_with_translation`: which rows it makes of pairs, which it leaves out and says so."""

import copy
import warnings

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_cc import CCPreprocessor
from keras_cc.data import augment_with_translation

pytestmark = pytest.mark.once

TR = {
    "id": 7,
    "lang": "tr",
    "instruction": "Kenya'nın başkenti neresidir?",
    "output": "Nairobi'dir",
    "instruction_en": "What is the capital of Kenya?",
    "output_en": "It is Nairobi",
    "answers": ["Nairobi'dir"],
}
SW = {**TR, "lang": "sw", "instruction": "Mji mkuu wa Kenya ni upi?", "output": "Ni Nairobi"}
ZH = {
    "id": 8,
    "lang": "zh",
    "instruction": "肯尼亚的货币是什么？",
    "output": "肯尼亚先令",
    "instruction_en": "What is the currency of Kenya?",
}
AR = {"lang": "ar", "instruction": "ما هي عملة كينيا؟", "output": "شلن كيني"}
EN = {"lang": "en", "instruction": TR["instruction_en"], "output": "Nairobi", "id": 7}


def test_all_rows_of_one_pair():
    assert augment_with_translation([TR]) == [
        TR,
        {
            "id": "7/pivot",
            "lang": "en",
            "instruction": "What is the capital of Kenya?",
            "output": "It is Nairobi",
        },
        {
            "id": "7/to_pivot",
            "lang": "tr",
            "instruction": "Translate into English: Kenya'nın başkenti neresidir?",
            "output": "What is the capital of Kenya?",
        },
        {
            "id": "7/from_pivot",
            "lang": "en",
            "instruction": "Translate into Turkish: What is the capital of Kenya?",
            "output": "Kenya'nın başkenti neresidir?",
        },
    ]


def test_a_made_row_is_a_plain_row_to_the_preprocessor():
    paired, *made = augment_with_translation([TR])
    x, _, _ = CCPreprocessor(tiny_tokenizers.gemma_tokenizer(), 128)([paired, *made])
    assert x["pivot_padding_mask"].any(axis=1).tolist() == [True, False, False, False]
    assert all("instruction_en" not in row and "answers" not in row for row in made)


class TestEnglishRows:
    def english(self, rows, **options):
        made = augment_with_translation(rows, directions=(), **options)[len(rows) :]
        return [(row["instruction"], row["output"]) for row in made]

    def test_one_for_each_distinct_prompt_and_answer(self):
        other = {**SW, "output_en": "Nairobi"}
        question = TR["instruction_en"]
        assert self.english([TR, SW]) == [(question, "It is Nairobi")]
        assert self.english([TR, other]) == [(question, "It is Nairobi"), (question, "Nairobi")]

    @pytest.mark.parametrize(
        "present",
        [
            EN,
            {**EN, "instruction_en": EN["instruction"]},
            {**EN, "lang": "en-GB"},
            {"instruction": EN["instruction"], "output": "Nairobi"},
            {"instruction": EN["instruction"], "instruction_en": EN["instruction"], "output": "N"},
        ],
    )
    def test_what_is_in_the_data_is_not_added_again(self, present):
        assert self.english([TR, present, SW]) == []

    def test_the_same_id_is_not_the_same_item(self):
        """Ids of XL-Sum are the places in each language's own list."""
        other = {**EN, "instruction": "What is the capital of Chad?", "output": "N'Djamena"}
        assert self.english([TR, other]) == [(TR["instruction_en"], "It is Nairobi")]
        unanswered = {key: value for key, value in TR.items() if key != "output_en"}
        with pytest.warns(UserWarning, match="^1 English rows are left out"):
            assert self.english([unanswered, other]) == []

    def test_what_is_left_out_is_counted_once_a_prompt(self):
        rows = [TR, ZH, {**ZH, "lang": "ja"}, {**ZH, "instruction_en": "?", "output_en": " "}]
        with pytest.warns(UserWarning) as caught:
            assert len(self.english(rows)) == 1
        (warning,) = caught
        text = str(warning.message)
        assert text.startswith("2 English rows are left out") and "`pivot_output_column=`" in text
        assert warning.filename == __file__

    def test_an_answer_in_one_language_serves_all(self):
        unanswered = {key: value for key, value in SW.items() if key != "output_en"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(self.english([unanswered, TR])) == 1

    def test_answers_that_are_the_same_in_every_language(self):
        row = {**ZH, "output": "2"}
        question = ZH["instruction_en"]
        assert self.english([row], pivot_output_column="output") == [(question, "2")]

    def test_off(self):
        made = augment_with_translation([TR], english_rows=False)
        assert [row["id"] for row in made] == [7, "7/to_pivot", "7/from_pivot"]


class TestInstructions:
    def made(self, rows, **options):
        return augment_with_translation(rows, False, **options)[len(rows) :]

    @pytest.mark.parametrize(
        ("row", "language"), [(TR, "Turkish"), (SW, "Swahili"), (ZH, "Chinese")]
    )
    def test_language_names(self, row, language):
        to_pivot, from_pivot = self.made([row])
        assert to_pivot["instruction"] == f"Translate into English: {row['instruction']}"
        assert from_pivot["instruction"] == f"Translate into {language}: {row['instruction_en']}"
        assert (to_pivot["lang"], from_pivot["lang"]) == (row["lang"], "en")

    @pytest.mark.parametrize(
        ("code", "language"),
        [("pt-BR", "Portuguese"), ("PT_br", "Portuguese"), ("et", "Estonian"), ("bn", "Bengali")],
    )
    def test_names_of_regions_and_of_less_usual_languages(self, code, language):
        _, from_pivot = self.made([{**TR, "lang": code}])
        assert from_pivot["instruction"].startswith(f"Translate into {language}: ")

    def test_a_language_without_a_name_is_refused_with_a_way_out(self):
        row = {**TR, "lang": "tlh"}
        with pytest.raises(ValueError, match=r"id 7: .*'tlh'.*language_names=.*Received:"):
            augment_with_translation([row])
        assert len(self.made([row], directions="to_pivot")) == 1  # English alone is named
        with pytest.raises(ValueError, match="'tlh'"):
            self.made([TR], directions="to_pivot", pivot_language="tlh")
        with pytest.raises(TypeError, match=r"`language_names` must be a dict.*Received"):
            self.made([TR], language_names="Klingon")

    def test_names_of_ones_own_come_first(self):
        names = {"tlh": "Klingon", "tr": "Türkçe"}
        for code, name in names.items():
            _, from_pivot = self.made([{**TR, "lang": code}], language_names=names)
            assert from_pivot["instruction"].startswith(f"Translate into {name}: ")

    def test_rows_without_a_pair_make_none(self):
        for row in (AR, EN, {**TR, "lang": "en-GB"}, {**TR, "instruction_en": None}):
            assert len(self.made([TR, row])) == 2

    def test_another_pivot(self):
        rows = [{**TR, "lang": "en", "instruction": "Hi", "instruction_en": "Bonjour"}]
        to_pivot, from_pivot = self.made(rows, pivot_language="fr-CA")
        assert to_pivot["instruction"] == "Translate into French: Hi"
        assert from_pivot["instruction"] == "Translate into English: Bonjour"
        assert from_pivot["lang"] == "fr-CA"

    def test_a_text_is_put_in_as_it_stands(self):
        row = {**TR, "instruction": "{language} {text} {0} \\1"}
        (made,) = self.made([row], directions="to_pivot", template="{text} -> {language}")
        assert made["instruction"] == "{language} {text} {0} \\1 -> English"

    def test_own_columns_and_no_id(self):
        row = {"q": "Habari?", "a": "Nzuri", "en": "How are you?", "language": "sw"}
        names = {"instruction_column": "q", "output_column": "a", "pivot_column": "en"}
        (made,) = self.made([row], directions="to_pivot", lang_column="language", **names)
        text = "Translate into English: Habari?"
        assert made == {"language": "sw", "q": text, "a": "How are you?"}

    def test_without_a_language_only_to_the_pivot(self):
        row = {key: value for key, value in TR.items() if key != "lang"}
        (made,) = self.made([row], directions="to_pivot")
        assert "lang" not in made
        with pytest.raises(ValueError, match=r"row with id 7: no language.*lang_column="):
            self.made([row])

    def test_a_repeated_pair_makes_one(self):
        assert len(self.made([TR, {**TR, "output": "another"}])) == 2

    def test_untranslated_pairs_are_counted(self):
        same = {**ZH, "instruction": ZH["instruction_en"]}
        with pytest.warns(UserWarning, match="^1 of 2 pairs make no translation"):
            assert len(self.made([TR, same])) == 2

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 40), st.floats(0.01, 1), st.floats(0.01, 1), st.integers())
    def test_the_share_is_met_and_grows(self, count, small, large, seed):
        rows = [{**TR, "id": i, "instruction": f"soru {i}"} for i in range(count)]
        before = copy.deepcopy(rows)
        small, large = sorted((small, large))

        def ids(share):
            made = self.made(rows, directions="to_pivot", share=share, seed=seed)
            return [int(row["id"].split("/")[0]) for row in made]

        assert len(ids(small)) == max(1, round(small * count))
        assert ids(large) == ids(large) == sorted(ids(large))
        assert set(ids(small)) <= set(ids(large))
        assert ids(1.0) == list(range(count))
        assert rows == before

    def test_the_seed_draws(self):
        rows = [{**TR, "id": i, "instruction": f"soru {i}"} for i in range(20)]
        drawn = {
            tuple(row["id"] for row in self.made(rows, share=0.5, seed=seed)) for seed in range(5)
        }
        assert len(drawn) == 5


def test_the_input_and_its_copies_are_apart():
    rows = [TR, EN]
    result = augment_with_translation(rows)
    assert result[:2] == rows
    result[0]["instruction"] = "changed"
    assert rows[0]["instruction"] == TR["instruction"] != "changed"


def test_bytes_as_tfds_gives_them():
    row = {key: value.encode() if isinstance(value, str) else value for key, value in TR.items()}
    assert augment_with_translation([row])[1:] == augment_with_translation([TR])[1:]


BAD = {
    "direction": (ValueError, [TR], {"directions": "to_english"}, "`directions` must be among"),
    "nothing": (ValueError, [TR], {"english_rows": False, "directions": ()}, "Nothing to add"),
    "share 0": (ValueError, [TR], {"share": 0}, "`share` must be a number > 0 and <= 1"),
    "share 2": (ValueError, [TR], {"share": 2}, "`share` must be a number.*share=2"),
    "share True": (ValueError, [TR], {"share": True}, "share=True"),
    "share nan": (ValueError, [TR], {"share": float("nan")}, "share=nan"),
    "seed": (ValueError, [TR], {"seed": None}, "`seed` must be an integer"),
    "template": (ValueError, [TR], {"template": "{text}"}, "`template` must be.*Received"),
    "no rows": (ValueError, [], {}, "at least one row"),
    "columns": (TypeError, {"instruction": ["a"]}, {}, "`rows` must be a list of dicts"),
    "strings": (TypeError, [TR, "a"], {}, "as row 1"),
    "no pair": (ValueError, [AR, EN], {}, "No row has a prompt in two languages.*2 rows"),
    "pivot": (ValueError, [TR], {"pivot_column": "english"}, "No row has a prompt in two"),
    "no prompt": (ValueError, [{**TR, "instruction": ""}], {}, "row with id 7: a pivot needs"),
    "number": (TypeError, [{**TR, "instruction": 3}], {}, "'instruction' must be a string.*=3"),
    "answer": (TypeError, [{**TR, "output_en": 3}], {}, "'output_en' must be a string"),
    "column": (ValueError, [TR], {"id_column": ""}, "`id_column` must be a non-empty string"),
    "output": (ValueError, [TR], {"output_column": None}, "`output_column` must be a non-empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    error, rows, options, message = BAD[case]
    with pytest.raises(error, match=f"(?s){message}") as caught:
        augment_with_translation(rows, **options)
    assert "Received" in str(caught.value)
