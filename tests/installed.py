"""Which backends are installed, and which run what; nothing of them, nor of Keras, is imported."""

import importlib.util

BACKENDS = ("jax", "tensorflow", "torch")
INSTALLED = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]

#: Where a test runs that does the same on every backend.
ONCE_ON = INSTALLED[0]
#: Where a test runs in each of its many cases: torch compiles nothing, which is most of the time
#: that tiny models take.
THOROUGH_ON = "torch" if "torch" in INSTALLED else INSTALLED[0]
