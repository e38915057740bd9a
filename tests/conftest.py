"""Fixtures that tests of several files use, how JAX compiles while they run, and their order."""

import collections
import os
import subprocess
import sys

import numpy as np
import pytest

# Compiling is most of the time that small models take on JAX; with these it is less than half.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist: the order below stands
    if os.environ.get("KERAS_BACKEND") != "jax" or "XLA_FLAGS" in os.environ:
        return
    # XLA ends a process whose flags it does not know, as another version may: one tries.
    environment = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE}
    script = [sys.executable, "-c", "import jax; jax.jit(abs)(1.0)"]
    if subprocess.run(script, env=environment, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = QUICK_TO_COMPILE


def pytest_collection_modifyitems(items):
    """Files with real weights first, then those with the most tests.

    On TensorFlow a process grows by gigabytes over a run (65 MB for every tiny model that is
    trained in graph mode, though it is freed), and the weights of a real one need gigabytes beside
    that: early there is room for both. The README's command has the processes end half way, too.
    """
    tests = collections.Counter(item.path for item in items)
    real = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in real, -tests[item.path]))


@pytest.fixture
def seen_ids(monkeypatch):
    """The ids that `generate` turned into text, call by call."""
    from keras_cc import CCPreprocessor

    seen, detokenize = [], CCPreprocessor.detokenize

    def spy(self, token_ids, *args, **kwargs):
        seen.append(np.asarray(token_ids))
        return detokenize(self, token_ids, *args, **kwargs)

    monkeypatch.setattr(CCPreprocessor, "detokenize", spy)
    return seen
