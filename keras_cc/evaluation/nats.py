"""How likely rows' answers are: nats a token, with the pivot at hand or without."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keras_cc.evaluation.scorer import Ids, Scorer

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def texts(rows: Rows, key: str = "output") -> list[Any]:
    """One column of the rows of all languages."""
    return [row[key] for some in rows.values() for row in some]


def by_language(rows: Rows, values: Iterable[Any]) -> dict[str, list[Any]]:
    """Values of the rows of all languages, apart by language again."""
    values = iter(values)
    return {language: [next(values) for _ in some] for language, some in rows.items()}


def answer_ids(scorer: Scorer, answers: Sequence[str]) -> list[list[int]]:
    """Ids of answers, their end token with them."""
    end = scorer.preprocessor.end_token_id
    return [ids + ([] if end is None else [end]) for ids in scorer.answer_ids(answers)]


def pivot_ids(scorer: Scorer, rows: Rows) -> "list[Ids | None] | None":
    """Ids of the rows' pivot prompts, None in English; None where the pass reads no pivot."""
    intervention = scorer.model.intervention
    if not (scorer.connected or (intervention is not None and intervention.needs_pivot)):
        return None
    ids = scorer.prompt_ids(texts(rows, "instruction_en"))
    languages = [language for language, some in rows.items() for _ in some]
    return [None if k == "en" else row for k, row in zip(languages, ids, strict=True)]


def answer_nats(
    scorer: Scorer, rows: Rows, contexts: "Sequence[Ids] | None" = None
) -> dict[str, list[float]]:
    """The negative log-likelihood of each row's answer, nats a token, by language.

        nats = - (1 / n) sum_i log p(answer_i | context, answer_<i),  n with the end token

    Args:
        scorer: a `keras_cc.evaluation.Scorer`: it says which pass.
        rows: from language to row dicts with `instruction`, `output` and, where a pivot is read,
            `instruction_en`.
        contexts: the ids that stand before the answers, or None: the rows' prompts.

    Example:

    ```python
    rows = {"tr": keras_cc.data.cldr_rows(["tr"], split="validation")[:8]}
    nats = keras_cc.evaluation.answer_nats(keras_cc.evaluation.Scorer(model), rows)["tr"]
    ```
    """
    contexts = scorer.prompt_ids(texts(rows, "instruction")) if contexts is None else contexts
    requests = list(zip(contexts, answer_ids(scorer, texts(rows)), strict=True))
    found = scorer.log_likelihoods(requests, pivot_ids(scorer, rows))
    return by_language(rows, [-one.total / one.tokens for one in found])
