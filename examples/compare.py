"""Which method serves my languages best? Recipes x seeds, trained, scored, and put side by side.

    KERAS_BACKEND=jax python examples/compare.py
    KERAS_BACKEND=jax python examples/compare.py --task xnli --data FOLDER --languages en tr ar \
        --methods sft cc "cc dropout=0.9" cc_published --seeds 0 1 2

    KERAS_BACKEND=jax python examples/compare.py --protocol transfer --task currency_code \
        --methods floor sft ceiling own_answers

    KERAS_BACKEND=jax python examples/compare.py --protocol transfer --model demo:laboratory \
        --task lab_code --languages en xa xb --methods floor sft ceiling own_answers \
        --train all --steps 800 --batch-size 16 --learning-rate 1e-3

The first two train on every language's answers and score other items. `--protocol transfer` asks
what crosses: facts are told in English alone, and asked in the other languages. In the laboratory
(`keras_cc.laboratory`), whose model and languages are tiny, a cell takes about a minute.

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
    """Recipes, each maybe with options: "cc dropout=0.9 layers=[4,5] refit"; for transfer also
    "floor" (the facts left out) and "ceiling" (told in every language)."""
    protocol: Literal["task", "transfer"] = "task"
    """task: answers in every language; transfer: facts told in English alone."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds; each method is trained once with each."""
    baseline: str = "sft"
    """The method that the others are measured against."""
    model: str = "demo:gemma3_270m"
    """A KerasHub preset, or `demo:` and the name of a demo model."""
    task: str | None = None
    """A task of `keras_cc.evaluation`: cldr (the default), xnli, xstorycloze, xquad, ... Of
    transfer a relation: currency_code (the default), calling_code, currency, language, continent,
    born, town, speaks, mkqa, xquad, lab_code and lab_word (the laboratory's), or rows (a JSON
    lines file of yours)."""
    data: str | None = None
    """Folder with train/TASK/LANG.jsonl and dev/TASK/LANG.jsonl, or that file of rows; CLDR's and
    invented facts need none."""
    languages: tuple[str, ...] = ("en", "tr", "sw", "id")
    """Languages, English among them."""
    unseen_languages: tuple[str, ...] = ()
    """Of transfer: languages that are scored and never trained."""
    english_share: float = 0.4
    """Of transfer: the share of rows in English."""
    pair_share: float = 0.4
    """Of transfer: the share of pairs without an answer, for methods that learn from them."""
    pairs_from: float = 0.5
    """Of transfer: the share of the steps before pairs come."""
    items: int = 200
    """Of transfer: how many facts, invented or the laboratory's (lab_word has 128 at most)."""
    train_rows: int = 60
    """Rows a language to train on; 0 takes all."""
    dev_rows: int = 32
    """Rows a language that are scored; 0 takes all."""
    score_on: Literal["dev", "held_out", "test"] = "dev"
    """dev, or to choose by: held_out (a fifth of the training ids; cldr's validation split). Of
    transfer: dev to choose by, test to report."""
    epochs: int = 1
    """Passes over the rows; recipes that make more rows of them take more steps."""
    steps: int | None = None
    """Training steps of every method alike; default: as the epochs say, and 150 of transfer."""
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
    kind = comparison.Transfer if args.protocol == "transfer" else comparison.Experiment
    fields = {field.name for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in vars(args).items() if name in fields}
    for name in ("task", "steps"):
        if settings[name] is None:  # each protocol has its own
            del settings[name]
    untuned = kind(comparison.UNTUNED, **settings)
    methods = [
        kind.parse(method, seed=seed, **settings) for seed in args.seeds for method in args.methods
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
