"""Code-switching: prompts that are partly English, partly the target language, for a curriculum.

Notable choices:

- Draws depend on the seed and the row's place alone, not on the other rows.
- Sentences are aligned line by line, so that a line whose sentences do not match costs that line
  alone, and a difference in one line cannot cancel one in another.
"""

import random
import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from keras_cc.data.languages import capitalize, is_language
from keras_cc.data.lexicon import Lexicon, lexicons_of
from keras_cc.data.pairs import (
    Pair,
    check_rows,
    find_pairs,
    read_text,
)
from keras_cc.options import integer, number

LEVELS: tuple[str, ...] = ("token", "sentence", "monolingual")

# Template fields, tags and links are no words, nor are the markers of options: "(1)", "A.".
_KEPT = r"\{[^{}\n]*\}|<[^<>\s]*>|\[[^\[\]\s]*\]|\w+://\S+|\((?:\w|\d+)\)|^[ \t]*\w[.)](?=\s)"
# A word takes its accents and apostrophes along: "don't" is not "don".
_PART = r"\w[\w\u0300-\u036f]*"
_WORDS = re.compile(rf"(?:{_KEPT})|(?P<word>{_PART}(?:['’]{_PART})*)", re.MULTILINE)

_LINE_END = re.compile(r"(?<=\S)\s*\n\s*")
_CLOSING = "[\"'”’»)\\]」』）]*"
_SENTENCE_END = re.compile(
    rf"(?<!\b\w)[.!?…؟۔]+{_CLOSING}\s+"  # not after one letter: an initial, or "A."
    rf"|[。！？।॥]+{_CLOSING}\s*"
    r"|(?<=\w\w)[.!?؟](?=[^\W\d_a-z])"  # "in 2011.I was": the space is forgotten
)


def code_switch(
    rows: Iterable[Mapping[str, Any]],
    lexicon: Lexicon | Mapping[str, Lexicon] | None = None,
    level: str = "token",
    ratio: float = 0.5,
    seed: int = 0,
    *,
    instruction_column: str = "instruction",
    pivot_column: str = "instruction_en",
    lang_column: str = "lang",
    id_column: str = "id",
    pivot_language: str = "en",
) -> list[dict[str, Any]]:
    """Makes the prompts of paired rows switch between English and their language.

    `"token"`: a share `ratio` of the words of the English prompt that the lexicon knows becomes
    their translation. `"sentence"`: a share `ratio` of the sentences is the target prompt's, the
    others are the English prompt's. `"monolingual"`: the rows as they are. A share of n is n *
    ratio, rounded up or down at random so that it is met on average.

    Args:
        rows: row dicts. Rows in the pivot's language, or without a pivot, pass unchanged.
        lexicon: dict of English words to a translation or a list of some (one is drawn); or, for
            rows in several languages, dict of language codes to such dicts. A word is looked up
            as it stands, then in lower case. Only `"token"` reads it.
        level: `"token"`, `"sentence"` or `"monolingual"`.
        ratio: float from 0 (the English prompt) to 1 (at `"sentence"`, the target prompt).
        seed: int. Draws the words, their translations and the sentences.
        instruction_column: string. Column with the prompt in the target language.
        pivot_column: string. Column with the prompt in English.
        lang_column: string. Column with the language of the instruction.
        id_column: string. Column that messages name a row by (optional in the data).
        pivot_language: string. The pivot's language, `"en"`. `"en-GB"` counts as `"en"`.

    Returns:
        List of dicts, copies of the rows in their order, with a new instruction; every other
        column, pivot and output among them, is kept. Outside the replaced words nothing changes,
        and a translation begins with a capital where its word did. Option markers ("(1)"),
        template fields, tags and links are never replaced.

        Sentences are taken from both prompts in turn, line by line; a line in which the two have
        different numbers of sentences switches as a whole, and so does a prompt in which they
        have different numbers of lines.

    Raises:
        TypeError: where the rows or the lexicon are not dicts, or a text is not a string.
        ValueError: for an unknown level, a ratio outside [0, 1], a lexicon of another form, one
            that does not cover the language of a row, one language's lexicon for rows in
            several, where the lexicon knows no word of any row, and where no row has a pivot.

    Warns:
        UserWarning: how many rows have no word that the lexicon knows (their prompt is plain
            English), how many prompts switch as a whole because their sentences do not match,
            and how many rows pass unchanged for want of a pivot.

    Example:

    ```python
    row = {"instruction": "Kenya'nın para birimi nedir?", "output": "Kenya şilini",
           "instruction_en": "What is the currency of Kenya?", "lang": "tr"}
    lexicon = {"what": "ne", "currency": ["para birimi"]}
    (switched,) = keras_cc.data.code_switch([row], lexicon, ratio=1)
    switched["instruction"]  # "Ne is the para birimi of Kenya?"
    ```

    Source: the levels are those of code-switching curriculum learning, arXiv 2411.02460; words
    replaced from a lexicon are CoSDA-ML's, arXiv 2006.06402.
    """
    if level not in LEVELS:
        raise ValueError(f"`level` must be one of {LEVELS}. Received: level={level!r}")
    ratio, seed = number("ratio", ratio, most=1), integer("seed", seed)
    rows = check_rows(rows)
    result = [dict(row) for row in rows]
    if level == "monolingual":
        return result
    pairs = find_pairs(
        rows,
        instruction_column=instruction_column,
        pivot_column=pivot_column,
        lang_column=lang_column,
        id_column=id_column,
        pivot_language=pivot_language,
    )
    if level == "token":
        prompts = _switch_words(pairs, lexicon, ratio, seed)
    else:
        prompts = _switch_sentences(pairs, ratio, seed)
    unpaired = sum(_lacks_pivot(row, pivot_column, lang_column, pivot_language) for row in rows)
    if unpaired:
        warnings.warn(
            f"{unpaired} of {len(rows)} rows have no {pivot_column!r} and pass unchanged.",
            stacklevel=2,
        )
    for pair, prompt in zip(pairs, prompts, strict=True):
        result[pair.index][instruction_column] = prompt
    return result


def code_switching_curriculum(
    rows: Iterable[Mapping[str, Any]],
    lexicon: Lexicon | Mapping[str, Lexicon],
    ratio: float = 0.5,
    seed: int = 0,
    **columns: str,
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Makes the three stages of code-switching curriculum learning.

    Args:
        rows: row dicts, as for `code_switch`.
        lexicon: as for `code_switch`.
        ratio: float from 0 to 1. Share of words, then of sentences, in the target language.
        seed: int.
        **columns: the column names and `pivot_language` of `code_switch`.

    Returns:
        List of `(level, rows)` in the order to train in: `"token"`, `"sentence"`,
        `"monolingual"`.

    Raises:
        TypeError, ValueError: as `code_switch`.

    Example:

    ```python
    lexicon = {"tr": keras_cc.data.load_lexicon("en-tr.txt")}
    for level, stage in keras_cc.data.code_switching_curriculum(rows, lexicon):
        model.fit(stage, epochs=1)
    ```

    Source: arXiv 2411.02460.
    """
    rows = check_rows(rows)
    return [(level, code_switch(rows, lexicon, level, ratio, seed, **columns)) for level in LEVELS]


def _lacks_pivot(row: Mapping[str, Any], pivot_column: str, lang_column: str, pivot: str) -> bool:
    lang = read_text(row, lang_column, "row")
    return read_text(row, pivot_column, "row") is None and not (lang and is_language(lang, pivot))


def _switch_words(pairs: list[Pair], lexicon: Any, ratio: float, seed: int) -> list[str]:
    lexicons = lexicons_of(pairs, lexicon)
    prompts, unknown = [], 0
    for pair, words in zip(pairs, lexicons, strict=True):
        rng = random.Random(f"{seed}/{pair.index}")
        known = []
        for match in _WORDS.finditer(pair.pivot):
            word = match["word"] or ""
            found = words.get(word) or words.get(word.lower())
            if found:
                translation = found if isinstance(found, str) else rng.choice(found)
                if word[0].isupper():
                    translation = capitalize(translation, pair.lang)
                known.append((match.span(), translation))
        unknown += not known
        chosen = _choose(len(known), ratio, rng)
        pieces, end = [], 0
        for (start, stop), translation in (known[i] for i in chosen):
            pieces += [pair.pivot[end:start], translation]
            end = stop
        prompts.append("".join([*pieces, pair.pivot[end:]]))
    if unknown == len(pairs):
        raise ValueError(
            "`lexicon` knows no word of any row: its keys must be English words, as in the "
            f"prompts. Received: keys {list(lexicons[0])[:5]}, a prompt {pairs[0].pivot[:80]!r}"
        )
    if unknown:
        warnings.warn(
            f"In {unknown} of {len(pairs)} rows nothing is switched, their prompt is plain "
            "English: `lexicon` knows no word of it.",
            stacklevel=3,
        )
    return prompts


def _switch_sentences(pairs: list[Pair], ratio: float, seed: int) -> list[str]:
    prompts, whole = [], 0
    for pair in pairs:
        rng = random.Random(f"{seed}/{pair.index}")
        units = _align(pair.pivot, pair.instruction)
        if len(units) == 1:
            whole += any(len(_sentences(text)) > 1 for text in units[0])
        chosen = set(_choose(len(units), ratio, rng))
        prompts.append("".join(unit[i in chosen] for i, unit in enumerate(units)))
    if whole:
        warnings.warn(
            f"{whole} of {len(pairs)} prompts switch as a whole, being all English or all in "
            "their language: the two prompts have different numbers of lines or sentences.",
            stacklevel=3,
        )
    return prompts


def _align(english: str, target: str) -> list[tuple[str, str]]:
    """Cuts two prompts into matching pieces; either side's put together is its prompt again."""
    lines = [_cut(_LINE_END, text) for text in (english, target)]
    if len(lines[0]) != len(lines[1]):
        return [(english, target)]
    units = []
    for pair in zip(*lines, strict=True):
        sentences = [_cut(_SENTENCE_END, line) for line in pair]
        same = len(sentences[0]) == len(sentences[1])
        units += list(zip(*sentences, strict=True)) if same else [pair]
    return units


def _sentences(text: str) -> list[str]:
    return [part for line in _cut(_LINE_END, text) for part in _cut(_SENTENCE_END, line)]


def _cut(end: re.Pattern[str], text: str) -> list[str]:
    """Cuts behind every match; white space stays with what is before it."""
    ends = [match.end() for match in end.finditer(text)]
    return [text[start:stop] for start, stop in pairwise([0, *ends, len(text)]) if start < stop]


def _choose(count: int, ratio: float, rng: random.Random) -> list[int]:
    size = min(count, int(count * ratio + rng.random()))
    return sorted(rng.sample(range(count), size))
