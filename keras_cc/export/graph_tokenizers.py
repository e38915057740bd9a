"""Tokenizers as TensorFlow graphs: the ids and texts of the eager ones, string tensors in and out.

Imported late, since it needs TensorFlow and tensorflow-text.

Notable choices:

- Byte-level BPE is written in TensorFlow's own operations and `tf_text.regex_split`, which TF
  Serving links. KerasHub's graph of it (`_tokenize_tf`) splits text in other places than KerasHub's
  eager code, with which models are trained and asked, and caches in a table that grows.
- Where the eager code splits text into words is tried and not assumed (KerasHub 0.32 hands its
  pattern over as a plain string, which matches nothing: merges run over spaces). A tokenizer whose
  ids no graph gives is refused.
"""

from typing import Any

import tensorflow as tf
import tensorflow_text as tf_text

# Marks places in valid UTF-8, where this byte cannot stand.
MARK = b"\xff"

# Unicode's white space, which RE2's `\s` is not.
_SPACE = r"\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}"
_SPACE += r"\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
# GPT-2's pattern with each digit by itself, as SmolLM2 splits. `\s+(?!\S)` has no twin in RE2: of
# spaces before a word the last one is parted off first.
_LAST_SPACE = rf"([{_SPACE}])([{_SPACE}])([^{_SPACE}\pN])"
_WORD = rf"\pN|'s|'t|'re|'ve|'m|'ll|'d| ?\pL+| ?[^{_SPACE}\pL\pN]+|[{_SPACE}]+"

# What graph and eager code are compared on: scripts, digits, spaces of every kind, quotes, joined
# emoji, special tokens.
PROBES = (
    "",
    " ",
    "a",
    "What is the currency of Kenya?",
    "Kenya'nın para birimi nedir?\n",
    "It's 1999, isn't it?  We'll see:\t12,345.67 \n\n\n  end  \n",
    "केन्या की मुद्रा क्या है? ১২৩",
    "肯尼亚的货币是什么？　全角",
    "ما هي عملة كينيا؟ ١٢٣",
    "👩‍👩‍👧‍👦 é e\u0301 \u00a0\u2009x\u202f\u3000y ſ ß ﬁ ²½Ⅷ",
    "two\n\nlines   three !!\n\n",
    "def f(x):\n    return x**2  # ok\r\n",
    "<eos></s><|im_end|><|endoftext|>",
)


def of(tokenizer: Any) -> "SentencePieceGraph | BytePairGraph":
    """The graph of a KerasHub tokenizer's `tokenize` and `detokenize`.

    Args:
        tokenizer: a KerasHub tokenizer with its vocabulary: SentencePiece or byte-level BPE.

    Returns:
        A `tf.Module` with `tokenize`, strings `(N,)` to a ragged int32 `(N, None)`, and
        `detokenize`, the other way; `longest`, the most bytes that a token stands for, or None.

    Raises:
        ValueError: for another kind of tokenizer, or one that splits text in a way of its own.
    """
    if getattr(tokenizer, "proto", None) is not None:
        return SentencePieceGraph(tokenizer.proto)
    if getattr(tokenizer, "merges", None) is None:
        raise ValueError(
            "`generate` can be exported for SentencePiece and byte-level BPE tokenizers. "
            f"Received: {type(tokenizer).__name__}"
        )
    graph = BytePairGraph(tokenizer)
    expected = [[int(i) for i in ids] for ids in tokenizer.tokenize(list(PROBES))]
    for graph.splits_words in (True, False):
        if graph.tokenize(tf.constant(PROBES)).to_list() == expected:
            return graph
    raise ValueError(
        "`generate` cannot be exported: this tokenizer splits text into words in a way that is not "
        f"known in the graph. Received: {type(tokenizer).__name__}"
    )


class SentencePieceGraph(tf.Module):
    """SentencePiece, by the library that the eager tokenizer runs too."""

    longest = None  # its normaliser may make any text short

    def __init__(self, proto: bytes) -> None:
        super().__init__()
        self._pieces = tf_text.SentencepieceTokenizer(model=proto, out_type=tf.int32)

    def tokenize(self, texts: tf.Tensor) -> Any:
        return self._pieces.tokenize(texts)

    def detokenize(self, ids: tf.RaggedTensor) -> Any:
        return self._pieces.detokenize(ids)


class BytePairGraph(tf.Module):
    """Byte-level BPE.

    Text is cut at the special tokens, then into words, then into bytes. In each word the neighbours
    whose merge rule comes first are merged, from left to right, until no rule applies. All words of
    a batch take a step at once, and in a word all neighbours of one rule, unless what the rule
    makes has a rule of its own that comes before: then that one's turn is first.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        if getattr(tokenizer, "add_prefix_space", False):
            raise ValueError(
                "`generate` cannot be exported for a tokenizer that puts a space in front of every "
                "text. Received: add_prefix_space=True"
            )
        vocabulary = dict(tokenizer.vocabulary)
        alphabet = byte_alphabet()
        named = sorted({*tokenizer.unsplittable_tokens, *tokenizer.special_tokens})
        found = [[int(i) for i in ids] for ids in tokenizer.tokenize(named)] if named else []
        special = {
            token: vocabulary[token]
            for token, ids in zip(named, found, strict=True)
            if ids == [vocabulary.get(token)]
        }
        self._special = sorted(special, key=lambda token: (-len(token), token))
        self.splits_words = True  # or words run from special token to special token
        self._size = max(vocabulary.values()) + 1
        # Constants of the module, and not tables of strings: ids are all that the loop handles.
        self._byte_ids = tf.constant([vocabulary.get(sign, -1) for sign in alphabet], tf.int64)
        rules = _merge_rules(tokenizer.merges, vocabulary)
        self._no_merge = 2 * self._size * len(tokenizer.merges)
        merges = {}  # of two neighbours, to the rule's rank, its result and whether it goes alone
        for (left, right), (rank, merged, goes_alone) in rules.items():
            value = 2 * (rank * self._size + merged) + goes_alone
            merges[left * self._size + right] = value
        self._merges = _table(merges or {-1: self._no_merge}, default=self._no_merge)
        special_ids = {token.encode(): index for token, index in special.items()}
        self._special_ids = _table(special_ids or {MARK: -1}, default=-1)
        texts = _texts_of_ids(vocabulary, alphabet, self._size)
        self._texts = tf.constant(texts)
        self.longest = max(map(len, texts))

    def tokenize(self, texts: tf.Tensor) -> tf.RaggedTensor:
        parts = self._cut_at_specials(texts)  # (N, None)
        special = self._special_ids.lookup(parts.flat_values)
        words = self._words(tf.where(special < 0, parts.flat_values, ""))  # (parts, None)
        ids = self._merged(words)  # (parts, None), empty for special tokens
        own = tf.ragged.boolean_mask(special[:, None], special[:, None] >= 0)
        of_parts = tf.concat([own, ids], axis=1)
        return tf.cast(parts.with_flat_values(of_parts).merge_dims(1, 2), tf.int32)

    def detokenize(self, ids: tf.RaggedTensor) -> tf.Tensor:
        pieces = ids.with_flat_values(tf.gather(self._texts, ids.flat_values))
        texts = tf.strings.reduce_join(pieces, axis=-1)
        return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")

    def _cut_at_specials(self, texts):
        if not self._special:
            return tf.RaggedTensor.from_tensor(texts[:, None])
        pattern = "|".join(map(re2_literal, self._special))
        return tf_text.regex_split(texts, pattern, pattern)

    def _words(self, parts):
        """`(parts, None)`: what is merged within."""
        if not self.splits_words:
            return tf.RaggedTensor.from_tensor(parts[:, None])
        marked = tf.strings.regex_replace(parts, _LAST_SPACE, rb"\1" + MARK + rb"\2\3")
        cut = tf.strings.split(marked, MARK)
        words = tf_text.regex_split(cut.flat_values, _WORD, _WORD)
        return cut.with_flat_values(words).merge_dims(1, 2)

    def _merged(self, words):
        """Ids of every part of `words` `(parts, None)`, as `(parts, None)`."""
        # Flat: the bytes of all words, as ids, and beside each the number of its word.
        symbols = tf.io.decode_raw(tf.strings.reduce_join(words.flat_values), tf.uint8)
        symbols = tf.gather(self._byte_ids, tf.cast(symbols, tf.int32))
        lengths = tf.strings.length(words.flat_values, unit="BYTE")
        count = tf.size(lengths)
        word = tf.repeat(tf.range(count), lengths)
        # Bytes that the vocabulary lacks are left out, as the eager code does.
        is_known = symbols >= 0
        symbols, word = tf.boolean_mask(symbols, is_known), tf.boolean_mask(word, is_known)

        def rules(symbols, word):
            """The rule for each symbol and the next one."""
            pairs = symbols[:-1] * self._size + symbols[1:]
            return tf.where(word[:-1] == word[1:], self._merges.lookup(pairs), self._no_merge)

        def step(symbols, word, found):
            word_of = word[:-1]
            best = tf.gather(tf.math.unsorted_segment_min(found, word_of, count), word_of)
            is_best = (found == best) & (found < self._no_merge)
            place = tf.range(tf.size(found))
            # Of neighbours that overlap, as in "aaa", every second pair from the first.
            starts = is_best & tf.logical_not(tf.concat([[False], is_best[:-1]], axis=0))
            start_of = tf.gather(
                tf.concat([[0], tf.where(starts)[:, 0]], axis=0),
                tf.cumsum(tf.cast(starts, "int32")),
            )
            merges = is_best & ((place - tf.cast(start_of, "int32")) % 2 == 0)
            first = tf.math.unsorted_segment_min(
                tf.where(merges, place, tf.int32.max), word_of, count
            )
            merges &= (found % 2 == 0) | (place == tf.gather(first, word_of))
            merges = tf.concat([merges, [False]], axis=0)
            merged = tf.concat([found // 2 % self._size, [0]], axis=0)
            stays = tf.concat([[True], tf.logical_not(merges[:-1])], axis=0)
            symbols = tf.boolean_mask(tf.where(merges, merged, symbols), stays)
            word = tf.boolean_mask(word, stays)
            return symbols, word, rules(symbols, word)

        symbols, word, _ = tf.while_loop(
            lambda symbols, word, found: tf.reduce_any(found < self._no_merge),
            step,
            (symbols, word, rules(symbols, word)),
            shape_invariants=(tf.TensorShape([None]),) * 3,
        )
        ids = tf.RaggedTensor.from_value_rowids(
            symbols, tf.cast(word, tf.int64), nrows=tf.cast(count, tf.int64)
        )
        return words.with_flat_values(ids).merge_dims(1, 2)


def byte_alphabet() -> list[str]:
    """The sign that stands for each of the 256 bytes, as in GPT-2."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def re2_literal(text: str) -> str:
    """A pattern of RE2's that matches `text` alone."""
    return "".join(sign if sign.isalnum() else rf"\x{{{ord(sign):x}}}" for sign in text)


def _merge_rules(merges, vocabulary):
    """`(left id, right id)` to `(rank, merged id, goes alone)` of each rule."""
    rules, first_use = {}, {}
    for rank, rule in enumerate(merges):
        if "#version:" in rule.lstrip():
            continue
        left, right = rule.split(" ")
        pair = vocabulary[left], vocabulary[right]
        rules[pair] = rank, vocabulary[left + right]
        for part in pair:
            first_use.setdefault(part, rank)
    return {
        pair: (rank, merged, first_use.get(merged, len(merges)) < rank)
        for pair, (rank, merged) in rules.items()
    }


def _texts_of_ids(vocabulary, alphabet, size):
    """The bytes that each id stands for, id after id."""
    byte_of = {sign: byte for byte, sign in enumerate(alphabet)}
    texts = [b""] * size
    for token, index in vocabulary.items():
        is_bytes = all(sign in byte_of for sign in token)
        texts[index] = bytes(byte_of[sign] for sign in token) if is_bytes else token.encode()
    return texts


def _table(values, default):
    is_text = isinstance(next(iter(values)), bytes)
    keys = tf.constant(list(values), tf.string if is_text else tf.int64)
    values = tf.constant(list(values.values()), tf.int64)
    initializer = tf.lookup.KeyValueTensorInitializer(keys, values)
    return tf.lookup.StaticHashTable(initializer, default)
