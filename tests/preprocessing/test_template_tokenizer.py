"""The tokenizer under a `CCPreprocessor`: its special tokens, and ids back to text."""

import keras_hub
import numpy as np
import pytest
import tiny_tokenizers
from tiny_tokenizers import ROW, TOKENIZERS, ids_of

from keras_cc import CCPreprocessor

GEMMA = tiny_tokenizers.gemma_tokenizer()


def real(x):
    return x["token_ids"][0][x["padding_mask"][0] == 1].tolist()


def test_stop_tokens_include_the_second_end_token():
    tokenizer = tiny_tokenizers.llama3_tokenizer()
    assert CCPreprocessor(tokenizer).stop_token_ids == (
        tokenizer.token_to_id("<|end_of_text|>"),
        tokenizer.token_to_id("<|eot_id|>"),
    )


def test_a_template_that_begins_with_the_start_token_does_not_double_it():
    tokenizer = tiny_tokenizers.smollm2_tokenizer()  # its start token is <|im_start|>
    x, _, _ = CCPreprocessor(tokenizer, 128, template="chatml")([ROW])
    start, user = tokenizer.start_token_id, tokenizer.token_to_id("user")
    assert real(x)[:2] == [start, user]


@pytest.mark.parametrize("given_start, preprocessor_start, expected", [
    (None, True, True),
    (None, False, False),
    (True, False, True),
    (False, True, False),
])  # fmt: skip
def test_the_start_token_follows_the_preprocessor(given_start, preprocessor_start, expected):
    inner = keras_hub.models.GemmaCausalLMPreprocessor(GEMMA, add_start_token=preprocessor_start)
    preprocessor = CCPreprocessor(inner, 64, add_start_token=given_start)
    x, _, _ = preprocessor([ROW])
    assert (x["token_ids"][0, 0] == GEMMA.start_token_id) == expected


def test_tokenizers_that_add_their_own_bos_and_eos():
    plain = tiny_tokenizers.llama_tokenizer()
    adds = tiny_tokenizers.llama_tokenizer(add_bos=True, add_eos=True)
    assert ids_of(adds, "Kenya")[0] == adds.start_token_id  # it does
    one, two = (CCPreprocessor(t, 64)([ROW])[0] for t in (plain, adds))
    np.testing.assert_array_equal(one["token_ids"], two["token_ids"])


@pytest.mark.parametrize("value", ["gemma", 3, object()])
def test_something_else_than_a_tokenizer(value):
    with pytest.raises(TypeError, match="KerasHub"):
        CCPreprocessor(value)


def test_a_tokenizer_that_cuts_or_returns_strings_is_refused():
    with pytest.raises(ValueError, match="sequence_length=8"):
        CCPreprocessor(tiny_tokenizers.llama_tokenizer(sequence_length=8))
    with pytest.raises(ValueError, match="dtype=string"):
        CCPreprocessor(tiny_tokenizers.llama_tokenizer(dtype="string"))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_detokenize_gives_the_answer_back(name):
    preprocessor = CCPreprocessor(TOKENIZERS[name](), 80)
    rows = [ROW, {**ROW, "output": "केन्या (1)", "id": 3}]
    x, _, _ = preprocessor(rows)
    lengths = x["answer_mask"].argmax(axis=1) + 1
    texts = preprocessor.detokenize(x["token_ids"], x["padding_mask"], lengths)
    assert texts == [r["output"] for r in rows]
    # Whatever a model writes after its stop token is not part of the answer.
    junk = np.where(x["padding_mask"] == 1, x["token_ids"], x["token_ids"][:, [0]])
    assert preprocessor.detokenize(junk, prompt_lengths=lengths) == texts
    (pivot, _) = preprocessor.detokenize(x["pivot_token_ids"], x["pivot_padding_mask"])
    assert pivot == ROW["instruction_en"]


def test_detokenize_of_nothing_and_of_wrong_shapes():
    preprocessor = CCPreprocessor(GEMMA, 16)
    assert preprocessor.detokenize(np.zeros((2, 4), int), np.zeros((2, 4), int)) == ["", ""]
    with pytest.raises(ValueError, match=r"\(B, T\)"):
        preprocessor.detokenize(np.zeros(4, int))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        preprocessor.detokenize(np.zeros((2, 4), int), np.zeros((2, 3), int))
