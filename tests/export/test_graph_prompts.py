"""Prompts and answers in the graph against `CCPreprocessor`, which is Python."""

import keras
import numpy as np
import pytest
import tiny_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keras_cc import CCPreprocessor

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs are TensorFlow's: tested once"
)
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_cc.export import graph_tokenizers
    from keras_cc.export.graph_prompts import GraphPrompts

LENGTH = 64
CASES = {
    "gemma": ("gemma", "gemma"),
    "gemma_plain": ("gemma", None),
    "gemma_line": ("gemma", "{instruction}\n"),
    "llama": ("llama", "Q: {instruction}\nA:"),
    "mistral": ("mistral", "mistral"),
    "llama3": ("llama3", "llama3"),
    "llama3_plain": ("llama3", None),
    "smollm": ("smollm2", "smollm"),
    "qwen": ("qwen", "chatml"),
    "gpt2": ("gpt2", None),
}
_TEMPLATES = ["<start_of_turn>", "<eos>", "<|im_end|>", "[INST]", "<|eot_id|>", "<s>", "</s>"]
PROMPTS = st.lists(
    st.text(st.sampled_from(list(" \t\n\u00a0\u2003\u001cabK'é中🙂12<|>")), max_size=20)
    | st.lists(st.sampled_from([*_TEMPLATES, "a", " ", "<", "the"]), max_size=6).map("".join),
    min_size=1,
    max_size=4,
)


# Byte pairs take long to try; the quick run has those of one tokenizer.
BYTE_PAIRS = ("llama3_plain", "smollm", "qwen", "gpt2")
PAIRS = [
    pytest.param(name, marks=pytest.mark.large) if name in BYTE_PAIRS else name for name in CASES
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    name, template = CASES[request.param]
    tokenizer = getattr(tiny_tokenizers, f"{name}_tokenizer")()
    preprocessor = CCPreprocessor(tokenizer, LENGTH, template=template)
    graph = GraphPrompts(preprocessor)
    # As it is exported, and much faster than one operation after the other.
    graph.ids = tf.function(graph.ids, [tf.TensorSpec([None], tf.string)])
    return preprocessor, graph


def encode(graph, prompts, max_length=LENGTH, errors=None):
    errors = tf.fill([len(prompts)], "") if errors is None else tf.constant(errors)
    return graph.encode(tf.constant(prompts, tf.string), tf.constant(max_length), errors)


class TestIds:
    @settings(max_examples=40, deadline=None)
    @given(prompts=PROMPTS)
    @example(prompts=["", " "])
    @example(prompts=["a<eos>b", "<start_of_turn>user\n", "<|im_end|><|im_end|>", "x[/INST]y"])
    def test_equal_the_preprocessors(self, pair, prompts):
        preprocessor, graph = pair
        found = graph.ids(tf.constant(prompts, tf.string)).to_list()
        assert found == preprocessor.prompt_ids(prompts)

    def test_a_start_token_is_not_doubled(self):
        tokenizer = tiny_tokenizers.llama3_tokenizer()
        graph = GraphPrompts(CCPreprocessor(tokenizer, LENGTH))
        start = tokenizer.start_token_id
        found = graph.ids(tf.constant(["<|begin_of_text|>a", "a"])).to_list()
        assert found[0] == found[1] and found[0].count(start) == 1

    def test_a_tokenizer_that_the_graph_does_not_follow_is_refused(self, monkeypatch):
        tokenizer = tiny_tokenizers.gemma_tokenizer()
        preprocessor = CCPreprocessor(tokenizer, LENGTH)
        shift = lambda graph, texts: graph._pieces.tokenize(texts) + 1  # noqa: E731
        monkeypatch.setattr(graph_tokenizers.SentencePieceGraph, "tokenize", shift)
        with pytest.raises(ValueError, match="other ids than from GemmaTokenizer"):
            GraphPrompts(preprocessor)


class TestEncoding:
    def test_equals_generate_preprocess(self, pair):
        preprocessor, graph = pair
        prompts = ["Kenya", "", "the quick\nfox"]
        if not preprocessor.prompt_ids([""])[0]:
            prompts.remove("")
        expected = preprocessor.generate_preprocess(prompts, LENGTH + 40)
        found = encode(graph, prompts, LENGTH + 40)
        np.testing.assert_array_equal(found.token_ids, expected["token_ids"])
        np.testing.assert_array_equal(found.padding_mask, expected["padding_mask"] != 0)
        np.testing.assert_array_equal(found.lengths, expected["padding_mask"].sum(axis=1))
        assert set(found.errors.numpy()) == {b""}

    def test_each_prompt_is_refused_by_itself(self, pair):
        preprocessor, graph = pair
        prompts = [b"the", b"\xff\xfe", b"fox " * 100, "é".encode()[:1], b"a" * 10_000]
        found = encode(graph, prompts, LENGTH + 40)
        said = [error.decode() for error in found.errors.numpy()]
        assert said[0] == ""
        assert said[1] == said[3] == "The prompt is not valid UTF-8."
        tokens = len(preprocessor.prompt_ids(["fox " * 100])[0])
        assert said[2] == f"The prompt has {tokens} tokens; it must have fewer than max_length=104."
        assert "max_length=104" in said[4]

    def test_a_refused_row_is_one_that_is_answered(self, pair):
        """No step is made for it: all is prompt but the last place, where a stop token stands."""
        preprocessor, graph = pair
        found = encode(graph, ["x" * 5000, "the"], LENGTH + 40)
        assert found.token_ids[0, -1] in preprocessor.stop_token_ids
        assert found.padding_mask.numpy()[0].tolist() == [True] * (LENGTH + 39) + [False]

    def test_a_prompt_fits_up_to_one_token_before_the_end(self, pair):
        preprocessor, graph = pair
        tokens = len(preprocessor.prompt_ids(["the fox"])[0])
        said = [
            encode(graph, ["the fox"], length).errors.numpy()[0] for length in (tokens, tokens + 1)
        ]
        assert said[0] != b"" and said[1] == b""

    def test_a_prompt_without_a_token_is_refused(self):
        graph = GraphPrompts(CCPreprocessor(tiny_tokenizers.qwen_tokenizer(), LENGTH))
        assert encode(graph, ["", "a"]).errors.numpy().tolist() == [
            b"The prompt has no token.",
            b"",
        ]

    def test_an_error_that_is_there_already_stays(self, pair):
        found = encode(pair[1], ["the", "fox"], LENGTH + 40, errors=["no", ""])
        assert found.errors.numpy().tolist() == [b"no", b""]


class TestTexts:
    def test_equal_the_preprocessors(self, pair):
        preprocessor, graph = pair
        rng = np.random.default_rng(0)
        ids = rng.integers(0, preprocessor.tokenizer.vocabulary_size(), (8, 20)).astype("int32")
        ids[:, 3] = sorted(preprocessor.special_token_ids)[0]
        mask = rng.random((8, 20)) < 0.8
        mask[-1] = False
        found = [text.decode() for text in graph.texts(tf.constant(ids), tf.constant(mask)).numpy()]
        assert found == preprocessor.detokenize(ids, mask)
