"""Translation-augmented fine-tuning: what a pair of prompts can teach beside the row itself.

Notable choices:

- A made row carries no pivot, so it trains as a plain row among connected ones.
- An English row counts as present by its text, never by its id: where a set is not parallel (the
  items of XL-Sum), the same id is another item, and its answer would be a wrong one.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from keras_cc.data.columns import plain_text
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
from keras_cc.data.pairs import (
    Pair,
    check_names,
    check_rows,
    find_pairs,
    read_text,
)
from keras_cc.options import integer, number


def augment_with_translation(
    rows: Iterable[Mapping[str, Any]],
    english_rows: bool = True,
    directions: str | Iterable[str] = DIRECTIONS,
    share: float = 1.0,
    seed: int = 0,
    *,
    template: str = "Translate into {language}: {text}",
    language_names: Mapping[str, str] | None = None,
    instruction_column: str = "instruction",
    output_column: str = "output",
    pivot_column: str = "instruction_en",
    pivot_output_column: str = "output_en",
    lang_column: str = "lang",
    id_column: str = "id",
    pivot_language: str = "en",
) -> list[dict[str, Any]]:
    """Adds English rows and translation instructions to paired rows, for plain fine-tuning.

    Of each pair (x in language L, p in English, English answer a), with template t:

        pivot:       p                -> a
        to_pivot:    t("English", x)  -> p
        from_pivot:  t(name of L, p)  -> x

    Args:
        rows: row dicts. A row with a pivot in another language than its own is a pair; other rows
            pass unchanged and make nothing.
        english_rows: bool. Whether to add the English row of each distinct prompt and answer. One
            whose prompt is already in the data, as a row without a pivot or in the pivot's
            language, is not added again.
        directions: names, one or several, of `"to_pivot"` and `"from_pivot"`; `()` adds no
            translation instructions.
        share: float in (0, 1]. Share of the distinct pairs that get translation instructions; at
            least one does. A larger share holds the pairs of a smaller one.
        seed: int. Draws the share.
        template: string with `{language}`, the English name of the language translated into (of
            "pt-BR" that of "pt"), and `{text}`.
        language_names: dict from a language's code, as the rows have it, to what `{language}` is to
            say. More than 80 languages have a name without it.
        instruction_column: string. Column with the prompt in the target language.
        output_column: string. Column with the answer; of the made rows too.
        pivot_column: string. Column with the prompt in the pivot language.
        pivot_output_column: string. Column with the answer in the pivot language, optional in the
            data. Where answers are the same in every language, such as option numbers, name
            `output_column` itself.
        lang_column: string. Column with the language of the instruction. `"from_pivot"` needs it.
        id_column: string. Column with the row's id (optional in the data).
        pivot_language: string. The pivot's language, `"en"`. `"en-GB"` counts as `"en"`.

    Returns:
        List of dicts: copies of the rows, then the English rows, then the instructions. A made
        row has instruction, output, `lang` (that of the text in the instruction: the row's own
        under `"to_pivot"`, else the pivot's) and, where the row has one, its id with "/pivot",
        "/to_pivot" or "/from_pivot" behind it.

    Raises:
        TypeError: where the rows or `language_names` are not dicts, or a text is not a string.
        ValueError: for an unknown direction, a share outside (0, 1], a template without its two
            fields, a pair without the language that "from_pivot" names, a language to be named
            that has no name, and where no row is a pair.

    Warns:
        UserWarning: how many English rows are left out because the data has no answer for them,
            and how many pairs because both prompts are the same text.

    Example:

    ```python
    row = {"instruction": "Kenya'nın para birimi nedir?", "output": "Kenya şilini",
           "instruction_en": "What is the currency of Kenya?",
           "output_en": "Kenyan shilling", "lang": "tr", "id": "currency/KE"}
    _, english, to_english, to_turkish = keras_cc.data.augment_with_translation([row])
    english["instruction"]  # "What is the currency of Kenya?"
    to_english["instruction"]  # "Translate into English: Kenya'nın para birimi nedir?"
    to_turkish["instruction"]  # "Translate into Turkish: What is the currency of Kenya?"
    ```

    Source: x-LLaMA, arXiv 2308.04948, and CrossAlpaca, arXiv 2308.14186, which tune on
    translation tasks beside the instructions.
    """
    directions = check_directions(directions)
    if not english_rows and not directions:
        raise ValueError(
            "Nothing to add: ask for `english_rows` or for `directions`. "
            f"Received: english_rows={english_rows!r}, directions={directions!r}"
        )
    share = number("share", share, most=1, positive=True)
    seed = integer("seed", seed)
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
    made: list[Made] = []
    if english_rows:
        paired = {pair.index for pair in pairs}
        alone = (row for i, row in enumerate(rows) if i not in paired)
        present = {plain_text(row.get(instruction_column)) for row in alone}
        made += _english_rows(rows, pairs, present, pivot_output_column, pivot_language)
    if directions:
        drawn = draw(_distinct(pairs), share, seed)
        made += _translations(drawn, directions, fill, pivot_language, names)
    return with_made(
        rows,
        made,
        instruction_column=instruction_column,
        output_column=output_column,
        lang_column=lang_column,
        id_column=id_column,
    )


def _english_rows(
    rows: list[Mapping[str, Any]], pairs: list[Pair], present: set[Any], column: str, language: str
) -> list[Made]:
    made: dict[tuple[str, str], Made] = {}
    unanswered: set[str] = set()
    for pair in pairs:
        if pair.pivot in present:
            continue
        answer = read_text(rows[pair.index], column, pair.name)
        if answer is None:
            unanswered.add(pair.pivot)
        else:
            made.setdefault((pair.pivot, answer), Made(pair, "pivot", language, pair.pivot, answer))
    unanswered -= {pivot for pivot, _ in made}  # answered in the row of another language
    if unanswered:
        warnings.warn(
            f"{len(unanswered)} English rows are left out: the data does not answer their prompts "
            f"in {language!r}. Give the answers in a column {column!r}, or name yours with "
            "`pivot_output_column=` (where answers are the same in every language, the output "
            "column itself); or add the English rows to the data, or pass `english_rows=False`.",
            stacklevel=3,
        )
    return list(made.values())


def _distinct(pairs: list[Pair]) -> list[Pair]:
    """Gives each pair of different prompts once."""
    distinct: dict[tuple, Pair] = {}
    for pair in pairs:
        distinct.setdefault((pair.lang, pair.instruction, pair.pivot), pair)
    pairs = [pair for pair in distinct.values() if pair.instruction != pair.pivot]
    if len(pairs) < len(distinct):
        warnings.warn(
            f"{len(distinct) - len(pairs)} of {len(distinct)} pairs make no translation "
            "instructions: their two prompts are the same text.",
            stacklevel=3,
        )
    return pairs


def _translations(
    pairs: list[Pair],
    directions: tuple[str, ...],
    fill: Callable[[str, str], str],
    pivot_language: str,
    language_names: Mapping[str, str],
) -> list[Made]:
    made: list[Made] = []
    for pair in pairs:
        for direction in directions:
            lang, text, language, output = pair.lang, pair.instruction, pivot_language, pair.pivot
            if direction == "from_pivot":
                lang, text, language, output = pivot_language, pair.pivot, pair.lang, text
            name = name_of(language, pair, language_names)
            made.append(Made(pair, direction, lang, fill(name, text), output))
    return made
