"""What a benchmark asks of the model: its rows, read, and the requests to the scorer. Not public.

Stories and their endings are taken out of the instructions of XStoryCloze and XCOPA here.
"""

import dataclasses
import re
import warnings

from keras_cc.data import pairs
from keras_cc.data.columns import to_columns
from keras_cc.evaluation.metrics import TURKIC
from keras_cc.tokenization import TemplateTokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    language: str
    id: str
    name: str
    prompt: str
    gold: str
    answers: list[str]
    pivot: str | None

    def endings(self):
        return _story(self.prompt, self.language, self.name)[1:]


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
        options = task.options or (("1", "2") if task.kind == "endings" else ())
        if options and not set(answers) <= set(options):
            raise ValueError(
                f"{name}: the answers must be among the options {options}. "
                f"Received: answers={answers!r}"
            )
        id = str(row[of["id_column"]])
        id = id if task.is_parallel else f"{language}/{id}"
        examples.append(Example(language, id, name, prompt, gold, answers, pivot))
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

_PARTS = re.compile(r"(.+?)\n\(1\)(.+?)\n\(2\)(.+?)\n.*", re.DOTALL)
_QUESTIONS = {"What was the cause?": 0, "What happened as a result?": 1}
_CONNECTORS = {
    "en": ("because", "so"), "et": ("sest", "seetõttu"), "ht": ("poukisa", "donk sa"),
    "id": ("karena", "maka"), "it": ("perché", "quindi"), "qu": ("imataq", "chaymi"),
    "sw": ("kwa sababu", "kwa hiyo"), "ta": ("காரணமாக", "எனவே"), "th": ("เพราะ", "ดังนั้น"),
    "tr": ("çünkü", "bu yüzden"), "vi": ("bởi vì", "vì vậy"), "zh": ("因为", "所以"),
}  # fmt: skip
# Languages that put no space between sentences' parts.
_SPACELESS = ("zh", "ja", "th", "lo", "km", "my")


def _story(instruction, language, name):
    """The story of an instruction, up to where its ending begins, and its two endings.

    XCOPA's question becomes a word, as in lm-evaluation-harness: "The man turned on the tap
    because", "the toilet filled with water."
    """
    match = _PARTS.fullmatch(instruction)
    if match is None:
        raise ValueError(
            f"{name}: the instruction must be a story and then the lines '(1) ...' and '(2) ...', "
            f"with a question after them. Received: instruction={instruction!r}"
        )
    story, *endings = (part.strip() for part in match.groups())
    before, _, question = story.rpartition("\n")
    if question not in _QUESTIONS:
        return story, *endings
    if language not in _CONNECTORS:
        raise ValueError(
            f"{name}: {question!r} can be asked in {sorted(_CONNECTORS)}. "
            f"Received: language={language!r}"
        )
    space = "" if language in _SPACELESS else " "
    story = (
        re.sub(r"[.。!?！？\s]+$", "", before) + space + _CONNECTORS[language][_QUESTIONS[question]]
    )
    return story, *(_lower_first(ending, language) for ending in endings)


def _lower_first(text, language):
    first = text[:1]
    if pairs.base_language(language) in TURKIC:
        first = first.replace("İ", "i").replace("I", "ı")
    return first.lower() + text[1:]


def ending_requests(preprocessor, examples, reads_pivot=False):
    plain = TemplateTokenizer(
        preprocessor.preprocessor, None, add_start_token=preprocessor.add_start_token
    )
    requests = []
    for example in examples:
        story, *endings = _story(example.prompt, example.language, example.name)
        space = "" if example.language in _SPACELESS else " "
        context, *whole = plain.prompt_ids([story, *(story + space + e for e in endings)])
        pivot = None
        if reads_pivot and example.pivot:
            (pivot,) = plain.prompt_ids([_story(example.pivot, "en", example.name)[0]])
        for ids in whole:
            # Tokens may span the seam: what the ending changed of the story is scored with it.
            same = [one == other for one, other in zip(context, ids, strict=False)]
            seam = max(1, same.index(False) if False in same else len(same))
            requests.append(Request(example, ids[:seam], ids[seam:], pivot))
    return requests
