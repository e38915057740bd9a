"""What the tests of the connected model share: quick compile options, NumPy references."""

import os

import keras
import keras_hub
import numpy as np
import tiny
import tiny_tokenizers

import keras_cc

BACKEND = keras.backend.backend()
# A tiny model trains a step in less time than a graph takes to trace; JAX compiles each
# operation by itself where it runs eagerly, which takes longer than the whole step.
QUICK = {} if BACKEND == "jax" else {"run_eagerly": True}

if BACKEND == "torch":
    import torch

    torch.set_num_threads(1)  # more cost time at this size
if BACKEND == "jax":
    import jax


def environment():
    """The environment of a process with the same backend."""
    return {**os.environ, "KERAS_BACKEND": BACKEND}


ROWS = [
    {
        "id": "kenya",
        "instruction": "Kenya'nın para birimi nedir?",
        "output": "Kenya şilini",
        "instruction_en": "What is the currency of Kenya?",
    },
    {"id": "fox", "instruction": "the quick fox", "output": "yes", "instruction_en": "the fox"},
    {"id": "english", "instruction": "Answer the question", "output": "no"},
]


def tokenizer_of(family):
    return tiny_tokenizers.TOKENIZERS[family]()


def causal_lm(family, tokenizer, with_preprocessor=False, **options):
    """A tiny causal LM whose vocabulary is the tokenizer's, with KerasHub's preprocessor or not."""
    preprocessor = None
    if with_preprocessor:
        options_of = {"image_converter": None} if family == "gemma3" else {}
        prefix = tiny.FAMILIES[family][0]
        preprocessor = getattr(keras_hub.models, prefix + "CausalLMPreprocessor")(
            tokenizer, sequence_length=48, **options_of
        )
    return tiny.causal_lm(
        family, preprocessor, vocabulary_size=tokenizer.vocabulary_size(), **options
    )


def text_model(family, connection="fused", with_preprocessor=False, **options):
    """A connected tiny model that takes strings."""
    tokenizer = tokenizer_of(family)
    model = causal_lm(family, tokenizer, with_preprocessor, **options)
    inner = model.preprocessor if with_preprocessor else tokenizer
    preprocessor = keras_cc.CCPreprocessor(inner, max_length=48, pivot_max_length=40)
    return keras_cc.CCCausalLM(model, connection, preprocessor=preprocessor)


def answering_model(connection=None, sampler="greedy", preprocessing=None, **options):
    """A compiled tiny Llama that takes strings, with a connection that stands for a trained one.

    `preprocessing` holds the options of its `CCPreprocessor`, `options` those of `CCCausalLM`.
    """
    tokenizer = tokenizer_of("llama3")
    preprocessor = keras_cc.CCPreprocessor(tokenizer, **(preprocessing or {}))
    model = causal_lm("llama3", tokenizer)
    model = keras_cc.CCCausalLM(model, connection, preprocessor=preprocessor, **options)
    train_connection(model, scale=0.3)
    model.compile("sgd", sampler=sampler, **QUICK)
    return model


def train_connection(model, seed=1, scale=0.1):
    """Stand in for training: draw gates and transforms, so that no two paths agree."""
    for layer in model.connection_layers().values():
        tiny.fill(layer, seed, scale)
        seed += 1


def monolingual(x):
    return {name: x[name] for name in ("token_ids", "padding_mask")}


def outputs(model, x):
    """`model(x)`, of a `CCCausalLM`, as a dict of NumPy arrays."""
    if BACKEND != "jax":
        found = model(x)
    else:
        weights = (
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
        )
        found = jax.jit(lambda state, x: model.stateless_call(*state, x)[0])(weights, x)
    found = found if isinstance(found, dict) else {"logits": found}
    return {name: to_numpy(value) for name, value in found.items()}


def logits(model, x):
    """Logits as NumPy float32, of a `CCCausalLM` or a stock causal LM."""
    return outputs(model, x)["logits"]


def to_numpy(value):
    return keras.ops.convert_to_numpy(keras.ops.cast(value, "float32"))


def cross_entropy(logits, labels):
    """`logsumexp(logits) - logits[label]` in float64, `(B, T)`."""
    logits = logits.astype("float64")
    top = logits.max(axis=-1, keepdims=True)
    normalizer = top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))
    return normalizer - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def sft_loss(logits, labels, weights):
    """Nats an answer token."""
    return (cross_entropy(logits, labels) * weights).sum() / weights.sum()


def token_accuracy(logits, labels, weights):
    return ((logits.argmax(axis=-1) == labels) * weights).sum() / weights.sum()


def weights(model):
    """Every weight by its path."""
    return {v.path: to_numpy(v) for v in model.weights if keras.backend.is_float_dtype(v.dtype)}


def assert_weights_equal(one, other, **tolerances):
    assert set(one) == set(other)
    for path, value in one.items():
        np.testing.assert_allclose(value, other[path], err_msg=path, **tolerances)


def moved(before, after):
    """Paths of the weights that changed."""
    return {path for path in before if not np.array_equal(before[path], after[path])}
