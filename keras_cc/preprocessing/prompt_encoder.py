"""From a prompt template and a tokenizer to token ids. Not public; see `templates.py`."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from keras_cc.preprocessing.templates import PROMPT_TEMPLATES, PromptTemplate


def token_id(tokenizer: Any, token: str) -> int | None:
    """Returns the id of one token of a KerasHub tokenizer, `None` where it has no such token."""
    try:
        index = tokenizer.token_to_id(token)
        # SentencePiece answers with the unknown token's id, so look at what the id stands for.
        return int(index) if tokenizer.id_to_token(int(index)) == token else None
    except (KeyError, ValueError, TypeError):
        return None


class PromptEncoder:
    """Turns instructions and answers into token ids under one template.

    Args:
        tokenizer: a KerasHub tokenizer that has its vocabulary.
        template: a `PromptTemplate` or `None`.
        tokenize: callable, list of strings -> list of lists of ids.

    Raises:
        ValueError: where the tokenizer lacks one of the template's special tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate | None,
        tokenize: Callable[[list[str]], list[list[int]]],
    ) -> None:
        self._tokenize = tokenize
        self.strip = template is not None and template.strip  # white space around a text
        self.head: list[int] = []  # ids before the text that the instruction stands in
        self.tail: list[int] = []  # ids after it
        self.before = self.after = ""  # template text that is tokenised with the instruction
        self.end_of_turn_id: int | None = None
        self.special_ids: dict[int, str] = {}
        if template is None:
            return
        self.special_ids = self._known_special_ids(tokenizer, template)
        if template.end_of_turn is not None:
            self.end_of_turn_id = token_id(tokenizer, template.end_of_turn)
        *head, self.before = self._split(template.prefix)
        self.after, *tail = self._split(template.suffix)
        self.head, self.tail = self._fixed_ids(head), self._fixed_ids(tail)

    @staticmethod
    def _known_special_ids(tokenizer: Any, template: PromptTemplate) -> dict[int, str]:
        missing = [t for t in template.required_tokens if token_id(tokenizer, t) is None]
        if missing:
            raise ValueError(
                f"The template {template.name!r} needs special tokens that are not in the "
                f"vocabulary of {type(tokenizer).__name__}: {missing}. Choose the template of this "
                'model family, or a string with "{instruction}" in it. '
                f"Received: template={template.name!r}"
            )
        known = [*template.required_tokens, *tokenizer.special_tokens]
        known += [t for other in PROMPT_TEMPLATES.values() for t in other.required_tokens]
        ids = {token_id(tokenizer, t): t for t in known}
        return {index: token for index, token in ids.items() if index is not None}

    def _split(self, text: str) -> list[Any]:
        """Text, id, text, ..., text: ids stand for special tokens; a text may be empty."""
        by_token = {token: index for index, token in self.special_ids.items()}
        pattern = "|".join(re.escape(t) for t in sorted(by_token, key=len, reverse=True))
        return [by_token.get(part, part) for part in re.split(f"({pattern})", text)]

    def _fixed_ids(self, parts: Iterable[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                ids += self._tokenize([part])[0]
        return ids

    def prompts(self, instructions: Sequence[str]) -> list[list[int]]:
        """Returns each instruction's prompt ids: no start token, no answer."""
        texts = [self.before + t + self.after for t in self._stripped(instructions)]
        return [self.head + ids + self.tail for ids in self._text(texts)]

    def answers(self, answers: Sequence[str]) -> list[list[int]]:
        """Returns each answer's ids: no end token."""
        return self._text(self._stripped(answers))

    def _stripped(self, texts: Sequence[str]) -> list[str]:
        return [t.strip() for t in texts] if self.strip else list(texts)

    def _text(self, texts: list[str]) -> list[list[int]]:
        return [
            ids if self.special_ids.keys().isdisjoint(ids) else self._as_plain_text(text, ids)
            for text, ids in zip(texts, self._tokenize(texts), strict=True)
        ]

    def _as_plain_text(self, text: str, ids: list[int]) -> list[int]:
        """Tokenises a text whose literal special tokens must not become special ids."""
        found = [self.special_ids[i] for i in dict.fromkeys(ids) if i in self.special_ids]
        # "<eos>" -> "<", "eos>": cut after the first character of each literal.
        pattern = "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in found)
        first, *rest = re.split(pattern, text)
        result = list(self._tokenize([first])[0])
        for piece in rest:
            result += self._continuation(piece)
        return result

    def _continuation(self, piece: str) -> list[int]:
        """Tokenises text that follows other text: no dummy prefix (SentencePiece) in front."""
        start, whole = self._tokenize(["\n", "\n" + piece])
        return whole[len(start) :] if whole[: len(start)] == start else self._tokenize([piece])[0]
