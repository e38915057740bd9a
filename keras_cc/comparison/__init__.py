"""Recipes compared: one cell is one recipe, trained with one seed and scored on held-out items.

    experiments = [Experiment(recipe, seed=seed) for recipe in ("sft", "cc") for seed in range(3)]
    cells = keras_cc.comparison.run_all(experiments, "runs/compare")
    keras_cc.report.write(cells, "runs/compare")

Needs the extra: `pip install "keras-cc[evaluation]"`.
"""

from keras_cc.comparison.cells import Cells, run_all
from keras_cc.comparison.experiment import UNTUNED, Experiment
from keras_cc.comparison.run import run
from keras_cc.comparison.transfer import Transfer

__all__ = ["UNTUNED", "Cells", "Experiment", "Transfer", "run", "run_all"]
