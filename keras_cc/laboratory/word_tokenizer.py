"""`WordTokenizer`: one token a word."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import keras

from keras_cc.preprocessing.python_tokenizer import PythonTokenizer

VOCABULARY_FILE = "vocabulary.json"
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
_TOKEN = re.compile("|".join([*map(re.escape, SPECIAL_TOKENS), r"\n", r"\w+", r"[^\w\s]"]))


@keras.saving.register_keras_serializable(package="keras_cc")
class WordTokenizer(PythonTokenizer):
    """A tokenizer of one token a word, for a language whose words are all known.

    A token is a word, a punctuation mark, a line break or a special token (`"<pad>"`, `"<s>"`,
    `"</s>"`). Other white space parts words and is not kept: back in text, one space stands before
    a word, none before a punctuation mark, and none beside a line break.

    Args:
        words: the tokens but for the special ones, in the order of their ids, which begin at 3.
            Default `None`: no vocabulary yet (a preset loads it as an asset).
        sequence_length: If given, ids are cut or padded to this length, and come as one array.
        dtype: `"int32"`, or `"string"` for tokens instead of ids.

    Returns:
        For a string: int32 ids, (T,). For a list of strings: a list of lists of ids, or
        (B, sequence_length). Inside `tf.data`: the same as a tensor or a `tf.RaggedTensor`.

    Raises:
        ValueError: for a text with a word that is not in the vocabulary, or words that come twice.

    Example:

    ```python
    tokenizer = keras_cc.laboratory.WordTokenizer(["what", "is", "it", "?"])
    tokenizer("what is it?")  # [3, 4, 5, 6]
    tokenizer.detokenize([3, 4, 5, 6])  # "what is it?"
    ```
    """

    def __init__(
        self,
        words: Iterable[str] | None = None,
        sequence_length: int | None = None,
        dtype: str = "int32",
        **kwargs: Any,
    ):
        pad, start, end = SPECIAL_TOKENS
        super().__init__(start, end, pad, (), sequence_length, dtype, **kwargs)
        self.file_assets = [VOCABULARY_FILE]
        if words is not None:
            self._set_words(words)

    def _set_words(self, words):
        if isinstance(words, str):
            raise ValueError(f"`words` must be a list of words. Received: words={words!r}")
        tokens = [*SPECIAL_TOKENS, *words]
        if len(set(tokens)) < len(tokens):
            twice = sorted({token for token in tokens if tokens.count(token) > 1})
            raise ValueError(f"`words` must come once each. Received: {twice[:5]} twice")
        wrong = [token for token in tokens if not _TOKEN.fullmatch(token)]
        if wrong:
            raise ValueError(
                "`words` must each be letters and digits, one punctuation mark or a line break. "
                f"Received: {wrong[:5]}"
            )
        self._set_vocabulary({token: index for index, token in enumerate(tokens)})

    def save_assets(self, dir_path: str) -> None:
        """Writes the vocabulary into a folder."""
        words = self.get_vocabulary()[len(SPECIAL_TOKENS) :]
        with open(os.path.join(dir_path, VOCABULARY_FILE), "w", encoding="utf-8") as file:
            json.dump(words, file, ensure_ascii=False)

    def load_assets(self, dir_path: str) -> None:
        """Reads what `save_assets` wrote."""
        with open(os.path.join(dir_path, VOCABULARY_FILE), encoding="utf-8") as file:
            self._set_words(json.load(file))

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update({"words": None, "sequence_length": self.sequence_length})  # words: an asset
        return config

    def _encode(self, texts: list[str]) -> list[list[int]]:
        tokens = [_TOKEN.findall(text) for text in texts]
        unknown = {token for row in tokens for token in row if token not in self.vocabulary}
        if unknown:
            raise ValueError(
                f"Texts must be of the {self.vocabulary_size()} words that the tokenizer knows, "
                "such as those of the laboratory's relations. Received words that it does not: "
                f"{sorted(unknown)[:8]}"
            )
        return [[self.vocabulary[token] for token in row] for row in tokens]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        texts = []
        for row in rows:
            text = " ".join(self.id_to_token(index) for index in row)
            texts.append(re.sub(r" (?=[^\w\s<])| ?(\n) ?", r"\1", text))
        return texts
