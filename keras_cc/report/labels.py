"""Labels of languages in tables and pictures, and the installed fonts that can draw them.

A language that `keras_cc.data.languages` has no name for is shown by its code, as is one of a
region ("pt-BR"), which may stand beside another.
"""

import functools
import unicodedata

from keras_cc.data.languages import NAMES

_BASE = "DejaVu Sans"  # comes with matplotlib, so it is there on every machine
# Chinese, Japanese and Korean share code points that each writes in its own way.
_REGIONS = {"zh": "SC", "ja": "JP", "ko": "KR"}


def english_name(code: str) -> str:
    """The language's name in English, or the code itself where it is none of `NAMES`."""
    return NAMES.get(code, (code, ""))[0]


def own_name(code: str) -> str:
    """The language's name in itself; empty where it is unknown or the same as in English."""
    english, own = NAMES.get(code, (code, ""))
    return "" if own == english else own


def label(code: str) -> tuple[str, list[str]]:
    """A language's label for a picture, and the font families that draw all of it.

    The own name is left out where no installed font has its letters, so no label ever shows
    boxes in place of letters.

    Args:
        code: ISO 639-1 code, such as `"ar"`.

    Returns:
        `(text, families)`: such as `("Arabic · العربية", ["DejaVu Sans"])`.

    Example:

    ```python
    text, families = label("th")
    axes.set_title(text, fontfamily=families)
    ```
    """
    english, own = english_name(code), own_name(code)
    font = _font(own, _REGIONS.get(code, "")) if own and _can_be_shaped(own) else None
    if font is None:
        return drawable(english)
    families = [_BASE] if font == _BASE else [_BASE, font]
    return f"{english} · {own}", families


def drawable(text: str) -> tuple[str, list[str]]:
    """`text` and the font families that draw it; "?" for letters that no installed font has."""
    font = _font(text)
    if font is None:
        text = text.encode("ascii", "replace").decode()
    return text, [_BASE] if font in (None, _BASE) else [_BASE, font]


def _can_be_shaped(text: str) -> bool:
    """Whether matplotlib joins and orders these letters: all with libraqm (3.11 and later)."""
    from matplotlib import ft2font

    return hasattr(ft2font, "__libraqm_version__") or all(
        unicodedata.bidirectional(letter) == "L" and unicodedata.category(letter)[0] == "L"
        for letter in text
    )


def _font(text: str, region: str = "") -> str | None:
    """The family of an installed font that has all letters of `text`."""
    needed = {ord(letter) for letter in text if not letter.isspace()}
    if needed <= _letters(_base_file()):
        return _BASE
    for name, path in sorted(_fonts(), key=lambda font: _rank(font[0], region)):
        if needed <= _letters(path):
            return name
    return None


def _rank(name: str, region: str):
    return (not (region and name.endswith(f" {region}")), "Sans" not in name, "Mono" in name, name)


@functools.cache
def _fonts() -> tuple[tuple[str, str], ...]:
    """`(family, file)` of the upright regular fonts that matplotlib sees."""
    from matplotlib import font_manager

    return tuple(
        (font.name, font.fname)
        for font in font_manager.fontManager.ttflist
        # "Last Resort" and "Adobe Blank" have every letter: as a box, as nothing.
        if font.style == "normal"
        and font.weight == 400
        and not font.name.startswith(("Last Resort", "Adobe Blank"))
    )


def _base_file() -> str:
    from matplotlib import font_manager

    return font_manager.findfont(_BASE)


@functools.cache
def _letters(path: str) -> frozenset[int]:
    from matplotlib import font_manager

    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # a font that was removed, or that FreeType cannot read
        return frozenset()
