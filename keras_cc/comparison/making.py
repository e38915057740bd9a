"""How a cell's model is made and trained, whatever it is asked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_cc import presets
from keras_cc.calibration import atlas
from keras_cc.cc_causal_lm import CCCausalLM
from keras_cc.comparison.costs import own_parameters
from keras_cc.comparison.experiment import UNTUNED
from keras_cc.comparison.rows import spread
from keras_cc.evaluation.scorer import Scorer
from keras_cc.preprocessing import CCPreprocessor


def make_model(experiment: Any, prepare: Any) -> tuple[CCCausalLM, dict[str, int]]:
    """The model that an experiment trains, and how large it is.

    Args:
        experiment: a `keras_cc.comparison.experiment.Training`.
        prepare: a function from the causal LM's preprocessor or tokenizer to a `CCPreprocessor`.

    Returns:
        `(model, parameters)`; the untuned model is compiled to answer.
    """
    causal_lm, tokenizer = presets.load_preset(experiment.model)
    preprocessor = prepare(causal_lm.preprocessor or tokenizer)
    parameters = {"model": causal_lm.count_params()}
    if experiment.recipe == UNTUNED:
        model = CCCausalLM(causal_lm, None, preprocessor=preprocessor)
        model.compile(sampler="greedy")
    else:
        if experiment.train == "lora":
            causal_lm.backbone.enable_lora(experiment.lora_rank)
        elif experiment.train == "blocks":
            causal_lm.backbone.token_embedding.trainable = False
        model = experiment.resolve().model(causal_lm, preprocessor=preprocessor)
    parameters["trained"] = sum(math.prod(v.shape) for v in model.trainable_variables)
    return model, parameters


def extra_parameters(model: CCCausalLM) -> int:
    """How many numbers are served beside the stock model's."""
    return 0 if model.is_mergeable else own_parameters(model)


def english_perplexity(scorer: Scorer, rows: Mapping[str, Sequence[Any]], count: int = 64) -> float:
    """Perplexity a token of English prompts, `exp(mean nats)`, in the path that a user gets."""
    texts = list(dict.fromkeys(row["instruction"] for row in rows["en"]))
    ids = [ids for ids in scorer.prompt_ids(spread(texts, count)) if len(ids) > 1]
    intervention = scorer.model.intervention
    reads_pivot = intervention is not None and intervention.needs_pivot
    pivots = [None] * len(ids) if reads_pivot else None  # English rows have none
    found = scorer.log_likelihoods([(text[:1], text[1:]) for text in ids], pivots)
    return math.exp(-sum(one.total for one in found) / sum(one.tokens for one in found))


class StopAfter(keras.callbacks.Callback):
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


def optimizer(model, experiment, steps):
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


def with_room(
    inner: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    pivots: Sequence[str],
    template: "str | None",
    max_length: int = 0,
    any_answer: bool = False,
    in_turn: bool = False,
    padding: str = "max_length",
) -> CCPreprocessor:
    """A preprocessor with room for the longest row, so that nothing is cut.

    Args:
        inner: a KerasHub preprocessor or tokenizer.
        prompts, answers: texts of the rows.
        pivots: texts of their pivots.
        template: as `CCPreprocessor` takes.
        max_length: int, or 0: what the rows need, a multiple of 8.
        any_answer: bool, whether any of the answers may come to stand under any prompt.
        in_turn: bool, whether a pivot and an answer to it may come to stand before any prompt.
        padding: as `CCPreprocessor` takes; by default one that keeps the order of rows.
    """
    own = CCPreprocessor(inner, template=template)
    sizes = [list(map(len, own.prompt_ids(prompts))), list(map(len, own.answer_ids(answers)))]
    pivot_length = max(map(len, own.prompt_ids(pivots)))
    longest = max(p + a + 1 for p, a in zip(*sizes, strict=True))
    if any_answer or in_turn:
        longest = sum(map(max, sizes)) + 1
    if in_turn:
        longest += pivot_length + max(sizes[1]) + 1
    return CCPreprocessor(
        inner,
        padding=padding,
        max_length=max_length or -(-longest // 8) * 8,
        pivot_max_length=-(-pivot_length // 8) * 8,
        template=template,
    )


def gates(model, rows, batch_size, verbose):
    """Where the gates stand, on scored rows with a pivot; None where nothing can be seen."""
    targets = [row for language, some in rows.items() if language != "en" for row in some]
    paired = [row for row in targets if row.get("instruction_en")]
    if not isinstance(model.connection, atlas.MEASURED) or not paired:
        return None
    return atlas.gate_atlas(model, paired, batch_size=batch_size, verbose=verbose).to_dict()


def floats(values):
    return [round(float(value), 6) for value in values]
