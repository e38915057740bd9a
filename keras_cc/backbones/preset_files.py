"""What is in a KerasHub preset's files, where KerasHub itself leaves something out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_cc.backbones import surgery


def repair_config(backbone: Any, path: str | os.PathLike[str]) -> None:
    """Adds `tie_word_embeddings` to a saved preset whose backbone's config forgot it.

    Args:
        backbone: The backbone that was saved.
        path: The preset directory; `config.json` and, where there is one, `task.json` are edited.
    """
    tied = getattr(backbone, "tie_word_embeddings", None)
    if tied is None:
        return
    for name in ("config.json", "task.json"):
        file = Path(path, name)
        if not file.exists():
            continue
        saved = json.loads(file.read_text(encoding="utf-8"))
        config = saved["config"] if name == "config.json" else saved["config"]["backbone"]["config"]
        if config.setdefault("tie_word_embeddings", bool(tied)) == bool(tied):
            file.write_text(json.dumps(saved, indent=4), encoding="utf-8")


def save_preprocessor(
    preprocessor_cls: type, tokenizer: Any, path: str | os.PathLike[str], **options: Any
) -> None:
    """Saves a tokenizer, and the config of a preprocessor around it without building that one.

    Without the config, KerasHub looks for an image converter beside a Gemma 3 preset; and it
    builds Gemma 3's preprocessor only where TensorFlow is installed.

    Args:
        preprocessor_cls: A KerasHub `CausalLMPreprocessor` class.
        tokenizer: The tokenizer.
        path: The preset directory.
        **options: Arguments of the preprocessor that differ from its defaults.
    """
    import keras

    tokenizer.save_to_preset(os.fspath(path))
    config = {"tokenizer": keras.saving.serialize_keras_object(tokenizer), **options}
    saved = {
        "module": preprocessor_cls.__module__,
        "class_name": preprocessor_cls.__name__,
        "config": config,
        "registered_name": keras.saving.get_registered_name(preprocessor_cls),
    }
    Path(path, "preprocessor.json").write_text(json.dumps(saved, indent=4), encoding="utf-8")


def read_preset(
    path: str, *, dtype: str | None = None, sequence_length: int | None = None
) -> tuple[Any, Any]:
    """`(causal_lm, tokenizer)` of a KerasHub preset: what `keras_cc.load_preset` returns."""
    import keras_hub

    try:
        preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(path)
    except ImportError:  # Gemma 3 without TensorFlow.
        preprocessor = None
        tokenizer = keras_hub.models.Tokenizer.from_preset(path)
    else:
        tokenizer = preprocessor.tokenizer
        if sequence_length is not None:
            preprocessor.sequence_length = sequence_length
    options = {} if dtype is None else {"dtype": dtype}
    causal_lm = keras_hub.models.CausalLM.from_preset(path, preprocessor=None, **options)
    # Not at once: KerasHub would read its vocabulary again, 4 s for Gemma's 262,144 pieces.
    if preprocessor is not None:
        causal_lm.preprocessor = preprocessor
    surgery.quantise_weights_only(causal_lm.backbone)
    return causal_lm, tokenizer


def assign_weights(backbone: Any, values: dict[str, Callable[[], Any]]) -> None:
    """Assigns every weight of a backbone, by path, one at a time.

    Args:
        backbone: A built KerasHub backbone.
        values: Weight path (`"token_embedding/embeddings"`, ...) to a function that makes its
            value, so that only one tensor of the file is in memory at a time.

    Raises:
        ValueError: If a weight has no value, a value no weight, or the shapes differ.
    """
    weights = {weight.path: weight for weight in backbone.weights}
    if set(weights) != set(values):
        raise ValueError(
            "The file and the backbone do not have the same weights. Received: "
            f"only in the file: {sorted(set(values) - set(weights))}, "
            f"only in the backbone: {sorted(set(weights) - set(values))}"
        )
    for path, weight in weights.items():
        value = values[path]()
        if tuple(value.shape) != tuple(weight.shape):
            raise ValueError(
                f"Weight {path!r} must have the shape {tuple(weight.shape)}. "
                f"Received: shape={tuple(value.shape)}"
            )
        weight.assign(value)
