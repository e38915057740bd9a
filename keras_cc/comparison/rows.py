"""The rows of an experiment, in three sets that share no id.

Recipes train on the first four fifths of the training ids; the last fifth chooses (an
intervention's options, yours if you sweep some); the scores are of the `dev` split. The CLDR set
has three splits of its own: train, validation, test.
"""

from collections.abc import Sequence
from typing import Any

from keras_cc.comparison.experiment import Experiment
from keras_cc.evaluation import tasks

#: Held-out rows a language that learning curves and choices are made with.
HELD_OUT = 24


def load_rows(experiment: Experiment) -> dict[str, Any]:
    """`train` and `held_out`, lists of rows, and `scored`, lists by language."""
    languages = experiment.languages
    train = tasks.load(experiment.task, experiment.data, "train", languages)
    if experiment.task == "cldr":
        held_out = tasks.load(experiment.task, experiment.data, "validation", languages)
        dev = tasks.load(experiment.task, experiment.data, "test", languages)
    else:
        dev = tasks.load(experiment.task, experiment.data, "dev", languages)
        ids = sorted({str(row["id"]) for rows in train.values() for row in rows}, key=_natural)
        last = set(ids[len(ids) * 4 // 5 :])
        held_out = {k: [r for r in rows if str(r["id"]) in last] for k, rows in train.items()}
        train = {k: [r for r in rows if str(r["id"]) not in last] for k, rows in train.items()}
    scored, share = dev, 1
    if experiment.score_on == "held_out":
        share = 2  # of the rows, one half chooses at most
    chosen = {k: spread(rows, min(HELD_OUT, len(rows) // share)) for k, rows in held_out.items()}
    if experiment.score_on == "held_out":
        ids = {row["id"] for rows in chosen.values() for row in rows}
        scored = {k: [r for r in rows if r["id"] not in ids] for k, rows in held_out.items()}
    return {
        "train": [r for rows in train.values() for r in spread(rows, experiment.train_rows)],
        "held_out": [row for rows in chosen.values() for row in rows],
        "scored": {k: spread(rows, experiment.dev_rows) for k, rows in scored.items()},
    }


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """`count` of the rows, evenly spaced; all of them for 0."""
    count = min(count, len(rows)) or len(rows)
    return [rows[i * len(rows) // count] for i in range(count)]


def _natural(text):
    return (0, int(text), "") if text.isdigit() else (1, 0, text)
