"""A grid search over an intervention's options, on a development set."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_cc.calibration.compiled import Compiled
from keras_cc.data.batches import PreparedBatches
from keras_cc.passes import runs


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        candidates: a tuple of dicts, the options that were tried.
        losses: float64 `(number of candidates,)`: the mean negative log-likelihood of an answer
            token, in nats. Lower is better.
        baseline: float, the same without the intervention.
        best: the candidate of the lowest loss. The model's intervention has it.
    """

    candidates: tuple[dict[str, Any], ...]
    losses: np.ndarray
    baseline: float
    best: dict[str, Any]


def search(model, rows, grid, batch_size=16, verbose="auto"):
    """Try an intervention's options on a development set, and set the best on the model.

    Every combination is scored by the negative log-likelihood of the answers on the path that
    a user gets. One compiled function serves them all. Use rows that nothing was trained on.

    Args:
        model: a `CCCausalLM` with an intervention; an `Incline` is fitted first.
        rows: paired rows, as `CCCausalLM.evaluate` takes.
        grid: a dict from option to the values to try, such as
            `{"source_layer": range(0, 18, 3), "target_layer": range(18)}` for `XTransplant` or
            `{"sigma": [-0.2, -0.1, 0.1, 0.2]}` for `Incline`.
        batch_size: int, rows a batch.
        verbose: 0 for no progress bar.

    Returns:
        A `SearchResult`.

    Raises:
        ValueError: for a model without an intervention, an empty grid, an option that is none
            of the swept ones, a value that the model cannot have, or rows without a pivot where
            the intervention reads one.

    Example:

    ```python
    model = keras_cc.CCCausalLM(causal_lm, None, intervention=keras_cc.XTransplant(0, 0))
    model.compile(sampler="greedy")
    result = keras_cc.search(model, dev_rows, {"source_layer": [3, 6], "target_layer": [2, 3]})
    result.best  # {"source_layer": 6, "target_layer": 3}, and the model has it
    ```

    Source: XTransplant (arXiv 2412.12686, all pairs of layers), INCLINE (arXiv 2410.12462, sigma
    in [-1, 1]).
    """
    intervention = model.intervention
    if intervention is None:
        raise ValueError(
            "`model` must have an intervention to search over: `model.intervention = "
            "keras_cc.XTransplant(0, 0)`. Received: intervention=None"
        )
    candidates = _candidates(intervention, grid, model.num_blocks)
    batches = list(
        PreparedBatches(
            rows, model.preprocessor, batch_size, group=True, answers="all", method="a search"
        )
    )
    has_pivot = any((x["pivot_padding_mask"] != 0).any() for x, _, _ in batches)
    if intervention.needs_pivot and not has_pivot:
        raise ValueError(
            f"`rows` must have pivots, which {type(intervention).__name__} reads: without one, all "
            f"candidates are the same. Received: {sum(len(y) for _, y, _ in batches)} rows without"
        )
    scorer = Compiled(model, lambda inputs: runs.answer_nats(model, inputs, runs.user))
    progress = keras.utils.Progbar(
        len(candidates), unit_name="candidate", verbose=1 if verbose == "auto" else verbose
    )
    found = []
    for number, candidate in enumerate(candidates):
        swept = type(intervention)(**{**intervention.get_config(), **candidate}).swept()
        found.append(_mean(scorer, batches, swept))
        progress.update(number + 1)
    plain = Compiled(model, lambda inputs: runs.answer_nats(model, inputs, runs.monolingual))
    baseline = _mean(plain, batches, intervention.swept())
    if not np.isfinite(found).any():
        raise ValueError(
            "`rows` must have answers that the model can score: no candidate has a finite loss. "
            f"Received: losses {found}"
        )
    best = candidates[int(np.nanargmin(found))]
    for name, value in best.items():
        setattr(intervention, name, value)
    model.forget_compiled()
    return SearchResult(tuple(candidates), np.asarray(found), baseline, best)


def _candidates(intervention, grid, num_blocks):
    config = intervention.get_config()
    options = intervention.swept_options
    if not isinstance(grid, dict) or not grid or not set(grid) <= set(options):
        raise ValueError(
            f"`grid` must be a dict with some of the options {options} of "
            f"{type(intervention).__name__}. Received: grid={grid!r}"
        )
    values = {}
    for name, tried in grid.items():
        values[name] = list(tried) if isinstance(tried, Iterable) else []
        if not values[name] or isinstance(tried, str):
            raise ValueError(
                "`grid` must give each option a list of at least one value to try. "
                f"Received: {name}={tried!r}"
            )
    candidates = []
    for combination in itertools.product(*values.values()):
        candidate = dict(zip(values, combination, strict=True))
        type(intervention)(**{**config, **candidate}).check(num_blocks)
        candidates.append(candidate)
    return candidates


def _mean(scorer, batches, swept):
    """Nats an answer token over all batches, summed in float64."""
    nats = tokens = 0.0
    for x, y, sample_weight in batches:
        options = np.tile(np.asarray(swept, "float32"), (len(y), 1))
        inputs = {k: v for k, v in x.items() if k != "row_ids"}
        inputs |= {"intervention_options": options, "y": y, "sample_weight": sample_weight}
        found = scorer.run(inputs)
        nats += found["nats"].sum(dtype="float64")
        tokens += found["tokens"].sum(dtype="float64")
    return float(nats / tokens)
