"""Writes, checks and loads KerasHub presets: the cache of the demo models, and merged models.

A cached preset is written into a temporary folder and renamed when it is whole, so a conversion
that was interrupted leaves nothing that looks like a preset. A manifest with the size of every
file tells a whole preset from a damaged one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_cc import surgery

CACHE_VARIABLE = "KERAS_CC_CACHE"
MANIFEST = "keras_cc_manifest.json"


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder of the cached presets.

    Args:
        cache_dir: A folder that wins over everything else. By default the environment variable
            `KERAS_CC_CACHE`, and without it `~/.cache/keras_cc`.

    Returns:
        The folder, which need not exist yet.
    """
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "keras_cc"
    return Path(chosen).expanduser()


def cached_preset(
    name: str,
    build: Callable[[str], None],
    *,
    version: int,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """Returns a preset directory, building it first where the cache has no whole one.

    Args:
        name: The preset's folder name in the cache.
        build: Called with an empty folder; writes the preset there.
        version: The version of the conversion. A preset of another version is rebuilt.
        cache_dir: See `cache_root`.

    Returns:
        The preset directory, as KerasHub's `from_preset` takes it.
    """
    target = cache_root(cache_dir) / name
    if _is_whole(target, version):
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
        fresh = Path(scratch) / name
        fresh.mkdir()
        build(str(fresh))
        manifest = {"version": version, "files": _sizes(fresh)}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        # Another process may have finished the same conversion meanwhile: then keep its preset.
        if not _is_whole(target, version):
            if target.exists():
                target.rename(Path(scratch) / "damaged")
            try:
                fresh.rename(target)
            except OSError:
                if not _is_whole(target, version):
                    raise
    return str(target)


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
    import keras_cc.demo

    causal_lm, tokenizer = keras_cc.demo.load("smollm2_135m")
    keras_cc.demo.save_preset(causal_lm, "my_preset", tokenizer=tokenizer)
    again, tokenizer = keras_cc.demo.load_preset("my_preset")
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
        save_preprocessor(type(causal_lm).preprocessor_cls, tokenizer, path)
    else:
        causal_lm.save_to_preset(path)
    repair_config(causal_lm.backbone, path)


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
    """`(causal_lm, tokenizer)` of a KerasHub preset: what `keras_cc.demo.load_preset` returns."""
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
    causal_lm = keras_hub.models.CausalLM.from_preset(path, preprocessor=preprocessor, **options)
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


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in files
        if file.name != MANIFEST
    }


def _is_whole(folder: Path, version: int) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        return manifest["version"] == version and all(
            (folder / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
