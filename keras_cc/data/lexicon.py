"""Lexicons: read from a file, checked, and matched to the languages of paired rows."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from keras_cc.data.columns import describe
from keras_cc.data.languages import base_language
from keras_cc.data.pairs import Pair

Lexicon = Mapping[str, str | Sequence[str]]
"""English words and their translations, one or several, in one language."""


def load_lexicon(path: "str | os.PathLike[str]") -> dict[str, tuple[str, ...]]:
    """Reads a bilingual lexicon of two columns, English word and translation, one pair a line.

    Args:
        path: a UTF-8 text file, as MUSE's `en-tr.txt`. The columns stand apart by a tab (then a
            translation may be of several words) or by white space; a word with several
            translations has as many lines.

    Returns:
        Dict of words to tuples of translations, both in file order, repeated pairs once.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for a line without exactly two columns (the message names file and line), for
            bytes that are not UTF-8, and where no line is left.

    Example:

    ```python
    lexicon = keras_cc.data.load_lexicon("en-tr.txt")
    lexicon["dog"]  # ("köpek", "it")
    ```

    Source: the format of MUSE's dictionaries, facebookresearch/MUSE.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`path` must be a text file. Received: path={str(path)!r}")
    lexicon: dict[str, dict[str, None]] = {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: {error}. Received: {line[:80]!r}") from error
            if not text:
                continue
            columns = [
                part.strip() for part in (text.split("\t") if "\t" in text else text.split())
            ]
            if len(columns) != 2 or not all(columns):
                raise ValueError(
                    f"{path}:{number}: not two columns, a word and its translation, apart by a "
                    f"tab or white space. Received: {text[:80]!r}"
                )
            lexicon.setdefault(columns[0], {})[columns[1]] = None
    if not lexicon:
        raise ValueError(f"The lexicon has no line. Received: path={str(path)!r}")
    return {word: tuple(translations) for word, translations in lexicon.items()}


def lexicons_of(pairs: list[Pair], lexicon: Any) -> list[Lexicon]:
    """Gives each pair its lexicon, checked."""
    form = "a dict of English words to translations, or of language codes to such dicts"
    if not isinstance(lexicon, Mapping):
        raise TypeError(f"`lexicon` must be {form}. Received: lexicon={lexicon!r}")
    nested = [isinstance(value, Mapping) for value in lexicon.values()]
    if any(nested) and not all(nested):
        raise ValueError(f"`lexicon` must be {form}, not both. Received: {describe(lexicon)}")
    if not any(nested):
        _check_words("lexicon", lexicon)
        languages = {base_language(pair.lang) for pair in pairs if pair.lang}
        if len(languages) > 1:
            raise ValueError(
                "`lexicon` is of one language, and the rows are in several: pass a dict of "
                f"language codes to lexicons. Received: rows in {sorted(languages)}"
            )
        return [lexicon] * len(pairs)
    for code, words in lexicon.items():
        _check_words(f"lexicon[{code!r}]", words)
    found = []
    for pair in pairs:
        code = next((c for c in (pair.lang, base_language(pair.lang)) if c in lexicon), None)
        if code is None:
            raise ValueError(
                f"{pair.name}: `lexicon` must have the row's language. Add it, drop the row, or "
                "name the column with `lang_column=`. Received: a row in "
                f"{pair.lang!r}, a lexicon of {sorted(map(str, lexicon))}"
            )
        found.append(lexicon[code])
    return found


def _check_words(name: str, words: Mapping[Any, Any]) -> None:
    if not words:
        raise ValueError(f"`{name}` must have at least one word. Received: {name}={words!r}")
    for word, found in words.items():
        options = [found] if isinstance(found, str) else found
        if (
            not isinstance(word, str)
            or not isinstance(options, list | tuple)
            or not options
            or not all(isinstance(option, str) and option.strip() for option in options)
        ):
            raise ValueError(
                f"`{name}` must map a word to its translation, a string or a list of strings. "
                f"Received: {name}[{word!r}]={found!r}"
            )
