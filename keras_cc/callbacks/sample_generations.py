import os
from collections.abc import Sequence
from typing import Any

from keras_cc.callbacks.periodic import Periodic
from keras_cc.generation import Sampling


class SampleGenerations(Periodic):
    """Shows what the model says to some prompts while it trains.

    Greedy, whatever the sampler that the model was compiled with, and so with no random number:
    training goes on as it would without the callback.

    Args:
        prompts: a list of strings, put into the preprocessor's template.
        every: `"epoch"`, or an int, that many steps. The first look is before the first step.
        max_length: int, tokens of prompt and answer together. Default: the preprocessor's.
        pivot_prompts: None (what a user gets), or the pivot's version of each prompt: then the
            connected path is shown.
        log_dir: TensorBoard's folder, for the samples as text, or None. They are written to its
            subfolder `samples`, so that it can be that of `keras.callbacks.TensorBoard` too.
        file: what the samples are printed to. None: the standard output.

    Attributes:
        history: list of `(step, list of texts)`, the continuations without the prompts. Steps
            are batches trained on; 0 is the model as it was before.

    Raises:
        ValueError: for no prompts, or other than one pivot prompt a prompt; when training begins,
            for what `CCCausalLM.generate` refuses.
        ModuleNotFoundError: for a `log_dir` where `tensorboard` is not installed.

    Example:

    ```python
    samples = keras_cc.callbacks.SampleGenerations(["Kenya'nın para birimi nedir?"], every=100)
    model.fit(rows, callbacks=[samples])
    samples.history[-1]  # (300, ["Kenya şilini"])
    ```
    """

    def __init__(
        self,
        prompts: "Sequence[str]",
        every: "int | str" = "epoch",
        max_length: int | None = None,
        pivot_prompts: "Sequence[str] | None" = None,
        log_dir: "str | os.PathLike[str] | None" = None,
        file: Any = None,
    ) -> None:
        super().__init__(every, log_dir, "samples")
        self.prompts = _texts("prompts", prompts)
        self.pivot_prompts = None
        if pivot_prompts is not None:
            self.pivot_prompts = _texts("pivot_prompts", pivot_prompts)
            if len(self.pivot_prompts) != len(self.prompts):
                raise ValueError(
                    "`pivot_prompts` must be as many as `prompts`. Received: "
                    f"{len(self.pivot_prompts)} pivot prompts for {len(self.prompts)} prompts"
                )
        self.max_length = max_length
        self.file = file
        self._greedy: Sampling | None = None

    def on_train_begin(self, logs=None):
        # Compiled anew for each fit: between two, the model may have become another.
        self._greedy = Sampling("greedy")
        super().on_train_begin(logs)

    def look(self):
        with self._greedy.of(self.model.causal_lm):
            texts = self.model.generate(
                self.prompts,
                self.max_length,
                pivot_prompts=self.pivot_prompts,
                strip_prompt=True,
            )
        # The line above is the progress bar's, which has not ended.
        print(f"\nstep {self.step}", file=self.file)
        for prompt, text in zip(self.prompts, texts, strict=True):
            print(f"  {_one_line(prompt)} -> {_one_line(text)}", file=self.file)
        return texts

    def write(self, events, seen):
        lines = ["| prompt | text |", "| --- | --- |"]
        for prompt, text in zip(self.prompts, seen, strict=True):
            lines.append(f"| {_cell(prompt)} | {_cell(text)} |")
        events.text("samples", "\n".join(lines), self.step)


def _texts(name, value):
    texts = [value] if isinstance(value, str) else list(value)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` must be one or more strings. Received: {name}={value!r}")
    return texts


def _one_line(text):
    return text.strip().replace("\n", "\\n")


def _cell(text):
    return _one_line(text).replace("|", "\\|")
