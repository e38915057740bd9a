"""`PythonTokenizer`: what a KerasHub tokenizer of ours has, whatever it splits text into."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np


class PythonTokenizer(keras_hub.tokenizers.Tokenizer):
    """A KerasHub tokenizer whose splitting is Python, inside `tf.data` too.

    There the same Python code runs through `tf.numpy_function`, so a pipeline with it cannot be
    exported in a SavedModel. A subclass has `_encode` and `_decode`, and hands its vocabulary to
    `_set_vocabulary`.

    Args:
        start_token, end_token, pad_token: special tokens; the last two must differ, or KerasHub's
            `generate` takes the padding after a prompt for the end of the answer.
        unsplittable_tokens: further special tokens.
        sequence_length: If given, ids are cut or padded to this length, and come as one array.
        dtype: `"int32"`, or `"string"` for tokens instead of ids.
    """

    # No backbone of KerasHub: it would choose this class for other presets of that backbone.
    backbone_cls = None

    def __init__(
        self,
        start_token: str,
        end_token: str,
        pad_token: str,
        unsplittable_tokens: Sequence[str] = (),
        sequence_length: int | None = None,
        dtype: str = "int32",
        **kwargs: Any,
    ):
        super().__init__(dtype=dtype, **kwargs)
        self.start_token = start_token
        self.end_token = end_token
        self.pad_token = pad_token
        self.unsplittable_tokens = list(unsplittable_tokens)
        self.sequence_length = sequence_length
        self._set_vocabulary(None)

    # --- What a subclass has. ---

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, nothing cut."""
        raise NotImplementedError

    def _decode(self, rows: list[list[int]]) -> list[str]:
        """Text of each row of ids, special tokens written out."""
        raise NotImplementedError

    # --- Vocabulary. ---

    def _set_vocabulary(self, vocabulary: Mapping[str, int] | None) -> None:
        self.start_token_id = self.end_token_id = self.pad_token_id = None
        self.vocabulary = None
        self._token_of: dict[int, str] = {}
        if vocabulary is None:
            return
        if self.pad_token == self.end_token:
            raise ValueError(
                "`pad_token` and `eos_token` must differ, or `generate` stops before it starts. "
                f"Received: pad_token={self.pad_token!r}, eos_token={self.end_token!r}"
            )
        table = dict(vocabulary)
        missing = [token for token in self.special_tokens if token not in table]
        if missing:
            raise ValueError(f"Special tokens must be in the vocabulary. Received: {missing}")
        self.vocabulary = table
        self._token_of = {index: token for token, index in table.items()}
        self.start_token_id = table[self.start_token]
        self.end_token_id = table[self.end_token]
        self.pad_token_id = table[self.pad_token]

    def get_vocabulary(self) -> list[str]:
        """Returns the tokens, in the order of their ids."""
        self._check()
        return [self._token_of[index] for index in sorted(self._token_of)]

    def vocabulary_size(self) -> int:
        """Returns the number of tokens."""
        self._check()
        return len(self._token_of)

    def id_to_token(self, id: int) -> str:
        """Returns the token of an id."""
        self._check()
        if int(id) not in self._token_of:
            raise ValueError(
                f"`id` must be in [0, {self.vocabulary_size() - 1}]. Received: id={id}"
            )
        return self._token_of[int(id)]

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token."""
        self._check()
        if token not in (self.vocabulary or {}):
            raise ValueError(f"`token` is not in the vocabulary. Received: token={token!r}")
        return self.vocabulary[token]

    @property
    def special_tokens(self) -> list[str]:
        """The special tokens, which `generate` leaves out of its answers."""
        own = [self.start_token, self.end_token, self.pad_token]
        return list(dict.fromkeys([*own, *self.unsplittable_tokens]))

    @property
    def special_token_ids(self) -> list[int]:
        """The ids of `special_tokens`."""
        return [self.token_to_id(token) for token in self.special_tokens]

    # --- Text to ids and back. ---

    def call(self, inputs: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        return self.tokenize(inputs)

    def tokenize(self, inputs: Any) -> Any:
        """Turns a string or a batch of strings into ids; see the class."""
        self._check()
        if _is_symbolic(inputs):
            return self._tokenize_symbolic(inputs)
        texts, batched = _to_strings(inputs)
        rows = self._rows(texts)
        if self.compute_dtype != "string":
            if self.sequence_length and batched:
                return np.array(rows, dtype=self.compute_dtype).reshape(-1, self.sequence_length)
            if not batched:
                return np.array(rows[0], dtype=self.compute_dtype)
        return rows if batched else rows[0]

    def detokenize(self, inputs: Any) -> str | list[str]:
        """Turns ids into text: a string for (T,), a list of strings for a batch.

        Special tokens are written out.
        """
        self._check()
        if _is_symbolic(inputs):
            raise ValueError(
                f"`{type(self).__name__}.detokenize` runs eagerly only, not inside `tf.data` or a "
                f"`tf.function`. Received: inputs={inputs}"
            )
        rows, batched = _to_id_lists(inputs)
        texts = self._decode(rows)
        return texts if batched else texts[0]

    def _check(self) -> None:
        if self.vocabulary is None:
            raise ValueError(
                f"No vocabulary has been set for `{type(self).__name__}`. Give one, or load a "
                "preset. Received: vocabulary=None"
            )

    def _rows(self, texts: list[str]) -> list[list[Any]]:
        rows: list[list[Any]] = self._encode(texts)
        pad: Any = self.pad_token_id
        if self.compute_dtype == "string":
            rows = [[self._token_of[index] for index in row] for row in rows]
            pad = self.pad_token
        if self.sequence_length:
            length = self.sequence_length
            rows = [row[:length] + [pad] * (length - len(row)) for row in rows]
        return rows

    def _tokenize_symbolic(self, inputs: Any) -> Any:
        """The same Python code inside a TensorFlow graph."""
        tf = sys.modules["tensorflow"]
        out_type = tf.string if self.compute_dtype == "string" else tf.int32
        np_type = object if self.compute_dtype == "string" else np.int32

        def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = self._rows([text.decode("utf-8") for text in texts])
            flat = [item for row in rows for item in row]
            return np.array(flat, dtype=np_type), np.array([len(r) for r in rows], dtype=np.int64)

        flat, lengths = tf.numpy_function(
            encode, [tf.reshape(inputs, [-1])], [out_type, tf.int64], stateful=False
        )
        flat.set_shape([None])
        if inputs.shape.rank == 0:
            flat.set_shape([self.sequence_length])
            return flat
        lengths.set_shape(inputs.shape)
        if self.sequence_length:
            return tf.reshape(flat, [-1, self.sequence_length])
        return tf.RaggedTensor.from_row_lengths(flat, lengths)


def _is_symbolic(inputs: Any) -> bool:
    """Whether `inputs` is a TensorFlow graph tensor, without importing TensorFlow."""
    tf = sys.modules.get("tensorflow")
    tensor = getattr(tf, "Tensor", None)
    return tensor is not None and isinstance(inputs, tensor) and not hasattr(inputs, "numpy")


def _to_strings(inputs: Any) -> tuple[list[str], bool]:
    if hasattr(inputs, "numpy"):
        inputs = inputs.numpy()
    if isinstance(inputs, np.ndarray):
        inputs = inputs.tolist()
    batched = isinstance(inputs, (list, tuple))
    texts = list(inputs) if batched else [inputs]
    texts = [text.decode("utf-8") if isinstance(text, bytes) else text for text in texts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"Inputs must be a string or a list of strings. Received: {inputs}")
    return texts, batched


def _to_id_lists(inputs: Any) -> tuple[list[list[int]], bool]:
    if hasattr(inputs, "to_list"):  # A ragged tensor.
        inputs = inputs.to_list()
    elif not isinstance(inputs, (list, tuple, int, np.integer)):
        inputs = keras.ops.convert_to_numpy(inputs).tolist()
    if not isinstance(inputs, (list, tuple)):
        return [[int(inputs)]], False
    if all(isinstance(item, (int, np.integer)) for item in inputs):
        return [[int(item) for item in inputs]], False
    return [[int(item) for item in row] for row in inputs], True
