"""Fixtures that tests of several files use."""

import numpy as np
import pytest


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
