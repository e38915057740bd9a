"""`KerasLM` against the harness' own Hugging Face model, both reading SmolLM2's GGUF file."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest

import keras_cc.data
import keras_cc.demo
from keras_cc.demo import smollm2

NEEDED = ("lm_eval", "torch", "transformers", "accelerate", "gguf", "babel", smollm2.PACKAGE)
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
LANGUAGES = ("en", "ar", "hi", "tr", "zh")

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def pairs():
    """40 questions in each of 5 languages, in the ways in which the harness' tasks ask."""
    found = []
    for lang in LANGUAGES:
        for number, row in enumerate(keras_cc.data.cldr_rows(lang, split="test", seed=0)[:40]):
            question, answer = row["instruction"], row["output"]
            if number % 4 == 0:  # as XNLI's
                found.append(("", f"{question} {answer}"))
            elif number % 4 == 1:  # white space that belongs to the continuation
                found.append((f"{question} \n ", answer))
            else:
                found.append((question, f" {answer}"))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """`(Keras' answers, Hugging Face's answers)`, each with a column for "is greedy"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.instance import Instance

        from keras_cc.evaluation import KerasLM
    causal_lm, _ = keras_cc.demo.load("smollm2_135m")
    lm, asked, ids = KerasLM(causal_lm, verbose=0), pairs(), {}
    tok_encode = lm.tok_encode

    def remember(text, *args, **kwargs):
        return ids.setdefault(text, tok_encode(text, *args, **kwargs))

    lm.tok_encode = remember
    requests = [
        Instance("loglikelihood", {}, pair, number, metadata=("cldr", number, 1))
        for number, pair in enumerate(asked)
    ]
    ours = lm.loglikelihood(requests)
    folder = tmp_path_factory.mktemp("hugging_face")
    files = [folder / name for name in ("requests.json", "answers.json")]
    files[0].write_text(json.dumps({"pairs": asked, "ids": ids}))
    script = pathlib.Path(__file__).with_name("hf_harness.py")
    done = subprocess.run(
        [sys.executable, str(script), smollm2.gguf_path(), *map(str, files)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return np.array(ours, float), np.array(json.loads(files[1].read_text()), float)


def test_200_requests_in_5_languages(both):
    ours, theirs = both
    assert ours.shape == theirs.shape == (200, 2)
    assert len(set(theirs[:, 0])) > 190  # they are not of one kind
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(ours[:, 1], theirs[:, 1])
