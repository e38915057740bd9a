"""Prompt templates: what surrounds an instruction.

Notable choices (`prompt_encoder.py` carries them out):

- A template is text before and after the instruction. Its special tokens (`<start_of_turn>`,
  `<|im_end|>`, ...) are looked up in the vocabulary and inserted as ids; they are never tokenised
  as text, because KerasHub tokenizers differ in what they make of a special token inside a string.
- The text between two special tokens is tokenised together with the instruction that stands in
  it, as a chat template of Hugging Face's `transformers` is.
- With a template, a special token written out in the *user's* text stays text: it cannot open or
  close a turn. Without one (`template=None`) the text goes to the tokenizer as it is.
"""

import dataclasses
import re
from typing import Any

PLACEHOLDER = "{instruction}"
SYSTEM_PLACEHOLDER = "{system}"

# What a custom template string may contain that can only be meant as a special token.
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>")


@dataclasses.dataclass(frozen=True)
class PromptTemplate:
    """What stands around an instruction, `prefix + instruction + suffix`, answer next.

    Args:
        name: string. The name it is found and serialised under.
        prefix: string. Text and special tokens before the instruction. The start token
            (`<bos>`, `<s>`, ...) is not part of it: `CCPreprocessor` adds that.
        suffix: string. Text and special tokens between the instruction and the answer.
        end_of_turn: string or `None`. The special token that ends the answer, in place of the
            tokenizer's own end token.
        special_tokens: tuple of strings. The special tokens in `prefix`, `suffix` and
            `system_turn`. Each must be a single token of the tokenizer.
        strip: bool. Whether white space around the instruction and the answer is removed, as the
            published chat templates with `| trim` do.
        system_turn: string or `None`. A system's whole turn, its text at `"{system}"`, for
            conversations that have one. `None` where the format has no such turn.

    Raises:
        ValueError: for a `system_turn` without `"{system}"`, or with two.

    Example:

    ```python
    template = keras_cc.templates.PromptTemplate(
        "phi3",
        prefix="<|user|>\\n",
        suffix="<|end|>\\n<|assistant|>\\n",
        end_of_turn="<|end|>",
        special_tokens=("<|user|>", "<|end|>", "<|assistant|>"),
    )
    template.format("Hello")  # "<|user|>\\nHello<|end|>\\n<|assistant|>\\n"
    ```
    """

    name: str
    prefix: str
    suffix: str
    end_of_turn: str | None = None
    special_tokens: tuple[str, ...] = ()
    strip: bool = False
    system_turn: str | None = None

    def __post_init__(self) -> None:
        # A config that went through JSON brings a list.
        object.__setattr__(self, "special_tokens", tuple(self.special_tokens))
        if self.system_turn is not None and self.system_turn.count(SYSTEM_PLACEHOLDER) != 1:
            raise ValueError(
                f'`system_turn` must have "{SYSTEM_PLACEHOLDER}" in it exactly once. '
                f"Received: system_turn={self.system_turn!r}"
            )

    def format(self, instruction: str) -> str:
        """Returns the prompt as a string, for reading: `CCPreprocessor` builds ids instead."""
        return self.prefix + (instruction.strip() if self.strip else instruction) + self.suffix

    def format_system(self, text: str) -> str | None:
        """Returns a system's turn as a string, `None` where the format has no such turn."""
        if self.system_turn is None:
            return None
        before, after = self.system_turn.split(SYSTEM_PLACEHOLDER)
        return before + (text.strip() if self.strip else text) + after

    @property
    def required_tokens(self) -> tuple[str, ...]:
        """Every special token that the tokenizer must have, in order, without repeats."""
        end = () if self.end_of_turn is None else (self.end_of_turn,)
        return tuple(dict.fromkeys(self.special_tokens + end))


def _chatml(name: str, system: str | None = None) -> PromptTemplate:
    system_turn = "<|im_start|>system\n{system}<|im_end|>\n"
    own = "" if system is None else system_turn.replace(SYSTEM_PLACEHOLDER, system)
    return PromptTemplate(
        name,
        prefix=f"{own}<|im_start|>user\n",
        suffix="<|im_end|>\n<|im_start|>assistant\n",
        end_of_turn="<|im_end|>",
        special_tokens=("<|im_start|>", "<|im_end|>"),
        system_turn=system_turn,
    )


_TEMPLATES = (
    # Gemma 1, 2 and 3, instruction-tuned.
    PromptTemplate(
        "gemma",
        prefix="<start_of_turn>user\n",
        suffix="<end_of_turn>\n<start_of_turn>model\n",
        end_of_turn="<end_of_turn>",
        special_tokens=("<start_of_turn>", "<end_of_turn>"),
        strip=True,
    ),
    # Llama 3 Instruct. (3.1 and later put a dated system turn in front by default; not here.)
    PromptTemplate(
        "llama3",
        prefix="<|start_header_id|>user<|end_header_id|>\n\n",
        suffix="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end_of_turn="<|eot_id|>",
        special_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=True,
        system_turn="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
    ),
    # ChatML with no system turn: Qwen3 as published, and any ChatML model by choice.
    _chatml("chatml"),
    # ChatML with the system turn that the published template adds when the user gives none.
    _chatml("qwen", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    _chatml("smollm", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    # Mistral 7B Instruct v0.3 and later, where [INST] is a special token. The space after it is
    # the SentencePiece tokenizer's own dummy prefix; Tekken tokenizers have none, and want none.
    PromptTemplate(
        "mistral", prefix="[INST]", suffix="[/INST]", special_tokens=("[INST]", "[/INST]")
    ),
)

PROMPT_TEMPLATES: dict[str, PromptTemplate] = {template.name: template for template in _TEMPLATES}


def get(template: "str | dict[str, Any] | PromptTemplate | None") -> PromptTemplate | None:
    """Returns the prompt template that a name, a string, a config or an object stands for.

    Args:
        template: `None` (nothing is added to the instruction), a name in `PROMPT_TEMPLATES`
            (`"gemma"`, `"llama3"`, `"chatml"`, `"qwen"`, `"smollm"`, `"mistral"`), a string with
            `"{instruction}"` in it exactly once, a `PromptTemplate`, or the dict that `serialize`
            returned for one.

    Returns:
        A `PromptTemplate`, or `None`.

    Raises:
        ValueError: for an unknown name, or a string without the placeholder or with two.
        TypeError: for anything else.

    Example:

    ```python
    keras_cc.templates.get("gemma").end_of_turn  # "<end_of_turn>"
    keras_cc.templates.get("Q: {instruction}\\nA:").suffix  # "\\nA:"
    ```

    Sources: the `chat_template` of google/gemma-3-1b-it, meta-llama/Meta-Llama-3-8B-Instruct,
    Qwen/Qwen2.5-7B-Instruct, HuggingFaceTB/SmolLM2-135M-Instruct and
    mistralai/Mistral-7B-Instruct-v0.3.
    """
    if template is None or isinstance(template, PromptTemplate):
        return template
    if isinstance(template, dict):
        return PromptTemplate(**template)
    if not isinstance(template, str):
        raise TypeError(
            "`template` must be None, a string or a `PromptTemplate`. "
            f"Received: template={template!r} (of type {type(template).__name__})"
        )
    if template in PROMPT_TEMPLATES:
        return PROMPT_TEMPLATES[template]
    if template.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"`template` must be one of {sorted(PROMPT_TEMPLATES)}, or a string that contains "
            f'"{PLACEHOLDER}" exactly once. Received: template={template!r}'
        )
    prefix, suffix = template.split(PLACEHOLDER)
    special_tokens = tuple(dict.fromkeys(_SPECIAL_TOKEN.findall(template)))
    return PromptTemplate(template, prefix, suffix, special_tokens=special_tokens)


def serialize(template: PromptTemplate | None) -> "str | dict[str, Any] | None":
    """Returns what `get` turns back into an equal template: a name, a string or a dict."""
    if template is None:
        return None
    is_short = template.name in PROMPT_TEMPLATES or template.name.count(PLACEHOLDER) == 1
    if is_short and get(template.name) == template:
        return template.name
    return dataclasses.asdict(template)
