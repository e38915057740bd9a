"""Finished cells as files, and the running of those that are missing.

A cell is keyed by everything that decides it, and its file appears when it is whole: a run that was
killed goes on where it was, and nothing is measured twice.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_cc.comparison.experiment import UNTUNED, Experiment, Training
from keras_cc.comparison.run import run
from keras_cc.comparison.transfer import Transfer
from keras_cc.whole_files import whole_file

# Their answers go to one file.
_DISTILLING = threading.Lock()


class Cells:
    """The finished cells of a comparison, one JSON file each.

    Args:
        folder: where they are kept; made if it is not there.

    Example:

    ```python
    cells = keras_cc.comparison.Cells("runs/compare")
    for experiment in experiments:
        if experiment not in cells:
            cells.add(experiment, keras_cc.comparison.run(experiment))
    ```
    """

    def __init__(self, folder: "str | os.PathLike[str]") -> None:
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, experiment: Training) -> pathlib.Path:
        """The file of an experiment's cell."""
        return self.folder / f"{experiment.key}.json"

    def __contains__(self, experiment: Training) -> bool:
        return self.path(experiment).exists()

    def __getitem__(self, experiment: Training) -> dict[str, Any]:
        return json.loads(self.path(experiment).read_text(encoding="utf-8"))

    def add(self, experiment: Training, cell: Mapping[str, Any]) -> None:
        """Keep a cell; the file appears when it is whole."""
        with whole_file(self.path(experiment)) as unfinished:
            unfinished.write_text(json.dumps(cell, ensure_ascii=False), encoding="utf-8")

    def load(self, experiments: Sequence[Training]) -> list[dict[str, Any]]:
        """The cells of experiments, `before` filled in from the untuned model's."""
        cells = [self[experiment] for experiment in experiments if experiment in self]
        for cell in cells:
            untuned = dataclasses.replace(_experiment(cell["config"]), recipe=UNTUNED)
            if untuned in self:
                before = self[untuned]
                means = {
                    metric: {lang: float(np.mean(values)) for lang, values in by_language.items()}
                    for metric, by_language in before["scores"].items()
                }
                cell["before"] = {**means, "english_perplexity": before["english_perplexity"]}
        return cells


def run_all(
    experiments: Sequence[Training],
    folder: "str | os.PathLike[str]",
    *,
    workers: int = 1,
    verbose: "int | str" = "auto",
) -> list[dict[str, Any]]:
    """Run the experiments whose cells are not there yet, and load all cells.

    Each runs in a process of its own, so that none finds the memory of another. One that fails
    is said at the end; the others are run and kept.

    Args:
        experiments: the cells that are wanted.
        folder: where cells are kept (in `cells`), and the answers of a distillation.
        workers: how many run at once; 0 runs them one by one in this process.
        verbose: 0 for no line per cell.

    Returns:
        The cells, in the order of `experiments`, as `keras_cc.report.write` takes them.

    Raises:
        RuntimeError: at the end, naming the experiments that failed and why.

    Example:

    ```python
    from keras_cc.comparison import Experiment

    if __name__ == "__main__":  # cells are processes that import this file
        recipes, seeds = ("sft", "cc"), range(3)
        experiments = [Experiment(recipe, seed=seed) for recipe in recipes for seed in seeds]
        cells = keras_cc.comparison.run_all(experiments, "runs/compare")
        keras_cc.report.write(cells, "runs/compare")
    ```
    """
    folder = pathlib.Path(folder)
    cells, failures = Cells(folder / "cells"), []
    missing = list({e.key: e for e in experiments if e not in cells}.values())
    if verbose != 0:
        print(f"{len(experiments)} cells, {len(missing)} to run", flush=True)
    start = time.perf_counter()
    for number, (experiment, error) in enumerate(_finished(missing, folder, workers), start=1):
        if error is not None:
            failures.append(f"{experiment.name}, seed {experiment.seed}: {error!r}")
        if verbose != 0:
            seconds = time.perf_counter() - start
            left = seconds / number * (len(missing) - number)
            said = "FAILED" if error is not None else _line(cells[experiment])
            print(
                f"{number}/{len(missing)} {experiment.name}, seed {experiment.seed}: {said} "
                f"({seconds:.0f} s, about {left:.0f} s left)",
                flush=True,
            )
    if failures:
        raise RuntimeError(
            f"{len(failures)} of {len(missing)} cells failed; the others are kept, and running "
            "this again tries only what is missing:\n" + "\n".join(failures)
        )
    return cells.load(experiments)


def _finished(missing, folder, workers):
    """Run and keep cells; yields `(experiment, None or what went wrong)` as they end."""
    if workers == 0:
        for experiment in missing:
            try:
                _run_and_keep(experiment, folder)
                yield experiment, None
            except Exception as error:
                yield experiment, error
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {
            pool.submit(_run_apart, experiment, folder): experiment for experiment in missing
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.exception()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _run_apart(experiment, folder):
    """In a process, and in a pool, of its own: one that is killed takes no other with it."""
    spawn = multiprocessing.get_context("spawn")
    distils = experiment.recipe != UNTUNED and experiment.resolve().augment == "distillation"
    with (
        _DISTILLING if distils else contextlib.nullcontext(),
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool,
    ):
        pool.submit(_run_and_keep, experiment, folder).result()


def _run_and_keep(experiment, folder):
    Cells(folder / "cells").add(experiment, run(experiment, answers=folder, verbose=0))


def _line(cell):
    means = {k: 100 * float(np.mean(v)) for k, v in cell["scores"][cell["metric"]].items()}
    others = [mean for language, mean in means.items() if language != "en"]
    return f"{cell['metric']} {np.mean(others):.1f} %, English {means['en']:.1f} %"


def _experiment(config: Mapping[str, Any]) -> Training:
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return (Transfer if "facts" in options else Experiment)(**options)
