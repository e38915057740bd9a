"""Cells with scores that are easy to reckon with by hand."""

import copy

from keras_cc.report.grouping import VERSION

LAYERS = [2, 3, 4, 5]
MACHINE = {"backend": "jax", "cores": 2, "keras": "3.15.1"}

# Means: tr 0.5, ar 0.25, en 0.75; so 0.375 without English.
SFT = {"tr": [1, 0, 1, 0], "ar": [1, 0, 0, 0], "en": [1, 1, 1, 0]}
# Means: tr 1, ar 1, en 0.75; so 1.0 without English: every item is right.
BEST = {"tr": [1, 1, 1, 1], "ar": [1, 1, 1, 1], "en": [1, 1, 1, 0]}
# Means: tr 0, ar 0: every item is wrong.
WORST = {"tr": [0, 0, 0, 0], "ar": [0, 0, 0, 0], "en": [1, 1, 1, 0]}


def cell(name="sft", seed=0, scores=None, repeat=10, config=None, **changes):
    """One cell; each score stands `repeat` times, for as many items. `changes` replace keys."""
    scores = {k: [float(s) for s in v] * repeat for k, v in (scores or SFT).items()}
    made = {
        "version": VERSION,
        "key": "0123456789abcdef",
        "name": name,
        "config": {
            "recipe": name,
            "options": {},
            "seed": seed,
            "model": "demo:tiny",
            "task": "xnli",
            "languages": sorted(scores),
            "epochs": 3,
            **(config or {}),
        },
        "metric": "accuracy",
        "items": {k: [str(i) for i in range(len(v))] for k, v in scores.items()},
        "scores": {"accuracy": scores},
        "before": {"accuracy": {"tr": 0.3, "ar": 0.2, "en": 0.5}, "english_perplexity": 20.0},
        "english_perplexity": 30.0,
        "history": {"step": [10, 20, 25], "val_sft_loss": [3.0, 2.0, 2.5]},
        "seconds": {"train": 60.0, "finish": 1.5, "evaluate": 12.0},
        "parameters": {"model": 1000, "trained": 100, "extra": 0},
        "inference": {"ratio": 1.0, "low": 0.9, "high": 1.1},
        "atlas": None,
        "machine": dict(MACHINE),
    }
    return {**made, **copy.deepcopy(changes)}


def atlas(**changes):
    """Gate: opens most at layers 3 and 4; most for Turkish. Error: grows; largest for Arabic."""
    return {
        "layers": LAYERS,
        "gate": {"tr": [0.2, 0.8, 0.8, 0.4], "ar": [0.1, 0.7, 0.69, 0.3]},
        "gate_by_dimension": [[0.4, 0.6, 0.4], [0.9, 0.1, 0.5], [0.6, 0.7, 0.5], [0.5, 0.5, 0.5]],
        "alignment_error": {"tr": [0.01, 0.1, 1.0, 10.0], "ar": [0.03, 0.3, 3.0, 30.0]},
        "selected": {"tr": [0.0, 0.75, 0.25, 0.0], "ar": [0.0, 0.25, 0.75, 0.0]},
        **changes,
    }


def three():
    """The baseline with two seeds, one far above it, one far below."""
    return [
        cell(name, seed, scores, atlas=atlas() if name == "cc" else None)
        for name, scores in (("sft", SFT), ("cc", BEST), ("incline", WORST))
        for seed in (0, 1)
    ]
