"""Tiny models of every family and tiny batches, the same on every backend."""

import keras
import keras_hub
import numpy as np

VOCABULARY = 61
HIDDEN = 16

_LLAMA = dict(
    vocabulary_size=VOCABULARY,
    num_layers=2,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=HIDDEN,
    intermediate_dim=24,
)
_GEMMA = dict(_LLAMA, head_dim=8)
_GPT = dict(
    vocabulary_size=VOCABULARY,
    num_layers=2,
    num_heads=2,
    hidden_dim=HIDDEN,
    intermediate_dim=24,
    max_sequence_length=64,
)
_GEMMA3 = dict(
    _GEMMA,
    image_size=None,
    vision_encoder=None,
    use_query_key_norm=True,
    use_post_ffw_norm=True,
    use_post_attention_norm=True,
    use_sliding_window_attention=True,
    sliding_window_size=8,
)

# name -> (KerasHub class prefix, backbone arguments)
FAMILIES = {
    "gemma": ("Gemma", _GEMMA),
    "gemma2": (
        "Gemma",
        dict(
            _GEMMA,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            final_logit_soft_cap=30.0,
            attention_logit_soft_cap=50.0,
            use_sliding_window_attention=True,
            sliding_window_size=8,
        ),
    ),
    "gemma3": ("Gemma3", _GEMMA3),
    "llama": ("Llama", _LLAMA),
    "llama3": ("Llama3", dict(_LLAMA, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(_LLAMA, sliding_window=8)),
    "qwen": ("Qwen", _LLAMA),
    "qwen3": ("Qwen3", _GEMMA),
    "phi3": ("Phi3", _LLAMA),
    "smollm3": (
        "SmolLM3",
        dict(
            vocabulary_size=VOCABULARY,
            hidden_dim=HIDDEN,
            intermediate_dim=24,
            num_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=False,
            attention_dropout=0.0,
            rope_layer_enabled_list=[True, False],
            layer_types=["attention", "attention"],
            mlp_bias=True,
            layer_norm_epsilon=1e-6,
            max_position_embeddings=64,
            rope_theta=10000.0,
            partial_rotary_factor=1.0,
        ),
    ),
    "gpt_neo_x": ("GPTNeoX", _GPT),
    "falcon": (
        "Falcon",
        dict(
            vocabulary_size=VOCABULARY,
            num_layers=2,
            num_attention_heads=2,
            hidden_dim=HIDDEN,
            intermediate_dim=24,
        ),
    ),
    "gpt2": ("GPT2", _GPT),
    "opt": ("OPT", _GPT),
    "bloom": (
        "Bloom",
        dict(
            vocabulary_size=VOCABULARY,
            num_layers=2,
            num_heads=2,
            hidden_dim=HIDDEN,
            intermediate_dim=24,
        ),
    ),
}

#: One of each kind: norms on both sides and a sliding window; the plain one; learned positions and
#: biases; parallel residuals; no positions but ALiBi's.
UNLIKE = ("gemma3", "llama3", "gpt2", "gpt_neo_x", "bloom")


def causal_lm(family="llama3", preprocessor=None, seed=0, dtype=None, **options):
    """A tiny causal LM of a family, its weights drawn from a seed: equal on all backends."""
    prefix, arguments = FAMILIES[family]
    backbone = getattr(keras_hub.models, prefix + "Backbone")(
        **{**arguments, **options}, dtype=dtype
    )
    fill(backbone, seed)
    return getattr(keras_hub.models, prefix + "CausalLM")(
        preprocessor=preprocessor, backbone=backbone
    )


def fill(model, seed, scale=0.2):
    """Draw every weight of a model (or layer) from a NumPy seed, so that backends agree."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if not keras.backend.is_float_dtype(variable.dtype):
            continue
        value = rng.normal(0.0, scale, variable.shape)
        if "norm" in variable.path and not variable.path.endswith("bias"):
            value = 1.0 + 0.1 * value
        if variable.path.endswith("/delta"):  # of a transform, W = I + delta / sqrt(d)
            value *= np.sqrt(variable.shape[0])
        variable.assign(value.astype("float32"))


def fill_lora(layers, scale=0.2):
    """Draw the LoRA matrices of layers from NumPy seeds, so that backends agree."""
    for number, layer in enumerate(layers):
        rng = np.random.default_rng(number)
        for matrix in (layer.lora_kernel_a, layer.lora_kernel_b):
            matrix.assign(rng.normal(0.0, scale, matrix.shape).astype("float32"))


def batch(rows=3, length=9, pivot_length=6, prompt_lengths=(4, 3, 5), seed=0):
    """A preprocessed batch `(x, y, sample_weight)`: padded pairs, the last row without pivot."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, VOCABULARY, (rows, length + 1))
    lengths = [min(length, prompt + 3 + i % 2) for i, prompt in enumerate(prompt_lengths)]
    mask = np.arange(length)[None] < np.asarray(lengths)[:, None]
    answer = mask & (np.arange(length)[None] >= np.asarray(prompt_lengths)[:, None] - 1)
    pivot_lengths = [2 + (2 * i) % (pivot_length - 1) for i in range(rows)]
    pivot_lengths[-1] = 0
    pivot_mask = np.arange(pivot_length)[None] < np.asarray(pivot_lengths)[:, None]
    x = {
        "token_ids": np.where(mask, ids[:, :-1], 0).astype("int32"),
        "padding_mask": mask.astype("int32"),
        "answer_mask": answer.astype("int32"),
        "pivot_token_ids": np.where(
            pivot_mask, rng.integers(3, VOCABULARY, (rows, pivot_length)), 0
        ).astype("int32"),
        "pivot_padding_mask": pivot_mask.astype("int32"),
    }
    return x, np.where(answer, ids[:, 1:], 0).astype("int32"), answer.astype("float32")
