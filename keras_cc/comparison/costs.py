"""What a cell of a comparison costs, and on which machine."""

import math
import os
import pathlib
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cc.calibration.compiled import Compiled
from keras_cc.connections import FlareConnection, FusedConnection
from keras_cc.passes import pairing
from keras_cc.passes.runs import answer_nats, user


def inference_cost(
    model: Any, rows: Mapping[str, Sequence[Any]], turns: int = 5
) -> dict[str, float]:
    """Time of the pass that a user gets, as a ratio to the stock model's, in turn."""
    if model.is_mergeable:  # then what is served is the stock model
        return {"ratio": 1.0, "low": 1.0, "high": 1.0}
    batch = [row for language in rows.values() for row in language][:8]
    x, y, sample_weight = model.preprocessor(batch)
    positions = np.argmax(x["answer_mask"], axis=1)[:, None].astype("int32")
    inputs = {**x, "y": y, "sample_weight": sample_weight, "answer_positions": positions}
    passes = [
        Compiled(model, lambda inputs, make=make: answer_nats(model, inputs, make))
        for make in (user, _stock_pass(model))
    ]
    ratios = []
    for turn in range(turns + 1):
        seconds = []
        for compiled in passes:
            start = time.perf_counter()
            compiled.run(inputs)
            seconds.append(time.perf_counter() - start)
        if turn:  # the first one compiles
            ratios.append(seconds[0] / seconds[1])
    return {"ratio": float(np.median(ratios)), "low": min(ratios), "high": max(ratios)}


def own_parameters(model: Any) -> int:
    """How many numbers the connection holds."""
    layers = model.connection_layers().values()
    return sum(math.prod(v.shape) for layer in layers for v in layer.weights)


def machine() -> dict[str, Any]:
    """What a cell was computed on and with."""
    import keras_hub

    return {
        "backend": keras.backend.backend(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
    }


def _stock_pass(model):
    """The pass of the model as it came: wrappers give what is inside them."""
    if isinstance(model.connection, (FusedConnection, FlareConnection)):
        return lambda model, inputs: pairing.PivotPass(ops.cast(inputs["padding_mask"], "bool"))
    return lambda model, inputs: pairing.Pass()


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
