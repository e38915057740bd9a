"""The laboratory's tiny Llama 3, as a KerasHub preset that is trained once."""

from __future__ import annotations

import hashlib
import os
import pathlib

from keras_cc.demo.cache import cached_preset

NAME = "laboratory"
#: Of the languages, the text and the training: raised with whatever changes the weights.
VERSION = 1


def laboratory(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Returns the preset directory of the laboratory's model, training it on the first call.

    The model is that of `keras_cc.laboratory.pretrain` with seed 0. Training takes minutes on two
    CPU cores, and does not depend on the backend but for rounding: one preset serves all of them.
    Rounding grows, so that the model of another machine is another one.

    Args:
        cache_dir: Where presets are kept. By default the environment variable `KERAS_CC_CACHE`,
            and without it `~/.cache/keras_cc`. The preset takes 4 MB.

    Returns:
        A directory for `keras_hub.models.CausalLM.from_preset`. Its tokenizer is
        `keras_cc.laboratory.WordTokenizer`: a process that loads the preset must have run
        `import keras_cc.demo`.

    Example:

    ```python
    import keras_hub
    import keras_cc.demo

    causal_lm = keras_hub.models.CausalLM.from_preset(keras_cc.demo.laboratory())
    ```
    """
    return cached_preset(NAME, _train, version=VERSION, cache_dir=cache_dir)


def fingerprint() -> str:
    """16 hex digits that stand for the weights in the cache, trained if there are none yet."""
    digest = hashlib.sha256()
    for file in sorted(pathlib.Path(laboratory()).glob("*.h5")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _train(folder: str) -> None:
    from keras_cc.laboratory import pretrain

    print("keras_cc: training the laboratory's model (once) ...", flush=True)
    pretrain(folder)
    print("keras_cc: done.", flush=True)
