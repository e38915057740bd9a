"""`keras_cc.data.audit`: what is odd about rows."""

import dataclasses

import pytest

from keras_cc.data import Audit, audit

pytestmark = pytest.mark.once

GOOD = {"instruction": "Habari?", "output": "Nzuri", "instruction_en": "How are you?", "lang": "sw"}
ENGLISH = {"instruction": "Who?", "output": "me", "lang": "en"}


def rows(*some):
    return [{**row, "id": f"r{number}"} for number, row in enumerate(some)]


def kinds(found):
    named = dataclasses.asdict(found)
    assert named.pop("rows")
    return {kind: names for kind, names in named.items() if names}


def test_nothing_is_odd():
    other = {**GOOD, "instruction": "a", "instruction_en": "b", "id": "other"}
    found = audit(rows(GOOD, ENGLISH), [other])
    assert found == Audit(2) and str(found) == "2 rows"


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**GOOD, "instruction": "x", "output": None}, "unanswered"),
        ({"instruction": "x", "output": "y", "lang": "sw"}, "without_pivot"),
        ({**GOOD, "instruction": " HABARI? "}, "duplicates"),
        ({**GOOD, "instruction": "\uff28abari?"}, "duplicates"),  # a full-width H
        ({**GOOD, "output": "Mbaya"}, "contradictions"),
        ({**GOOD, "instruction": "x\x00"}, "control"),
        ({**GOOD, "instruction": "x", "output": "lost \ufffd"}, "control"),
        ({**GOOD, "instruction": "x", "instruction_en": "a\u202eb"}, "bidirectional"),
        ({**GOOD, "instruction": "x<|im_start|>system"}, "markers"),
        ({**GOOD, "instruction": "x", "output": "y<end_of_turn>"}, "markers"),
    ],
)
def test_a_row_is_named_by_what_is_odd(row, kind):
    assert kinds(audit(rows(GOOD, row, ENGLISH))) == {kind: ("r1",)}


@pytest.mark.parametrize(
    "row",
    [
        {**GOOD, "instruction": "Y a-t-il \t un\nmot?\u00a0", "output": "\u200fמה\u200e"},
        {**GOOD, "lang": "tr"},  # the same words of another language are another row
        {**ENGLISH, "instruction": "What?", "lang": "eng_Latn"},
    ],
)
def test_what_is_not_odd(row):
    assert kinds(audit(rows(GOOD, row))) == {}


def test_rows_to_test_on_that_were_trained_on():
    other = {**GOOD, "instruction": "a", "instruction_en": "b"}
    test = [
        {**other, "id": "new"},
        {**other, "instruction": "habari? ", "id": "prompt"},
        {**other, "instruction_en": "How  are you?", "id": "pivot"},
        {**other, "instruction": "How are you?", "id": "english"},
        {**other, "id": "r0"},
    ]
    found = audit(rows(GOOD), test)
    assert kinds(found) == {"overlap": ("prompt", "pivot", "english", "r0")}
    assert str(found) == "1 rows\n      4 overlap: prompt, pivot, english, ..."


def test_rows_without_ids_and_other_columns():
    some = [{"frage": "a", "antwort": "b"}, {"frage": "A", "antwort": "b"}]
    found = audit(some, instruction_column="frage", output_column="antwort")
    assert kinds(found) == {"duplicates": ("row 1",)}


@pytest.mark.parametrize(
    ("some", "options", "error", "message"),
    [
        ([], {}, ValueError, "`rows` must have at least one row"),
        ("rows", {}, TypeError, "`rows` must be a list of dicts"),
        ([{"output": "x"}], {}, ValueError, r"row 0: no 'instruction'.*keys \['output'\]"),
        ([{**GOOD, "output": 3}], {}, TypeError, "row 0: 'output' must be a string"),
        ([GOOD], {"lang_column": ""}, ValueError, "`lang_column` must be a non-empty string"),
        ([GOOD], {"test_rows": []}, ValueError, "`rows` must have at least one row"),
    ],
)
def test_bad_input(some, options, error, message):
    with pytest.raises(error, match=message):
        audit(some, **options)
