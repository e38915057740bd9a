"""`SmolLM2Tokenizer`: byte-level BPE with SmolLM2's own splitting of text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

import keras

from keras_cc.preprocessing.python_tokenizer import PythonTokenizer

VOCABULARY_FILE = "vocabulary.json"
MERGES_FILE = "merges.txt"


@keras.saving.register_keras_serializable(package="keras_cc")
class SmolLM2Tokenizer(PythonTokenizer):
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
        super().__init__(
            bos_token, eos_token, pad_token, list(unsplittable_tokens), sequence_length, dtype,
            **kwargs,
        )  # fmt: skip
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
        self.merges = None
        self._bpe: Any = None
        self._set_vocabulary(None)
        if vocabulary is None or merges is None:
            return
        if isinstance(vocabulary, str) or isinstance(merges, str):
            # A path in a config could make a model file read any file of the machine.
            raise ValueError(
                "`vocabulary` must be a dict and `merges` a list; files are read by "
                f"`load_assets(folder)`. Received: {type(vocabulary)}, {type(merges)}"
            )
        self._set_vocabulary(vocabulary)
        self.merges = list(merges)
        self._bpe = _build_bpe(self.vocabulary, self.merges, self.special_tokens)

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

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._bpe.encode_batch(texts, add_special_tokens=False)]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        """Bytes that are not UTF-8 become U+FFFD."""
        return self._bpe.decode_batch(rows, skip_special_tokens=False)


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
