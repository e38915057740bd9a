"""`CCPreprocessor`: rows spelled out by hand, properties of truncation, and what it refuses."""

import json
import threading

import keras
import keras_hub
import numpy as np
import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import ROW, TOKENIZERS, ids_of

from keras_cc import CCPreprocessor

GEMMA = tiny_tokenizers.gemma_tokenizer()


def real(x, key="token_ids", mask="padding_mask", row=0):
    return x[key][row][x[mask][row] == 1].tolist()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_row_of_every_tokenizer(name):
    tokenizer = TOKENIZERS[name]()
    x, y, weight = CCPreprocessor(tokenizer, 80, 70, padding="max_length")([ROW])
    start = [] if tokenizer.start_token_id is None else [tokenizer.start_token_id]
    prompt = start + ids_of(tokenizer, ROW["instruction"])
    answer = [*ids_of(tokenizer, ROW["output"]), tokenizer.end_token_id]
    length, pad = len(prompt) + len(answer), tokenizer.pad_token_id

    assert set(x) == {
        *["token_ids", "padding_mask", "answer_mask"],
        *["pivot_token_ids", "pivot_padding_mask"],
    }
    assert [x[k].shape for k in ("token_ids", "padding_mask", "answer_mask")] == [(1, 80)] * 3
    assert [x[k].shape for k in ("pivot_token_ids", "pivot_padding_mask")] == [(1, 70)] * 2
    assert {v.dtype for v in x.values()} | {y.dtype} == {np.dtype("int32")}
    assert weight.dtype == np.float32
    assert x["token_ids"][0].tolist() == prompt + answer + [pad] * (80 - length)
    assert x["padding_mask"][0].tolist() == [1] * length + [0] * (80 - length)
    assert y[0].tolist() == (prompt + answer)[1:] + [pad] * (81 - length)
    expected = [0] * (len(prompt) - 1) + [1] * len(answer) + [0] * (81 - length)
    assert x["answer_mask"][0].tolist() == expected
    assert weight[0].tolist() == expected
    assert y[0][weight[0] == 1].tolist() == answer
    assert x["token_ids"][0, x["answer_mask"][0].argmax()] == prompt[-1]
    assert real(x, "pivot_token_ids", "pivot_padding_mask") == start + ids_of(
        tokenizer, ROW["instruction_en"]
    )


def test_the_answer_never_reaches_the_pivot_stream():
    preprocessor = CCPreprocessor(GEMMA, 64)
    one, _, _ = preprocessor([ROW])
    two, _, _ = preprocessor([{**ROW, "output": "something else"}])
    for key in ("pivot_token_ids", "pivot_padding_mask"):
        np.testing.assert_array_equal(one[key], two[key])


def test_a_template_ends_the_answer_with_its_end_of_turn():
    preprocessor = CCPreprocessor(GEMMA, 64, template="gemma")
    x, y, weight = preprocessor([ROW])
    end, turn = (GEMMA.token_to_id(t) for t in ("<end_of_turn>", "<start_of_turn>"))
    assert y[0][weight[0] == 1].tolist() == [*ids_of(GEMMA, ROW["output"]), end]
    assert real(x)[:2] == [GEMMA.start_token_id, turn]
    assert real(x, "pivot_token_ids", "pivot_padding_mask")[:2] == [GEMMA.start_token_id, turn]
    assert preprocessor.stop_token_ids == (GEMMA.end_token_id, end)


def test_generation_matches_keras_hub():
    inner = keras_hub.models.GemmaCausalLMPreprocessor(GEMMA, sequence_length=40)
    prompts = ["Kenya\n\nwhat?", "केन्या"]
    expected = inner.generate_preprocess(prompts)
    actual = CCPreprocessor(inner, 40).generate_preprocess(prompts)
    for key in ("token_ids", "padding_mask"):
        np.testing.assert_array_equal(
            actual[key], keras.ops.convert_to_numpy(expected[key]).astype("int32")
        )
        assert actual[key].dtype == np.int32


FORMS = {
    "list of rows": lambda rows: rows,
    "tuple of rows": tuple,
    "columns": lambda rows: {k: [r[k] for r in rows] for k in rows[0]},
    "numpy": lambda rows: {k: np.array([r[k] for r in rows]) for k in rows[0]},
    "bytes": lambda rows: {
        k: np.array([v.encode() if isinstance(v := r[k], str) else v for r in rows], object)
        for k in rows[0]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_rows_gives_the_same(form):
    rows = [ROW, {**ROW, "instruction": "Habari?", "lang": "sw", "id": 2}]
    preprocessor = CCPreprocessor(GEMMA, 64)
    expected = preprocessor(rows)
    actual = preprocessor(FORMS[form](rows))
    for one, two in zip(expected[0].items(), actual[0].items(), strict=True):
        assert one[0] == two[0]
        np.testing.assert_array_equal(one[1], two[1])
    np.testing.assert_array_equal(expected[1], actual[1])


def test_one_row_of_strings_is_a_batch_of_one():
    preprocessor = CCPreprocessor(GEMMA, 64)
    x, _, _ = preprocessor(ROW)
    np.testing.assert_array_equal(x["token_ids"], preprocessor([ROW])[0]["token_ids"])


def test_other_columns_are_ignored_whatever_they_hold():
    row = {**ROW, "answers": ["a", "b"], "score": 0.5, "none": None}
    assert CCPreprocessor(GEMMA, 64)(row)[1].shape == CCPreprocessor(GEMMA, 64)(ROW)[1].shape
    columns = {k: [v] for k, v in ROW.items()} | {"answers": ["a", "b", "c"]}
    assert len(CCPreprocessor(GEMMA, 64)(columns)[1]) == 1


WITHOUT = "no such column"
PIVOTS = [  # lang, pivot, has a pivot?
    ("tr", "What?", True),
    ("tr", "", False),
    ("tr", "  \n", False),
    ("tr", None, False),
    ("tr", WITHOUT, False),
    ("en", "What?", False),
    ("EN", "What?", False),
    ("en-GB", "What?", False),
    ("en_US", "What?", False),
    ("enm", "What?", True),  # Middle English is not English
    ("tr", "same", True),  # a language is given: its word counts
    (WITHOUT, "same", False),
    (WITHOUT, "What?", True),
    (None, "same", False),
    ("", "same", False),
]


@pytest.mark.parametrize("lang, pivot, expected", PIVOTS)
def test_which_rows_have_a_pivot(lang, pivot, expected):
    row = {"instruction": "same", "output": "yes", "instruction_en": pivot, "lang": lang}
    row = {k: v for k, v in row.items() if v is not WITHOUT}
    x, _, _ = CCPreprocessor(GEMMA, 16)([row])
    assert x["pivot_padding_mask"].any() == expected
    if not expected:
        assert (x["pivot_token_ids"] == GEMMA.pad_token_id).all()


def test_another_pivot_language_and_other_columns():
    preprocessor = CCPreprocessor(
        GEMMA,
        16,
        instruction_column="q",
        output_column="a",
        pivot_column="q_es",
        lang_column="language",
        pivot_language="es",
    )
    rows = [
        {"q": "what", "a": "yes", "q_es": "que", "language": "en"},
        {"q": "que", "a": "yes", "q_es": "que", "language": "es"},
    ]
    x, _, _ = preprocessor(rows)
    assert x["pivot_padding_mask"].any(axis=1).tolist() == [True, False]


words = st.text(alphabet="abcKenya şन\n?", min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=150, deadline=None)
@given(words, words, st.integers(2, 40), st.sampled_from([None, "gemma"]))
def test_truncation_keeps_the_answer_and_a_suffix_of_the_prompt(prompt, answer, length, template):
    whole = CCPreprocessor(GEMMA, 512, template=template)
    row = {"instruction": prompt, "output": answer}
    x, y, weight = whole([row])
    full, answered = real(x), y[0][weight[0] == 1].tolist()
    start, full_prompt = full[0], full[1 : len(full) - len(answered)]
    cut = CCPreprocessor(GEMMA, length, 512, template=template)
    if 2 + len(answered) > length:  # start, one prompt token
        with pytest.raises(ValueError, match="does not fit"):
            cut([row])
        return
    x, y, weight = cut([row])
    kept = real(x)
    assert y[0][weight[0] == 1].tolist() == answered == kept[len(kept) - len(answered) :]
    assert kept[0] == start
    kept_prompt = kept[1 : len(kept) - len(answered)]
    assert kept_prompt and full_prompt[len(full_prompt) - len(kept_prompt) :] == kept_prompt
    assert len(kept) == min(length, len(full))  # no more is cut than must be
    assert cut.truncated_count == (len(full) > length)
    # Masks: ones, then zeros; the answer's mask ends one before the row does.
    assert (np.diff(x["padding_mask"][0]) <= 0).all()
    assert x["answer_mask"][0].sum() == len(answered)
    assert x["answer_mask"][0, len(kept) - 1 - len(answered) : len(kept) - 1].all()
    np.testing.assert_array_equal(weight, x["answer_mask"].astype("float32"))
    np.testing.assert_array_equal(y[0, :-1], x["token_ids"][0, 1:])


def test_counters_are_safe_across_threads():
    preprocessor = CCPreprocessor(GEMMA, 12, 64)
    work = [threading.Thread(target=lambda: [preprocessor([ROW]) for _ in range(20)])
            for _ in range(4)]  # fmt: skip
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert (preprocessor.row_count, preprocessor.truncated_count) == (80, 80)


BAD_ROWS = {
    "no answer column": (
        {"output": WITHOUT, "instruction_en": WITHOUT},
        ValueError,
        "no column 'output'",
    ),
    "no instruction column": ({"instruction": WITHOUT}, ValueError, "no column 'instruction'"),
    "answer None": ({"output": None, "instruction_en": None}, ValueError, "id 17: no 'output'"),
    "answer empty": ({"output": ""}, ValueError, "id 17: 'output' is empty"),
    "answer blank": ({"output": " \n"}, ValueError, "id 17: 'output' is empty"),
    "answer number": ({"output": 2}, TypeError, "id 17: 'output' must be a string"),
    "instruction None": ({"instruction": None}, ValueError, "id 17: no 'instruction'"),
    "instruction blank": ({"instruction": " "}, ValueError, "id 17: 'instruction' is empty"),
    "pivot number": ({"instruction_en": 3}, TypeError, "id 17: 'instruction_en' must be"),
    "instruction NaN": ({"instruction": float("nan")}, ValueError, "id 17: no 'instruction'"),
    "long answer": (
        {"output": "Kenya " * 99},
        ValueError,
        r"id 17: the answer has \d+ tokens.*`max_length` to \d+.*max_length=32",
    ),
    "long pivot": (
        {"instruction_en": "Kenya " * 99},
        ValueError,
        r"id 17: the pivot prompt has \d+ tokens.*`pivot_max_length` to \d+.*pivot_max_length=32",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(name):
    change, error, message = BAD_ROWS[name]
    row = {k: v for k, v in {**ROW, **change}.items() if v is not WITHOUT}
    with pytest.raises(error, match=message) as caught:
        CCPreprocessor(GEMMA, 32)([row])
    assert "Received: " in str(caught.value)


def test_rows_without_an_id_are_named_by_their_place():
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}]
    with pytest.raises(ValueError, match="row 1: 'output' is empty"):
        CCPreprocessor(GEMMA, 32)(rows)


@pytest.mark.parametrize("advice", ["max_length", "pivot_max_length"])
def test_the_length_that_an_error_advises_is_enough(advice):
    change = {"output" if advice == "max_length" else "instruction_en": "Kenya " * 40}
    lengths = {"max_length": 32, "pivot_max_length": 32}
    with pytest.raises(ValueError) as error:
        CCPreprocessor(GEMMA, **lengths)([{**ROW, **change}])
    needed = int(str(error.value).split(f"`{advice}` to ")[1].split()[0])
    CCPreprocessor(GEMMA, **{**lengths, advice: needed})([{**ROW, **change}])
    with pytest.raises(ValueError):
        CCPreprocessor(GEMMA, **{**lengths, advice: needed - 1})([{**ROW, **change}])


@pytest.mark.parametrize(
    "rows, error",
    [
        ([], TypeError),
        ("text", TypeError),
        (["text"], TypeError),
        (3, TypeError),
        ({}, ValueError),
        ({"instruction": [], "output": []}, ValueError),
        ({"instruction": ["a", "b"], "output": ["a"]}, ValueError),
        ({"instruction": ["a", "b"], "output": "a"}, ValueError),
    ],
)
def test_bad_batches(rows, error):
    with pytest.raises(error, match="Received"):
        CCPreprocessor(GEMMA, 32)(rows)


@pytest.mark.parametrize("length", [0, 1, -3, 2.5, "9", True])
@pytest.mark.parametrize("name", ["max_length", "pivot_max_length"])
def test_bad_lengths(name, length):
    with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}="):
        CCPreprocessor(GEMMA, **{name: length})


@pytest.mark.parametrize("name", ["instruction_column", "output_column", "pivot_language"])
@pytest.mark.parametrize("value", ["", None, 3])
def test_bad_names(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        CCPreprocessor(GEMMA, **{name: value})


def test_columns_must_differ():
    with pytest.raises(ValueError, match="its own name"):
        CCPreprocessor(GEMMA, pivot_column="instruction")


def test_inside_a_tf_function_it_says_so():
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    dataset = tf.data.Dataset.from_tensors({"instruction": ["a"], "output": ["b"]})
    with pytest.raises(RuntimeError, match="pass the dataset of strings to `fit`"):
        dataset.map(CCPreprocessor(GEMMA, 16))


# --- generation ---


def test_generate_preprocess_pads_to_the_length_asked_for():
    preprocessor = CCPreprocessor(GEMMA, 64, template="gemma")
    x, _, _ = preprocessor([ROW])
    prompt_length = int(x["answer_mask"][0].argmax()) + 1
    for length in (None, 50):
        out = preprocessor.generate_preprocess([ROW["instruction"]], length)
        assert out["token_ids"].shape == out["padding_mask"].shape == (1, length or 64)
        assert real(out) == x["token_ids"][0, :prompt_length].tolist()
    with pytest.raises(
        ValueError, match=rf"has {prompt_length} tokens.*max_length={prompt_length}"
    ):
        preprocessor.generate_preprocess([ROW["instruction"]], prompt_length)
    preprocessor.generate_preprocess([ROW["instruction"]], prompt_length + 1)


def test_pivot_preprocess_masks_absent_prompts():
    preprocessor = CCPreprocessor(GEMMA, 64, 40, template="gemma", padding="max_length")
    x, _, _ = preprocessor([ROW])
    out = preprocessor.pivot_preprocess([ROW["instruction_en"], None, "", " "])
    assert out["pivot_token_ids"].shape == (4, 40)
    np.testing.assert_array_equal(out["pivot_token_ids"][:1], x["pivot_token_ids"])
    assert out["pivot_padding_mask"].any(axis=1).tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match=r"prompts\[0\]: the pivot prompt"):
        preprocessor.pivot_preprocess(["Kenya " * 50])


def test_the_length_of_an_answer_or_none_where_no_row_holds_it():
    preprocessor = CCPreprocessor(GEMMA, 32)
    prompt, tokens = "Kenya " * 40, ids_of(GEMMA, "Kenya şilini")
    assert preprocessor.answer_length(prompt, "Kenya şilini") == len(tokens)
    _, _, weight = preprocessor([{"instruction": prompt, "output": "Kenya şilini"}])
    assert weight.sum() == len(tokens) + 1  # the end token is trained on, and not counted
    for count, expected in ((29, 29), (30, None)):  # start, one of the prompt and end: 3 of 32
        (answer,) = preprocessor.detokenize([tokens[:1] * count])
        assert ids_of(GEMMA, answer) == tokens[:1] * count
        assert preprocessor.answer_length(prompt, answer) == expected
    assert preprocessor.row_count == 1
    for texts in ((3, "a"), ("a", None)):
        with pytest.raises(TypeError, match=r"must be strings. Received: \w+\[0\]=(3|None)"):
            preprocessor.answer_length(*texts)


def test_prompts_must_be_strings():
    preprocessor = CCPreprocessor(GEMMA, 64)
    for prompts in ([3], [None]):
        with pytest.raises(TypeError, match=r"prompts\[0\]"):
            preprocessor.generate_preprocess(prompts)


# --- serialisation ---


@pytest.mark.parametrize("template", [None, "gemma", "{instruction}\n"])
def test_config_round_trip_needs_only_the_vocabulary(template):
    inner = keras_hub.models.GemmaCausalLMPreprocessor(GEMMA, add_start_token=False)
    first = CCPreprocessor(inner, 48, 32, template=template, lang_column="language")
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(first)))
    second = keras.saving.deserialize_keras_object(config)
    assert isinstance(second, CCPreprocessor)
    assert not second.has_vocabulary
    with pytest.raises(ValueError, match="no tokenizer with a vocabulary"):
        second([ROW])
    second.preprocessor = inner
    assert second.get_config() == first.get_config()
    row = {**ROW, "language": "tr"}
    np.testing.assert_array_equal(first([row])[0]["token_ids"], second([row])[0]["token_ids"])


def test_a_config_without_a_tokenizer():
    preprocessor = CCPreprocessor.from_config({"max_length": 32, "template": "gemma"})
    assert preprocessor.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer"):
        preprocessor.generate_preprocess(["x"])
    with pytest.raises(ValueError, match="special tokens"):  # a template of another family
        preprocessor.preprocessor = tiny_tokenizers.llama_tokenizer()
    preprocessor.preprocessor = GEMMA
    assert preprocessor([ROW])[1].shape == (1, 32)


def test_no_vocabulary_lies_in_the_config():
    config = json.dumps(keras.saving.serialize_keras_object(CCPreprocessor(GEMMA)))
    assert len(config) < 3000
