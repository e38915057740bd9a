"""A saved model trains on as the one that was saved: LoRA, what is frozen, optimizer, seeds."""

import connected
import keras
import numpy as np
import pytest
import tiny
from connected import QUICK, logits, monolingual

import keras_cc
from keras_cc import CCCausalLM, FusedConnection

X, Y, WEIGHTS = tiny.batch()


def fit(model, epochs):
    options = {"batch_size": 3, "verbose": 0, "shuffle": False, "epochs": epochs}
    return model.fit(X, Y, sample_weight=WEIGHTS, **options).history["loss"]


def make(connection, what):
    keras.utils.set_random_seed(0)
    model = CCCausalLM(tiny.causal_lm(), connection)
    if connection is not None:
        connected.train_connection(model)
    WHAT[what](model)
    return model


def some_frozen(model):
    backbone = model.causal_lm.backbone
    backbone.token_embedding.trainable = False
    backbone.transformer_layers[0].trainable = False
    next(v for v in backbone.variables if v.path.endswith("1/self_attention_layernorm/scale") or
         "scale" in v.path).trainable = False  # fmt: skip


WHAT = {
    "lora": lambda model: model.enable_lora(2),
    "lora of a layer": lambda model: model.enable_lora(3, ["feedforward_gate_dense", "query"]),
    "frozen": some_frozen,
    "all": lambda model: None,
}


@pytest.mark.thorough("fused-lora", "None-frozen")
@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("connection", ["fused", "selected", None])
def test_a_loaded_model_goes_on_as_the_saved_one(connection, what, tmp_path):
    model = make(connection, what)
    model.compile(keras.optimizers.Adam(0.003), **QUICK)
    fit(model, 2)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert [v.path for v in loaded.trainable_variables] == [
        v.path for v in model.trainable_variables
    ]
    assert [v.shape for v in loaded.non_trainable_variables] == [
        v.shape for v in model.non_trainable_variables
    ]
    connected.assert_weights_equal(connected.weights(loaded), connected.weights(model))
    assert loaded.optimizer.iterations == 2
    # Dropout of the connection draws from the model's seeds, which are a part of the state.
    np.testing.assert_allclose(fit(loaded, 3), fit(model, 3), rtol=1e-6)
    np.testing.assert_array_equal(logits(loaded, monolingual(X)), logits(model, monolingual(X)))


def test_lora_in_a_file_of_weights(tmp_path):
    model, other = make("fused", "lora"), make("fused", "lora")
    model.compile(keras.optimizers.SGD(0.05), **QUICK)
    fit(model, 2)
    expected = logits(model, monolingual(X))
    model.save_weights(tmp_path / "with.weights.h5")
    other.load_weights(tmp_path / "with.weights.h5")
    assert logits(other, monolingual(X)).tolist() == expected.tolist()
    connected.assert_weights_equal(connected.weights(other), connected.weights(model))
    # Into a model without LoRA: the kernels hold the matrices.
    plain = make("fused", "all")
    plain.load_weights(tmp_path / "with.weights.h5")
    np.testing.assert_allclose(logits(plain, monolingual(X)), expected, atol=1e-5)
    # A file without LoRA, into a model with it: it is there, does nothing, and learns.
    plain.save_weights(tmp_path / "without.weights.h5")
    other.load_weights(tmp_path / "without.weights.h5")
    np.testing.assert_allclose(logits(other, monolingual(X)), expected, atol=1e-5)
    other.compile(keras.optimizers.SGD(0.05), **QUICK)
    before = connected.weights(other)
    fit(other, 2)
    moved = connected.moved(before, connected.weights(other))
    assert len([path for path in moved if "lora" in path]) == 8
    # Another rank is another model.
    third = make("fused", "lora of a layer")
    with pytest.raises(ValueError, match=r"4 layers of rank \[2\], for a model with 4 layers of r"):
        third.load_weights(tmp_path / "with.weights.h5")


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:.*The use of `x.T`")
def test_a_quantised_model_with_lora(tmp_path):
    keras.utils.set_random_seed(0)
    causal_lm = tiny.causal_lm()
    causal_lm.backbone.quantize("int8")
    model = CCCausalLM(causal_lm, FusedConnection(dropout=0.0))
    model.enable_lora(2)
    model.compile(keras.optimizers.SGD(0.05), **QUICK)
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        logits(loaded, monolingual(X)), logits(model, monolingual(X)), atol=1e-6
    )
    np.testing.assert_allclose(fit(loaded, 2), fit(model, 2), rtol=1e-6)


def test_a_model_that_was_merged_goes_on(tmp_path):
    model = make("fused", "lora")
    model.compile(keras.optimizers.SGD(0.05), **QUICK)
    fit(model, 1)
    model.disconnect()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(fit(loaded, 2), fit(model, 2), rtol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion", "RMSprop"])
def test_the_optimizer_in_a_file_is_one_of_every_backend(name, tmp_path):
    optimizer = getattr(keras.optimizers, name)(0.01, clipnorm=1.0)
    model = make(None, "all")
    model.compile(optimizer, **QUICK)
    config = model.get_compile_config()["optimizer"]
    inner = config["config"]["inner_optimizer"]
    assert (inner["module"], inner["class_name"]) == ("keras.optimizers", name)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer.inner_optimizer
    assert type(loaded) is type(optimizer) and loaded.get_config() == optimizer.get_config()


class Stop(keras.callbacks.Callback):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def on_train_batch_end(self, batch, logs=None):
        self.after -= 1
        self.model.stop_training = not self.after


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.thorough("True")
def test_an_accumulation_group_goes_on_where_it_was(alternate, tmp_path):
    """Micro-batches of other lengths, so that a group that began elsewhere has other weights."""

    def make():
        keras.utils.set_random_seed(0)
        objective = keras_cc.DFT(alternating=True) if alternate else ()
        model = CCCausalLM(tiny.causal_lm(), FusedConnection(dropout=0.0), objective)
        connected.train_connection(model)
        model.compile(keras.optimizers.SGD(0.05, gradient_accumulation_steps=3), **QUICK)
        return model

    def fit(model, epochs, *callbacks):
        options = {"batch_size": 1, "verbose": 0, "shuffle": False, "epochs": epochs}
        model.fit(X, Y, sample_weight=WEIGHTS, callbacks=[*callbacks], **options)

    parts = make()
    fit(parts, 2, Stop(4))  # one micro-batch into the second group
    parts.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    before = connected.weights(parts)
    fit(parts, 1, Stop(1))
    connected.assert_weights_equal(connected.weights(parts), before)  # two of three
    fit(parts, 1, Stop(1))
    assert connected.moved(before, connected.weights(parts))
    fit(loaded, 1, Stop(1))
    fit(loaded, 1, Stop(1))
    fit(parts, 4)
    fit(loaded, 4)
    connected.assert_weights_equal(connected.weights(loaded), connected.weights(parts))
