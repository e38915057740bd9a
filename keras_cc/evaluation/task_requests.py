"""What a benchmark asks of the model: its rows, and the requests to the scorer. Not public."""

import dataclasses
import warnings

from keras_cc.data import pairs
from keras_cc.data.columns import to_columns
from keras_cc.preprocessing.template_tokenizer import TemplateTokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    language: str
    id: str
    name: str
    prompt: str
    gold: str
    answers: list[str]
    pivot: str | None
    options: tuple[str, ...]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Request:
    example: Example
    context: list[int]
    continuation: list[int]
    pivot: list[int] | None


def check_answers(answers, place):
    is_list = isinstance(answers, list | tuple) and len(answers) > 0
    if not is_list or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(
            f"{place}: 'answers' must be a list of strings, at least one. "
            f"Received: answers={answers!r}"
        )
    return list(answers)


def _check_endings(endings, place):
    texts = endings if isinstance(endings, list | tuple) else ()
    texts = {text.strip() for text in texts if isinstance(text, str)} - {""}
    if len(texts) < 2 or len(texts) != len(endings):
        raise ValueError(
            f"{place}: 'endings' must be a list of two or more different texts, each after the "
            "space that belongs before it; `tasks.load` makes such rows of a benchmark's. "
            f"Received: endings={endings!r}"
        )
    return tuple(endings)


def read_examples(task, preprocessor, language, rows):
    of = pairs.columns_of(preprocessor)
    # `to_columns` gives the columns that it is asked for.
    columns = to_columns(rows, list(of.values()))
    names = [f"{language}: {n}" for n in pairs.row_names(columns, of["id_column"], len(rows))]
    prompts = pairs.read_texts(columns, of["instruction_column"], names)
    golds = pairs.read_texts(columns, of["output_column"], names)
    pivots = pairs.read_pivots(
        columns,
        prompts,
        names,
        of["pivot_column"],
        of["lang_column"],
        preprocessor.pivot_language,
    )
    examples = []
    for row, name, prompt, gold, pivot in zip(rows, names, prompts, golds, pivots, strict=True):
        if row.get(of["id_column"]) is None:
            raise ValueError(f"{name}: no {of['id_column']!r}. Received: keys {sorted(row)}")
        answers = check_answers(row.get("answers") or [gold], name)
        options = names = task.options
        if task.kind == "endings":
            options = _check_endings(row.get("endings"), name)
            names = tuple(option.strip() for option in options)
            answers = [answer.strip() for answer in answers]
        if names and not set(answers) <= set(names):
            raise ValueError(
                f"{name}: the answers must be among the options {names}. "
                f"Received: answers={answers!r}"
            )
        id = str(row[of["id_column"]])
        id = id if task.is_parallel else f"{language}/{id}"
        examples.append(Example(language, id, name, prompt, gold, answers, pivot, options, names))
    return examples


# --- likelihoods ---


def gold_requests(preprocessor, examples):
    """Each gold output with its end token, as a training row has it."""
    end = [] if preprocessor.end_token_id is None else [preprocessor.end_token_id]
    golds = preprocessor.answer_ids([example.gold for example in examples])
    requests = [
        Request(example, context, gold + end, pivot)
        for (example, context, pivot), gold in zip(
            _contexts(preprocessor, examples), golds, strict=True
        )
    ]
    long = sum(len(r.context) + len(r.continuation) > preprocessor.max_length for r in requests)
    if long:
        warnings.warn(
            f"{long} of {len(requests)} rows have more tokens than max_length="
            f"{preprocessor.max_length}. They are scored whole; `fit` and `evaluate` of the model "
            "cut such prompts.",
            stacklevel=3,
        )
    return requests


def option_requests(preprocessor, task, examples):
    options = preprocessor.answer_ids(task.options)
    return [
        Request(example, context, option, pivot)
        for example, context, pivot in _contexts(preprocessor, examples)
        for option in options
    ]


def _contexts(preprocessor, examples):
    """Example, ids of its prompt, and ids of its pivot prompt or None, of each."""
    prompts = preprocessor.prompt_ids([example.prompt for example in examples])
    pivots = preprocessor.prompt_ids([example.pivot or "" for example in examples])
    return [
        (example, prompt, pivot if example.pivot else None)
        for example, prompt, pivot in zip(examples, prompts, pivots, strict=True)
    ]


# --- endings ---


def ending_requests(preprocessor, examples, reads_pivot=False):
    plain = TemplateTokenizer(
        preprocessor.preprocessor, None, add_start_token=preprocessor.add_start_token
    )
    requests = []
    for example in examples:
        story = example.prompt
        context, *whole = plain.prompt_ids([story, *(story + e for e in example.options)])
        pivot = None
        if reads_pivot and example.pivot:
            (pivot,) = plain.prompt_ids([example.pivot])
        for ids in whole:
            # Tokens may span the seam: what the ending changed of the story is scored with it.
            same = [one == other for one, other in zip(context, ids, strict=False)]
            seam = max(1, same.index(False) if False in same else len(same))
            requests.append(Request(example, ids[:seam], ids[seam:], pivot))
    return requests
