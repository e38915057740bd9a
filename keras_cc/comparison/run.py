"""One cell: a recipe trained with one seed, and scored as a user gets it.

Notable choices:

- What is scored is the user's language alone, transforms and interventions on; an intervention
  that reads the English prompt is given it.
- All recipes get the same rows, epochs, batch size and schedule; one that makes more rows of them
  trains longer, and the cell says how long. Or all get the same steps.
"""

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_cc import presets
from keras_cc.calibration import atlas
from keras_cc.cc_causal_lm import CCCausalLM
from keras_cc.comparison.costs import inference_cost, machine, own_parameters
from keras_cc.comparison.experiment import UNTUNED, VERSION, Experiment
from keras_cc.comparison.rows import load_rows, spread
from keras_cc.data import augment_with_translation
from keras_cc.evaluation import evaluate, tasks
from keras_cc.evaluation.metrics import first_line
from keras_cc.evaluation.scorer import Scorer
from keras_cc.preprocessing import CCPreprocessor


def run(experiment: Experiment, answers: Any = None, verbose: "int | str" = "auto"):
    """Train one recipe with one seed and score it.

    Args:
        experiment: an `Experiment`.
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
    keras.utils.set_random_seed(experiment.seed)
    task = tasks.get(experiment.task)
    rows = load_rows(experiment)
    causal_lm, tokenizer = presets.load_preset(experiment.model)
    preprocessor = _preprocessor(experiment, causal_lm.preprocessor or tokenizer, rows)
    parameters = {"model": causal_lm.count_params()}
    if experiment.recipe == UNTUNED:
        model, trained = CCCausalLM(causal_lm, None, preprocessor=preprocessor), {}
        model.compile(sampler="greedy")
    else:
        if experiment.train == "lora":
            causal_lm.backbone.enable_lora(experiment.lora_rank)
        elif experiment.train == "blocks":
            causal_lm.backbone.token_embedding.trainable = False
        model = experiment.resolve().model(causal_lm, preprocessor=preprocessor)
        trained = _train(model, experiment, rows, answers, verbose)
    parameters["trained"] = sum(math.prod(v.shape) for v in model.trainable_variables)
    parameters["extra"] = 0 if model.is_mergeable else own_parameters(model)

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
            metric: {language: _floats(values) for language, values in by_language.items()}
            for metric, by_language in result.scores.items()
        },
        "english_perplexity": perplexity,
        "history": {},
        **trained,
        "seconds": seconds,
        "parameters": parameters,
        "inference": inference_cost(model, rows["scored"]),
        "atlas": _atlas(model, rows["scored"], experiment.batch_size, verbose),
        "rows": {
            "train": len(rows["train"]),
            "held_out": len(rows["held_out"]),
            "truncated": model.preprocessor.truncated_count,
        },
        "machine": machine(),
    }


def english_perplexity(scorer: Scorer, rows: Mapping[str, Sequence[Any]], count: int = 64) -> float:
    """Perplexity a token of English prompts, `exp(mean nats)`, in the path that a user gets."""
    texts = list(dict.fromkeys(row["instruction"] for row in rows["en"]))
    ids = [ids for ids in scorer.prompt_ids(spread(texts, count)) if len(ids) > 1]
    intervention = scorer.model.intervention
    reads_pivot = intervention is not None and intervention.needs_pivot
    pivots = [None] * len(ids) if reads_pivot else None  # English rows have none
    found = scorer.log_likelihoods([(text[:1], text[1:]) for text in ids], pivots)
    return math.exp(-sum(one.total for one in found) / sum(one.tokens for one in found))


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
    model.compile(_optimizer(model, experiment, steps), sampler="greedy")
    prepared, began = time.perf_counter() - start, time.perf_counter()
    stop = _StopAfter(steps)
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
    curves = {name: _floats(values) for name, values in history.items()}
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


class _StopAfter(keras.callbacks.Callback):
    """Ends training after so many steps, within an epoch too, and notes where epochs end."""

    def __init__(self, steps):
        super().__init__()
        self._steps, self._done = steps, 0
        self.at_epoch_end = []

    def on_train_batch_end(self, batch, logs=None):
        self._done += 1
        if self._done >= self._steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        self.at_epoch_end.append(self._done)


def _optimizer(model, experiment, steps):
    """AdamW, warmed up and then lowered; the connection may have a rate of its own."""

    def adam(peak):
        warmup = max(1, steps // 10)
        decay = max(1, steps - warmup)
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0, decay, warmup_target=peak, warmup_steps=warmup
        )
        return keras.optimizers.AdamW(schedule, weight_decay=0.0)

    known = adam(experiment.learning_rate)
    if not experiment.connection_learning_rate:
        return known
    new = adam(experiment.connection_learning_rate)
    own = {v.path for layer in model.connection_layers().values() for v in layer.weights}
    return keras.optimizers.MultiOptimizer(lambda variable: new if variable.path in own else known)


def _answers_file(experiment):
    """One for all seeds: before training the model is the same, but for LoRA's first matrices."""
    names = ("model", "task", "data", "languages", "template", "max_length", "train_rows")
    names += ("dev_rows", "score_on", "train", "lora_rank")
    facts = [experiment.config[name] for name in names]
    facts += [experiment.seed] if experiment.train == "lora" else []
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return f"english_answers_{digest}.jsonl"


def _preprocessor(experiment, inner, rows):
    """With room for the longest row, so that nothing is cut; widths are multiples of 8."""
    # A story and its ending are one text, trained on as they are scored.
    template = None if tasks.get(experiment.task).kind == "endings" else experiment.template
    own = CCPreprocessor(inner, template=template)
    every = [*rows["train"], *rows["held_out"], *(r for k in rows["scored"].values() for r in k)]
    augment = None if experiment.recipe == UNTUNED else experiment.resolve().augment
    if augment == "translation":
        every += augment_with_translation(rows["train"], share=experiment.translation_share)
    prompts = own.prompt_ids([row["instruction"] for row in every])
    answers = own.answer_ids([row["output"] for row in every])
    pivots = own.prompt_ids([row.get("instruction_en") or row["instruction"] for row in every])
    longest = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
    if augment == "distillation":  # any answer may come to stand under any prompt
        longest = max(map(len, prompts)) + max(map(len, answers)) + 1
    return CCPreprocessor(
        inner,
        padding="max_length",  # the order of rows, and so the scores, of the cells that there are
        max_length=experiment.max_length or -(-longest // 8) * 8,
        pivot_max_length=-(-max(map(len, pivots)) // 8) * 8,
        template=template,
    )


def _atlas(model, rows, batch_size, verbose):
    """Where the gates stand, on scored rows with a pivot; None where nothing can be seen."""
    targets = [row for language, some in rows.items() if language != "en" for row in some]
    paired = [row for row in targets if row.get("instruction_en")]
    if model.connection is None or not paired:
        return None
    return atlas.gate_atlas(model, paired, batch_size=batch_size, verbose=verbose).to_dict()


def _floats(values):
    return [round(float(value), 6) for value in values]
