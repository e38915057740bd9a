"""Conversations as text, under a prompt template, and such text as token ids. Not public.

The harness passes conversations around as strings. `ConversationEncoder.format` writes the special
tokens of the template into the string, and `encode` reads them out again as ids: a prompt of one
turn gets the ids that `CCPreprocessor.prompt_ids` gives it, those of training.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from keras_cc.preprocessing import CCPreprocessor
from keras_cc.preprocessing.prompt_encoder import token_id


class ConversationEncoder:
    """Writes conversations under a template, and encodes text with special tokens in it.

    A special token of the template or the tokenizer that stands in a text is one id, whoever wrote
    it: as in the harness' Hugging Face models, and other than in `CCPreprocessor`.

    Args:
        preprocessor: a `CCPreprocessor` with a tokenizer; its template is the conversation's.
    """

    def __init__(self, preprocessor: CCPreprocessor) -> None:
        self.template = preprocessor.template
        self.start_token_id = getattr(preprocessor.tokenizer, "start_token_id", None)
        self._adds_start_token = preprocessor.add_start_token
        self._plain = CCPreprocessor(preprocessor.tokenizer)
        names = list(preprocessor.tokenizer.special_tokens)
        if self.template is not None:
            names += self.template.required_tokens
        found = {name: token_id(preprocessor.tokenizer, name) for name in names if name}
        self._special_ids = {name: index for name, index in found.items() if index is not None}
        by_length = sorted(self._special_ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")
        end_of_turn = getattr(self.template, "end_of_turn", None)
        self._end = end_of_turn or preprocessor.tokenizer.id_to_token(preprocessor.end_token_id)

    def encode(self, text: str, add_start_token: "bool | None" = None) -> list[int]:
        """The ids of a text.

        Args:
            text: string; a special token in it becomes its id.
            add_start_token: bool, or `None` for the preprocessor's own way; in no case a second
                one before a text that begins with it.
        """
        parts = re.split(self._pattern, text) if self._special_ids else [text]
        plain = [part for part in parts if part and part not in self._special_ids]
        tokenized = iter(self._plain.answer_ids(plain))
        ids: list[int] = []
        for part in filter(None, parts):
            ids += [self._special_ids[part]] if part in self._special_ids else next(tokenized)
        wanted = self._adds_start_token if add_start_token is None else add_start_token
        if wanted and self.start_token_id is not None and ids[:1] != [self.start_token_id]:
            ids.insert(0, int(self.start_token_id))
        return ids

    def format(self, messages: Sequence[Mapping[str, str]], is_open: bool = False) -> str:
        """The text of a conversation, up to where the model's next answer begins.

        Args:
            messages: `{"role": ..., "content": ...}` dicts: perhaps one of the system, then user
                and assistant in turns. The system's text takes the place of a template's own, or
                stands in front of the user's first one where the template has no `system_turn`
                (Gemma, Mistral, a string of your own).
            is_open: bool. Whether the last message is an answer of the assistant's that has only
                begun: nothing ends it then.

        Raises:
            ValueError: without a template, or for roles in another order.
        """
        template = self.template
        if template is None:
            raise ValueError(
                "A chat template must be chosen: pass `template=`, a name such as "
                '"gemma" or a string with "{instruction}" in it (see `keras_cc.templates.get`). '
                "Received: template=None"
            )
        roles = [message["role"] for message in messages]
        turns = [dict(message) for message in messages]
        first = 1 if roles[:1] == ["system"] else 0
        expected = ["user", "assistant"] * len(roles)
        last = "assistant" if is_open else "user"
        if roles[first:] != expected[: len(roles) - first] or roles[-1:] != [last]:
            raise ValueError(
                '`messages` must be one of "system" or none, then "user" and "assistant" in '
                f'turns, the last one of the "{last}". Received: roles {roles}'
            )
        end = self._end + self._after_end()
        # The template's own system turn, if any, stands before the first user's turn alone.
        header = template.prefix.rpartition(end)[2]
        text, opening = "", template.prefix
        if first:
            content = turns.pop(0)["content"]
            turn = template.format_system(content)
            if turn is None:
                both = (content, turns[0]["content"])
                turns[0]["content"] = "\n\n".join(map(self._stripped, both))
            else:
                text, opening = turn, header
        for number, turn in enumerate(turns):
            content = self._stripped(turn["content"])
            if turn["role"] == "user":
                text += opening + content + template.suffix
                opening = header
            else:
                text += content + ("" if is_open and number == len(turns) - 1 else end)
        return text

    def _after_end(self) -> str:
        """What the template has between the end of one turn and the next special token."""
        if self.template is None or not self.template.suffix.startswith(self._end):
            return ""
        return re.split(self._pattern, self.template.suffix[len(self._end) :])[0]

    def _stripped(self, text: Any) -> str:
        return text.strip() if self.template.strip else text
