"""What is known of languages: names, base languages, and how some of them are written.

Not public. Names are Unicode CLDR's (https://cldr.unicode.org; licence Unicode-3.0), copied so that
nothing needs Babel for them.
"""

import functools
from typing import Any

import langcodes
from langcodes.tag_parser import LanguageTagError

NAMES: dict[str, tuple[str, str]] = {
    "af": ("Afrikaans", "Afrikaans"),
    "am": ("Amharic", "አማርኛ"),
    "ar": ("Arabic", "العربية"),
    "as": ("Assamese", "অসমীয়া"),
    "az": ("Azerbaijani", "azərbaycan"),
    "be": ("Belarusian", "беларуская"),
    "bg": ("Bulgarian", "български"),
    "bn": ("Bengali", "বাংলা"),  # CLDR: "Bangla", by which few data sets call it
    "bs": ("Bosnian", "bosanski"),
    "ca": ("Catalan", "català"),
    "cs": ("Czech", "čeština"),
    "cy": ("Welsh", "Cymraeg"),
    "da": ("Danish", "dansk"),
    "de": ("German", "Deutsch"),
    "el": ("Greek", "Ελληνικά"),
    "en": ("English", "English"),
    "es": ("Spanish", "español"),
    "et": ("Estonian", "eesti"),
    "eu": ("Basque", "euskara"),
    "fa": ("Persian", "فارسی"),
    "fi": ("Finnish", "suomi"),
    "fil": ("Filipino", "Filipino"),
    "fr": ("French", "français"),
    "ga": ("Irish", "Gaeilge"),
    "gl": ("Galician", "galego"),
    "gu": ("Gujarati", "ગુજરાતી"),
    "ha": ("Hausa", "Hausa"),
    "he": ("Hebrew", "עברית"),
    "hi": ("Hindi", "हिन्दी"),
    "hr": ("Croatian", "hrvatski"),
    "ht": ("Haitian Creole", "Kreyòl Ayisyen"),
    "hu": ("Hungarian", "magyar"),
    "hy": ("Armenian", "հայերեն"),
    "id": ("Indonesian", "Indonesia"),
    "ig": ("Igbo", "Igbo"),
    "is": ("Icelandic", "íslenska"),
    "it": ("Italian", "italiano"),
    "ja": ("Japanese", "日本語"),
    "jv": ("Javanese", "Jawa"),
    "ka": ("Georgian", "ქართული"),
    "kk": ("Kazakh", "қазақ тілі"),
    "km": ("Khmer", "ខ្មែរ"),
    "kn": ("Kannada", "ಕನ್ನಡ"),
    "ko": ("Korean", "한국어"),
    "ky": ("Kyrgyz", "кыргызча"),
    "lo": ("Lao", "ລາວ"),
    "lt": ("Lithuanian", "lietuvių"),
    "lv": ("Latvian", "latviešu"),
    "mk": ("Macedonian", "македонски"),
    "ml": ("Malayalam", "മലയാളം"),
    "mn": ("Mongolian", "монгол"),
    "mr": ("Marathi", "मराठी"),
    "ms": ("Malay", "Melayu"),
    "my": ("Burmese", "မြန်မာ"),
    "ne": ("Nepali", "नेपाली"),
    "nl": ("Dutch", "Nederlands"),
    "no": ("Norwegian", "norsk"),
    "or": ("Odia", "ଓଡ଼ିଆ"),
    "pa": ("Punjabi", "ਪੰਜਾਬੀ"),
    "pl": ("Polish", "polski"),
    "ps": ("Pashto", "پښتو"),
    "pt": ("Portuguese", "português"),
    "qu": ("Quechua", "Runasimi"),
    "ro": ("Romanian", "română"),
    "ru": ("Russian", "русский"),
    "si": ("Sinhala", "සිංහල"),
    "sk": ("Slovak", "slovenčina"),
    "sl": ("Slovenian", "slovenščina"),
    "so": ("Somali", "Soomaali"),
    "sq": ("Albanian", "shqip"),
    "sr": ("Serbian", "српски"),
    "sv": ("Swedish", "svenska"),
    "sw": ("Swahili", "Kiswahili"),
    "ta": ("Tamil", "தமிழ்"),
    "te": ("Telugu", "తెలుగు"),
    "tg": ("Tajik", "тоҷикӣ"),
    "th": ("Thai", "ไทย"),
    "tr": ("Turkish", "Türkçe"),
    "uk": ("Ukrainian", "українська"),
    "ur": ("Urdu", "اردو"),
    "uz": ("Uzbek", "o‘zbek"),
    "vi": ("Vietnamese", "Tiếng Việt"),
    "xh": ("Xhosa", "IsiXhosa"),
    "yo": ("Yoruba", "Èdè Yorùbá"),
    "zh": ("Chinese", "中文"),
    "zu": ("Zulu", "isiZulu"),
}
"""A language's code, ISO 639-1 where it has one, to its name in English and in itself."""

_BY_NAME = {name.casefold(): code for code, names in NAMES.items() for name in names}

DOTTED_I = frozenset({"az", "tr"})
"""Languages where I is the capital of ı, and İ of i."""

SPACELESS = frozenset({"ja", "km", "lo", "my", "th", "zh"})
"""Languages that put no space between words, nor between the parts of a sentence."""


def base_language(code: Any) -> str:
    """Gives the language without its region or script, by the code that `NAMES` has it under.

    "pt" of "pt-BR", "por_Latn" and "Portuguese", "sw" of "swh", "" of None.
    """
    return tag(code).split("-")[0]


def is_language(lang: Any, pivot: str) -> bool:
    """Whether a code is the pivot's language or one of its regions: "en-GB" is "en"."""
    lang, pivot = tag(lang), tag(pivot)
    return lang == pivot or lang.startswith(pivot + "-")


def tag(code: Any) -> str:
    """Gives a language's BCP 47 tag in small letters, however the language is called.

    Known are BCP 47 and ISO 639 codes, those of FLORES ("eng_Latn"), and the names of `NAMES`.
    What is none of them stays as it is, but for its letters' size.
    """
    return _tag("" if code is None else str(code).strip())


@functools.lru_cache(maxsize=4096)
def _tag(text: str) -> str:
    if text.casefold() in _BY_NAME:
        return _BY_NAME[text.casefold()]
    try:
        return langcodes.standardize_tag(text, macro=True).lower()
    except LanguageTagError:
        return text.lower().replace("_", "-")


def english_name(code: Any) -> str | None:
    """Gives the English name of a code's base language, `None` where `NAMES` has none."""
    return NAMES.get(base_language(code), (None, None))[0]


# --- letters ---


def lower_i(text: str, language: Any) -> str:
    """Makes I and İ small as the language does; `str.lower` and `casefold` know English alone."""
    if base_language(language) in DOTTED_I:
        text = text.replace("İ", "i").replace("I", "ı")
    return text


def capitalize(word: str, language: Any) -> str:
    """Makes the first letter of a word a capital as the language does, and leaves the others."""
    if word[:1] == "i" and base_language(language) in DOTTED_I:
        return "İ" + word[1:]
    # Title case, not upper case: they differ for "ǆ", and in Georgian.
    return word[:1].title() + word[1:]
