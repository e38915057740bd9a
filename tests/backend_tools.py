"""What tests need and Keras does not offer on every backend alike."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
from keras import ops


def gradients(loss, variables):
    """The gradients of `loss()`, a scalar, with respect to Keras variables, as NumPy arrays.

    A variable that the loss does not depend on gets zeros.
    """
    variables = list(variables)
    backend = keras.backend.backend()
    if backend == "tensorflow":
        found = _tensorflow_gradients(loss, variables)
    elif backend == "torch":
        found = _torch_gradients(loss, variables)
    else:
        found = _jax_gradients(loss, variables)
    return [
        np.zeros(variable.shape, "float32") if gradient is None else ops.convert_to_numpy(gradient)
        for variable, gradient in zip(variables, found, strict=True)
    ]


def _tensorflow_gradients(loss, variables):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        value = loss()
    found = tape.gradient(value, [variable.value for variable in variables])
    # Of an embedding it is a sparse one.
    return [None if g is None else tf.convert_to_tensor(g) for g in found]


def _torch_gradients(loss, variables):
    import torch

    values = [variable.value for variable in variables]
    return torch.autograd.grad(loss(), values, allow_unused=True)


def _jax_gradients(loss, variables):
    import jax

    def stateless(values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return loss()

    return jax.grad(stateless)([variable.value for variable in variables])


def run_python(script, *arguments, backend=None, timeout=300):
    """Run Python source in a fresh process, `tests/` on its path; returns its standard output.

    Raises:
        AssertionError: with what the process said, if it failed.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    path = [here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend or keras.backend.backend(),
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *(str(argument) for argument in arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_python_for_json(script, *arguments, **options):
    """As `run_python`, and the last line of the output read as JSON."""
    return json.loads(run_python(script, *arguments, **options).strip().splitlines()[-1])


_LOAD = """
import sys
import numpy as np
import keras, keras_cc
model = keras.saving.load_model(sys.argv[1])
inputs = dict(np.load(sys.argv[2]))
outputs = model.predict(inputs, verbose=0)
np.savez(sys.argv[3], **outputs)
"""


def outputs_after_reload(model, inputs, folder):
    """What a functional model, saved as `.keras`, answers in another process.

    Args:
        model: a functional model with dicts of named inputs and outputs.
        inputs: dict of NumPy arrays.
        folder: a `pathlib.Path` to write into.

    Returns:
        Dict of NumPy arrays.
    """
    files = [folder / name for name in ("model.keras", "inputs.npz", "outputs.npz")]
    model.save(files[0])
    np.savez(files[1], **inputs)
    run_python(_LOAD, *files)
    return dict(np.load(files[2]))
