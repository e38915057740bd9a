"""Cross-lingual fine-tuning: a prompt in one language, its answer in the other.

Notable choices:

- A made row says which language its answer is to be in; an unmarked prompt is answered in its own.
- An English answer may stand beside the pair or under the same prompt in an English row of the
  data. It is found by that text and never by an id, as `augment_with_translation` does.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from keras_cc.data.languages import is_language
from keras_cc.data.made_rows import (
    DIRECTIONS,
    Made,
    check_directions,
    check_language_names,
    draw,
    filler,
    name_of,
    with_made,
)
from keras_cc.data.pairs import Pair, check_names, check_rows, find_pairs, read_text
from keras_cc.options import integer, number


def cross_lingual_rows(
    rows: Iterable[Mapping[str, Any]],
    directions: str | Iterable[str] = DIRECTIONS,
    share: float = 1.0,
    seed: int = 0,
    *,
    template: str = "{text} ({language})",
    language_names: Mapping[str, str] | None = None,
    instruction_column: str = "instruction",
    output_column: str = "output",
    pivot_column: str = "instruction_en",
    pivot_output_column: str = "output_en",
    lang_column: str = "lang",
    id_column: str = "id",
    pivot_language: str = "en",
) -> list[dict[str, Any]]:
    """Adds rows whose answer is in another language than their prompt, marked by its name.

    Of each pair (x in language L with the answer y, p in English with the answer a), with the
    marking template t:

        to_pivot:    t("English", x)  -> a
        from_pivot:  t(name of L, p)  -> y

    So a fact that is told in one language is asked for in the other, and what the answer says is
    apart from the language that it is said in.

    Args:
        rows: row dicts. A row with a pivot in another language than its own is a pair; other rows
            pass unchanged and make nothing.
        directions: names, one or several, of `"to_pivot"` and `"from_pivot"`.
        share: float in (0, 1]. Share of the distinct pairs that make rows; at least one does. A
            larger share holds the pairs of a smaller one.
        seed: int. Draws the share.
        template: string with `{text}`, the prompt, and `{language}`, the English name of the
            answer's language (of "pt-BR" that of "pt").
        language_names: dict from a language's code, as the rows have it, to what `{language}` is to
            say. More than 80 languages have a name without it.
        instruction_column: string. Column with the prompt in the target language.
        output_column: string. Column with the answer; of the made rows too.
        pivot_column: string. Column with the prompt in the pivot language.
        pivot_output_column: string. Column with the answer in the pivot language. Where a row has
            none, the answer of a row of the data in the pivot's language with the same prompt is
            taken.
        lang_column: string. Column with the language of the instruction. `"from_pivot"` needs it.
        id_column: string. Column with the row's id (optional in the data).
        pivot_language: string. The pivot's language, `"en"`. `"en-GB"` counts as `"en"`.

    Returns:
        List of dicts: copies of the rows, then the made ones, which are plain rows without a
        pivot: instruction, output, `lang` (that of the prompt) and, where the row has one, its id
        with "/to_pivot" or "/from_pivot" behind it.

    Raises:
        TypeError: where the rows or `language_names` are not dicts, or a text is not a string.
        ValueError: for no or an unknown direction, a share outside (0, 1], a template without its
            two fields, a pair without the language that "from_pivot" names, a language to be named
            that has no name, where no row is a pair, and where no pair has an answer to be given.

    Warns:
        UserWarning: how many pairs make no rows in a direction, because the answer that it gives
            is not in the data.

    Example:

    ```python
    row = {"instruction": "Kenya'nın para birimi nedir?", "output": "Kenya şilini",
           "instruction_en": "What is the currency of Kenya?",
           "output_en": "Kenyan shilling", "lang": "tr"}
    _, to_english, to_turkish = keras_cc.data.cross_lingual_rows([row])
    to_english["instruction"]  # "Kenya'nın para birimi nedir? (English)"
    to_english["output"]  # "Kenyan shilling"
    to_turkish["instruction"]  # "What is the currency of Kenya? (Turkish)"
    to_turkish["output"]  # "Kenya şilini"
    ```

    Source: the x2en and en2x rows of CrossIn, arXiv 2404.11932. The marker is ours.
    """
    directions = check_directions(directions)
    if not directions:
        raise ValueError(
            f"`directions` must name at least one of {DIRECTIONS}. Received: directions=()"
        )
    share, seed = number("share", share, most=1, positive=True), integer("seed", seed)
    fill, names = filler(template), check_language_names(language_names)
    check_names(output_column=output_column, pivot_output_column=pivot_output_column)
    rows = check_rows(rows)
    pairs = find_pairs(
        rows,
        instruction_column=instruction_column,
        pivot_column=pivot_column,
        lang_column=lang_column,
        id_column=id_column,
        pivot_language=pivot_language,
    )
    english = _pivot_answers(rows, instruction_column, output_column, lang_column, pivot_language)
    distinct: dict[tuple, Answered] = {}
    for pair in pairs:
        row = rows[pair.index]
        own = read_text(row, output_column, pair.name)
        other = read_text(row, pivot_output_column, pair.name) or english.get(pair.pivot)
        answers = {"to_pivot": other, "from_pivot": own}
        distinct.setdefault((pair.lang, pair.instruction, pair.pivot, own, other), (pair, answers))
    lacking = {"to_pivot": pivot_output_column, "from_pivot": output_column}
    known = _answered(list(distinct.values()), {name: lacking[name] for name in directions})
    made: dict[tuple, Made] = {}
    for pair, answers in draw(known, share, seed):
        for direction in directions:
            answer = answers[direction]
            if answer is None:
                continue
            lang, text, language = pair.lang, pair.instruction, pivot_language
            if direction == "from_pivot":
                lang, text, language = pivot_language, pair.pivot, pair.lang
            marked = fill(name_of(language, pair, names), text)
            made.setdefault((lang, marked, answer), Made(pair, direction, lang, marked, answer))
    return with_made(
        rows,
        made.values(),
        instruction_column=instruction_column,
        output_column=output_column,
        lang_column=lang_column,
        id_column=id_column,
    )


Answered = tuple[Pair, dict[str, str | None]]
"""A pair, and by direction the answer that it gives there."""


def _pivot_answers(
    rows: list[Mapping[str, Any]],
    instruction_column: str,
    output_column: str,
    lang_column: str,
    pivot_language: str,
) -> dict[str, str]:
    """From a prompt to its answer, of the rows in the pivot's language; the first one counts."""
    found: dict[str, str] = {}
    for i, row in enumerate(rows):
        if is_language(read_text(row, lang_column, f"row {i}"), pivot_language):
            prompt, answer = (
                read_text(row, column, f"row {i}") for column in (instruction_column, output_column)
            )
            if prompt is not None and answer is not None:
                found.setdefault(prompt, answer)
    return found


def _answered(pairs: list[Answered], columns: Mapping[str, str]) -> list[Answered]:
    """The pairs that have an answer to be given; what is lacking is counted and said.

    `columns` has the directions, and the column that the answer of each stands in.
    """
    known = [one for one in pairs if any(one[1][direction] for direction in columns)]
    if not known:
        raise ValueError(
            f"No pair has an answer to be given: none in {' or '.join(map(repr, columns.values()))}"
            ", nor in a row in the pivot's language with the same prompt. Name your columns with "
            "`pivot_output_column=`, `output_column=` (where answers are the same in every "
            f"language, the same column). Received: {len(pairs)} pairs, directions={[*columns]}"
        )
    for direction, column in columns.items():
        missing = sum(answers[direction] is None for _, answers in pairs)
        if missing:
            nowhere = ", and no row in the pivot's language answers their prompt"
            warnings.warn(
                f'{missing} of {len(pairs)} pairs make no "{direction}" row: they have no '
                f"{column!r}{nowhere if direction == 'to_pivot' else ''}.",
                stacklevel=3,
            )
    return known
