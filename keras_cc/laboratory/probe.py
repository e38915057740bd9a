"""Where an entity is, layer by layer: can another language's state be told by English ones?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_cc.backbones import taps
from keras_cc.calibration.compiled import Compiled
from keras_cc.passes import positions, runs


def entity_by_layer(
    model: Any, rows: Sequence[Mapping[str, Any]], label: str = "id", batch_size: int = 32
) -> dict[str, list[float]]:
    """Tells by English states which entity a prompt of another language is about.

    At the output of each block, `h` is the state of the last prompt token in the pass that a user
    gets. With `m_l` the mean of a language's states, and `c_k` the mean of the English `h - m_en`
    of the rows with label `k`, the nearest centroid is read:

        argmax_k  cos(h - m_l, c_k)

    Nothing is trained: a block where this is right has the entity in the same directions whatever
    the language. Chance is 1 over the number of labels.

    Args:
        model: a `CCCausalLM` with a preprocessor, of any family.
        rows: dicts with `lang` and `instruction`, and `instruction_en` in other languages than
            English, such as those of `laboratory_rows`.
        label: string, the column that says what is to be told: `"id"` (the entity, as far as each
            has one row in a language) or `"output"` (its answer, where all languages have it).
        batch_size: int, rows a batch.

    Returns:
        A dict from each language but English to the share of its rows that are told right, after
        each block from the first to the last.

    Raises:
        ValueError: without a preprocessor; for a row without a language or label; without English
            rows, or rows of another language; for a label that no English row has.

    Example:

    ```python
    rows = [
        {"id": 0, "lang": "en", "instruction": "What is Kenya?"},
        {"id": 1, "lang": "en", "instruction": "What is it?"},
        {"id": 0, "lang": "tr", "instruction": "Kenya nedir?", "instruction_en": "What is Kenya?"},
    ]
    keras_cc.laboratory.entity_by_layer(model, rows)["tr"]  # 0.0 or 1.0 after each block
    ```

    Source: nearest centroids of activations, as in cross-lingual retrieval; means of languages
    are taken off as in ShifCon, arXiv 2410.19453.
    """
    languages, labels = _checked(model, rows, label)
    states = _states(model, rows, batch_size)  # (rows, blocks, d)
    for language in np.unique(languages):
        states[languages == language] -= states[languages == language].mean(axis=0)
    english = languages == "en"
    known = np.unique(labels[english])
    centroids = np.stack([states[english & (labels == one)].mean(axis=0) for one in known])
    found = np.einsum("nbd,kbd->nbk", _unit(states), _unit(centroids)).argmax(axis=-1)
    right = known[found] == labels[:, None]  # (rows, blocks)
    return {
        str(language): right[languages == language].mean(axis=0).tolist()
        for language in np.unique(languages[~english])
    }


def _checked(model, rows, label):
    """`(languages, labels)`, arrays of strings."""
    if model.preprocessor is None:
        raise ValueError(
            "Prompts are read as text: `model.preprocessor` must be set. "
            "Received: model.preprocessor=None"
        )
    for number, row in enumerate(rows):
        if not row.get("lang") or row.get(label) is None:
            raise ValueError(
                f"`rows` must each have a 'lang' and a {label!r}. "
                f"Received: row {number} with {sorted(row)}"
            )
    languages = np.array([str(row["lang"]) for row in rows], dtype=str)
    labels = np.array([str(row[label]) for row in rows], dtype=str)
    english = languages == "en"
    if not english.any() or english.all():
        raise ValueError(
            "`rows` must be in English, which the others are told by, and in other languages. "
            f"Received: languages {sorted(set(languages.tolist()))}"
        )
    strange = sorted(set(labels[~english].tolist()) - set(labels[english].tolist()))
    if strange:
        raise ValueError(
            f"`rows` must have an English row of every {label!r}. Received: none of {strange[:5]}"
        )
    return languages, labels


def _states(model, rows, batch_size):
    """The last prompt token's state at each block, float64 `(rows, blocks, d)`."""
    preprocessor = model.preprocessor
    prompts = [str(row["instruction"]) for row in rows]
    pivots = [None if row["lang"] == "en" else row.get("instruction_en") for row in rows]
    width = preprocessor.width_of(1 + max(map(len, preprocessor.prompt_ids(prompts))))
    inputs = preprocessor.generate_preprocess(prompts, width)
    inputs |= preprocessor.pivot_preprocess(pivots)
    collect = Compiled(model, lambda inputs: {"states": _last_states(model, inputs)})
    was_tapped = taps.untap(model.causal_lm)
    taps.tap(model.causal_lm)
    try:
        found = [
            collect.run({name: value[start : start + batch_size] for name, value in inputs.items()})
            for start in range(0, len(rows), batch_size)
        ]
    finally:
        if not was_tapped:
            taps.untap(model.causal_lm)
    return np.concatenate([one["states"] for one in found]).astype("float64")


def _last_states(model, inputs):
    sites = [("hidden", number) for number in range(model.num_blocks)]
    scope = runs.user(model, inputs)
    scope.observed |= set(sites)
    runs.run(model, inputs, scope)
    real = ops.cast(inputs["padding_mask"], "bool")
    return positions.pick_sites(scope, sites, positions.last_prompt(real))


def _unit(states):
    return states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-12)
