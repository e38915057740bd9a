"""`TemplateTokenizer`: what `CCPreprocessor` knows of the tokenizer. Not public.

Notable choices:

- Tokenisation runs eagerly in Python on every backend. KerasHub's in-graph path (`tf.data`)
  tokenises "\\n\\n" and special tokens differently, and needs TensorFlow.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_cc.data.columns import plain_text
from keras_cc.preprocessing.prompt_encoder import PromptEncoder
from keras_cc.preprocessing.templates import PromptTemplate


class TemplateTokenizer:
    """Turns prompts and answers into ids under one template, and ids back into text.

    Args:
        preprocessor: a `keras_hub.models.CausalLMPreprocessor`, a KerasHub tokenizer or `None`.
        template: a `PromptTemplate` or `None`.
        add_start_token: bool, or `None` for the preprocessor's own setting.

    Raises:
        TypeError: where `preprocessor` is something else.
        ValueError: where the tokenizer cuts, pads or returns no ids, or lacks a special token of
            the template.
    """

    def __init__(
        self,
        preprocessor: Any = None,
        template: PromptTemplate | None = None,
        add_start_token: bool | None = None,
    ) -> None:
        self.template = template
        self._add_start_token = add_start_token
        self._preprocessor: Any = None
        self._encoder: PromptEncoder | None = None
        self.preprocessor = preprocessor

    @property
    def preprocessor(self) -> Any:
        """The KerasHub preprocessor or tokenizer. May be set, as after loading a config."""
        return self._preprocessor

    @preprocessor.setter
    def preprocessor(self, value: Any) -> None:
        tokenizer = getattr(value, "tokenizer", value)
        if value is not None:
            _check_tokenizer(tokenizer)
        self._preprocessor, self._encoder = value, None
        if value is not None and self.has_vocabulary:
            _ = self.encoder  # a template that does not fit fails here, not in `fit`

    @property
    def tokenizer(self) -> Any:
        """The KerasHub tokenizer, or `None`."""
        return getattr(self._preprocessor, "tokenizer", self._preprocessor)

    @property
    def has_vocabulary(self) -> bool:
        """Whether there is a tokenizer with a vocabulary: one from a bare config has none."""
        try:
            return self.tokenizer is not None and self.tokenizer.vocabulary_size() > 0
        except ValueError:
            return False

    @property
    def add_start_token(self) -> bool:
        """Whether rows begin with the start token, where the tokenizer has one."""
        if self._add_start_token is not None:
            return bool(self._add_start_token)
        return bool(getattr(self._preprocessor, "add_start_token", True))

    @property
    def pad_token_id(self) -> int:
        """Id that fills a row up, where every mask is 0."""
        index = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if index is None else int(index)

    @property
    def end_token_id(self) -> int | None:
        """Id that ends an answer: the template's end of turn, else the tokenizer's end token."""
        end_of_turn = self.encoder.end_of_turn_id
        end = end_of_turn if end_of_turn is not None else self.tokenizer.end_token_id
        return None if end is None else int(end)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the tokenizer's end tokens and the template's."""
        ids = [getattr(self.tokenizer, name, None) for name in ("end_token_id", "end_token2_id")]
        ids.append(self.encoder.end_of_turn_id)
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of prompts under the template, with the start token; nothing is cut."""
        encoded = self.encoder.prompts(list(prompts))
        return [self._start(prompt) + prompt for prompt in encoded]

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Ids of answers under the template, without the end token; nothing is cut."""
        return self.encoder.answers(list(answers))

    @property
    def encoder(self) -> PromptEncoder:
        """What the template puts around a text, as ids and as text that is tokenised with it."""
        if self._encoder is None:
            if not self.has_vocabulary:
                raise ValueError(
                    "CCPreprocessor has no tokenizer with a vocabulary: a config does not carry "
                    "one. Set `cc_preprocessor.preprocessor` to the KerasHub preprocessor or "
                    f"tokenizer. Received: preprocessor={self._preprocessor}"
                )
            self._encoder = PromptEncoder(self.tokenizer, self.template, self._tokenize)
        return self._encoder

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        tokenizer, result = self.tokenizer, self.tokenizer.tokenize(texts)
        if not isinstance(result, list):
            raise TypeError(
                "The tokenizer must tokenize in Python: build it without "
                "`_allow_python_workflow=False`, and call CCPreprocessor outside of tf.function "
                f"and `tf.data.Dataset.map`. Received: {type(result)}"
            )
        # SentencePiece tokenizers may add these to every string, answers included.
        first = 1 if getattr(tokenizer, "add_bos", False) else 0
        last = -1 if getattr(tokenizer, "add_eos", False) else None
        return [[int(i) for i in ids[first:last]] for ids in result]

    @property
    def start_token_id(self) -> int | None:
        """Id that rows begin with, or `None`."""
        index = getattr(self.tokenizer, "start_token_id", None)
        return None if index is None or not self.add_start_token else int(index)

    def _start(self, prompt: Sequence[int]) -> list[int]:
        start = self.start_token_id
        return [] if start is None or list(prompt[:1]) == [start] else [start]

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that are left out of texts: stop tokens, the tokenizer's and the template's own."""
        known = {*self.stop_token_ids, *self.tokenizer.special_token_ids, *self.encoder.special_ids}
        return frozenset(int(index) for index in known)

    def detokenize(
        self, token_ids: Any, padding_mask: Any = None, prompt_lengths: Any = None
    ) -> list[str]:
        """Turns token ids back into text, without special tokens.

        Args:
            token_ids: int array (B, T).
            padding_mask: int array (B, T) or `None`: tokens under a 0 are left out.
            prompt_lengths: int array (B,) or `None`. Where given, that many tokens in front are
                left out and the text ends before the first stop token after them.

        Returns:
            List of B strings.
        """
        token_ids = np.asarray(token_ids)
        mask = np.ones_like(token_ids) if padding_mask is None else np.asarray(padding_mask)
        if token_ids.ndim != 2 or mask.shape != token_ids.shape:
            raise ValueError(
                "`token_ids` and `padding_mask` must both have shape (B, T). "
                f"Received: token_ids.shape={token_ids.shape}, padding_mask.shape={mask.shape}"
            )
        stop, special = set(self.stop_token_ids), self.special_token_ids
        texts = []
        for i in range(len(token_ids)):
            start = 0 if prompt_lengths is None else int(prompt_lengths[i])
            ids = [int(t) for t in token_ids[i, start:][mask[i, start:] != 0]]
            if prompt_lengths is not None:
                ids = ids[: next((n for n, t in enumerate(ids) if t in stop), len(ids))]
            ids = [t for t in ids if t not in special]
            texts.append(plain_text(self.tokenizer.detokenize([ids])[0]) if ids else "")
        return texts


def _check_tokenizer(tokenizer: Any) -> None:
    needed = ("tokenize", "detokenize", "token_to_id", "id_to_token", "end_token_id")
    missing = [name for name in needed if not hasattr(tokenizer, name)]
    if missing:
        raise TypeError(
            "`preprocessor` must be a KerasHub CausalLMPreprocessor or tokenizer "
            f"(it lacks {missing}). Received: {tokenizer} (of type {type(tokenizer).__name__})"
        )
    if getattr(tokenizer, "sequence_length", None) is not None:
        raise ValueError(
            "The tokenizer must not cut or pad: build it without `sequence_length`. "
            f"Received: tokenizer.sequence_length={tokenizer.sequence_length}"
        )
    dtype = str(getattr(tokenizer, "compute_dtype", "int32"))
    if "int" not in dtype:
        raise ValueError(f"The tokenizer must return integer ids. Received: dtype={dtype}")
