"""Losses of five SGD steps from fixed weights, for `test_parity.py` to compare.

    KERAS_BACKEND=jax python trajectory.py gemma llama3 llama3-varied llama3-dft

prints one JSON object: for each name, five losses. Behind the family's name may stand that of a
recipe.
"""

import json
import sys

import keras
import tiny

from keras_cc import CCCausalLM, FusedConnection, recipes
from keras_cc.backbones import surgery

STEPS = 5
# A rate that is too high amplifies rounding: at 0.5 all losses drift apart by a tenth within a
# few steps, and at 0.02 this Gemma 3, whose attention is sharp, multiplies a difference by eight
# in each.
LEARNING_RATES = {"gemma3": 0.001, "llama3-int8": 0.2}
VARIED = {
    "alignment": "mean",
    "gate": "layer",
    "transform": "low_rank",
    "rank": 3,
    "pivot_gradient": True,
    "alignment_gradient": "full",
    "alignment_error": "plain",
    "alignment_loss_weight": 0.1,
}


def trajectory(name):
    family, _, variant = name.partition("-")
    rows = 3
    if variant in recipes.names():
        model = recipes.get(variant).model(tiny.causal_lm(family))
        rows = 6  # pairs to tell apart
    else:
        causal_lm = tiny.causal_lm(family)
        if variant == "int8":
            causal_lm.backbone.quantize("int8")
        options = VARIED if variant == "varied" else {}
        model = CCCausalLM(causal_lm, FusedConnection(dropout=0.0, **options))
        if variant == "int8":
            model.enable_lora(2)
            tiny.fill_lora(surgery.lora_layers(causal_lm).values())
    for number, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, 3 + number)
    model.compile(keras.optimizers.SGD(LEARNING_RATES.get(name, LEARNING_RATES.get(family, 0.02))))
    batch = tiny.batch(rows, prompt_lengths=(4, 3, 5) * (rows // 3))
    history = model.fit(batch, batch_size=rows, shuffle=False, epochs=STEPS, verbose=0)
    return [float(loss) for loss in history.history["loss"]]


if __name__ == "__main__":
    print(json.dumps({name: trajectory(name) for name in sys.argv[1:]}))
