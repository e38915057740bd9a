"""Readers of paired data, and what feeds it to `fit`."""

from typing import Any

from keras_cc.data.readers import load_jsonl

__all__ = ["cldr_rows", "from_tfds", "load_jsonl"]


def __getattr__(name: str) -> Any:
    # Lazy: these two need packages that the rest of the library does not.
    if name == "cldr_rows":
        from keras_cc.data.cldr import cldr_rows

        return cldr_rows
    if name == "from_tfds":
        from keras_cc.data.readers_tfds import from_tfds

        return from_tfds
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
