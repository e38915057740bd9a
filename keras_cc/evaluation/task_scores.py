"""The scores of a model on a task.

Notable choices:

- Prompts are put into the model's own template, as in training, and nothing is cut: a row longer
  than `max_length` is scored whole, and a warning counts such rows.
- An option is scored without its end token, as lm-evaluation-harness does; `nll` has it, as the
  training loss does.
- Options as likely as the best one share the point: a model that cannot tell them apart scores
  what guessing does, and not what the order of the options makes of it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_cc.data import pairs
from keras_cc.data.widths import width_of
from keras_cc.evaluation import statistics, tasks
from keras_cc.evaluation.metrics import METRICS, first_line
from keras_cc.evaluation.scorer import Scorer
from keras_cc.evaluation.task_requests import (
    ending_requests,
    gold_requests,
    option_requests,
    read_examples,
)
from keras_cc.evaluation.tasks import Task
from keras_cc.options import count

# Nats. Options that are nearer to each other are as likely: float32 tells no more.
TIE = 1e-5


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The scores of a model on a task, item by item.

    Attributes:
        task: the `Task`.
        items: dict from language to the ids of its items, strings. Where ids do not go across
            languages (`Task.is_parallel`), the language is in them.
        scores: dict from metric, `"nll"` included, to a dict from language to a float64 array
            `(items,)`.
        predictions: dict from language to what the model answered, a string an item; None where
            options are as likely.
    """

    task: Task
    items: dict[str, list[str]]
    scores: dict[str, dict[str, np.ndarray]]
    predictions: dict[str, list[str | None]]

    def mean(self, metric: str | None = None) -> dict[str, float]:
        """The mean of a metric (None: the main one) in each language."""
        return {language: float(found.mean()) for language, found in self._of(metric).items()}

    def interval(self, metric: str | None = None, **options: Any) -> statistics.Interval:
        """The mean of a metric over languages; see `keras_cc.evaluation.statistics.interval`."""
        return statistics.interval(self._of(metric), self.items, **options)

    def _of(self, metric):
        metric = self.task.metric if metric is None else metric
        if metric not in self.scores:
            raise ValueError(
                f"`metric` must be one of {sorted(self.scores)}. Received: metric={metric!r}"
            )
        return self.scores[metric]


def evaluate(
    model: Any,
    task: "str | Task",
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    scorer: Scorer | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    verbose: "int | str" = "auto",
) -> TaskResult:
    """Scores a model on a task, as a user gets it: on its monolingual path.

    - Kind `"options"`: the answer is the option of the largest log-likelihood after the prompt.
      Where n options share it, the gold one among them scores 1/n.
    - Kind `"endings"`: the answer is the one of a row's own `endings` of the largest log-likelihood
      after its prompt, without a template: `accuracy` by the sum over its tokens,
      `accuracy_per_character` by that divided by its length.
    - Kind `"generate"`: the answer is the first line with something in it of what the model
      generates, scored by the task's metrics.
    - Every kind: `nll`, the mean over the gold output's tokens and its end token of `-log p`, under
      the template: a row's own `sft_loss`.

    A pivot is read where the model's intervention needs one, and never otherwise.

    Args:
        model: a `keras_cc.CCCausalLM` with a preprocessor, whose columns are those of the rows;
            for kind `"generate"` compiled with `sampler="greedy"`.
        task: a `Task` or its name.
        rows: dict from language to a list of row dicts, as `tasks.load` gives it. Without a column
            `answers`, the output is the only accepted answer.
        scorer: a `Scorer` of this model, whose compiled function is kept; None makes one.
        batch_size: int, prompts generated at a time, and requests where `scorer` is None.
        max_new_tokens: int, instead of the task's.
        limit: int, the number of rows of each language that are scored, the first ones.
        verbose: 0 for no progress bar.

    Returns:
        A `TaskResult`.

    Raises:
        ValueError: without a preprocessor, for a row that cannot be used (the message names it),
            and for a sampler other than greedy.
        FloatingPointError: where a log-likelihood is not finite.

    Example:

    ```python
    result = evaluate(model, "xnli", tasks.load("xnli", "data", "dev", ["en", "tr"]), limit=100)
    result.mean()  # {"en": 0.41, "tr": 0.35}
    ```

    Source: the harness' "acc" and "acc_norm" (EleutherAI/lm-evaluation-harness); Lin et al. 2022
    (XStoryCloze) and Ponti et al. 2020 (XCOPA).
    """
    task = tasks.get(task)
    scorer = _checked_scorer(model, scorer, batch_size, verbose)
    model, preprocessor = scorer.model, scorer.preprocessor
    for name, value in (("max_new_tokens", max_new_tokens), ("limit", limit)):
        if value is not None:
            count(name, value, least=1)
    max_new_tokens = max_new_tokens or task.max_new_tokens or 40
    if task.kind == "generate":
        _check_greedy(model)
        if scorer.preprocessor is not model.preprocessor:
            raise ValueError(
                "`scorer` must have the model's own preprocessor, which answers are generated "
                f"with. Received: another one, {scorer.preprocessor!r}"
            )
    if not isinstance(rows, Mapping) or not rows:
        raise ValueError(
            "`rows` must be a dict from language to a list of rows, as `tasks.load` gives it. "
            f"Received: {type(rows).__name__}"
        )
    examples = [
        example
        for language, of_language in rows.items()
        for example in read_examples(
            task, preprocessor, language, pairs.check_rows(of_language)[:limit]
        )
    ]
    reads_pivot = model.intervention is not None and model.intervention.needs_pivot
    requests = gold_requests(preprocessor, examples)
    if task.kind == "options":
        requests += option_requests(preprocessor, task, examples)
    elif task.kind == "endings":
        requests += ending_requests(preprocessor, examples, reads_pivot)
    pivots = [request.pivot for request in requests] if reads_pivot else None
    found = scorer.log_likelihoods([(r.context, r.continuation) for r in requests], pivots)
    for request, likelihood in zip(requests, found, strict=True):
        if not math.isfinite(likelihood.total):
            raise FloatingPointError(
                f"{request.example.name}: the log-likelihood of an answer must be finite: are the "
                f"weights? Received: {likelihood}"
            )
    gold, rest = found[: len(examples)], found[len(examples) :]
    scores = {"nll": [-likelihood.total / likelihood.tokens for likelihood in gold]}
    if task.kind == "generate":
        predictions = _generate(scorer, examples, reads_pivot, batch_size, max_new_tokens, verbose)
        for metric in task.metrics:
            scores[metric] = [
                METRICS[metric](prediction, example.answers, example.language)
                for prediction, example in zip(predictions, examples, strict=True)
            ]
    else:
        totals = iter([likelihood.total for likelihood in rest])
        totals = [np.array([next(totals) for _ in example.options]) for example in examples]
        scores["accuracy"], predictions = _choose(totals, examples)
        if "accuracy_per_character" in task.metrics:
            rates = [
                row / [len(name) for name in example.names]
                for row, example in zip(totals, examples, strict=True)
            ]
            scores["accuracy_per_character"], _ = _choose(rates, examples)
    return _result(task, list(rows), examples, scores, predictions)


def _checked_scorer(model, scorer, batch_size, verbose):
    batch_size = count("batch_size", batch_size, least=1)
    if scorer is None:
        scorer = Scorer(model, batch_size=batch_size, verbose=verbose)
    elif model is not scorer.model and model is not scorer.model.causal_lm:
        raise ValueError(
            f"`scorer` must be of this model: make it by Scorer(model). Received: scorer={scorer!r}"
        )
    if scorer.preprocessor is None:
        raise ValueError(
            "`model` needs a preprocessor: set `model.preprocessor = "
            "keras_cc.CCPreprocessor(tokenizer)`. Received: model.preprocessor=None"
        )
    return scorer


def _check_greedy(model):
    import keras_hub  # here and not above: it imports TensorFlow wherever that is installed

    sampler = getattr(model.causal_lm, "sampler", None)
    if not isinstance(sampler, keras_hub.samplers.GreedySampler):
        raise ValueError(
            "Answers must not depend on chance: compile the model with "
            f'`sampler="greedy"`. Received: sampler={sampler!r}'
        )


def _result(task, languages, examples, scores, predictions):
    of = {name: [n for n, e in enumerate(examples) if e.language == name] for name in languages}
    return TaskResult(
        task,
        {name: [examples[n].id for n in numbers] for name, numbers in of.items()},
        {
            metric: {name: np.array(values, "float64")[numbers] for name, numbers in of.items()}
            for metric, values in scores.items()
        },
        {name: [predictions[n] for n in numbers] for name, numbers in of.items()},
    )


# --- answers ---


def _choose(totals, examples):
    """Scores and predictions by the largest total of each example's options."""
    scores, predictions = [], []
    for row, example in zip(totals, examples, strict=True):
        best = [n for n, total in zip(example.names, row, strict=True) if total > row.max() - TIE]
        scores.append(len(set(best) & set(example.answers)) / len(best))
        predictions.append(best[0] if len(best) == 1 else None)
    return scores, predictions


def _generate(scorer, examples, reads_pivot, batch_size, max_new_tokens, verbose):
    """The first line of each greedy continuation."""
    model, preprocessor = scorer.model, scorer.preprocessor
    limit = scorer.max_length or math.inf
    lengths = [len(ids) for ids in preprocessor.prompt_ids([e.prompt for e in examples])]
    order = sorted(range(len(examples)), key=lambda n: -lengths[n])
    progress = keras.utils.Progbar(
        len(order), unit_name="prompt", verbose=1 if verbose == "auto" else int(verbose)
    )
    lines = [""] * len(examples)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        # Every batch is as large, and as long as one of few lengths: little is compiled.
        batch = [examples[n] for n in (numbers + numbers[-1:] * batch_size)[:batch_size]]
        longest = lengths[numbers[0]] + max_new_tokens
        if longest > limit:
            raise ValueError(
                f"{batch[0].name}: the prompt has {lengths[numbers[0]]} tokens and leaves no room "
                f"for {max_new_tokens} more, since the model has {limit} positions: drop the row, "
                f"or lower `max_new_tokens`. Received: max_new_tokens={max_new_tokens}"
            )
        max_length = min(width_of(longest), limit)
        pivots = {"pivot_prompts": [e.pivot for e in batch]} if reads_pivot else {}
        texts = model.generate(
            [e.prompt for e in batch], max_length=max_length, strip_prompt=True, **pivots
        )
        for number, text in zip(numbers, texts, strict=False):
            lines[number] = first_line(_first_tokens(preprocessor, text, max_new_tokens))
        progress.update(first + len(numbers))
    return lines


def _first_tokens(preprocessor, text, count):
    """The text as far as `count` tokens go: shorter prompts of a batch have room for more."""
    (ids,) = preprocessor.answer_ids([text])
    if len(ids) <= count:
        return text
    return preprocessor.detokenize([ids[:count]])[0].rstrip("\ufffd")
