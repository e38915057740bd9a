import connected
import keras
import numpy as np
from keras import ops

from keras_cc.calibration.compiled import Compiled


def test_a_function_runs_once_for_each_shape_and_not_for_each_batch():
    model = connected.text_model("llama3", with_preprocessor=True)
    calls = []

    def sums(inputs):
        calls.append(inputs["token_ids"].shape)
        weight = model.weights[0]
        return {"sums": ops.sum(ops.cast(inputs["token_ids"], weight.dtype), axis=1)}

    compiled = Compiled(model, sums)
    ids = np.arange(12, dtype="int32").reshape(2, 6)
    for _ in range(5):
        np.testing.assert_array_equal(compiled.run({"token_ids": ids})["sums"], ids.sum(axis=1))
    # PyTorch runs it each time, and is none the slower.
    assert len(calls) == 5 if keras.backend.backend() == "torch" else len(calls) <= 2
