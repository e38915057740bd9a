"""Readers of paired data, and what feeds it to `fit`."""

from typing import TYPE_CHECKING, Any

from keras_cc.data.audit import Audit, audit
from keras_cc.data.code_switching import code_switch, code_switching_curriculum
from keras_cc.data.cross_lingual import cross_lingual_rows
from keras_cc.data.invented import invented_rows
from keras_cc.data.lexicon import load_lexicon
from keras_cc.data.readers import load_jsonl
from keras_cc.data.tokenized import TokenizedRows
from keras_cc.data.tokenizing import tokenize
from keras_cc.data.translation import augment_with_translation

# These need packages that the rest of the library does not: imported when they are first used.
if TYPE_CHECKING:
    from keras_cc.data.cldr import cldr_report, cldr_rows
    from keras_cc.data.readers_tfds import from_tfds

__all__ = [
    "Audit",
    "TokenizedRows",
    "audit",
    "augment_with_translation",
    "cldr_report",
    "cldr_rows",
    "code_switch",
    "code_switching_curriculum",
    "cross_lingual_rows",
    "from_tfds",
    "invented_rows",
    "load_jsonl",
    "load_lexicon",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name in ("cldr_report", "cldr_rows"):
        from keras_cc.data import cldr

        return getattr(cldr, name)
    if name == "from_tfds":
        from keras_cc.data.readers_tfds import from_tfds

        return from_tfds
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
