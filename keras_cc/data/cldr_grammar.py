"""How a territory's name changes inside a question: articles, cases, particles and verbs.

A language is listed here only when its forms follow from a rule or from a short closed list.
Where they do not (Russian and Greek cases, Basque locatives), the question in
`cldr_templates.py` keeps the name in its dictionary form instead.

Lists are keyed by ISO 3166 territory code, not by name, so they survive a change of CLDR's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable


def _codes(text: str) -> frozenset[str]:
    return frozenset(text.split())


# English: "the Bahamas", "the United States". A state takes a singular verb whatever its name.
_EN_THE = _codes(
    "AE AX BQ BS CC CF CK DO FK FO GB GM IM KM KY MH MP MV NL PH PN PS SB SC TC US VG VI"
)


def _english(code: str, name: str) -> dict[str, str]:
    plural = name.endswith((" Islands", " Territories"))
    return {"the": f"the {name}" if code in _EN_THE else name, "is": "are" if plural else "is"}


# Spanish names take no article, save these and every "Isla(s) ...".
_ES = {
    **dict.fromkeys(_codes("BQ CG EH GB LB"), "el"),
    **dict.fromkeys(_codes("CD CF CX DO GF IM IN NF PF VA"), "la"),
    **dict.fromkeys(_codes("AE NL PS"), "los"),
    **dict.fromkeys(_codes("BM BS KM MV SC"), "las"),
}


def _spanish(code: str, name: str) -> dict[str, str]:
    article = "las" if name.startswith("Islas ") else _ES.get(code, "")
    the = f"{article} {name}".strip()
    of = f"del {name}" if article == "el" else f"de {the}"
    return {"the": the, "of": of, "está": "están" if article in ("los", "las") else "está"}


# French: a final "e" is feminine and everything else masculine, but for these lists.
_FR_NONE = _codes(
    "AD AG AI AW BH BL CU CW CY DJ GG GI GU HT IL JE KI KN LC MC MF MG MS MT MU NR NU OM PM PR RE"
    " SG SH SJ SM ST SX TK TT TV TW VC WF YT"
)
_FR_LE = _codes("BZ CG KH MX MZ SR ZW")
_FR_LA = _codes("GW KP KR MK")
_FR_LES = _codes("AE AS BM BQ BS FJ KM MV NL PH PS PW SC TO US WS")


def _french(code: str, name: str) -> dict[str, str]:
    elided = name[0] in "AEIOUÂÉÎÔ"  # not H (le Honduras, la Hongrie) and not Y (le Yémen)
    if code in _FR_NONE:
        the, of = name, f"d’{name}" if elided else f"de {name}"
    elif code in _FR_LES or name.startswith("Îles "):
        the, of = f"les {name}", f"des {name}"
    elif elided:
        the, of = f"l’{name}", f"de l’{name}"
    elif code in _FR_LA or (name.endswith("e") and code not in _FR_LE):
        the, of = f"la {name}", f"de la {name}"
    else:
        the, of = f"le {name}", f"du {name}"
    return {"the": the, "of": of, "trouve": "trouvent" if the.startswith("les ") else "trouve"}


# Portuguese (Brazil): a final "a" is feminine and everything else masculine, but for these lists.
_PT_NONE = _codes(
    "AD AG AI AO AW BB BD BF BL BN BW BZ CM CU CV CW CY DJ DM FJ GD GG GH GI GP GU HN IL JE KI KN"
    " LC LI LU MA MC ME MF MG MM MS MT MU MZ NR NU OM PM PR PT PW RW SC SG SH SJ SM ST SV SX SZ TK"
    " TL TO TT TV TW UG VC VU WF WS YT"
)
_PT_O = _codes("CD KE KH LK")
_PT_A = _codes("CF CG CI CX DO GN GQ GW IM KP KR MK NF PG RE VA ZA")
_PT_OS = _codes("AE BQ NL PS US")
_PT_AS = _codes("BM BS KM MV PH")


def _portuguese(code: str, name: str) -> dict[str, str]:
    if code in _PT_NONE:
        article = ""
    elif code in _PT_OS:
        article = "os"
    elif code in _PT_AS or name.startswith("Ilhas "):
        article = "as"
    elif code in _PT_A or (name.endswith("a") and code not in _PT_O):
        article = "a"
    else:
        article = "o"
    return {
        "the": f"{article} {name}".strip(),
        "of": f"d{article} {name}" if article else f"de {name}",
        "fica": "ficam" if article in ("os", "as") else "fica",
    }


# German: most names take no article. An adjective after the article loses its strong ending.
_DE = {
    **dict.fromkeys(_codes("IQ IR LB SD SS TD YE"), "der"),
    **dict.fromkeys(_codes("CF CH CX DO EH IM MD MN NF SK TR UA VA"), "die"),
    "GB": "das",
}
_DE_PLURAL = _codes("AE AX BQ BS CC CK FK FO KM KY MH MP MV NL PH PN PS SB SC TC US VG VI")
_DE_ADJECTIVE = re.compile(
    r"\b(Vereinigte|Arabische|Britische|Amerikanische|Nördliche|Karibische|Palästinensische)s?\b"
)


def _german(code: str, name: str) -> dict[str, str]:
    if code in _DE_PLURAL:
        weak = _DE_ADJECTIVE.sub(r"\1n", name)
        return {"the": f"die {weak}", "hat": "haben", "liegt": "liegen"}
    article = _DE.get(code)
    the = f"{article} " + _DE_ADJECTIVE.sub(r"\1", name) if article else name
    return {"the": the, "hat": "hat", "liegt": "liegt"}


# Turkish: the suffix follows the sound, which foreign spelling hides in these names
# (Liechtenstein ends in [ayn], Guadeloupe in [up]) and a soft final l fronts in Nepal, Senegal.
_TR_BY_SOUND = {
    "BL": "nin",
    "CI": "ın",
    "GG": "nin",
    "GP": "un",
    "JE": "nin",
    "LI": "ın",
    "NP": "in",
    "SN": "in",
    "YT": "un",
}
_TR_VOWELS = {
    **dict.fromkeys("aıâãåá", "ı"),
    **dict.fromkeys("eiéèêîí", "i"),
    **dict.fromkeys("ouóôû", "u"),
    **dict.fromkeys("öü", "ü"),
}


def turkish_genitive(name: str, code: str = "") -> str:
    """Adds the Turkish genitive to a proper name: Kenya'nın, Çin'in, Peru'nun, Ürdün'ün.

    The vowel follows the name's last vowel (four-way harmony), an `n` stands between two vowels,
    and an apostrophe sets the suffix off from a proper name.

    Args:
        name: a proper name.
        code: its ISO 3166 code, for the few names that are not said as they are spelled.

    Returns:
        The name with its suffix.

    Raises:
        ValueError: for a name without a vowel.
    """
    if code in _TR_BY_SOUND:
        return f"{name}'{_TR_BY_SOUND[code]}"
    # str.lower() would turn I into i and İ into two characters.
    lowered = name.replace("I", "ı").replace("İ", "i").lower()
    vowel = next((_TR_VOWELS[letter] for letter in reversed(lowered) if letter in _TR_VOWELS), None)
    if vowel is None:
        raise ValueError(f"`name` must contain a vowel. Received: name={name!r}")
    buffer = "n" if lowered[-1] in _TR_VOWELS else ""
    return f"{name}'{buffer}{vowel}n"


_BN_INDEPENDENT_VOWELS = "অআইঈউঊঋএঐওঔ"


def bengali_genitive(name: str) -> str:
    """Adds the Bengali genitive to a name: কেনিয়ার, জাপানের, মালাউইয়ের.

    Args:
        name: a name in the Bengali script.

    Returns:
        The name with র after a vowel sign, য়ের after a full vowel letter, ের after a consonant.
    """
    last = name[-1]
    if "\u09be" <= last <= "\u09cc":  # a dependent vowel sign
        return name + "র"
    return name + ("য়ের" if last in _BN_INDEPENDENT_VOWELS else "ের")


def korean_topic(name: str) -> str:
    """Adds the Korean topic particle: 케냐는, 일본은.

    Args:
        name: a name that ends in a Hangul syllable.

    Returns:
        The name with 은 after a final consonant and 는 after a vowel.
    """
    # A precomposed syllable is 0xAC00 + 28 * (lead and vowel) + final consonant.
    return name + ("은" if (ord(name[-1]) - 0xAC00) % 28 else "는")


def _telugu(code: str, name: str) -> dict[str, str]:
    plural = name.endswith("లు")  # దీవులు, islands: oblique దీవుల, and a plural verb
    oblique = name.removesuffix("ు") if plural else name
    return {"oblique": oblique, "ఉంది": "ఉన్నాయి" if plural else "ఉంది"}


def _urdu(code: str, name: str) -> dict[str, str]:
    # Only a native plural shows its case before a postposition; names do not.
    return {"oblique": re.sub("خطے$", "خطوں", name)}


_FORMS: dict[str, Callable[[str, str], dict[str, str]]] = {
    "bn": lambda code, name: {"genitive": bengali_genitive(name)},
    "de": _german,
    "en": _english,
    "es": _spanish,
    "fr": _french,
    "ko": lambda code, name: {"topic": korean_topic(name)},
    "pt": _portuguese,
    "te": _telugu,
    "tr": lambda code, name: {"genitive": turkish_genitive(name, code)},
    "ur": _urdu,
}


def name_forms(lang: str, code: str, name: str) -> dict[str, str]:
    """Gives the pieces that the templates of `lang` need for one territory.

    Args:
        lang: ISO 639-1 code of the language.
        code: ISO 3166 code of the territory.
        name: the territory's name in that language.

    Returns:
        `name` itself, and the language's inflected forms and agreeing verbs by their key.
    """
    forms = _FORMS.get(lang)
    return {"name": name, **(forms(code, name) if forms else {})}
