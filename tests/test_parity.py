"""TensorFlow, JAX and torch train alike: one trajectory from the same weights on each."""

import functools
import pathlib

import numpy as np
import pytest
from backend_tools import run_python_for_json
from installed import BACKENDS, INSTALLED

QUICK = ("gemma3", "llama3-varied", "llama3-dft", "llama3-cc_published", "llama3-int8")
LARGE = ("gemma", "llama3", "llama3-afp", "gemma3-cc_published")
# The backends' generators draw different noise; this is any row's, at each step.
FIXED_NOISE = """
from keras import ops
from keras_cc.layers import LayerSelector
LayerSelector.gumbel_noise = lambda self, shape, dtype: ops.cast([[0.5, 0.1]], dtype)
"""
SCRIPT = pathlib.Path(__file__).with_name("trajectory.py")

pytestmark = [
    pytest.mark.skipif(
        len(INSTALLED) < 2, reason=f"needs two backends to compare; installed: {INSTALLED}"
    ),
    pytest.mark.once,
]


@functools.cache
def trajectories(*names):
    """By backend, what `trajectory.py` printed there."""
    script = FIXED_NOISE + SCRIPT.read_text(encoding="utf-8")
    return {
        backend: run_python_for_json(script, *names, backend=backend, timeout=600)
        for backend in INSTALLED
    }


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.large) for name in LARGE)]
)
def test_losses_agree(name, backend):
    if backend not in INSTALLED:
        pytest.skip(f"{backend} is not installed")
    found_on = trajectories(*(QUICK if name in QUICK else LARGE))
    expected = np.array(found_on[INSTALLED[0]][name])
    found = np.array(found_on[backend][name])
    assert len(found) == 5 and expected[-1] < 0.95 * expected[0]  # and it trains
    assert np.max(np.abs(found - expected) / np.abs(expected)) <= 1e-4
