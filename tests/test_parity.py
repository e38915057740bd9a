"""TensorFlow, JAX and torch train alike: one trajectory from the same weights on each."""

import pathlib

import numpy as np
import pytest
from backend_tools import run_python_for_json
from installed import BACKENDS, INSTALLED

NAMES = (
    "gemma",
    "gemma3",
    "llama3",
    "llama3-varied",
    "llama3-dft",
    "llama3-afp",
    "llama3-cc_published",
    "gemma3-cc_published",
)
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


@pytest.fixture(scope="module")
def trajectories():
    """By backend, what `trajectory.py` printed there."""
    script = FIXED_NOISE + SCRIPT.read_text(encoding="utf-8")
    return {
        name: run_python_for_json(script, *NAMES, backend=name, timeout=600) for name in INSTALLED
    }


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_losses_agree(trajectories, name, backend):
    if backend not in INSTALLED:
        pytest.skip(f"{backend} is not installed")
    expected = np.array(trajectories[INSTALLED[0]][name])
    found = np.array(trajectories[backend][name])
    assert len(found) == 5 and expected[-1] < 0.95 * expected[0]  # and it trains
    assert np.max(np.abs(found - expected) / np.abs(expected)) <= 1e-4
