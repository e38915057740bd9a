"""`CCPreprocessor`: rows of paired text in, arrays for `CCCausalLM` out.

Notable choices:

- Tokenisation runs eagerly in Python on every backend. KerasHub's in-graph path (`tf.data`)
  tokenises "\\n\\n" and special tokens differently, and needs TensorFlow.
- Prompt and answer are tokenised apart, so an answer's ids do not depend on its prompt, and the
  prompt's ids at inference are the ones seen in training.
- A prompt too long for its row loses tokens on the left; an answer is never cut.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_cc import templates
from keras_cc.data.columns import plain_text, to_columns
from keras_cc.prompt_encoder import PromptEncoder


@keras.saving.register_keras_serializable(package="keras_cc")
class CCPreprocessor:
    """Turns paired prompts and answers into the arrays that `CCCausalLM` trains on.

    A row of the target stream is

        [start token] + prompt + answer + [end token], padded on the right to `max_length`

    and a row of the pivot stream is the English prompt alone, under the same template:

        [start token] + pivot prompt, padded on the right to `pivot_max_length`

    The answer is never part of the pivot stream. A row without a pivot is a plain SFT row: its
    `pivot_padding_mask` is all 0. That is a row whose pivot column is missing, `None` or empty,
    whose language is `pivot_language`, or, where there is no language column, whose instruction
    and pivot are the same text.

    Args:
        preprocessor: a `keras_hub.models.CausalLMPreprocessor`, or a KerasHub tokenizer.
        max_length: int. Length of a target row in tokens, start, answer and end included.
        pivot_max_length: int. Length of a pivot row in tokens. Defaults to `max_length`.
        template: `None`, a name, a string with `"{instruction}"` or a `PromptTemplate`; see
            `keras_cc.templates.get`. It is applied to instruction and pivot alike.
        instruction_column: string. Column with the prompt in the target language.
        output_column: string. Column with the answer.
        pivot_column: string. Column with the prompt in the pivot language.
        lang_column: string. Column with the language of the instruction (optional in the data).
        id_column: string. Column that error messages name a row by (optional in the data).
        pivot_language: string. The pivot's language, `"en"`. `"en-GB"` counts as `"en"`.
        add_start_token: bool. Whether rows begin with the tokenizer's start token. Defaults to
            the preprocessor's own setting, or `True` for a tokenizer. A tokenizer without a start
            token (Qwen, SmolLM3), or a template that begins with it, adds none.

    Call arguments:
        rows: a list of row dicts, or one dict of columns (lists or arrays of strings), or one row
            dict of plain strings (a batch of one).

    Returns (of a call):
        `(x, y, sample_weight)`, NumPy. x holds `token_ids`, `padding_mask`, `answer_mask`, int32
        (B, T), and `pivot_token_ids`, `pivot_padding_mask`, int32 (B, S), with T = `max_length`
        and S = `pivot_max_length`. y is int32 (B, T), the next tokens. sample_weight is float32
        (B, T), 1 where y is a token of the answer or its end token; `answer_mask` equals it, so
        its first 1 is the last token of the prompt.

    Raises:
        ValueError: where a column is missing, a text is empty, an answer leaves no room for its
            prompt, or a pivot is longer than `pivot_max_length`; the message names the row.
        TypeError: where a text is not a string.

    Example:

    ```python
    preprocessor = keras_cc.CCPreprocessor(
        causal_lm.preprocessor, max_length=256, template="gemma"
    )
    x, y, sample_weight = preprocessor([
        {"instruction": "Kenya'nın para birimi nedir?", "output": "Kenya şilini",
         "instruction_en": "What is the currency of Kenya?", "lang": "tr"},
    ])
    ```

    Source: "CC-Tuning", the data format of YYF-Tommy/CC-Tuning (`instruction`, `output`,
    `instruction_en`).
    """

    def __init__(
        self,
        preprocessor: Any = None,
        max_length: int = 1024,
        pivot_max_length: int | None = None,
        template: "str | templates.PromptTemplate | dict[str, Any] | None" = None,
        *,
        instruction_column: str = "instruction",
        output_column: str = "output",
        pivot_column: str = "instruction_en",
        lang_column: str = "lang",
        id_column: str = "id",
        pivot_language: str = "en",
        add_start_token: bool | None = None,
    ) -> None:
        self.max_length = _check_length("max_length", max_length)
        self.pivot_max_length = _check_length(
            "pivot_max_length", self.max_length if pivot_max_length is None else pivot_max_length
        )
        self.template = templates.get(template)
        self.instruction_column = instruction_column
        self.output_column = output_column
        self.pivot_column = pivot_column
        self.lang_column = lang_column
        self.id_column = id_column
        self.pivot_language = pivot_language
        for name in (*_COLUMN_ARGUMENTS, "pivot_language"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"`{name}` must be a non-empty string. Received: {name}={value!r}")
        columns = [getattr(self, name) for name in _COLUMN_ARGUMENTS]
        if len(set(columns)) < len(columns):
            raise ValueError(f"Each column must have its own name. Received: {columns}")
        self._add_start_token = add_start_token
        self._lock = threading.Lock()
        self._row_count = self._truncated_count = 0
        self._preprocessor: Any = None
        self._encoder: PromptEncoder | None = None
        self.preprocessor = preprocessor

    # --- the tokenizer ---

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
            self._get_encoder()  # a template that does not fit fails here, not in `fit`

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
    def row_count(self) -> int:
        """Number of rows prepared so far."""
        return self._row_count

    @property
    def truncated_count(self) -> int:
        """Number of rows whose prompt was cut on the left to fit `max_length`."""
        return self._truncated_count

    @property
    def pad_token_id(self) -> int:
        """Id that fills a row up, where every mask is 0."""
        index = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if index is None else int(index)

    @property
    def end_token_id(self) -> int | None:
        """Id that ends an answer: the template's end of turn, else the tokenizer's end token."""
        end_of_turn = self._get_encoder().end_of_turn_id
        end = end_of_turn if end_of_turn is not None else self.tokenizer.end_token_id
        return None if end is None else int(end)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: the tokenizer's end tokens and the template's."""
        ids = [getattr(self.tokenizer, name, None) for name in ("end_token_id", "end_token2_id")]
        ids.append(self._get_encoder().end_of_turn_id)
        return tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    def _get_encoder(self) -> PromptEncoder:
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

    def _start(self, prompt: Sequence[int]) -> list[int]:
        index = getattr(self.tokenizer, "start_token_id", None)
        if index is None or not self.add_start_token or list(prompt[:1]) == [int(index)]:
            return []
        return [int(index)]

    # --- rows ---

    def __call__(
        self, rows: "Mapping[str, Any] | Sequence[Mapping[str, Any]]"
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Prepares a batch of rows; see the class for arguments, returns and errors."""
        columns = to_columns(rows, [getattr(self, name) for name in _COLUMN_ARGUMENTS])
        size = len(next(iter(columns.values())))
        names = self._row_names(columns, size)
        instructions = self._texts(columns, self.instruction_column, names)
        answers = self._texts(columns, self.output_column, names)
        pivots = self._pivots(columns, instructions, names)
        encoder = self._get_encoder()
        prompt_ids, answer_ids = encoder.prompts(instructions), encoder.answers(answers)

        token_ids = np.full((size, self.max_length), self.pad_token_id, "int32")
        padding_mask = np.zeros_like(token_ids)
        answer_mask = np.zeros_like(token_ids)
        truncated = 0
        for i, (prompt, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
            row, prompt_length, is_cut = self._row(prompt, answer, names[i])
            truncated += is_cut
            token_ids[i, : len(row)] = row
            padding_mask[i, : len(row)] = 1
            answer_mask[i, prompt_length - 1 : len(row) - 1] = 1
        pivot = self._pack_pivots(pivots, names)
        with self._lock:
            self._row_count += size
            self._truncated_count += truncated

        y = np.full_like(token_ids, self.pad_token_id)
        y[:, :-1] = token_ids[:, 1:]
        x = {"token_ids": token_ids, "padding_mask": padding_mask, "answer_mask": answer_mask}
        return {**x, **pivot}, y, answer_mask.astype("float32")

    def _row(self, prompt: list[int], answer: list[int], name: str) -> tuple[list[int], int, bool]:
        """Returns (row, length of its prompt with the start token, was the prompt cut?)."""
        start = self._start(prompt)
        end = [] if self.end_token_id is None else [self.end_token_id]
        if not start and not prompt:
            raise ValueError(
                f"{name}: the prompt has no token, and there is no start token to answer from."
            )
        room = self.max_length - len(start) - len(answer) - len(end)
        if room < min(1, len(prompt)):
            raise ValueError(
                f"{name}: the answer has {len(answer)} tokens; with {len(start)} start, {len(end)} "
                "end and at least one prompt token it does not fit. Answers are never cut: raise "
                f"`max_length` to {self.max_length - room + 1} or more, or drop the row. "
                f"Received: max_length={self.max_length}"
            )
        kept = prompt[max(0, len(prompt) - room) :]
        return start + kept + answer + end, len(start) + len(kept), len(kept) < len(prompt)

    def _pack_pivots(self, pivots: Sequence[str | None], names: list[str]) -> dict[str, np.ndarray]:
        token_ids = np.full((len(pivots), self.pivot_max_length), self.pad_token_id, "int32")
        padding_mask = np.zeros_like(token_ids)
        present = [i for i, pivot in enumerate(pivots) if pivot]
        encoded = self._get_encoder().prompts([pivots[i] for i in present])
        for i, prompt in zip(present, encoded, strict=True):
            row = self._start(prompt) + prompt
            if len(row) > self.pivot_max_length:
                raise ValueError(
                    f"{names[i]}: the pivot prompt has {len(row)} tokens. Pivots are never cut: "
                    f"raise `pivot_max_length` to {len(row)} or more, or drop the row. "
                    f"Received: pivot_max_length={self.pivot_max_length}"
                )
            token_ids[i, : len(row)] = row
            padding_mask[i, : len(row)] = 1
        return {"pivot_token_ids": token_ids, "pivot_padding_mask": padding_mask}

    def _row_names(self, columns: dict[str, Any], size: int) -> list[str]:
        ids = columns.get(self.id_column, [None] * size)
        return [
            f"row {i}" if ids[i] is None else f"row with id {plain_text(ids[i])}"
            for i in range(size)
        ]

    def _texts(self, columns: dict[str, Any], column: str, names: list[str]) -> list[str]:
        if column not in columns:
            raise ValueError(
                f"The rows have no column {column!r}. Name yours with `instruction_column=`, "
                f"`output_column=`, ... of CCPreprocessor. Received: columns {sorted(columns)}"
            )
        texts = []
        for name, value in zip(names, columns[column], strict=True):
            text = plain_text(value)
            if text is None:
                raise ValueError(f"{name}: no {column!r}. Received: {column}=None")
            if not isinstance(text, str):
                raise TypeError(f"{name}: {column!r} must be a string. Received: {value!r}")
            if not text.strip():
                raise ValueError(f"{name}: {column!r} is empty. Received: {column}={text!r}")
            texts.append(text)
        return texts

    def _pivots(
        self, columns: dict[str, Any], instructions: list[str], names: list[str]
    ) -> list[str | None]:
        """Returns each row's pivot text, `None` where the row trains without one."""
        nothing = [None] * len(instructions)
        langs = [plain_text(v) for v in columns.get(self.lang_column, nothing)]
        pivots: list[str | None] = []
        values = columns.get(self.pivot_column, nothing)
        for i, (value, lang) in enumerate(zip(values, langs, strict=True)):
            text = plain_text(value)
            if text is not None and not isinstance(text, str):
                raise TypeError(
                    f"{names[i]}: {self.pivot_column!r} must be a string. Received: {value!r}"
                )
            is_pivot_row = self._is_pivot_language(lang) if lang else text == instructions[i]
            pivots.append(text if text and text.strip() and not is_pivot_row else None)
        return pivots

    def _is_pivot_language(self, lang: Any) -> bool:
        lang, pivot = (str(v).lower().replace("_", "-") for v in (lang, self.pivot_language))
        return lang == pivot or lang.startswith(pivot + "-")

    # --- generation ---

    def generate_preprocess(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Prepares prompts for generation: the template, no answer, no end token.

        Args:
            prompts: list of strings.
            max_length: int. Prompt and generated tokens together. Defaults to `self.max_length`.

        Returns:
            `{"token_ids", "padding_mask"}`, int32 (B, max_length). A row of the mask sums to the
            length of its prompt.

        Raises:
            ValueError: where a prompt leaves no room for a generated token.

        Example: `cc_preprocessor.generate_preprocess(["Habari?"], max_length=64)`
        """
        length = self.max_length if max_length is None else _check_length("max_length", max_length)
        prompts = _check_prompts("prompts", prompts)
        token_ids = np.full((len(prompts), length), self.pad_token_id, "int32")
        padding_mask = np.zeros_like(token_ids)
        for i, prompt in enumerate(self._get_encoder().prompts(prompts)):
            row = self._start(prompt) + prompt
            if not row or len(row) >= length:
                raise ValueError(
                    f"prompts[{i}] has {len(row)} tokens; it needs at least 1, and room for one "
                    f"more to be generated. Received: max_length={length}"
                )
            token_ids[i, : len(row)] = row
            padding_mask[i, : len(row)] = 1
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def pivot_preprocess(self, prompts: Sequence[str | None]) -> dict[str, np.ndarray]:
        """Prepares pivot prompts for generation with the pivot at hand.

        Args:
            prompts: list of strings; `None` or an empty string is a row without a pivot.

        Returns:
            `{"pivot_token_ids", "pivot_padding_mask"}`, int32 (B, `pivot_max_length`).

        Raises:
            ValueError: where a prompt is longer than `pivot_max_length`.
        """
        prompts = _check_prompts("prompts", prompts, allow_none=True)
        names = [f"prompts[{i}]" for i in range(len(prompts))]
        return self._pack_pivots([p if p and p.strip() else None for p in prompts], names)

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
        encoder, stop = self._get_encoder(), set(self.stop_token_ids)
        special = stop | set(self.tokenizer.special_token_ids) | set(encoder.special_ids)
        texts = []
        for i in range(len(token_ids)):
            start = 0 if prompt_lengths is None else int(prompt_lengths[i])
            ids = [int(t) for t in token_ids[i, start:][mask[i, start:] != 0]]
            if prompt_lengths is not None:
                ids = ids[: next((n for n, t in enumerate(ids) if t in stop), len(ids))]
            ids = [t for t in ids if t not in special]
            texts.append(plain_text(self.tokenizer.detokenize([ids])[0]) if ids else "")
        return texts

    # --- serialisation ---

    def get_config(self) -> dict[str, Any]:
        """Returns the config. It holds the tokenizer's options and not its vocabulary."""
        tokenizer = self.tokenizer
        return {
            "preprocessor": (
                None if tokenizer is None else keras.saving.serialize_keras_object(tokenizer)
            ),
            "max_length": self.max_length,
            "pivot_max_length": self.pivot_max_length,
            "template": templates.serialize(self.template),
            "add_start_token": self.add_start_token,
            **{name: getattr(self, name) for name in _COLUMN_ARGUMENTS},
            "pivot_language": self.pivot_language,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CCPreprocessor":
        """Builds one from a config, with or without a tokenizer; see `preprocessor` to set it."""
        config = dict(config)
        preprocessor = config.pop("preprocessor", None)
        if isinstance(preprocessor, dict):
            preprocessor = keras.saving.deserialize_keras_object(preprocessor)
        return cls(preprocessor, **config)


_COLUMN_ARGUMENTS = (
    "instruction_column",
    "output_column",
    "pivot_column",
    "lang_column",
    "id_column",
)


def _check_length(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 2:
        raise ValueError(f"`{name}` must be an integer of at least 2. Received: {name}={value!r}")
    return int(value)


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


def _check_prompts(name: str, prompts: Any, allow_none: bool = False) -> list[Any]:
    if isinstance(prompts, str | bytes):
        prompts = [prompts]
    texts = [plain_text(p) for p in prompts]
    for i, text in enumerate(texts):
        if not isinstance(text, str) and not (allow_none and text is None):
            raise TypeError(f"`{name}` must be strings. Received: {name}[{i}]={text!r}")
    return texts
