"""`cross_lingual_rows`: which rows it makes of pairs, how it marks them, what it leaves out."""

import copy
import warnings

import pytest
import tiny_tokenizers
from test_translation import AR, EN, SW, TR, ZH

from keras_cc import CCPreprocessor
from keras_cc.data import cross_lingual_rows

pytestmark = pytest.mark.once

QUESTION = TR["instruction_en"]


def made(rows, **options):
    """`(lang, instruction, output)` of what was made."""
    rows = cross_lingual_rows(rows, **options)[len(rows) :]
    return [(row["lang"], row["instruction"], row["output"]) for row in rows]


def without(row, *columns):
    return {key: value for key, value in row.items() if key not in columns}


def test_both_directions_of_one_pair():
    before = copy.deepcopy(TR)
    assert cross_lingual_rows([TR]) == [
        TR,
        {
            "id": "7/to_pivot",
            "lang": "tr",
            "instruction": "Kenya'nın başkenti neresidir? (English)",
            "output": "It is Nairobi",
        },
        {
            "id": "7/from_pivot",
            "lang": "en",
            "instruction": "What is the capital of Kenya? (Turkish)",
            "output": "Nairobi'dir",
        },
    ]
    assert before == TR


def test_a_made_row_is_a_plain_row_to_the_preprocessor():
    rows = cross_lingual_rows([TR])
    x, _, _ = CCPreprocessor(tiny_tokenizers.gemma_tokenizer(), 128)(rows)
    assert x["pivot_padding_mask"].any(axis=1).tolist() == [True, False, False]


class TestAnswers:
    @pytest.mark.parametrize("english", [EN, {**EN, "lang": "en-GB", "instruction_en": QUESTION}])
    def test_an_english_row_with_the_same_prompt_answers(self, english):
        rows = [without(TR, "output_en"), english, without(SW, "output_en")]
        assert made(rows, directions="to_pivot") == [
            ("tr", "Kenya'nın başkenti neresidir? (English)", "Nairobi"),
            ("sw", "Mji mkuu wa Kenya ni upi? (English)", "Nairobi"),
        ]
        # What stands beside the pair comes first.
        assert made([TR, english], directions="to_pivot")[0][2] == "It is Nairobi"

    @pytest.mark.parametrize(
        "other",
        [
            {**EN, "instruction": "What is the capital of Chad?"},  # the same id is not the item
            {**EN, "lang": "fr"},
            without(EN, "lang"),
            {**EN, "output": None},
        ],
    )
    def test_no_other_row_does(self, other):
        with pytest.warns(UserWarning, match='^1 of 1 pairs make no "to_pivot" row'):
            assert len(made([without(TR, "output_en"), other])) == 1

    def test_what_is_lacking_is_counted_and_said(self):
        rows = [TR, ZH, {**SW, "output": None}, {**ZH, "id": 9, "lang": "ja"}]
        with pytest.warns(UserWarning) as caught:
            found = made(rows)
        texts = [str(warning.message) for warning in caught]
        assert texts == [
            "2 of 4 pairs make no \"to_pivot\" row: they have no 'output_en', and no row in the "
            "pivot's language answers their prompt.",
            "1 of 4 pairs make no \"from_pivot\" row: they have no 'output'.",
        ]
        assert all(warning.filename == __file__ for warning in caught)
        assert [(lang, output) for lang, _, output in found] == [
            ("tr", "It is Nairobi"), ("en", "Nairobi'dir"), ("en", "肯尼亚先令"),
            ("sw", "It is Nairobi"), ("en", "肯尼亚先令"),
        ]  # fmt: skip

    def test_a_direction_that_is_not_asked_for_lacks_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(made([ZH], directions="from_pivot")) == 1

    def test_answers_that_are_the_same_in_every_language(self):
        assert made([{**ZH, "output": "2"}], pivot_output_column="output") == [
            ("zh", "肯尼亚的货币是什么？ (English)", "2"),
            ("en", "What is the currency of Kenya? (Chinese)", "2"),
        ]

    def test_a_repeated_row_makes_no_more(self):
        assert len(made([TR, {**TR, "id": 9}])) == 2
        # Another answer in the target language is no other row to English.
        assert len(made([TR, {**TR, "output": "Nairobi"}])) == 3


class TestMarkers:
    def test_template_and_names(self):
        row = {**TR, "instruction": "{language} {text} \\1"}
        options = {"template": "[{language}] {text}", "language_names": {"tr": "Türkçe"}}
        assert [text for _, text, _ in made([row], **options)] == [
            "[English] {language} {text} \\1",
            f"[Türkçe] {QUESTION}",
        ]

    def test_regions_and_another_pivot(self):
        row = {"lang": "pt-BR", "instruction": "Oi", "output": "a", "instruction_en": "Salut",
               "output_en": "b"}  # fmt: skip
        assert made([row], pivot_language="fr-CA") == [
            ("pt-BR", "Oi (French)", "b"), ("fr-CA", "Salut (Portuguese)", "a")
        ]  # fmt: skip

    def test_a_language_that_has_no_name_or_is_not_said(self):
        with pytest.raises(ValueError, match=r"id 7: .*'tlh'.*language_names=.*Received:"):
            made([{**TR, "lang": "tlh"}])
        row = without(TR, "lang")
        with pytest.raises(ValueError, match=r"row with id 7: no language.*lang_column=.*Received"):
            made([row])
        (found,) = cross_lingual_rows([row], directions="to_pivot")[1:]
        assert "lang" not in found


def test_own_columns():
    row = {"q": "Habari?", "a": "Nzuri", "en": "How are you?", "a_en": "Fine", "language": "sw"}
    names = {"instruction_column": "q", "output_column": "a", "pivot_column": "en",
             "pivot_output_column": "a_en", "lang_column": "language"}  # fmt: skip
    assert cross_lingual_rows([row], **names)[1:] == [
        {"language": "sw", "q": "Habari? (English)", "a": "Fine"},
        {"language": "en", "q": "How are you? (Swahili)", "a": "Nzuri"},
    ]


def test_bytes_as_tfds_gives_them():
    row = {key: value.encode() if isinstance(value, str) else value for key, value in TR.items()}
    assert cross_lingual_rows([row])[1:] == cross_lingual_rows([TR])[1:]


def test_the_share_is_met_and_grows():
    rows = [{**TR, "id": i, "instruction": f"soru {i}", "output": f"y {i}"} for i in range(20)]
    drawn = {}
    for share in (0.01, 0.25, 0.5, 1.0):
        found = cross_lingual_rows(rows, share=share, seed=3)[20:]
        drawn[share] = [row["id"].split("/")[0] for row in found]
        assert len(found) == 2 * max(1, round(20 * share))
    assert set(drawn[0.01]) < set(drawn[0.25]) < set(drawn[0.5]) < set(drawn[1.0])
    seeds = {tuple(made(rows, share=0.5, seed=seed)) for seed in range(5)}
    assert len(seeds) == 5


BAD = {
    "direction": (ValueError, [TR], {"directions": "to_english"}, "`directions` must be among"),
    "none": (ValueError, [TR], {"directions": ()}, "`directions` must name at least one"),
    "share": (ValueError, [TR], {"share": 0}, "`share` must be a number > 0 and <= 1"),
    "seed": (ValueError, [TR], {"seed": None}, "`seed` must be an integer"),
    "template": (ValueError, [TR], {"template": "{text}"}, "`template` must be.*Received"),
    "names": (TypeError, [TR], {"language_names": "Klingon"}, "`language_names` must be a dict"),
    "no rows": (ValueError, [], {}, "at least one row"),
    "columns": (TypeError, {"instruction": ["a"]}, {}, "`rows` must be a list of dicts"),
    "no pair": (ValueError, [AR, EN], {}, "No row has a prompt in two languages.*2 rows"),
    "no answer": (ValueError, [ZH], {"directions": "to_pivot"}, "No pair has an answer.*1 pairs"),
    "number": (TypeError, [{**TR, "output": 3}], {}, "'output' must be a string.*=3"),
    "output": (ValueError, [TR], {"output_column": None}, "`output_column` must be a non-empty"),
    "pivot output": (ValueError, [TR], {"pivot_output_column": ""}, "`pivot_output_column` must"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    error, rows, options, message = BAD[case]
    with pytest.raises(error, match=f"(?s){message}") as caught:
        cross_lingual_rows(rows, **options)
    assert "Received" in str(caught.value)
