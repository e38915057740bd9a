"""What the methods share that make rows of paired rows: options, draws, names, what they append.

Not public. `augment_with_translation` and `cross_lingual_rows` are made of it.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from keras_cc.data.languages import english_name
from keras_cc.data.pairs import Pair

DIRECTIONS: tuple[str, ...] = ("to_pivot", "from_pivot")

T = TypeVar("T")


class Made(NamedTuple):
    """A made row: the pair, what is put behind its id, language, instruction, output."""

    pair: Pair
    kind: str
    lang: str | None
    instruction: str
    output: str


# --- options ---


def check_directions(directions: str | Iterable[str]) -> tuple[str, ...]:
    """Gives `directions`, one or several, as a tuple of known ones."""
    found = (directions,) if isinstance(directions, str) else tuple(directions)
    if any(direction not in DIRECTIONS for direction in found):
        raise ValueError(f"`directions` must be among {DIRECTIONS}. Received: directions={found!r}")
    return found


def filler(template: Any) -> Callable[[str, str], str]:
    """Gives a function of a language's name and a text that puts both into `template`."""
    if not isinstance(template, str) or "{language}" not in template or "{text}" not in template:
        raise ValueError(
            '`template` must be a string with "{language}" and "{text}". '
            f"Received: template={template!r}"
        )
    # One pass: a prompt may itself hold "{text}" or "{language}".
    parts = re.split(r"(\{language\}|\{text\})", template)

    def fill(language: str, text: str) -> str:
        fields = {"{language}": language, "{text}": text}
        return "".join(fields.get(part, part) for part in parts)

    return fill


def check_language_names(language_names: Any) -> dict[str, str]:
    """Gives `language_names` as a dict."""
    if not isinstance(language_names, Mapping | None):
        raise TypeError(
            "`language_names` must be a dict from codes to names. "
            f"Received: language_names={language_names!r}"
        )
    return dict(language_names or {})


# --- rows ---


def draw(items: list[T], share: float, seed: int) -> list[T]:
    """Draws a share of the items, at least one, in their order; a larger share holds a smaller."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    return [items[i] for i in sorted(order[: max(1, round(share * len(order)))])]


def name_of(language: str | None, pair: Pair, language_names: Mapping[str, str]) -> str:
    """Gives the name of a language that an instruction of a pair has to say."""
    if language is None:
        raise ValueError(
            f'{pair.name}: no language, which "from_pivot" has to name. Name its column with '
            '`lang_column=`, or pass `directions="to_pivot"`. Received: lang=None'
        )
    name = language_names.get(language) or english_name(language)
    if name is None:
        raise ValueError(
            f"{pair.name}: the instruction has to name its language, and no English name "
            f"is known of {language!r}. Give it one, `language_names={{{language!r}: "
            f'"..."}}`. Received: language_names={dict(language_names)!r}'
        )
    return name


def with_made(
    rows: Iterable[Mapping[str, Any]],
    made: Iterable[Made],
    *,
    instruction_column: str,
    output_column: str,
    lang_column: str,
    id_column: str,
) -> list[dict[str, Any]]:
    """Gives copies of the rows, and the made ones behind them."""
    result = [dict(row) for row in rows]
    for pair, kind, lang, instruction, output in made:
        row_id = None if pair.id is None else f"{pair.id}/{kind}"
        named = {id_column: row_id, lang_column: lang}
        named = {column: value for column, value in named.items() if value is not None}
        result.append({**named, instruction_column: instruction, output_column: output})
    return result
