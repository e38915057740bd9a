"""A laboratory for the comparison: a tiny model, languages whose truth is known, facts of one.

    KERAS_BACKEND=jax python examples/compare.py --protocol transfer --model demo:laboratory \\
        --task lab_code --languages en xa xb

A cell takes about a minute on two CPU cores. The languages say the same things in other words and
another order, some of the words common; the model, a Llama 3 of 4 layers, 128 wide, has read text
in all of them. `"demo:laboratory"` trains it once and keeps it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from keras_cc.laboratory.corpus import documents as documents
from keras_cc.laboratory.facts import laboratory_rows as laboratory_rows
from keras_cc.laboratory.grammar import LANGUAGES as LANGUAGES
from keras_cc.laboratory.grammar import Language as Language
from keras_cc.laboratory.grammar import languages as languages
from keras_cc.laboratory.grammar import shared_words as shared_words
from keras_cc.laboratory.pretraining import pretrain as pretrain
from keras_cc.laboratory.probe import entity_by_layer as entity_by_layer

if TYPE_CHECKING:
    from keras_cc.laboratory.word_tokenizer import WordTokenizer as WordTokenizer

_ON_USE = ("WordTokenizer",)  # a subclass of KerasHub's


def __getattr__(name: str) -> Any:
    if name == "WordTokenizer":
        return importlib.import_module("keras_cc.laboratory.word_tokenizer").WordTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
