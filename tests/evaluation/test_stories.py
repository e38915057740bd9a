"""Stories and their endings, against rows written out by hand."""

import pytest

from keras_cc.evaluation.stories import ending_row

pytestmark = pytest.mark.once

ENGLISH = "The fox ran.\nIt fell.\n(1) It slept.\n(2) It got up.\n\nWhich is more likely?\nAnswer:"


def row(language, instruction, answer="1", instruction_en=ENGLISH):
    return {
        "id": 3, "lang": language, "instruction": instruction, "instruction_en": instruction_en,
        "output": answer, "answers": [answer],
    }  # fmt: skip


def test_a_story_with_its_ending():
    found = ending_row(row("tr", "Tilki koştu.\n(1) Uyudu. \n(2)  Kalktı.\n\nHangisi?\n", "2"), "x")
    assert found == {
        "id": 3,
        "lang": "tr",
        "instruction": "Tilki koştu.",
        "instruction_en": "The fox ran.\nIt fell.",
        "endings": [" Uyudu.", " Kalktı."],
        "output": " Kalktı.",
        "answers": ["Kalktı."],
    }


def test_a_language_without_spaces_and_a_row_without_english():
    found = ending_row(row("zh", "他来了。\n(1) 他走了。\n(2) 他睡了。\n哪个?", "1", None), "x")
    assert (found["instruction"], found["output"]) == ("他来了。", "他走了。")
    assert found["instruction_en"] is None


@pytest.mark.parametrize(
    ("language", "premise", "question", "expected"),
    [
        ("tr", "Adam geldi.", "What happened as a result?", "Adam geldi bu yüzden"),
        ("tr", "Adam geldi.", "What was the cause?", "Adam geldi çünkü"),
        ("zh", "他来了。", "What was the cause?", "他来了因为"),
    ],
)
def test_the_question_of_xcopa_becomes_a_word(language, premise, question, expected):
    text = f"{premise}\n{question}\n(1) İlk.\n(2) Second.\nAnswer:"
    english = f"The man came!\n{question}\n(1) A.\n(2) B.\nAnswer:"
    found = ending_row(row(language, text, "1", english), "")
    assert found["instruction"] == expected
    word = "because" if "cause" in question else "so"
    assert found["instruction_en"] == f"The man came {word}"
    first = "ilk." if language == "tr" else "i\u0307lk."
    assert found["answers"] == [first]
    with pytest.raises(ValueError, match=r"row 3: .* can be asked in"):
        ending_row(row("xx", text), "row 3")


@pytest.mark.parametrize("instruction", ["(1) a\n(2) b\nWhich?", "A story.\n(1) a", "A story."])
def test_what_is_no_story(instruction):
    for bad in (row("tr", instruction), row("tr", ENGLISH, "1", instruction)):
        with pytest.raises(ValueError, match="row 3: the instruction must be a story"):
            ending_row(bad, "row 3")


def test_what_is_no_number_of_an_ending():
    with pytest.raises(ValueError, match=r"row 3: the answers must be among \('1', '2'\)"):
        ending_row(row("tr", ENGLISH, "3"), "row 3")
