"""A quantised base, LoRA on it and the connection in float32: it learns as the float model does."""

import connected
import keras
import numpy as np
import pytest
import tiny

from keras_cc import CCCausalLM, FusedConnection
from keras_cc.backbones import surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*The use of `x.T`"),
]


def trained(mode, family, connection, **options):
    """The model and its losses over six steps, LoRA and connection from the same numbers."""
    causal_lm = tiny.causal_lm(family)
    if mode is not None:
        causal_lm.backbone.quantize(mode)
    model = CCCausalLM(causal_lm, connection, **options)
    model.enable_lora(2)
    tiny.fill_lora(surgery.lora_layers(causal_lm).values())
    for number, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, 3 + number)
    fixed = [(v, np.array(v)) for v in model.variables if v.dtype == "int8"]
    model.compile(keras.optimizers.SGD(0.5), **connected.QUICK)
    history = model.fit(tiny.batch(), batch_size=3, epochs=6, shuffle=False, verbose=0).history
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert bool(fixed) == (mode is not None)
    for variable, value in fixed:
        np.testing.assert_array_equal(value, np.array(variable))
    return model, history["sft_loss"]


@pytest.mark.parametrize("family", [pytest.param("qwen", marks=pytest.mark.large), "llama3"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_it_learns_as_the_float_model_does(mode, family):
    """Keras' quantised head alone has no gradient: then losses would stay where they were."""
    connection = FusedConnection(dropout=0.0)
    _, expected = trained(None, family, connection)
    _, found = trained(mode, family, connection)
    fall = expected[0] - expected[-1]
    assert fall > 0.05 * expected[0]
    tolerance = {"int8": 0.1, "int4": 0.5}[mode]  # of the fall: int4 is another model
    assert found[0] - found[-1] == pytest.approx(fall, rel=tolerance)


@pytest.mark.parametrize("options", [{"rematerialize": True}, {}], ids=str)
@pytest.mark.parametrize("connection", [None, FusedConnection(dropout=0.0)], ids=["sft", "cc"])
@pytest.mark.thorough("cc-{}")
def test_with_what_is_beside_it(connection, options):
    _, found = trained("int8", "llama3", connection, **options)
    assert found[-1] < 0.95 * found[0]


def test_merging_is_refused_with_the_way_round():
    model, _ = trained("int8", "llama3", FusedConnection(dropout=0.0))
    with pytest.raises(ValueError, match=r"merge first and quantise the merged model.*Received: "):
        model.merge()
