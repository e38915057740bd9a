"""The means that a `Shift` moves between: of each language's prompts, and of the same in English.

One pass over the rows of each language, and one over their pivots. Sums are float64 and a few
vectors a language, whatever the number of rows.
"""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_cc.calibration.compiled import Compiled
from keras_cc.data import columns, pairs
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.prepared import PIVOT_KEYS, TARGET_KEYS
from keras_cc.passes import positions, runs


@dataclasses.dataclass(frozen=True)
class ShiftFit:
    """What was found at the output of one block.

    Attributes:
        rows: a dict from language to how many pairs its means are of.
        distances: a dict from language to `|| v_l - e_l || / || e_l ||`.
        error_before: float, the mean over pairs of the squared distance between the means of the
            prompt and of its pivot.
        error_after: float, the same after the shift. Never above `error_before`.
    """

    rows: dict[str, int]
    distances: dict[str, float]
    error_before: float
    error_after: float


def fit_shift(model, source, *, batch_size=None, verbose="auto"):
    """Take the means of a model's `Shift`, see `CCCausalLM.fit_transform`.

    Args:
        model: a `CCCausalLM` with a `Shift` and a preprocessor.
        source: a list of row dicts or a dict of columns, each row with its `lang`. Rows in the
            pivot's language, or without a pivot, are passed over.
        batch_size: int, rows a batch. Default 8.
        verbose: 0 for no progress bar.

    Returns:
        A dict from `"block_3"` to its `ShiftFit`.

    Raises:
        ValueError: without a preprocessor, for rows without a `lang`, or no row with a pivot.
    """
    by_language = _rows_by_language(model, source)
    shift, num_blocks = model.intervention, model.num_blocks
    dim = model.causal_lm.backbone.hidden_dim
    collect = Compiled(model, lambda inputs: _prompt_means(model, inputs))
    progress = keras.utils.Progbar(
        len(by_language), unit_name="language", verbose=1 if verbose == "auto" else verbose
    )
    sums = {}
    for number, (language, rows) in enumerate(by_language.items()):
        sums[language] = _sums(collect, model, rows, batch_size or 8)
        progress.update(number + 1)
    shift.learn(tuple(by_language), num_blocks, dim)
    model.intervention = shift  # its layers are others now
    total = sum(own["rows"] for own in sums.values())
    english = np.stack([own["pivot"] for own in sums.values()]).sum(axis=0) / total  # (blocks, d)
    fits = {}
    for number, layer in shift.matrices.items():
        target = np.stack([own["target"][number] / own["rows"] for own in sums.values()])
        pivot = np.stack([own["pivot"][number] / own["rows"] for own in sums.values()])
        if layer.has_means:
            layer.means.assign(np.concatenate([english[number][None], target]).astype("float32"))
        layer.shifts.assign((pivot - target).astype("float32"))
        moved = ((pivot - target) ** 2).sum(axis=-1)  # (languages,)
        before = sum(own["squared"][number] for own in sums.values())
        after = before - sum(m * own["rows"] for m, own in zip(moved, sums.values(), strict=True))
        distances = np.sqrt(moved) / np.maximum(np.linalg.norm(pivot, axis=-1), 1e-12)
        fits[f"block_{number}"] = ShiftFit(
            rows={language: own["rows"] for language, own in sums.items()},
            distances={name: float(d) for name, d in zip(sums, distances, strict=True)},
            error_before=float(before / total),
            error_after=float(max(after, 0.0) / total),
        )
    model.forget_compiled()
    return fits


def _rows_by_language(model, source):
    """Row dicts with a pivot, by their language, in the order of its code."""
    preprocessor = model.preprocessor
    if preprocessor is None:
        raise ValueError(
            "A `Shift` is fitted on rows of text, whose language is known, and needs a "
            "preprocessor: set `model.preprocessor`. Received: model.preprocessor=None"
        )
    try:
        table = columns.to_columns(source, tuple(pairs.columns_of(preprocessor).values()))
    except TypeError as error:
        raise ValueError(
            "A `Shift` is fitted on a list of row dicts or a dict of columns, whose language is "
            f"known. Received: {columns.describe(source)}"
        ) from error
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    found: dict[str, list] = {}
    for number, row in enumerate(rows):
        name = f"row {number}"
        lang = pairs.read_text(row, preprocessor.lang_column, name)
        if not lang:
            raise ValueError(
                f"Row {number}: a {preprocessor.lang_column!r} is needed, whose mean it is part "
                f"of. Received: a row with {sorted(k for k, v in row.items() if v is not None)}"
            )
        pivot = pairs.read_text(row, preprocessor.pivot_column, name)
        instruction = pairs.read_text(row, preprocessor.instruction_column, name)
        alone = pairs.is_in_pivot_language(lang, instruction, pivot, preprocessor.pivot_language)
        if not alone and pivot is not None:
            found.setdefault(lang, []).append(row)
    if not found:
        raise ValueError(
            "A `Shift` is fitted on pairs, and no row has a pivot (rows in the pivot's own "
            f"language have none). Received: {len(rows)} rows without one"
        )
    return dict(sorted(found.items()))


def _sums(collect, model, rows, batch_size):
    shape = (model.num_blocks, model.causal_lm.backbone.hidden_dim)
    sums = {"rows": 0, "target": np.zeros(shape), "pivot": np.zeros(shape)}
    sums["squared"] = np.zeros(shape[0])
    for x, _, _ in PreparedBatches(rows, model.preprocessor, batch_size=batch_size, group=True):
        found = collect.run({name: x[name] for name in (*TARGET_KEYS, *PIVOT_KEYS)})
        target, pivot = (found[name].astype("float64") for name in ("target", "pivot"))
        sums["rows"] += len(target)
        sums["target"] += target.sum(axis=0)
        sums["pivot"] += pivot.sum(axis=0)
        sums["squared"] += ((target - pivot) ** 2).sum(axis=(0, 2))
    return sums


def _prompt_means(model, inputs):
    """Each prompt's mean state at each block, `(B, blocks, d)`, of both streams."""
    shift = model.intervention
    sites = [("hidden", number) for number in range(model.num_blocks)]
    own = runs.monolingual(model, inputs)
    own.observed |= set(sites)
    runs.run(model, inputs, own)
    pivot = runs.pivot(model, inputs, observed=sites)
    real = ops.cast(inputs["padding_mask"], "bool")
    last = positions.last_prompt(real, inputs["answer_mask"])
    masks = {"target": positions.up_to(real, last), "pivot": pivot.mask}
    found = {}
    for name, scope in (("target", own), ("pivot", pivot)):
        read = [shift.read(scope.states[site], masks[name], last) for site in sites]
        found[name] = ops.stack(read, axis=1)
    return found
