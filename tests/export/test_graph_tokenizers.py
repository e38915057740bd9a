"""Tokenizers in the graph against the eager ones, which are other code: Rust and C++."""

import random

import keras
import keras_hub
import pytest
import tiny_tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs are TensorFlow's: tested once"
)
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from keras_cc.demo import SmolLM2Tokenizer
    from keras_cc.export import graph_tokenizers


def smollm2_words():
    """Splits into words, as SmolLM2 does, with merges over what the splitting keeps apart."""
    vocabulary, merges = tiny_tokenizers.byte_pair_vocabulary(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    )
    for left, right in [("Ġ", "Ġ"), ("1", "2"), ("a", "Ġ"), ("'", "s"), ("Ġ", "'"), ("ĠĠ", "a")]:
        merges.append(f"{left} {right}")
        vocabulary.setdefault(left + right, len(vocabulary))
    return SmolLM2Tokenizer(vocabulary, merges)


NAMES = ("gemma", "llama", "mistral", "llama3", "qwen", "gpt2", "bloom", "falcon")


def tokenizer_of(name):
    if name == "smollm2_words":
        return smollm2_words()
    return getattr(tiny_tokenizers, f"{name}_tokenizer")()


def eager_ids(tokenizer, texts):
    return [[int(i) for i in ids] for ids in tokenizer.tokenize(texts)]


def graph_ids(graph, texts):
    return graph.tokenize(tf.constant(texts, tf.string)).to_list()


# Byte pairs take long to try; the quick run has those of two tokenizers.
BYTE_PAIRS = ("qwen", "gpt2", "bloom", "falcon")
PAIRS = [
    pytest.param(name, marks=pytest.mark.large) if name in BYTE_PAIRS else name
    for name in (*NAMES, "smollm2_words")
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    tokenizer = tokenizer_of(request.param)
    graph = graph_tokenizers.of(tokenizer)
    # As it is exported, and much faster than one operation after the other.
    graph.tokenize = tf.function(graph.tokenize, [tf.TensorSpec([None], tf.string)])
    return tokenizer, graph


TEXTS = st.lists(
    st.text(st.sampled_from(list("ab 12'st\n\té中🙂\u00a0\u3000.<|>_")), max_size=40)
    | st.text(max_size=30)
    | st.sampled_from(["<|im_end|>", "<s>", "the user <|eot_id|><|eot_id|> x", "<eos>"]),
    min_size=1,
    max_size=5,
)


class TestIds:
    @settings(max_examples=40, deadline=None)
    @given(texts=TEXTS)
    @example(texts=["", "", " "])
    @example(texts=["a  b", "a  1", "1  a", "a \n b", "\n\na", "  ", "12 34", "it's 's"])
    def test_equal_the_eager_ones(self, pair, texts):
        tokenizer, graph = pair
        # A SentencePiece text ends at NUL in one of the two libraries' interfaces; a server's
        # prompts hold none that a user could type.
        texts = [text.replace("\0", "") for text in texts]
        assert graph_ids(graph, texts) == eager_ids(tokenizer, texts)

    def test_of_no_text_at_all(self, pair):
        assert graph_ids(pair[1], []) == []

    def test_of_ten_thousand_characters(self, pair):
        tokenizer, graph = pair
        texts = ["a" * 10_000, "the user is in Kenya, 12 " * 400]
        assert graph_ids(graph, texts) == eager_ids(tokenizer, texts)

    @pytest.mark.parametrize("seed", range(12))
    def test_whatever_the_order_of_the_rules(self, seed):
        """Rules in an order that no training gives: what a rule makes is merged before it."""
        rng = random.Random(seed)
        vocabulary, _ = tiny_tokenizers.byte_pair_vocabulary(("<|endoftext|>",))
        tokens, rules = list("abcd"), {}
        for _ in range(25):
            pair = rng.choice(tokens), rng.choice(tokens)
            if len("".join(pair)) < 7 and pair not in rules:
                rules[pair] = None
                tokens.append("".join(pair))
                vocabulary.setdefault("".join(pair), len(vocabulary))
        merges = [" ".join(pair) for pair in rules]
        rng.shuffle(merges)
        tokenizer = keras_hub.tokenizers.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
        texts = ["".join(rng.choice("abcd ") for _ in range(30)) for _ in range(40)]
        assert graph_ids(graph_tokenizers.of(tokenizer), texts) == eager_ids(tokenizer, texts)

    def test_words_are_found_by_trying(self):
        assert graph_tokenizers.of(smollm2_words()).splits_words
        assert not graph_tokenizers.of(tiny_tokenizers.llama3_tokenizer()).splits_words

    def test_bytes_that_the_vocabulary_lacks_are_left_out(self):
        vocabulary, merges = tiny_tokenizers.byte_pair_vocabulary(("<|endoftext|>",))
        kept = [token for token in vocabulary if token != "x"]
        vocabulary = {token: number for number, token in enumerate(kept)}
        tokenizer = keras_hub.tokenizers.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
        texts = ["txhe", "x", "axe"]
        found = graph_ids(graph_tokenizers.of(tokenizer), texts)
        assert found == eager_ids(tokenizer, texts)
        assert found[0] == [vocabulary["the"]] and found[1] == []


class TestTexts:
    def test_equal_the_eager_ones(self, pair):
        """Any ids, bytes among them that make no character."""
        tokenizer, graph = pair
        rng = random.Random(0)
        rows = [
            [rng.randrange(tokenizer.vocabulary_size()) for _ in range(length)]
            for length in [1, 2, 3, *range(20, 60)]
        ]
        found = graph.detokenize(tf.ragged.constant(rows, dtype=tf.int32)).numpy()
        assert [text.decode() for text in found] == [
            str(tokenizer.detokenize([r])[0]) for r in rows
        ]

    def test_of_no_ids(self, pair):
        rows = tf.ragged.constant([[], []], dtype=tf.int32)
        assert pair[1].detokenize(rows).numpy().tolist() == [b"", b""]


class TestRefusals:
    def test_another_kind_of_tokenizer(self):
        tokenizer = keras_hub.tokenizers.ByteTokenizer()
        with pytest.raises(ValueError, match="ByteTokenizer"):
            graph_tokenizers.of(tokenizer)

    def test_a_space_in_front_of_every_text(self):
        tokenizer = tiny_tokenizers.gpt2_tokenizer()
        tokenizer.add_prefix_space = True
        with pytest.raises(ValueError, match="add_prefix_space"):
            graph_tokenizers.of(tokenizer)

    def test_words_that_no_graph_finds(self, monkeypatch):
        tokenizer = tiny_tokenizers.gpt2_tokenizer()
        own = tokenizer.tokenize
        reverse = lambda texts: [ids[::-1] for ids in own(texts)]  # noqa: E731
        monkeypatch.setattr(tokenizer, "tokenize", reverse)
        with pytest.raises(ValueError, match="GPT2Tokenizer"):
            graph_tokenizers.of(tokenizer)
