"""Does it help? Benchmarks, their scores, and the intervals around them.

Needs the extra: `pip install "keras-cc[evaluation]"`.
"""

import importlib

from keras_cc.evaluation.scorer import LogLikelihood, Scorer

__all__ = ["LogLikelihood", "Scorer"]

# What needs packages of the extra, by the module that it is in.
_ON_USE: dict[str, str] = {"KerasLM": "keras_cc.evaluation.harness"}


def __getattr__(name):
    if name in _ON_USE:
        return getattr(importlib.import_module(_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
