"""Saves and loads KerasHub models as presets: merged models, demo models, anybody's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from keras_cc import demo
from keras_cc.backbones import preset_files


def save_preset(
    causal_lm: Any, path: str | os.PathLike[str], *, tokenizer: Any | None = None
) -> None:
    """Saves a KerasHub `CausalLM` so that a plain `from_preset` loads it again.

    `causal_lm.save_to_preset(path)` alone forgets `tie_word_embeddings` for the Llama families
    (keras-hub 0.32: `LlamaBackbone.get_config` leaves it out), and `from_preset` then expects a
    weight the file does not have. This function saves, then writes the missing key.

    Args:
        causal_lm: A KerasHub `CausalLM`, e.g. the result of `merge()`.
        path: The directory to write.
        tokenizer: Saved beside a model whose `preprocessor` is `None` (Gemma 3 where TensorFlow
            is not installed); such a preset gets its preprocessor back where TensorFlow is.

    Raises:
        ValueError: If both the model's preprocessor and `tokenizer` are given and differ.

    Example:

    ```python
    causal_lm, tokenizer = keras_cc.demo.load("smollm2_135m")
    keras_cc.save_preset(causal_lm, "my_preset", tokenizer=tokenizer)
    again, tokenizer = keras_cc.load_preset("my_preset")
    ```
    """
    path = os.fspath(path)
    own = getattr(causal_lm.preprocessor, "tokenizer", None)
    if tokenizer is not None and own is not None and tokenizer is not own:
        raise ValueError(
            "The model has a preprocessor with another tokenizer, which would be saved instead of "
            f"the one that was given. Received: tokenizer={tokenizer}, "
            f"causal_lm.preprocessor.tokenizer={own}"
        )
    if causal_lm.preprocessor is None and tokenizer is not None:
        # No task.json here: it would pin "no preprocessor" for every later reader.
        Path(path, "task.json").unlink(missing_ok=True)
        causal_lm.backbone.save_to_preset(path)
        preset_files.save_preprocessor(type(causal_lm).preprocessor_cls, tokenizer, path)
    else:
        causal_lm.save_to_preset(path)
    preset_files.repair_config(causal_lm.backbone, path)


def load_preset(
    preset: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    sequence_length: int | None = None,
) -> tuple[Any, Any]:
    """Loads a model and its tokenizer from a preset, with or without TensorFlow.

    KerasHub's Gemma 3 preprocessor refuses to be built where TensorFlow is not installed. The
    model then comes without one (`causal_lm.preprocessor is None`: it takes token ids, not
    strings); the tokenizer works either way.

    Args:
        preset: A preset's name, handle or folder (e.g. of `save_preset`), as KerasHub's
            `from_preset` takes it, or `"demo:"` and a name for `keras_cc.demo.load`.
        dtype: The dtype or dtype policy of the backbone. By default the saved one, which a
            quantised model needs.
        sequence_length: The preprocessor's length in tokens. By default the saved one.

    Returns:
        `(causal_lm, tokenizer)`: a KerasHub `CausalLM` of the preset's own class, and its
        tokenizer (the preprocessor's, where the model has one).

    Raises:
        ValueError: If there is no demo model of the name after `"demo:"`.

    Example:

    ```python
    causal_lm, tokenizer = keras_cc.load_preset("demo:smollm2_135m")
    ids = tokenizer("The capital of France is")
    ```
    """
    preset = os.fspath(preset)
    if preset.startswith("demo:"):
        options = {} if dtype is None else {"dtype": dtype}
        return demo.load(preset.removeprefix("demo:"), sequence_length=sequence_length, **options)
    return preset_files.read_preset(preset, dtype=dtype, sequence_length=sequence_length)
