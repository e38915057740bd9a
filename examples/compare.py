"""Which method serves my languages best? Recipes x seeds, trained, scored, and put side by side.

    KERAS_BACKEND=jax python examples/compare.py
    KERAS_BACKEND=jax python examples/compare.py --task xnli --data FOLDER --languages en tr ar \
        --methods sft cc "cc dropout=0.9" cc_published --seeds 0 1 2

Every cell is kept as soon as it is whole: killed, the command goes on where it was. At the end
come a table, pictures and one HTML page, in the output folder. A method is a recipe's name
(RECIPES.md has the list), then options of its connection, `connection_learning_rate=1e-3` (a rate
of its own for what starts from nothing) and `refit` (transforms in closed form) among them.
"""

import dataclasses
import os
import pathlib
from typing import Literal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Cells are processes of their own: what one has compiled, the next ones need not.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path("runs/jax_cache").resolve()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import tyro

from keras_cc import comparison, report


@dataclasses.dataclass
class Arguments:
    """Compare recipes on one dataset and one model."""

    methods: tuple[str, ...] = ("sft", "translation_sft", "cc", "cc_published")
    """Recipes, each maybe with options: "cc dropout=0.9 layers=[4,5] refit"."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds; each method is trained once with each."""
    baseline: str = "sft"
    """The method that the others are measured against."""
    model: str = "demo:gemma3_270m"
    """A KerasHub preset, or `demo:` and the name of a demo model."""
    task: str = "cldr"
    """A task of `keras_cc.evaluation`: cldr, xnli, xstorycloze, xquad, ..."""
    data: str | None = None
    """Folder with train/TASK/LANG.jsonl and dev/TASK/LANG.jsonl; cldr needs none."""
    languages: tuple[str, ...] = ("en", "tr", "sw", "id")
    """Languages, English among them."""
    train_rows: int = 60
    """Rows a language to train on; 0 takes all."""
    dev_rows: int = 32
    """Rows a language that are scored; 0 takes all."""
    score_on: str = "dev"
    """dev, or held_out (a fifth of the training ids; cldr's validation split): to choose by."""
    epochs: int = 1
    """Passes over the rows; recipes that make more rows of them take more steps."""
    steps: int = 0
    """Training steps of every method alike; 0: as the epochs say."""
    batch_size: int = 8
    """Rows a step."""
    learning_rate: float = 3e-5
    """Peak learning rate."""
    train: Literal["all", "blocks", "lora"] = "blocks"
    """What is trained: all weights, all but the token embedding, or LoRA matrices."""
    lora_rank: int = 8
    """Rank of the LoRA matrices."""
    max_length: int = 0
    """Tokens of a row; 0: the longest there is."""
    template: str | None = "{instruction}\n"
    """Prompt template: a name, or text with {instruction}. Tasks of endings have none."""
    translation_share: float = 0.5
    """Share of the pairs that translation-augmented recipes make instructions of."""
    workers: int = 1
    """Cells that run at once, each in a process of its own."""
    output: pathlib.Path = pathlib.Path("runs/compare")
    """Folder of the cells, the table, the pictures and the page."""


def experiments(args):
    """The cells that the arguments ask for, the untuned model first."""
    fields = {field.name for field in dataclasses.fields(comparison.Experiment)}
    settings = {name: value for name, value in vars(args).items() if name in fields}
    untuned = comparison.Experiment(comparison.UNTUNED, **settings)
    methods = [
        comparison.Experiment.parse(method, seed=seed, **settings)
        for seed in args.seeds
        for method in args.methods
    ]
    unique = {}
    for cell in (untuned, *methods):
        unique.setdefault(cell.key, cell)
    return list(unique.values())


def main(args):
    """Run what is missing, and write the report."""
    cells = comparison.run_all(experiments(args), args.output, workers=args.workers)
    if comparison.UNTUNED not in (*args.methods, args.baseline):
        cells = cells[1:]  # its means stand in the table all the same
    written = report.write(cells, args.output, baseline=args.baseline)
    print(pathlib.Path(written["results.md"]).read_text(encoding="utf-8"))
    for path in written.values():
        print(path)
    return written


if __name__ == "__main__":
    main(tyro.cli(Arguments))
