"""Benchmarks in local files: what they ask, how an answer is scored, and the scores of a model.

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
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_cc.data import load_jsonl, pairs
from keras_cc.evaluation import statistics
from keras_cc.evaluation.metrics import METRICS, first_line
from keras_cc.evaluation.scorer import Scorer, width_of
from keras_cc.evaluation.task_requests import (
    check_answers,
    ending_requests,
    gold_requests,
    option_requests,
    read_examples,
)

KINDS = ("options", "endings", "generate")

# Nats. Options that are nearer to each other are as likely: float32 tells no more.
TIE = 1e-5


@dataclasses.dataclass(frozen=True)
class Task:
    """What a benchmark asks, and how its answers are scored.

    Attributes:
        name: string.
        kind: `"options"` (the likeliest of `options` is the answer), `"endings"` (the likelier of
            two texts is, for models that were not tuned to answer with an option) or
            `"generate"` (the first line of a greedy continuation is).
        metrics: names of its scores, the main one first. All are in [0, 1], higher is better.
            Every task has `nll` besides, which is neither.
        options: the options, of kind `"options"`.
        max_new_tokens: int, the most tokens of an answer, of kind `"generate"`.
        folder: name of its folder in the data, None where it is made without one (cldr).
        is_parallel: whether an id is the same item in every language.

    Example: `Task("mine", "generate", ("exact_match", "f1"), max_new_tokens=16)`
    """

    name: str
    kind: str
    metrics: tuple[str, ...]
    options: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    folder: str | None = None
    is_parallel: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}. Received: kind={self.kind!r}")
        known = {
            "options": {"accuracy"},
            "endings": {"accuracy", "accuracy_per_character"},
            "generate": set(METRICS),
        }[self.kind]
        if not self.metrics or not set(self.metrics) <= known:
            raise ValueError(
                f"`metrics` of kind {self.kind!r} must be some of {sorted(known)}. "
                f"Received: metrics={self.metrics!r}"
            )
        if (self.kind == "options") != (len(set(self.options)) > 1):
            raise ValueError(
                "`options` must be two or more, of kind 'options' alone. "
                f"Received: kind={self.kind!r}, options={self.options!r}"
            )

    @property
    def metric(self) -> str:
        """The main metric."""
        return self.metrics[0]


def _endings(name: str) -> Task:
    metrics = ("accuracy", "accuracy_per_character")
    return Task(f"{name}_endings", "endings", metrics, folder=name)


_TASKS = (
    Task("xnli", "options", ("accuracy",), ("1", "2", "3"), folder="xnli"),
    Task("xstorycloze", "options", ("accuracy",), ("1", "2"), folder="xstorycloze"),
    Task("mmmlu", "options", ("accuracy",), ("A", "B", "C", "D"), folder="mmmlu"),
    Task("xcopa", "options", ("accuracy",), ("1", "2"), folder="xcopa"),
    _endings("xstorycloze"),
    _endings("xcopa"),
    # The authors generate 40 tokens. A sentence needs more where a word is several tokens.
    Task("xquad", "generate", ("exact_match", "f1", "contains"), (), 40, "xquad"),
    Task("mkqa", "generate", ("exact_match", "f1"), (), 40, "mkqa"),
    Task("xlsum", "generate", ("rouge_l",), (), 128, "xlsum", is_parallel=False),
    Task("mgsm", "generate", ("number",), (), 128, "mgsm"),
    Task("cldr", "generate", ("exact_match", "f1"), (), 40),
)

TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
"""The benchmarks, by name."""


def get(task: "str | Task") -> Task:
    """Returns the `Task` that a name stands for.

    Raises:
        ValueError: for an unknown name.

    Example: `get("xnli").options  # ("1", "2", "3")`
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"`task` must be a Task or one of {sorted(TASKS)}. Received: {task!r}")
    return TASKS[task]


# --- rows ---


def load(
    task: "str | Task",
    folder: "str | os.PathLike[str] | None",
    split: str = "dev",
    languages: Sequence[str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Reads the rows of a task: the files `folder/split/TASK/LANGUAGE.jsonl`.

    Args:
        task: a `Task` or its name. The rows of `"cldr"` come from `keras_cc.data.cldr_rows`,
            which needs no folder; `"dev"` is its split `"validation"`.
        folder: the folder of the data, not used for `"cldr"`.
        split: `"train"` or `"dev"`.
        languages: list of codes; None takes all that are there.

    Returns:
        Dict from language to its rows, in the order of `languages`. A row has the keys `id`,
        `lang`, `instruction`, `output`, `answers`, and `instruction_en` where there is a pivot.

    Raises:
        FileNotFoundError: where the folder or a language is missing; the message says what is
            there.
        ValueError: where a row lacks a key, or is of another language than its file.

    Example: `load("xnli", "data", "dev", ["en", "tr"])["tr"][0]["instruction"]`
    """
    task = get(task)
    if isinstance(languages, str):
        raise TypeError(f"`languages` must be a list of codes. Received: languages={languages!r}")
    if task.folder is None:
        return _cldr(split, languages)
    if folder is None:
        raise ValueError(f"`folder` must be given for {task.name!r}. Received: folder=None")
    path = Path(folder) / split / task.folder
    known = sorted(file.stem for file in path.glob("*.jsonl"))
    if not known:
        there = sorted(file.parent.name for file in path.parent.parent.glob("*/*/*.jsonl"))
        raise FileNotFoundError(
            f"No data of {task.name!r}: `folder` must have {split}/{task.folder}/LANGUAGE.jsonl in "
            f"it. It has the tasks {sorted(set(there))}. Received: folder={str(folder)!r}"
        )
    languages = known if languages is None else list(languages)
    missing = [language for language in languages if language not in known]
    if missing or not languages:
        raise FileNotFoundError(
            f"`languages` of {task.name!r} must be some of {known}, the files of {path}. "
            f"Received: languages={languages}, of which {missing} are missing"
        )
    return {language: _read(path / f"{language}.jsonl", language) for language in languages}


def _read(file, language):
    rows = load_jsonl(file)
    for number, row in enumerate(rows, 1):
        place = f"{file}, row {number}"
        missing = [key for key in ("id", "lang", "answers") if row.get(key) is None]
        if missing:
            raise ValueError(f"{place}: no {missing}. Received: keys {sorted(row)}")
        if row["lang"] != language:
            raise ValueError(f"{place} must be in {language!r}. Received: lang={row['lang']!r}")
        check_answers(row["answers"], place)
    return rows


def _cldr(split, languages):
    from keras_cc.data import cldr_rows

    found: dict[str, list[dict[str, Any]]] = {language: [] for language in languages or ()}
    for row in cldr_rows(languages, split="validation" if split == "dev" else split):
        found.setdefault(row["lang"], []).append(row)
    return found


# --- scores ---


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
    - Kind `"endings"`: the instruction is taken apart into story and two endings. The answer is
      the ending of the larger log-likelihood after the story, without a template: `accuracy` by
      the sum over its tokens, `accuracy_per_character` by that divided by its length.
    - Kind `"generate"`: the answer is the first line with something in it of what the model
      generates, scored by the task's metrics.
    - Every kind: `nll`, the mean over the gold output's tokens and its end token of `-log p`, under
      the template: a row's own `sft_loss`.

    A pivot is read where the model's intervention needs one, and never otherwise.

    Args:
        model: a `keras_cc.CCCausalLM` with a preprocessor, whose columns are those of the rows;
            for kind `"generate"` compiled with `sampler="greedy"`.
        task: a `Task` or its name.
        rows: dict from language to a list of row dicts, as `load` gives it. Without a column
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
    result = evaluate(model, "xnli", load("xnli", "data", "dev", ["en", "tr"]), limit=100)
    result.mean()  # {"en": 0.41, "tr": 0.35}
    ```

    Source: the harness' "acc" and "acc_norm" (EleutherAI/lm-evaluation-harness); Lin et al. 2022
    (XStoryCloze) and Ponti et al. 2020 (XCOPA).
    """
    task = get(task)
    scorer = _checked_scorer(model, scorer, batch_size, verbose)
    model, preprocessor = scorer.model, scorer.preprocessor
    for name, value in (("max_new_tokens", max_new_tokens), ("limit", limit)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
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
            "`rows` must be a dict from language to a list of rows, as `load` gives it. "
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
        totals = np.array([likelihood.total for likelihood in rest]).reshape(len(examples), -1)
        names = task.options or ("1", "2")
        scores["accuracy"], predictions = _choose(totals, names, examples)
        if "accuracy_per_character" in task.metrics:
            lengths = np.array([[len(text) for text in example.endings()] for example in examples])
            scores["accuracy_per_character"], _ = _choose(totals / lengths, names, examples)
    return _result(task, list(rows), examples, scores, predictions)


def _checked_scorer(model, scorer, batch_size, verbose):
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}"
        )
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


def _choose(totals, names, examples):
    """Scores and predictions by the largest of each row of `(examples, options)`."""
    scores, predictions = [], []
    for row, example in zip(totals, examples, strict=True):
        best = [name for name, total in zip(names, row, strict=True) if total > row.max() - TIE]
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
