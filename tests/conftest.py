"""Fixtures that tests of several files use, which tests run and in what order, how JAX compiles."""

import collections
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from installed import ONCE_ON, THOROUGH_ON

# Compiling is most of the time that small models take on JAX; with these it is less than half.
QUICK_TO_COMPILE = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

# The files that take longest, on one backend or another: begun last, one would be waited for.
LONGEST = (
    "test_distributed", "test_parity", "test_examples", "test_saved_model", "test_doors",
    "test_interventions", "test_callbacks", "test_selected", "test_recipes", "test_families",
    "test_merge_and_save", "test_closed_form",
)  # fmt: skip


def pytest_addoption(parser):
    help = "also run what is marked `large`: real weights, or many seconds"
    parser.addoption("--run-large", action="store_true", default=False, help=help)


def pytest_configure(config):
    config.option.loadscopereorder = False  # of pytest-xdist: the order below stands
    if os.environ.get("KERAS_BACKEND") == "jax":
        compile_quickly(config)


def compile_quickly(config):
    """Tell JAX so by environment variables: workers and the processes of tests inherit them."""
    # The same tiny step is compiled by test after test: a run compiles it once, and without what
    # makes long runs fast. pytest's cache keeps it for the next run.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        if hasattr(config, "cache"):
            folder = str(config.cache.mkdir("jax"))
        else:
            folder = tempfile.mkdtemp(prefix="keras_cc_tests_")
            config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    if "XLA_FLAGS" in os.environ:
        return
    # XLA ends a process whose flags it does not know, as another version may: one tries.
    environment = {**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE}
    script = [sys.executable, "-c", "import jax; jax.jit(abs)(1.0)"]
    if subprocess.run(script, env=environment, capture_output=True).returncode == 0:
        os.environ["XLA_FLAGS"] = QUICK_TO_COMPILE


def pytest_report_header(config):
    large = "run as well" if config.getoption("--run-large") else "are skipped without --run-large"
    return [
        f"keras_cc: tests marked `once` run on {ONCE_ON} alone",
        f"keras_cc: tests marked `thorough` are `large` on other backends than {THOROUGH_ON}",
        f"keras_cc: tests marked `large` {large}",
    ]


def is_large(item, backend):
    """Whether the test waits for `--run-large` on this backend.

    The arguments of `thorough` are the cases, by their ids, that are quick on every backend.
    """
    if item.get_closest_marker("large"):
        return True
    mark, case = item.get_closest_marker("thorough"), getattr(item, "callspec", None)
    return mark and backend != THOROUGH_ON and not (case and case.id in mark.args)


@pytest.hookimpl(tryfirst=True)  # `-m large` is to find what becomes large here
def pytest_collection_modifyitems(config, items):
    """What is not to run leaves; of the rest real weights come first, then the longest files.

    On TensorFlow a process grows over a run (65 MB for every tiny model that is trained in graph
    mode, though it is freed), and the weights of a real one need gigabytes beside that: early there
    is room for both.
    """
    import keras  # here, where the tests have it already: not in xdist's first process

    backend = keras.backend.backend()
    if backend != ONCE_ON:
        elsewhere = [item for item in items if item.get_closest_marker("once")]
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if not item.get_closest_marker("once")]
    real = {item.path for item in items if item.get_closest_marker("large")}
    tests = collections.Counter(item.path for item in items)
    place = {name: number for number, name in enumerate(LONGEST)}

    def order(item):
        is_other = not (item.path in real and config.getoption("--run-large"))
        return is_other, place.get(item.path.stem, len(place)), -tests[item.path]

    items.sort(key=order)
    for item in items:
        if is_large(item, backend):
            item.add_marker("large")
            if not config.getoption("--run-large"):
                item.add_marker(pytest.mark.skip(reason="large: run with --run-large"))


@pytest.fixture(scope="module", autouse=True)
def memory_given_back():
    """What a file compiled is of no use to the next one, and in a long run it is gigabytes.

    What stays all the same (TensorFlow's functions do) is not looked through again: a full
    collection of a process that has grown takes seconds, and Keras' `quantize` asks for many.
    """
    import keras

    yield
    keras.utils.clear_session()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    gc.freeze()


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
