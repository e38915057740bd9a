"""Benchmarks in local files: what they ask, and how an answer is scored."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keras_cc.data import load_jsonl
from keras_cc.evaluation.metrics import METRICS
from keras_cc.evaluation.stories import ending_row
from keras_cc.evaluation.task_requests import check_answers

KINDS = ("options", "endings", "generate")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a benchmark asks, and how its answers are scored.

    Attributes:
        name: string.
        kind: `"options"` (the likeliest of `options` is the answer), `"endings"` (the likeliest of
            a row's own texts that go on from its prompt is, without a template and a number to
            answer with) or `"generate"` (the first line of a greedy continuation is).
        metrics: names of its scores, the main one first. All are in [0, 1], higher is better.
            Every task has `nll` besides, which is neither.
        options: the options, of kind `"options"`.
        max_new_tokens: int, the most tokens of an answer, of kind `"generate"`.
        folder: name of its folder in the data, None where it is made without one (cldr).
        is_parallel: whether an id is the same item in every language.

    Example:

    ```python
    keras_cc.evaluation.Task("mine", "generate", ("exact_match", "f1"), max_new_tokens=16)
    ```
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

    Example:

    ```python
    keras_cc.evaluation.tasks.get("xnli").options  # ("1", "2", "3")
    ```
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise ValueError(f"`task` must be a Task or one of {sorted(TASKS)}. Received: {task!r}")
    return TASKS[task]


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
        `lang`, `instruction`, `output`, `answers`, and `instruction_en` where there is a pivot. Of
        kind `"endings"` the benchmark's rows are taken apart: the prompts are the story alone, the
        output is the right ending, and `endings` has all.

    Raises:
        FileNotFoundError: where the folder or a language is missing; the message says what is
            there.
        ValueError: where a row lacks a key, or is of another language than its file.

    Example:

    ```python
    keras_cc.evaluation.tasks.load("xnli", "data", "dev", ["en", "tr"])["tr"][0]["instruction"]
    ```
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
    return {language: _read(task, path / f"{language}.jsonl", language) for language in languages}


def _read(task, file, language):
    rows = load_jsonl(file)
    for number, row in enumerate(rows, 1):
        place = f"{file}, row {number}"
        missing = [key for key in ("id", "lang", "answers") if row.get(key) is None]
        if missing:
            raise ValueError(f"{place}: no {missing}. Received: keys {sorted(row)}")
        if row["lang"] != language:
            raise ValueError(f"{place} must be in {language!r}. Received: lang={row['lang']!r}")
        check_answers(row["answers"], place)
        if task.kind == "endings":
            rows[number - 1] = ending_row(row, place)
    return rows


def _cldr(split, languages):
    from keras_cc.data import cldr_rows

    found: dict[str, list[dict[str, Any]]] = {language: [] for language in languages or ()}
    for row in cldr_rows(languages, split="validation" if split == "dev" else split):
        found.setdefault(row["lang"], []).append(row)
    return found
