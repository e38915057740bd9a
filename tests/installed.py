"""Which backends are installed here; nothing of them, nor of Keras, is imported for it."""

import importlib.util

BACKENDS = ("jax", "tensorflow", "torch")
INSTALLED = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
