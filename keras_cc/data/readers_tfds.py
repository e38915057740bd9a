"""Rows from a TensorFlow Datasets dataset, as plain Python strings."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any, cast


def from_tfds(
    name: str,
    split: str = "train",
    *,
    instruction_column: str = "instruction",
    output_column: str = "output",
    instruction_en_column: str = "instruction_en",
    data_dir: str | None = None,
) -> list[dict[str, Any]]:
    """Reads paired rows from a TensorFlow Datasets dataset, preparing it first where needed.

    Works without TensorFlow too: the dataset is then prepared and read as `array_record` files.
    `"cldr_qa"` and its configurations come with this library and need no download.

    Args:
        name: the dataset as `tfds.load` takes it, such as `"cldr_qa/sw"`.
        split: a split of it, slices included, such as `"train[:100]"`.
        instruction_column: name of the column that holds the prompt in the target language.
        output_column: name of the column that holds the answer.
        instruction_en_column: name of the column that holds the prompt in English.
        data_dir: folder of prepared datasets. `None` takes TensorFlow Datasets' own.

    Returns:
        List of dicts, one a row, in the dataset's order. Every column of strings, or of lists of
        strings, is there under its own name; columns of other types are left out.

    Raises:
        ImportError: if TensorFlow Datasets is not installed.
        ValueError: if one of the three columns is missing or is not of strings, or for an unknown
            split.

    Example:

    ```python
    rows = keras_cc.data.from_tfds("cldr_qa/tr", split="test")
    rows[0]["instruction"], rows[0]["output"]  # strings
    ```
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "`from_tfds` needs TensorFlow Datasets, which is not installed. "
            'Install it with: pip install "keras-cc[data]"'
        ) from error
    if name.split("/")[0].split(":")[0] == "cldr_qa":
        import keras_cc.data.cldr_qa  # noqa: F401  (registers the builder)

    has_tensorflow = importlib.util.find_spec("tensorflow") is not None
    # tfds' own annotations know neither a file format's name nor `split`.
    options: dict[str, Any] = {} if has_tensorflow else {"file_format": "array_record"}
    builder = cast(Any, tfds.builder(name, data_dir=data_dir, **options))
    columns = (instruction_column, output_column, instruction_en_column)
    texts, lists = _string_columns(builder.info.features, tfds)
    _check_columns(name, columns, texts, builder.info.features)
    builder.download_and_prepare()
    known = sorted(builder.info.splits)
    if split.isidentifier() and split not in (*known, "all"):
        raise ValueError(
            f"`split` must be among {known} or a slice of one. Received: split={split!r}"
        )
    if has_tensorflow:
        examples: Iterable[Any] = tfds.as_numpy(builder.as_dataset(split=split))
    else:
        examples = builder.as_data_source(split=split)
    return [
        {column: _as_str(example[column]) for column in (*texts, *lists)} for example in examples
    ]


def _string_columns(features: Any, tfds: Any) -> tuple[list[str], list[str]]:
    """Names the columns of text, and the columns of lists of text."""
    items = features.items() if isinstance(features, tfds.features.FeaturesDict) else ()
    text = tfds.features.Text
    texts = [name for name, feature in items if isinstance(feature, text)]
    lists = [name for name, feature in items if isinstance(getattr(feature, "feature", None), text)]
    return texts, lists


def _check_columns(name: str, columns: tuple[str, ...], texts: list[str], features: Any) -> None:
    missing = [column for column in columns if column not in texts]
    if missing:
        raise ValueError(
            f"The dataset {name!r} must have the string columns {list(columns)}; {missing} are "
            "missing or not strings. Name its own columns with `instruction_column`, "
            f"`output_column` and `instruction_en_column`. Received: features={features!r}"
        )


def _as_str(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value if isinstance(value, str) else [_as_str(item) for item in value]
