import ast
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import keras

from keras_cc import recipes
from keras_cc.evaluation import tasks
from keras_cc.options import count, number
from keras_cc.report.grouping import UNTUNED, VERSION

RATE = "connection_learning_rate"


@dataclasses.dataclass(frozen=True)
class Training:
    """What decides how a cell's model is made and trained, whatever it is asked.

    Attributes:
        recipe: a name in `keras_cc.recipes.names()`, or `"untuned"`.
        options: options of the recipe's connection or objective that differ from its own, as a
            dict.
        finish: `"recipe"`, or `"refit"`: after training, the transforms are also fitted in closed
            form (`CCCausalLM.fit_transform`).
        seed: int, of the rows' order, of connection dropout and of new weights.
        model: a KerasHub preset, or `"demo:"` and a name of `keras_cc.demo`.
        languages: language codes, English among them.
        steps: int, training steps of every recipe alike.
        batch_size: int, rows a step.
        learning_rate: float, the peak: a tenth of the steps up to it, then a cosine down to 0.
        connection_learning_rate: float, the peak for the connection's own weights, which start from
            nothing (its gates, transforms, selectors); 0: `learning_rate`.
        train: what is trained beside the connection: `"all"` weights, `"blocks"` (all but the
            token embedding, which is most of a small multilingual model), or `"lora"`.
        lora_rank: int, of `"lora"`.
        max_length: int, tokens of a row; 0 for the longest there is among the rows.
        template: as `CCPreprocessor` takes; tasks of kind `"endings"` have none.
    """

    recipe: str = "sft"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    finish: str = "recipe"
    seed: int = 0
    model: str = "demo:gemma3_270m"
    languages: tuple[str, ...] = ("en", "tr", "sw", "id")
    steps: int = 0
    batch_size: int = 8
    learning_rate: float = 3e-5
    connection_learning_rate: float = 0.0
    train: str = "blocks"
    lora_rank: int = 8
    max_length: int = 0
    template: str | None = "{instruction}\n"

    _choices: ClassVar = {"finish": ("recipe", "refit"), "train": ("all", "blocks", "lora")}
    #: Fields that change nothing where nothing is trained.
    _of_training: ClassVar = (
        "options",
        "finish",
        "seed",
        "steps",
        "batch_size",
        "learning_rate",
        "connection_learning_rate",
        "train",
        "lora_rank",
    )

    def __post_init__(self) -> None:
        if self.recipe != UNTUNED:
            recipe = self.resolve()  # the recipe is known, and its parts take the options
            connection = recipe.connection and recipe.connection()
            if self.finish == "refit" and getattr(connection, "transform", None) != "linear":
                raise ValueError(
                    "`finish` can be 'refit' for a connection with transform='linear' alone, which "
                    f"has a closed form. Received: recipe={self.recipe!r}, connection={connection}"
                )
            if number(RATE, self.connection_learning_rate) and connection is None:
                raise ValueError(
                    f"`{RATE}` must be 0 for a recipe without a connection. "
                    f"Received: {self.connection_learning_rate} for {self.recipe!r}"
                )
        count("steps", self.steps)
        if "en" not in self.languages or len(set(self.languages)) < len(self.languages):
            raise ValueError(
                '`languages` must hold "en", which all are measured against, and each language '
                f"once. Received: languages={self.languages}"
            )
        for name, values in self._choices.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`{name}` must be one of {values}. Received: {name}={getattr(self, name)!r}"
                )

    @classmethod
    def parse(cls, method: str, **settings: Any) -> Self:
        """From a method written as its name is: `"cc dropout=0.9 layers=[4,5] refit"`.

        `connection_learning_rate=1e-3` may stand among a method's options too.
        """
        recipe, *words = method.split()
        options, finish = {}, "recipe"
        for word in words:
            key, is_option, value = word.partition("=")
            if is_option:
                try:
                    options[key] = ast.literal_eval(value)
                except (ValueError, SyntaxError):
                    options[key] = value
            elif word == "refit":
                finish = "refit"
            else:
                raise ValueError(
                    "`method` must be a recipe, then options as name=value without spaces, then "
                    f'maybe "refit". Received: {method!r}'
                )
        if RATE in options:
            settings[RATE] = options.pop(RATE)
        return cls(recipe=recipe, options=options, finish=finish, **settings)

    def resolve(self) -> recipes.Recipe:
        """The recipe, its connection and objectives with this experiment's options."""
        return recipes.get(self.recipe).with_options(self.options)

    @property
    def name(self) -> str:
        """The recipe, and what differs from it."""
        changes = [f"{key}={value}" for key, value in self.options.items()]
        if self.connection_learning_rate:
            changes.append(f"{RATE}={self.connection_learning_rate}")
        return " ".join([self.recipe, *changes, *(["refit"] if self.finish == "refit" else [])])

    @property
    def config(self) -> dict[str, Any]:
        """The attributes as JSON has them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def key(self) -> str:
        """16 hex digits that stand for the whole configuration, a recipe's defaults included."""
        facts = {
            "version": VERSION,
            "backend": keras.backend.backend(),
            **self._own_facts(),
            **self.config,
        }
        if self.recipe == UNTUNED:  # nothing is trained
            facts = {name: value for name, value in facts.items() if name not in self._of_training}
        else:
            recipe = self.resolve()
            facts["made_of"] = [
                repr(recipe.connection and recipe.connection()),
                repr(recipe.objectives()),
                repr(recipe.intervention and recipe.intervention()),
                recipe.augment,
                recipe.fits,
            ]
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _own_facts(self) -> dict[str, Any]:
        """What the key stands for beside the attributes."""
        return {}


@dataclasses.dataclass(frozen=True)
class Experiment(Training):
    """Everything that decides a cell of a comparison.

    Attributes:
        task: a name of `keras_cc.evaluation.tasks.TASKS`.
        data: folder with `train` and `dev`, as `keras_cc.evaluation.tasks.load` reads; None for
            a task that needs none (`"cldr"`).
        train_rows: int, rows a language to train on, evenly spaced; 0 takes all.
        dev_rows: int, rows a language that are scored; 0 takes all.
        score_on: `"dev"`, or `"held_out"`: the last fifth of the training ids, to choose by.
        epochs: int, passes over the rows; a recipe that makes more rows of them, or whose objective
            takes turns with the task, trains longer. Where `steps` is not 0, as many as those take.
        translation_share: float, of `keras_cc.data.augment_with_translation`.

    The others are those of `Training`.
    """

    task: str = "cldr"
    data: str | None = None
    train_rows: int = 0
    dev_rows: int = 0
    score_on: str = "dev"
    epochs: int = 1
    translation_share: float = 1.0

    _choices: ClassVar = {**Training._choices, "score_on": ("dev", "held_out")}
    _of_training: ClassVar = (*Training._of_training, "train_rows", "epochs", "translation_share")

    def __post_init__(self) -> None:
        super().__post_init__()
        tasks.get(self.task)

    def _own_facts(self) -> dict[str, Any]:
        return {"data_digest": _data_digest(self.task, self.data, tuple(self.languages))}


def _data_digest(task, folder, languages):
    """Of the rows' files, as they are; None where there are none."""
    name = tasks.get(task).folder
    return None if name is None or folder is None else file_digests(folder, name, languages)


def file_digests(path: str, name: str, languages: Sequence[str]) -> list[str]:
    """Of a file's content, or of those of a task in a folder."""
    root = pathlib.Path(path)
    files = [
        root / split / name / f"{language}.jsonl"
        for split in ("train", "dev")
        for language in languages
    ]
    files = [root] if root.is_file() else [file for file in files if file.exists()]
    return [_file_digest(file, file.stat().st_mtime_ns) for file in files]


@functools.lru_cache(maxsize=1024)
def _file_digest(file, _modified):
    return hashlib.sha256(file.read_bytes()).hexdigest()
