"""Readers of paired data, and what feeds it to `fit`."""

from typing import Any

from keras_cc.data.readers import load_jsonl

__all__ = ["cldr_report", "cldr_rows", "from_tfds", "load_jsonl"]


def __getattr__(name: str) -> Any:
    # Lazy: these need packages that the rest of the library does not.
    if name in ("cldr_report", "cldr_rows"):
        from keras_cc.data import cldr

        return getattr(cldr, name)
    if name == "from_tfds":
        from keras_cc.data.readers_tfds import from_tfds

        return from_tfds
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
