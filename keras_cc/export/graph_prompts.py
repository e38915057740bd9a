"""What `CCPreprocessor` does with prompts and answers, as a TensorFlow graph.

Imported late, since it needs TensorFlow and tensorflow-text.

A prompt that cannot be answered is refused by itself, with a message, and the others of its batch
are answered: a server has no better way to tell a client which of 32 prompts was too long.
"""

import sys
from typing import NamedTuple

import tensorflow as tf

from keras_cc.export import graph_tokenizers
from keras_cc.export.graph_tokenizers import MARK, re2_literal
from keras_cc.preprocessing.template_tokenizer import TemplateTokenizer

# What `str.strip` takes off, and RE2's `\s` does not know.
_STRIPPED = "".join(rf"\x{{{i:x}}}" for i in range(sys.maxunicode + 1) if chr(i).isspace())


class Prompts(NamedTuple):
    """Encoded prompts: what the model reads, and what is said of those that it does not.

    Attributes:
        token_ids: int32 `(B, max_length)`.
        padding_mask: bool `(B, max_length)`.
        lengths: int32 `(B,)`, tokens of each prompt.
        errors: string `(B,)`, empty where the prompt can be answered.
    """

    token_ids: tf.Tensor
    padding_mask: tf.Tensor
    lengths: tf.Tensor
    errors: tf.Tensor


class GraphPrompts(tf.Module):
    """Prompts to ids and ids to texts, under the template of a preprocessor.

    Args:
        preprocessor: a `CCPreprocessor` with a tokenizer.

    Raises:
        ValueError: for a tokenizer that cannot be put into a graph.
    """

    def __init__(self, preprocessor: TemplateTokenizer) -> None:
        super().__init__()
        encoder = preprocessor.encoder
        self.tokenizer = graph_tokenizers.of(preprocessor.tokenizer)
        self._head, self._tail = list(encoder.head), list(encoder.tail)
        self._before, self._after, self._strip = encoder.before, encoder.after, encoder.strip
        self._start, self._pad = preprocessor.start_token_id, preprocessor.pad_token_id
        self._special = sorted(preprocessor.special_token_ids)
        self.stop_token_ids = preprocessor.stop_token_ids
        # Special tokens that the tokenizer would find in what a user writes under a template.
        self._literals = [
            text
            for index, text in encoder.special_ids.items()
            if index in preprocessor.tokenizer.tokenize([text])[0]
        ]
        self._line_break = [int(i) for i in self.tokenizer.tokenize(tf.constant(["\n"]))[0]]
        self._check(preprocessor)

    def _check(self, preprocessor):
        texts = [*graph_tokenizers.PROBES, *(f"a {text} b" for text in self._literals)]
        expected = preprocessor.prompt_ids(texts)
        received = self.ids(tf.constant(texts)).to_list()
        for text, wanted, found in zip(texts, expected, received, strict=True):
            if wanted != found:
                raise ValueError(
                    "`generate` cannot be exported: in the graph a prompt would get other ids than "
                    f"from {type(preprocessor.tokenizer).__name__}. "
                    f"Received: for {text!r} the ids {wanted}, in the graph {found}"
                )

    # ---------------------------------------------------------------- to ids

    def encode(self, prompts: tf.Tensor, max_length: tf.Tensor, errors: tf.Tensor) -> Prompts:
        """Encode prompts `(B,)` to `max_length` tokens, but for those with an error already."""
        readable = tf.strings.unicode_transcode(prompts, "UTF-8", "UTF-8", errors="replace")
        errors = _unless(errors, readable == prompts, "The prompt is not valid UTF-8.")
        # tensorflow-text takes it for the end of the text.
        has_no_nul = tf.strings.regex_full_match(prompts, r"[^\x00]*")
        errors = _unless(errors, has_no_nul, "The prompt holds a NUL character.")
        if self.tokenizer.longest is not None:
            # What cannot fit need not be tokenised to know it.
            most = tf.cast(max_length, tf.int64) * self.tokenizer.longest
            count = tf.cast(tf.strings.length(prompts), tf.int64)
            said = tf.strings.format("The prompt is too long for max_length={}.", [max_length])
            errors = _unless(errors, count <= most, said)
        ids = self.ids(tf.where(errors == "", prompts, ""))
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        errors = _unless(errors, lengths > 0, "The prompt has no token.")
        said = tf.strings.join(
            [
                "The prompt has ",
                tf.strings.as_string(lengths),
                " tokens; it must have fewer than max_length=",
                tf.strings.as_string(max_length),
                ".",
            ]
        )
        errors = _unless(errors, lengths < max_length, said)
        is_read = (errors == "")[:, None]
        token_ids = ids.to_tensor(self._pad)[:, :max_length]
        missing = max_length - tf.shape(token_ids)[1]
        token_ids = tf.pad(token_ids, [[0, 0], [0, missing]], constant_values=self._pad)
        mask = tf.sequence_mask(lengths, max_length)
        # A refused row looks like one that is answered already, all but its last place prompt, so
        # that it costs the others no step.
        stop = self.stop_token_ids[0] if self.stop_token_ids else self._pad
        full = tf.sequence_mask(tf.fill(tf.shape(lengths), max_length - 1), max_length)
        return Prompts(
            tf.where(is_read, token_ids, stop), tf.where(is_read, mask, full), lengths, errors
        )

    def ids(self, prompts: tf.Tensor) -> tf.RaggedTensor:
        """The ids of prompts, int32 `(B, None)`: what `CCPreprocessor.prompt_ids` gives."""
        if self._strip:
            pattern = f"^[{_STRIPPED}]+|[{_STRIPPED}]+$"
            prompts = tf.strings.regex_replace(prompts, pattern, "")
        texts = tf.strings.join([self._before, prompts, self._after])
        ids = self._text(texts)
        count = ids.nrows()
        ids = tf.concat([_rows(self._head, count), ids, _rows(self._tail, count)], axis=1)
        if self._start is None:
            return ids
        first = ids[:, :1].to_tensor(-1, shape=[None, 1])[:, 0]
        missing = tf.cast(first != self._start, tf.int64)
        start = tf.fill([tf.reduce_sum(missing)], self._start)
        return tf.concat([tf.RaggedTensor.from_row_lengths(start, missing), ids], axis=1)

    def _text(self, texts):
        """Ids of texts in which no special token becomes its id: cut after its first character."""
        if not self._literals:
            return self.tokenizer.tokenize(texts)
        for text in self._literals:
            rest = text[1:].encode().replace(b"\\", rb"\\")
            cut = text[0].encode() + MARK + rest
            texts = tf.strings.regex_replace(texts, re2_literal(text), cut)
        pieces = tf.strings.split(texts, MARK)
        first = self.tokenizer.tokenize(pieces[:, :1].flat_values)
        rest = pieces[:, 1:]
        rest = rest.with_flat_values(self._continuations(rest.flat_values)).merge_dims(1, 2)
        return tf.concat([first, rest], axis=1)

    def _continuations(self, pieces):
        """Ids of texts that follow other text: no dummy prefix (SentencePiece) in front."""
        whole = self.tokenizer.tokenize(tf.strings.join(["\n", pieces]))
        width = len(self._line_break)
        begins = whole[:, :width].to_tensor(-1, shape=[None, width]) == self._line_break
        choices = tf.concat([whole[:, width:], self.tokenizer.tokenize(pieces)], axis=0)
        count = tf.size(pieces)
        offset = tf.where(tf.reduce_all(begins, axis=1), 0, count)
        return tf.gather(choices, tf.range(count) + offset)

    # ---------------------------------------------------------------- to texts

    def texts(self, token_ids: tf.Tensor, keep: tf.Tensor) -> tf.Tensor:
        """Texts `(B,)` of ids int32 `(B, T)` where `keep` `(B, T)`, without special tokens."""
        is_special = tf.reduce_any(token_ids[:, :, None] == self._special, axis=-1)
        return self.tokenizer.detokenize(tf.ragged.boolean_mask(token_ids, keep & ~is_special))


def _unless(errors, is_fine, message):
    return tf.where((errors == "") & ~is_fine, message, errors)


def _rows(ids, count):
    """The same ids in each of `count` rows, ragged."""
    tiled = tf.tile(tf.constant(ids, tf.int32, [1, len(ids)]), [count, 1])
    return tf.RaggedTensor.from_tensor(tiled)
