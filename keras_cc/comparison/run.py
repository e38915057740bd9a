"""One cell: a recipe trained with one seed, and scored as a user gets it.

Notable choices:

- What is scored is the user's language alone, transforms and interventions on; an intervention
  that reads the English prompt is given it.
- All recipes get the same rows, epochs, batch size and schedule; one that makes more rows of them
  trains longer, and the cell says how long. Or all get the same steps.
"""

import hashlib
import json
import pathlib
import time
from typing import Any

import keras
import numpy as np

from keras_cc.comparison.costs import inference_cost, machine
from keras_cc.comparison.experiment import UNTUNED, VERSION, Experiment
from keras_cc.comparison.making import (
    StopAfter,
    english_perplexity,
    extra_parameters,
    floats,
    gates,
    make_model,
    optimizer,
    with_room,
)
from keras_cc.comparison.rows import load_rows, spread
from keras_cc.comparison.transfer import Transfer
from keras_cc.comparison.transfer_run import run_transfer
from keras_cc.data import augment_with_translation, cross_lingual_rows
from keras_cc.evaluation import evaluate, tasks
from keras_cc.evaluation.metrics import first_line
from keras_cc.evaluation.scorer import Scorer


def run(experiment: Experiment | Transfer, answers: Any = None, verbose: "int | str" = "auto"):
    """Train one recipe with one seed and score it.

    Args:
        experiment: an `Experiment` or a `Transfer`.
        answers: folder that keeps the answers of a distillation, or None.
        verbose: 0 for no progress bars.

    Returns:
        A dict that JSON can hold: scores of every item by metric and language, learning curves,
        seconds, parameters, the gate atlas, the machine.

    Example:

    ```python
    experiment = keras_cc.comparison.Experiment(
        "cc", languages=("en", "tr"), train_rows=8, dev_rows=4
    )
    keras_cc.comparison.run(experiment)["scores"]["exact_match"]["tr"]  # of each question
    ```
    """
    if isinstance(experiment, Transfer):
        return run_transfer(experiment, verbose)
    keras.utils.set_random_seed(experiment.seed)
    task = tasks.get(experiment.task)
    rows = load_rows(experiment)
    model, parameters = make_model(experiment, lambda inner: _preprocessor(experiment, inner, rows))
    trained = {}
    if experiment.recipe != UNTUNED:
        trained = _train(model, experiment, rows, answers, verbose)
    parameters["extra"] = extra_parameters(model)

    start = time.perf_counter()
    scorer = Scorer(model, batch_size=2 * experiment.batch_size, verbose=verbose)
    result = evaluate(
        model,
        task,
        rows["scored"],
        scorer=scorer,
        batch_size=4 * experiment.batch_size,  # a step of generation reads all weights once
        verbose=verbose,
    )
    perplexity = english_perplexity(scorer, rows["scored"])
    seconds = {**trained.pop("seconds", {}), "evaluate": time.perf_counter() - start}
    return {
        "version": VERSION,
        "key": experiment.key,
        "name": experiment.name,
        "config": experiment.config,
        "metric": task.metric,
        "items": result.items,
        "scores": {
            metric: {language: floats(values) for language, values in by_language.items()}
            for metric, by_language in result.scores.items()
        },
        "english_perplexity": perplexity,
        "history": {},
        **trained,
        "seconds": seconds,
        "parameters": parameters,
        "inference": inference_cost(model, rows["scored"]),
        "atlas": gates(model, rows["scored"], experiment.batch_size, verbose),
        "rows": {
            "train": len(rows["train"]),
            "held_out": len(rows["held_out"]),
            "truncated": model.preprocessor.truncated_count,
        },
        "machine": machine(),
    }


def _train(model, experiment, rows, answers, verbose):
    """The recipe's data, its steps and what comes after; returns curves and seconds."""
    recipe, start = experiment.resolve(), time.perf_counter()
    bars = 0 if verbose == 0 else 1
    model.compile(sampler="greedy")  # a distillation asks before there is an optimizer
    options = {}
    if recipe.augment == "distillation":
        cache = None if answers is None else pathlib.Path(answers) / _answers_file(experiment)
        options = {"cache": cache, "clean": first_line, "batch_size": 16, "verbose": bool(bars)}
    if recipe.augment == "translation":
        options = {"share": experiment.translation_share}
    train = recipe.data(model, rows["train"], **options)
    epochs, steps = _length(model, experiment, len(train))
    model.compile(optimizer(model, experiment, steps), sampler="greedy")
    prepared, began = time.perf_counter() - start, time.perf_counter()
    stop = StopAfter(steps)
    history = model.fit(
        train,
        batch_size=experiment.batch_size,
        epochs=epochs,
        seed=experiment.seed,
        validation_data=rows["held_out"],
        callbacks=[stop],
        verbose=bars,
    ).history
    fitted = time.perf_counter()
    found = recipe.finish(model, spread(rows["train"], 512), rows["held_out"], verbose=verbose)
    if experiment.finish == "refit":
        found["fits"] = model.fit_transform(spread(rows["train"], 512), verbose=verbose)
    curves = {name: floats(values) for name, values in history.items()}
    trained: dict[str, Any] = {"history": {**curves, "step": stop.at_epoch_end}}
    if "search" in found:
        trained["chosen"] = found["search"].best
    if "fits" in found:
        fits = found["fits"].values()
        trained["fit"] = {
            "before": float(np.mean([fit.error_before for fit in fits])),
            "after": float(np.mean([fit.error_after for fit in fits])),
        }
    trained["steps"] = steps
    trained["seconds"] = {
        "prepare": prepared,
        "train": fitted - began,
        "finish": time.perf_counter() - fitted,
    }
    return trained


def _length(model, experiment, rows):
    """`(epochs, steps)`; the last epoch may be cut short."""
    steps_per_epoch = -(-rows // experiment.batch_size)
    if experiment.steps:
        return -(-experiment.steps // steps_per_epoch), experiment.steps
    # Where an objective takes turns with the task, the task has its epochs all the same.
    turns = 2 if any(objective.alternating for objective in model.objectives) else 1
    return turns * experiment.epochs, turns * experiment.epochs * steps_per_epoch


def _answers_file(experiment):
    """One for all seeds: before training the model is the same, but for LoRA's first matrices."""
    names = ("model", "task", "data", "languages", "template", "max_length", "train_rows")
    names += ("dev_rows", "score_on", "train", "lora_rank")
    facts = [experiment.config[name] for name in names]
    facts += [experiment.seed] if experiment.train == "lora" else []
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"english_answers_{digest}.jsonl"


def _preprocessor(experiment, inner, rows):
    # A story and its ending are one text, trained on as they are scored.
    template = None if tasks.get(experiment.task).kind == "endings" else experiment.template
    every = [*rows["train"], *rows["held_out"], *(r for k in rows["scored"].values() for r in k)]
    augment = None if experiment.recipe == UNTUNED else experiment.resolve().augment
    if augment == "translation":
        every += augment_with_translation(rows["train"], share=experiment.translation_share)
    elif augment == "cross_lingual":
        every += cross_lingual_rows(rows["train"])
    return with_room(
        inner,
        [row["instruction"] for row in every],
        [row["output"] for row in every],
        [row.get("instruction_en") or row["instruction"] for row in every],
        template,
        experiment.max_length,
        any_answer=augment == "distillation",
    )
