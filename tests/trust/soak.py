"""An hour of all that a service or a notebook does: python tests/trust/soak.py --minutes 60

Over and over, on one tiny model: `fit` with checkpoints, `evaluate`, `generate` on both paths, a
connection's weights saved and loaded, `.keras` saved and loaded. At the end: how memory grows
(MB an hour, a line through the second half, and MB a round), and open files, threads and the
backend's arrays at the half and at the end. Linux alone, which has `/proc`.
"""

import argparse
import gc
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def memory():
    """Megabytes that the process has in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def live_arrays():
    """How many arrays the backend keeps, where it can be asked."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return len(jax.live_arrays())
    if keras.backend.backend() == "torch":
        import torch

        return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
    return 0


def one_round(model, rows, prompts, folder):
    import keras

    import keras_cc

    shutil.rmtree(folder / "kept", ignore_errors=True)
    kept = keras_cc.Checkpoints(folder / "kept", steps=2)
    model.fit(rows, batch_size=2, verbose=0, seed=1, resume=kept)
    model.evaluate(rows[:4], batch_size=2, verbose=0)
    model.generate(prompts, 24)
    model.generate(prompts, 24, pivot_prompts=prompts)
    model.save_cc_weights(folder / "connection.safetensors")
    model.load_cc_weights(folder / "connection.safetensors")
    model.save(folder / "model.keras")
    keras.saving.load_model(folder / "model.keras")


def run(minutes):
    """Returns the figures of the module's docstring."""
    import keras
    import long_run

    model = long_run.make()
    model.compile(keras.optimizers.Adam(1e-3), sampler="greedy", **long_run.QUICK)
    rows, prompts = long_run.ROWS, ["dog Kenya", "fox the dog"]
    folder, points = pathlib.Path(tempfile.mkdtemp()), []
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < 60 * minutes or len(points) < 4:
            one_round(model, rows, prompts, folder)
            keras.backend.clear_session(free_memory=False)  # of the models that were loaded
            gc.collect()
            points.append(
                {
                    "hours": (time.monotonic() - begin) / 3600,
                    "memory": memory(),
                    "files": len(os.listdir("/proc/self/fd")),
                    "threads": threading.active_count(),
                    "arrays": live_arrays(),
                }
            )
    finally:
        shutil.rmtree(folder)
    half = points[len(points) // 2 :]
    slope = np.polyfit([p["hours"] for p in half], [p["memory"] for p in half], 1)[0]
    names = ("memory", "files", "threads", "arrays")
    return {
        "rounds": len(points),
        "MB an hour": round(float(slope), 1),
        "MB a round": round((half[-1]["memory"] - half[0]["memory"]) / (len(half) - 1), 3),
        **{name: [round(half[0][name]), round(half[-1][name])] for name in names},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    print(json.dumps(run(parser.parse_args().minutes)))
