"""Reading rows: their texts, and which of them have a pivot, to everybody."""

import connected
import keras
import numpy as np
import pytest

import keras_cc
from keras_cc.data import pairs
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.columns import to_columns

pytestmark = pytest.mark.once

COLUMNS = {
    "instruction_column": "instruction",
    "pivot_column": "instruction_en",
    "lang_column": "lang",
    "id_column": "id",
}
ROW = {"instruction": "same", "instruction_en": "What?", "lang": "tr", "output": "yes"}


def pivots(rows, pivot_language="en"):
    """As `CCPreprocessor` and `distill` read them."""
    columns = to_columns(rows, list(COLUMNS.values()))
    names = pairs.row_names(columns, "id", len(rows))
    prompts = pairs.read_texts(columns, "instruction", names)
    return pairs.read_pivots(columns, prompts, names, "instruction_en", "lang", pivot_language)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, "What?"),
        ({"instruction_en": ""}, None),
        ({"instruction_en": " \n"}, None),
        ({"instruction_en": None}, None),
        ({"lang": "en_US"}, None),
        ({"lang": "enm"}, "What?"),
        ({"instruction_en": "same"}, "same"),  # a language is given: its word counts
        ({"instruction_en": "same", "lang": None}, None),
        ({"instruction_en": "same", "lang": ""}, None),
        ({"lang": None}, "What?"),
        ({"lang": float("nan")}, "What?"),  # a DataFrame's missing value
        ({"lang": float("nan"), "instruction_en": "same"}, None),
        ({"instruction_en": float("nan")}, None),
        ({"instruction_en": np.float64("nan")}, None),
        ({"lang": "eng_Latn"}, None),
        ({"lang": "English"}, None),
        ({"instruction_en": b"What?", "lang": np.str_("en")}, None),
        ({"instruction_en": b"What?", "lang": np.array("tr")}, "What?"),
    ],
)
def test_a_row_with_a_pivot_is_one_to_all(change, expected):
    other = {**ROW, "instruction_en": "Who?", "id": 7}
    rows = [{**ROW, **change}, other]
    assert pivots(rows) == [expected, "Who?"]
    found = pairs.find_pairs(rows, **COLUMNS, pivot_language="en")
    last = pairs.Pair(1, "row with id 7", 7, "tr", "same", "Who?")
    assert found[-1] == last
    assert [(pair.index, pair.pivot) for pair in found[:-1]] == (
        [] if expected is None else [(0, expected)]
    )


def test_another_pivot_language():
    assert pivots([ROW, {**ROW, "lang": "tr-CY"}, {**ROW, "lang": "en"}], "tr") == [
        None,
        None,
        "What?",
    ]


def test_rows_are_named_by_their_id_or_their_place():
    columns = {"id": [None, 3, b"x", np.str_("y")]}
    expected = ["row 0", "row with id 3", "row with id x", "row with id y"]
    assert pairs.row_names(columns, "id", 4) == expected
    assert pairs.row_names({}, "id", 2) == ["row 0", "row 1"]


@pytest.mark.parametrize(
    "read, received",
    [
        (lambda row: pivots([row]), "3"),
        (lambda row: pairs.find_pairs([row], **COLUMNS, pivot_language="en"), "instruction_en=3"),
    ],
)
def test_what_is_no_string_is_refused(read, received):
    with pytest.raises(TypeError) as caught:
        read({**ROW, "instruction_en": 3, "id": "x"})
    message = f"row with id x: 'instruction_en' must be a string. Received: {received}"
    assert str(caught.value) == message


@pytest.mark.parametrize("column", ["instruction", "instruction_en", "lang", "output"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, TypeError, "must be a string. Received: .*3"),
        (["a"], TypeError, "must be a string. Received: .*'a'"),
        ("ab\ud800c", ValueError, r"must be text that UTF-8 has, .* at character 2.*\\ud800"),
        (b"ab\xff", ValueError, r"must be text that UTF-8 has, .* at character 2.*\\xff"),
    ],
)
def test_every_column_is_checked_at_one_door(column, value, error, message):
    preprocessor = keras_cc.CCPreprocessor(connected.tokenizer_of("llama3"), max_length=16)
    rows = [ROW, {**ROW, column: value, "id": "x"}]
    with pytest.raises(error, match=f"row with id x: '{column}' {message}"):
        preprocessor(rows)


def test_a_missing_value_of_a_table_is_none():
    pandas = pytest.importorskip("pandas")
    for missing in (None, float("nan"), np.float32("nan"), pandas.NA):
        assert pairs.is_unanswered(missing)
        with pytest.raises(ValueError, match="row 0: no 'instruction'"):
            pairs.read_texts({"instruction": [missing]}, "instruction", ["row 0"])
    assert not pairs.is_unanswered(0.0)


def test_a_dataframe_is_its_rows():
    pandas = pytest.importorskip("pandas")
    preprocessor = keras_cc.CCPreprocessor(connected.tokenizer_of("llama3"), max_length=32)
    rows = [{**ROW, "instruction_en": None}, {**ROW, "lang": None}, ROW, {**ROW, "output": None}]
    frame = pandas.DataFrame(rows)
    assert any(isinstance(value, float) for value in frame["lang"])  # NaN, where rows have None
    (found,), (expected,) = (PreparedBatches(one, preprocessor, 4) for one in (frame, rows))
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert found[0]["pivot_padding_mask"].any(axis=1).tolist() == [False, True, True, True]
    assert found[2].any(axis=1).tolist() == [True, True, True, False]


def test_columns_and_texts_that_every_row_must_have():
    with pytest.raises(ValueError, match=r"no column 'output'.*`output_column=`.*'lang'"):
        pairs.read_texts({"lang": ["tr"]}, "output", ["row 0"])
    for value, message in ((None, "no 'output'. Received: output=None"), (" ", "is empty.*=' '")):
        with pytest.raises(ValueError, match=f"row 1: .*{message}"):
            pairs.read_texts({"output": ["yes", value]}, "output", ["row 0", "row 1"])
    assert pairs.read_texts({"output": [b" a", "b"]}, "output", ["row 0", "row 1"]) == [" a", "b"]
