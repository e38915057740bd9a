"""`SmolLM2Tokenizer`: byte-level BPE with SmolLM2's own splitting of text."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from typing import Any

import keras
import keras_hub
import numpy as np

VOCABULARY_FILE = "vocabulary.json"
MERGES_FILE = "merges.txt"


@keras.saving.register_keras_serializable(package="keras_cc")
class SmolLM2Tokenizer(keras_hub.tokenizers.Tokenizer):
    """Byte-level BPE tokenizer whose ids equal Hugging Face's for SmolLM2.

    Text is split at the special tokens, then into single digits, then by GPT-2's pattern
    (contractions, letters, other signs, spaces), and each part is merged by BPE over its bytes.
    KerasHub's `BytePairTokenizer` classes split numbers by threes and newlines differently, and
    split differently again inside `tf.data`. Here both give the same ids: inside `tf.data` the
    same Python code runs through `tf.numpy_function`, so a pipeline with this tokenizer cannot be
    exported in a SavedModel.

    Args:
        vocabulary: dict, token to id. Default `None`: no vocabulary yet (a preset loads it as an
            asset).
        merges: list of merge rules `"a b"`, the first is merged first.
        bos_token: The start token, `start_token` here as in KerasHub.
        eos_token: The end token, `end_token`.
        pad_token: The padding token. It must differ from `eos_token`, or KerasHub's `generate`
            takes the padding after a prompt for the end of the answer.
        unsplittable_tokens: The special tokens, each one id wherever it stands in a text.
        sequence_length: If given, ids are cut or padded to this length, and come as one array.
        dtype: `"int32"`, or `"string"` for tokens instead of ids.

    Returns:
        For a string: int32 ids, (T,). For a list of strings: a list of lists of ids, or
        (B, sequence_length). Inside `tf.data`: the same as a tensor or a `tf.RaggedTensor`.

    Example:

    ```python
    import keras_cc.demo

    causal_lm, tokenizer = keras_cc.demo.load("smollm2_135m")
    tokenizer("In 2024,")  # "2", "0", "2" and "4" are four tokens
    ```

    Source: the `tokenizer.json` of HuggingFaceTB/SmolLM2-135M-Instruct (pre-tokenizers `Digits`
    and `ByteLevel`); `smollm` in llama.cpp.
    """

    # Not `Llama3Backbone`: KerasHub would then choose this class for other Llama 3 presets.
    backbone_cls = None

    def __init__(
        self,
        vocabulary: dict[str, int] | None = None,
        merges: Iterable[str] | None = None,
        bos_token: str = "<|im_start|>",
        eos_token: str = "<|im_end|>",
        pad_token: str = "<|endoftext|>",
        unsplittable_tokens: Iterable[str] = (),
        sequence_length: int | None = None,
        dtype: str = "int32",
        **kwargs: Any,
    ):
        super().__init__(dtype=dtype, **kwargs)
        self.start_token = bos_token
        self.end_token = eos_token
        self.pad_token = pad_token
        self.unsplittable_tokens = list(unsplittable_tokens)
        self.sequence_length = sequence_length
        self.file_assets = [VOCABULARY_FILE, MERGES_FILE]
        self.set_vocabulary_and_merges(vocabulary, merges)

    # --- Vocabulary. ---

    def set_vocabulary_and_merges(
        self, vocabulary: dict[str, int] | None, merges: Iterable[str] | None
    ) -> None:
        """Sets the vocabulary and the merge rules.

        Raises:
            ValueError: If only one of the two is given, a special token is not in the vocabulary,
                or the padding token is the end token.
        """
        if (vocabulary is None) != (merges is None):
            raise ValueError(
                "`vocabulary` and `merges` must be given together. Received: "
                f"vocabulary={type(vocabulary)}, merges={type(merges)}"
            )
        self.start_token_id = self.end_token_id = self.pad_token_id = None
        self.vocabulary = None
        self.merges = None
        self._bpe: Any = None
        if vocabulary is None or merges is None:
            return
        if isinstance(vocabulary, str) or isinstance(merges, str):
            # A path in a config could make a model file read any file of the machine.
            raise ValueError(
                "`vocabulary` must be a dict and `merges` a list; files are read by "
                f"`load_assets(folder)`. Received: {type(vocabulary)}, {type(merges)}"
            )
        if self.pad_token == self.end_token:
            raise ValueError(
                "`pad_token` and `eos_token` must differ, or `generate` stops before it starts. "
                f"Received: pad_token={self.pad_token!r}, eos_token={self.end_token!r}"
            )
        table, rules = dict(vocabulary), list(merges)
        special = self.special_tokens
        missing = [token for token in special if token not in table]
        if missing:
            raise ValueError(f"Special tokens must be in the vocabulary. Received: {missing}")
        self.vocabulary, self.merges = table, rules
        self._bpe = _build_bpe(table, rules, special)
        self.start_token_id = table[self.start_token]
        self.end_token_id = table[self.end_token]
        self.pad_token_id = table[self.pad_token]

    def save_assets(self, dir_path: str) -> None:
        """Writes the vocabulary and the merges into a folder."""
        self._check()
        with open(os.path.join(dir_path, VOCABULARY_FILE), "w", encoding="utf-8") as file:
            json.dump(dict(self.vocabulary), file, ensure_ascii=False)
        with open(os.path.join(dir_path, MERGES_FILE), "w", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(self.merges) + "\n")

    def load_assets(self, dir_path: str) -> None:
        """Reads what `save_assets` wrote."""
        with open(os.path.join(dir_path, VOCABULARY_FILE), encoding="utf-8") as file:
            vocabulary = json.load(file)
        # newline: a merge rule may hold characters that `splitlines` takes for line ends.
        with open(os.path.join(dir_path, MERGES_FILE), encoding="utf-8", newline="\n") as file:
            merges = file.read().removesuffix("\n").split("\n")
        self.set_vocabulary_and_merges(vocabulary, [rule for rule in merges if rule])

    def get_vocabulary(self) -> list[str]:
        """Returns the tokens, in the order of their ids."""
        self._check()
        return sorted(self.vocabulary, key=self.vocabulary.__getitem__)

    def vocabulary_size(self) -> int:
        """Returns the number of tokens."""
        self._check()
        return len(self.vocabulary)

    def id_to_token(self, id: int) -> str:
        """Returns the token of an id."""
        self._check()
        token = self._bpe.id_to_token(int(id)) if int(id) >= 0 else None
        if token is None:
            raise ValueError(
                f"`id` must be in [0, {self.vocabulary_size() - 1}]. Received: id={id}"
            )
        return token

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
        rows = self._encode(texts)
        if self.compute_dtype != "string":
            if self.sequence_length and batched:
                return np.array(rows, dtype=self.compute_dtype).reshape(-1, self.sequence_length)
            if not batched:
                return np.array(rows[0], dtype=self.compute_dtype)
        return rows if batched else rows[0]

    def detokenize(self, inputs: Any) -> str | list[str]:
        """Turns ids into text: a string for (T,), a list of strings for a batch.

        Special tokens are written out; bytes that are not UTF-8 become U+FFFD.
        """
        self._check()
        if _is_symbolic(inputs):
            raise ValueError(
                "`SmolLM2Tokenizer.detokenize` runs eagerly only, not inside `tf.data` or a "
                f"`tf.function`. Received: inputs={inputs}"
            )
        rows, batched = _to_id_lists(inputs)
        texts = self._bpe.decode_batch(rows, skip_special_tokens=False)
        return texts if batched else texts[0]

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            {
                "vocabulary": None,  # An asset, as for KerasHub's tokenizers.
                "merges": None,
                "bos_token": self.start_token,
                "eos_token": self.end_token,
                "pad_token": self.pad_token,
                "unsplittable_tokens": list(self.unsplittable_tokens),
                "sequence_length": self.sequence_length,
            }
        )
        return config

    def _check(self) -> None:
        if self._bpe is None:
            raise ValueError(
                "No vocabulary has been set for `SmolLM2Tokenizer`. Pass `vocabulary` and "
                "`merges`, or load a preset."
            )

    def _encode(self, texts: list[str]) -> list[list[Any]]:
        strings = self.compute_dtype == "string"
        encodings = self._bpe.encode_batch(texts, add_special_tokens=False)
        rows = [encoding.tokens if strings else encoding.ids for encoding in encodings]
        if self.sequence_length:
            pad = self.pad_token if strings else self.pad_token_id
            length = self.sequence_length
            rows = [row[:length] + [pad] * (length - len(row)) for row in rows]
        return rows

    def _tokenize_symbolic(self, inputs: Any) -> Any:
        """The same Python code inside a TensorFlow graph."""
        tf = sys.modules["tensorflow"]
        out_type = tf.string if self.compute_dtype == "string" else tf.int32
        np_type = object if self.compute_dtype == "string" else np.int32

        def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            rows = self._encode([text.decode("utf-8") for text in texts])
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


def _build_bpe(vocabulary: dict[str, int], merges: list[str], special: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pairs = [tuple(rule.split(" ")) for rule in merges]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe


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
