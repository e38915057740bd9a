"""`cldr_qa`, a TensorFlow Datasets builder over `cldr_rows`.

Importing this module registers the builder. Nothing is downloaded: CLDR comes with Babel.

TensorFlow is not needed to build and read it: ask for `file_format="array_record"` and
`tfds.data_source` (`keras_cc.data.from_tfds` does so where TensorFlow is missing).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from keras_cc.data.cldr import LANGUAGES, SPLITS, cldr_rows

try:
    import tensorflow_datasets as tfds
except ImportError as error:
    raise ImportError(
        "The `cldr_qa` builder needs TensorFlow Datasets, which is not installed. "
        'Install it with: pip install "keras-cc[data]". '
        "`keras_cc.data.cldr_rows` gives the same rows without it."
    ) from error


class CldrQa(tfds.core.GeneratorBasedBuilder):
    """Parallel question answering in 21 languages and English, from Unicode CLDR.

    One configuration a language (`cldr_qa/sw`), `cldr_qa/en`, and `cldr_qa/all`: the 21 together,
    without English. Columns and splits are those of `keras_cc.data.cldr_rows`.

    Example:

    ```python
    import tensorflow_datasets as tfds
    import keras_cc.data.cldr_qa

    dataset = tfds.load("cldr_qa/sw", split="train")
    ```

    Source: Unicode CLDR through Babel (Unicode-3.0).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {
        "1.0.0": "Currency, official language and continent of 241 territories."
    }
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name=name, description=f"Languages: {name}.")
        for name in (*LANGUAGES, "en", "all")
    ]

    # Nothing is downloaded, so there is no checksum to look for. (Looking would also import
    # `importlib_resources`, which tensorflow-datasets 4.9.10 does not always install.)
    url_infos: ClassVar[dict[str, Any]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            description=(
                "Questions on the currency, official language and continent of a territory, with "
                "the same question in English. Split by territory."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "relation": text,
                    "lang": text,
                    "instruction": text,
                    "output": text,
                    "instruction_en": text,
                    "answers": tfds.features.Sequence(text),
                }
            ),
            supervised_keys=("instruction", "output"),
            homepage="https://cldr.unicode.org",
            license="Unicode-3.0",
            disable_shuffling=True,  # `cldr_rows` has an order, and `fit` shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        languages = LANGUAGES if config is None or config.name == "all" else config.name
        yield from enumerate(cldr_rows(languages, split=split))
