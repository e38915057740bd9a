"""The laboratory's model: a tiny Llama 3, trained from scratch on the laboratory's text.

Notable choices:

- Weights start from a seed of NumPy's, equal on all backends, and the text is the same; what is
  trained differs between backends by how rounding grows.
- The token embedding starts at a standard deviation of 0.04: at KerasHub's 0.01 the model stays at
  chance for as long as it is trained here.
"""

import itertools
import os
from typing import Any

import keras
import numpy as np

from keras_cc.backbones.preset_files import repair_config, save_preprocessor
from keras_cc.laboratory.corpus import documents
from keras_cc.laboratory.grammar import vocabulary
from keras_cc.options import count

LAYERS, DIM, HEADS = 4, 128, 4
LENGTH, BATCH_SIZE = 64, 16
STEPS, LEARNING_RATE = 2000, 4e-3
EMBEDDING_STD, KERNEL_STD = 0.04, 0.04


def tokenizer(seed: int = 0) -> Any:
    """The `WordTokenizer` of the laboratory's languages."""
    from keras_cc.laboratory.word_tokenizer import WordTokenizer

    return WordTokenizer([*".?", "\n", *vocabulary(seed)])


def text_batches(seed: int, steps: int) -> np.ndarray:
    """Ids of the laboratory's text, int32 `(steps, BATCH_SIZE, LENGTH + 1)`: documents end to end.

    Each begins with the start token and ends with the end token, also where a row cuts it.
    """
    needed = steps * BATCH_SIZE * (LENGTH + 1)
    own, ids, text = tokenizer(seed), [], documents(seed)
    while len(ids) < needed:
        for found in own.tokenize(list(itertools.islice(text, 256))):
            ids += [own.start_token_id, *found, own.end_token_id]
    return np.array(ids[:needed], "int32").reshape(steps, BATCH_SIZE, LENGTH + 1)


def new_model(vocabulary_size: int, seed: int = 0) -> Any:
    """A `Llama3CausalLM` of the laboratory's size, its weights drawn from a seed."""
    import keras_hub

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=vocabulary_size,
        num_layers=LAYERS,
        num_query_heads=HEADS,
        num_key_value_heads=HEADS,
        hidden_dim=DIM,
        intermediate_dim=3 * DIM,
        rope_max_wavelength=10000,
        tie_word_embeddings=True,
        dtype="float32",
    )
    random = np.random.default_rng([seed, 20])
    for weight in backbone.weights:
        if weight.path.endswith("scale"):  # of a norm: 1
            continue
        std = EMBEDDING_STD if "embedding" in weight.path else KERNEL_STD
        weight.assign(random.normal(0.0, std, weight.shape).astype("float32"))
    return keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)


def pretrain(
    path: "str | os.PathLike[str]", seed: int = 0, steps: int = STEPS, verbose: Any = "auto"
) -> list[float]:
    """Trains the laboratory's model from scratch, and saves it with its tokenizer as a preset.

    Args:
        path: the directory to write.
        seed: int, of the languages, the text and the first weights.
        steps: int, of 16 rows of 64 tokens.
        verbose: 0 for no progress bar.

    Returns:
        The mean loss of each tenth of the steps, in nats a token.

    Raises:
        ValueError: for a `seed` or `steps` out of range.

    Example:

    ```python
    keras_cc.laboratory.pretrain("my_laboratory", seed=1, steps=10)
    causal_lm, tokenizer = keras_cc.load_preset("my_laboratory")
    ```
    """
    import keras_hub

    count("seed", seed)
    count("steps", steps, least=1)
    own = tokenizer(seed)
    model = new_model(own.vocabulary_size(), seed)
    batches = text_batches(seed, steps)
    warmup = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=LEARNING_RATE, warmup_steps=warmup
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(
            schedule, weight_decay=0.01, beta_2=0.98, global_clipnorm=1.0
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    losses = []
    for part in np.array_split(batches, min(10, steps)):
        ids = part.reshape(-1, LENGTH + 1)
        x = {"token_ids": ids[:, :-1], "padding_mask": np.ones_like(ids[:, :-1])}
        history = model.fit(x, ids[:, 1:], batch_size=BATCH_SIZE, shuffle=False, verbose=verbose)
        losses += history.history["loss"]
    folder = os.fspath(path)
    preprocessor_cls = keras_hub.models.Llama3CausalLMPreprocessor
    save_preprocessor(preprocessor_cls, own, folder)
    model.backbone.save_to_preset(folder)
    repair_config(model.backbone, folder)
    return losses
