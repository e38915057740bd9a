"""`CCPreprocessor`: rows of paired text in, arrays for `CCCausalLM` out.

Notable choices:

- Prompt and answer are tokenised apart, so an answer's ids do not depend on its prompt, and the
  prompt's ids at inference are the ones seen in training.
- A prompt too long for its row loses tokens on the left; an answer is never cut.
- Rows are padded to what a batch needs, on a ladder of few widths: most texts are much shorter than
  `max_length`, and every other width is compiled anew.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_cc import options
from keras_cc.data import pairs
from keras_cc.data.columns import plain_text, to_columns
from keras_cc.data.prepared import PackedRow
from keras_cc.data.widths import fine, ladder, rung
from keras_cc.preprocessing import templates
from keras_cc.preprocessing.template_tokenizer import TemplateTokenizer


@keras.saving.register_keras_serializable(package="keras_cc")
class CCPreprocessor(TemplateTokenizer):
    """Turns paired prompts and answers into the arrays that `CCCausalLM` trains on.

    A row of the target stream is

        [start token] + prompt + answer + [end token], padded on the right

    and a row of the pivot stream is the English prompt alone, under the same template:

        [start token] + pivot prompt, padded on the right

    The answer is never part of the pivot stream. A row without a pivot is a plain SFT row: its
    `pivot_padding_mask` is all 0. That is a row whose pivot column is missing, `None` or empty,
    whose language is `pivot_language`, or, where there is no language column, whose instruction
    and pivot are the same text. A row with a pivot whose answer is missing or `None` (in
    TensorFlow's strings, which have no `None`: empty) is a pair of prompts to be aligned: its
    target stream ends with the prompt, without an end token, and its `answer_mask` is all 0.

    Args:
        preprocessor: a `keras_hub.models.CausalLMPreprocessor`, or a KerasHub tokenizer.
        max_length: int. The most tokens of a target row, start, answer and end included.
        pivot_max_length: int. The most tokens of a pivot row. Defaults to `max_length`.
        template: `None`, a name, a string with `"{instruction}"` or a `PromptTemplate`; see
            `keras_cc.templates.get`. It is applied to instruction and pivot alike.
        instruction_column: string. Column with the prompt in the target language.
        output_column: string. Column with the answer.
        pivot_column: string. Column with the prompt in the pivot language.
        lang_column: string. Column with the language of the instruction (optional in the data).
        id_column: string. Column that error messages name a row by (optional in the data).
        pivot_language: string. The pivot's language, `"en"`. `"en-GB"` counts as `"en"`.
        padding: string. `"longest"`: a batch is as wide as the smallest of `widths` that holds its
            longest row, targets and pivots each on their own. `"max_length"`: all batches are as
            wide as `max_length` and `pivot_max_length` allow, one static shape.
        widths: ascending ints, the widths of `"longest"` in tokens, up to `max_length` and
            `pivot_max_length` at least. Defaults to 16, 24, 32, 48, 64, 96, ...: no more than a
            third of a batch's longest row is padding beyond 16 tokens.
        add_start_token: bool. Whether rows begin with the tokenizer's start token. Defaults to
            the preprocessor's own setting, or `True` for a tokenizer. A tokenizer without a start
            token (Qwen, SmolLM3), or a template that begins with it, adds none.

    Call arguments:
        rows: a list of row dicts, or one dict of columns (lists or arrays of strings), or one row
            dict of plain strings (a batch of one).

    Returns (of a call):
        `(x, y, sample_weight)`, NumPy. x holds `token_ids`, `padding_mask`, `answer_mask`, int32
        (B, T), and `pivot_token_ids`, `pivot_padding_mask`, int32 (B, S), T and S by `padding`.
        y is int32 (B, T), the next tokens. sample_weight is float32
        (B, T), 1 where y is a token of the answer or its end token; `answer_mask` equals it, so
        its first 1 is the last token of the prompt.

    Raises:
        ValueError: where a column is missing, a text is empty, a row has neither an answer nor a
            pivot, an answer leaves no room for its prompt, or a pivot is longer than
            `pivot_max_length`; the message names the row.
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
        padding: str = "longest",
        widths: Sequence[int] | None = None,
        add_start_token: bool | None = None,
    ) -> None:
        self.max_length = options.count("max_length", max_length, least=2)
        self.pivot_max_length = options.count(
            "pivot_max_length",
            self.max_length if pivot_max_length is None else pivot_max_length,
            least=2,
        )
        self.padding = options.choice("padding", padding, ("longest", "max_length"))
        self.widths = self._checked_widths(widths)
        template = templates.get(template)
        self.instruction_column = instruction_column
        self.output_column = output_column
        self.pivot_column = pivot_column
        self.lang_column = lang_column
        self.id_column = id_column
        self.pivot_language = pivot_language
        columns = pairs.columns_of(self)
        pairs.check_names(**columns, pivot_language=pivot_language)
        names = list(columns.values())
        if len(set(names)) < len(names):
            raise ValueError(f"Each column must have its own name. Received: {names}")
        self._lock = threading.Lock()
        self._row_count = self._truncated_count = 0
        super().__init__(preprocessor, template, add_start_token)

    @property
    def row_count(self) -> int:
        """Number of rows prepared so far."""
        return self._row_count

    @property
    def truncated_count(self) -> int:
        """Number of rows whose prompt was cut on the left to fit `max_length`."""
        return self._truncated_count

    # --- rows ---

    def __call__(
        self, rows: "Mapping[str, Any] | Sequence[Mapping[str, Any]]"
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Prepares a batch of rows; see the class for arguments, returns and errors."""
        return self.pad(self.pack(rows))

    def pack(self, rows: "Mapping[str, Any] | Sequence[Mapping[str, Any]]") -> "list[PackedRow]":
        """Tokenises rows, one by one; `pad` makes a batch of any of them.

        Args:
            rows: see the class, and its errors.

        Returns:
            A list of `PackedRow`, in the rows' order.
        """
        columns = to_columns(rows, list(pairs.columns_of(self).values()))
        size = len(next(iter(columns.values())))
        names = pairs.row_names(columns, self.id_column, size)
        instructions = pairs.read_texts(columns, self.instruction_column, names)
        pivots = pairs.read_pivots(
            columns, instructions, names, self.pivot_column, self.lang_column, self.pivot_language
        )
        answers = pairs.read_answers(columns, self.output_column, names, pivots)
        encoder = self.encoder
        ids = zip(encoder.prompts(instructions), self._answers(answers), names, strict=True)
        packed_pivots = self._pack_pivots(pivots, names)
        return [
            PackedRow(*self._row(prompt, answer, name), pivot)
            for (prompt, answer, name), pivot in zip(ids, packed_pivots, strict=True)
        ]

    def _answers(self, answers: "Sequence[str | None]") -> "list[list[int] | None]":
        """Ids of the answers with their end token, `None` where there is no answer."""
        end = [] if self.end_token_id is None else [self.end_token_id]
        encoded = iter(self.encoder.answers([answer for answer in answers if answer is not None]))
        return [None if answer is None else next(encoded) + end for answer in answers]

    def pad(
        self, rows: "Sequence[PackedRow]", width: int | None = None, pivot_width: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Makes a batch of packed rows.

        Args:
            rows: what `pack` returned, or some of it.
            width: int, the width of the targets; default: by `padding`.
            pivot_width: int, the width of the pivots; default: by `padding`.

        Returns:
            `(x, y, sample_weight)`, see the class.
        """
        needed = self.widths_of(rows)
        token_ids, padding_mask = self._padded([row.ids for row in rows], width or needed[0])
        answer_mask = np.zeros_like(token_ids)
        for i, row in enumerate(rows):
            answer_mask[i, row.prompt_length - 1 : len(row.ids) - 1] = 1
        pivot = self._padded_pivots([row.pivot for row in rows], pivot_width or needed[1])
        with self._lock:
            self._row_count += len(rows)
            self._truncated_count += sum(row.is_cut for row in rows)

        y = np.full_like(token_ids, self.pad_token_id)
        y[:, :-1] = token_ids[:, 1:]
        x = {"token_ids": token_ids, "padding_mask": padding_mask, "answer_mask": answer_mask}
        return {**x, **pivot}, y, answer_mask.astype("float32")

    def widths_of(self, rows: "Sequence[PackedRow]", is_fine: bool = False) -> tuple[int, int]:
        """The widths of targets and pivots that a batch of packed rows is padded to.

        Args:
            rows: what `pack` returned, or some of it.
            is_fine: whether they are multiples of 8 and not `widths`, where those are not given.
        """
        longest = (max(len(row.ids) for row in rows), max(len(row.pivot) for row in rows))
        limits = (self.max_length, self.pivot_max_length)
        holding = fine if is_fine and self.widths is None else self._width
        widths = [holding(n, limit) for n, limit in zip(longest, limits, strict=True)]
        return widths[0], widths[1]

    def width_of(self, length: int) -> int:
        """The width that targets of at most `length` tokens are padded to."""
        return self._width(length, self.max_length)

    def _width(self, length: int, limit: int) -> int:
        if self.padding == "max_length" or length > limit:
            return limit
        return rung(length, ladder(limit, self.widths))

    def _checked_widths(self, widths: Sequence[int] | None) -> list[int] | None:
        if widths is None:
            return None
        checked = [options.count("widths", width, least=1) for width in widths]
        limit = max(self.max_length, self.pivot_max_length)
        if not checked or checked != sorted(set(checked)) or checked[-1] < limit:
            raise ValueError(
                "`widths` must be ascending and reach `max_length` and `pivot_max_length`, "
                f"{limit} here, so that every row has one that holds it. "
                f"Received: widths={list(widths)}"
            )
        return checked

    def _row(
        self, prompt: list[int], answer: "list[int] | None", name: str
    ) -> tuple[list[int], int, bool]:
        """Returns (ids, length of the prompt with the start token, was the prompt cut?)."""
        start, answer = self._start(prompt), answer or []
        if not start and not prompt:
            raise ValueError(
                f"{name}: the prompt has no token, and there is no start token to answer from."
            )
        room = self.max_length - len(start) - len(answer)
        if room < min(1, len(prompt)):
            raise ValueError(
                f"{name}: the answer has {len(answer)} tokens, its end included; with {len(start)} "
                "start and at least one prompt token it does not fit. Answers are never cut: raise "
                f"`max_length` to {self.max_length - room + 1} or more, or drop the row. "
                f"Received: max_length={self.max_length}"
            )
        kept = prompt[max(0, len(prompt) - room) :]
        return start + kept + answer, len(start) + len(kept), len(kept) < len(prompt)

    def answer_length(self, instruction: str, answer: str) -> int | None:
        """Counts the tokens of an answer, without its end token.

        Args:
            instruction: string, the prompt that the answer follows.
            answer: string.

        Returns:
            int, or `None` where no training row can hold the answer: start token, one token of
            the prompt, answer and end token are more than `max_length`.

        Raises:
            TypeError: where a text is not a string.

        Example:

        ```python
        cc_preprocessor.answer_length("Habari?", "Nzuri")  # 1, where "Nzuri" is one token
        ```
        """
        encoder = self.encoder
        (prompt,) = encoder.prompts(_check_prompts("instruction", [instruction]))
        (ids,) = self._answers(_check_prompts("answer", [answer]))
        try:
            self._row(prompt, ids, "row")
        except ValueError:
            return None
        return len(ids) - (self.end_token_id is not None)

    def _pack_pivots(self, pivots: Sequence[str | None], names: list[str]) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in pivots]
        present = [i for i, pivot in enumerate(pivots) if pivot]
        encoded = self.encoder.prompts([pivots[i] for i in present])
        for i, prompt in zip(present, encoded, strict=True):
            row = self._start(prompt) + prompt
            if len(row) > self.pivot_max_length:
                raise ValueError(
                    f"{names[i]}: the pivot prompt has {len(row)} tokens. Pivots are never cut: "
                    f"raise `pivot_max_length` to {len(row)} or more, or drop the row. "
                    f"Received: pivot_max_length={self.pivot_max_length}"
                )
            rows[i] = row
        return rows

    def _padded_pivots(self, rows: list[list[int]], width: int) -> dict[str, np.ndarray]:
        token_ids, padding_mask = self._padded(rows, width)
        return {"pivot_token_ids": token_ids, "pivot_padding_mask": padding_mask}

    def _padded(self, rows: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
        token_ids = np.full((len(rows), length), self.pad_token_id, "int32")
        padding_mask = np.zeros_like(token_ids)
        for i, row in enumerate(rows):
            token_ids[i, : len(row)] = row
            padding_mask[i, : len(row)] = 1
        return token_ids, padding_mask

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

        Example:

        ```python
        inputs = cc_preprocessor.generate_preprocess(["Habari?"], max_length=64)
        inputs["token_ids"].shape  # (1, 64)
        ```
        """
        length = (
            self.max_length
            if max_length is None
            else options.count("max_length", max_length, least=2)
        )
        rows = self.prompt_ids(_check_prompts("prompts", prompts))
        for i, row in enumerate(rows):
            if not row or len(row) >= length:
                raise ValueError(
                    f"prompts[{i}] has {len(row)} tokens; it needs at least 1, and room for one "
                    f"more to be generated. Received: max_length={length}"
                )
        token_ids, padding_mask = self._padded(rows, length)
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def pivot_preprocess(self, prompts: Sequence[str | None]) -> dict[str, np.ndarray]:
        """Prepares pivot prompts for generation with the pivot at hand.

        Args:
            prompts: list of strings; `None` or an empty string is a row without a pivot.

        Returns:
            `{"pivot_token_ids", "pivot_padding_mask"}`, int32 (B, S), S by `padding`.

        Raises:
            ValueError: where a prompt is longer than `pivot_max_length`.
        """
        prompts = _check_prompts("prompts", prompts, allow_none=True)
        names = [f"prompts[{i}]" for i in range(len(prompts))]
        rows = self._pack_pivots([pairs.nonblank(p) for p in prompts], names)
        longest = max(map(len, rows), default=0)
        return self._padded_pivots(rows, self._width(longest, self.pivot_max_length))

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
            "padding": self.padding,
            "widths": self.widths,
            "add_start_token": self.add_start_token,
            **pairs.columns_of(self),
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


def _check_prompts(name: str, prompts: Any, allow_none: bool = False) -> list[Any]:
    if isinstance(prompts, str | bytes):
        prompts = [prompts]
    texts = [plain_text(p) for p in prompts]
    for i, text in enumerate(texts):
        if not isinstance(text, str) and not (allow_none and text is None):
            raise TypeError(f"`{name}` must be strings. Received: {name}[{i}]={text!r}")
    return texts
