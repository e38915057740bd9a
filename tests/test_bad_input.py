"""Wrong models, options and batches: refused where they enter, with nothing changed."""

import connected
import keras
import keras_hub
import numpy as np
import pytest
import tiny

import keras_cc
from keras_cc import CCCausalLM, FusedConnection


@pytest.fixture(scope="module")
def model():
    model = keras_cc.CCCausalLM(tiny.causal_lm())
    model.compile("sgd", **connected.QUICK)
    return model


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: "gemma3_270m",
        lambda: keras.Sequential([keras.layers.Dense(2)]),
        lambda: tiny.causal_lm().backbone,
        lambda: keras_hub.models.Llama3CausalLM,
    ],
)
def test_a_model_that_is_no_causal_lm(make):
    wrong = make()
    with pytest.raises(
        TypeError, match=r"`causal_lm` must be a keras_hub.*Received: causal_lm="
    ) as e:
        keras_cc.CCCausalLM(wrong)
    assert str(e.value).endswith(f"of type {type(wrong).__name__}")


def test_a_model_that_is_connected_already():
    causal_lm = tiny.causal_lm()
    keras_cc.CCCausalLM(causal_lm)
    before = [v.path for v in causal_lm.weights]
    with pytest.raises(ValueError, match=r"`causal_lm` is connected already.*Received: causal_lm="):
        keras_cc.CCCausalLM(causal_lm)
    with pytest.raises(ValueError, match=r"connected already.*Received: .*connection=None"):
        keras_cc.CCCausalLM(causal_lm, connection=None)
    assert [v.path for v in causal_lm.weights] == before


@pytest.mark.parametrize("mode", ["full", "activations"])
@pytest.mark.parametrize("connection", ["fused", None])
def test_a_model_that_is_rematerialised(mode, connection):
    with keras.RematScope(mode=mode):
        causal_lm = tiny.causal_lm()
        with pytest.raises(ValueError, match=rf"outside of it.*mode='{mode}'"):
            CCCausalLM(causal_lm, connection)
    with pytest.raises(ValueError, match=r"`keras.RematScope` remat.*Received: "):
        CCCausalLM(causal_lm, connection)
    plain = tiny.causal_lm()
    with keras.RematScope(mode=mode), pytest.raises(ValueError, match="rematerialize=True"):
        CCCausalLM(plain, connection)
    CCCausalLM(plain, connection)


def test_the_connected_model_itself_is_no_causal_lm(model):
    with pytest.raises(TypeError, match=r"`causal_lm` must be .*Received: .*of type CCCausalLM"):
        keras_cc.CCCausalLM(model)


# ---------------------------------------------------------------- options

RIGHT = {
    "alignment": ["attention", "mean", "last"],
    "gate": ["dimension", "layer", 0, 1, 0.3],
    "transform": ["linear", "low_rank", "mlp", None],
    "layers": ["all", [0], (1, 0), range(2), [-1], np.arange(2)],
    "alignment_loss_weight": [0, 0.5, 3],
    "dropout": [0, 0.9, 1],
    "without_pivot": ["bypass", "align", "transform"],
    "sink_tokens": [0, 4],
    "initial_gate": [0.01, 0.99],
    "rank": [1, 64],
    "pivot_gradient": [True, False],
    "alignment_gradient": ["transform", "stream", "full"],
    "alignment_error": ["relative", "plain"],
}
WRONG = {
    "alignment": ["cosine", None, 1, ["attention"]],
    "gate": ["token", -0.01, 1.01, None, True, float("nan"), [0.5]],
    "transform": ["cubic", True, 0, ["linear"]],
    "layers": ["some", [], None, True, 1, [True], [0.5], ["0"]],
    "alignment_loss_weight": [-1, "1", None, True, float("nan"), float("inf")],
    "dropout": [-0.1, 1.01, 1.5, "half", None, True],
    "without_pivot": ["drop", None, True, 1],
    "sink_tokens": [-1, 0.5, None, True],
    "initial_gate": [0, 1, -1, "half", None, True],
    "rank": [0, -1, 1.5, "4", None, True],
    "pivot_gradient": [None, "yes", 2],
    "alignment_gradient": ["none", None, True],
    "alignment_error": ["absolute", None],
}


LISTS = (list, tuple, range, np.ndarray)


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_every_option_has_right_and_wrong_values():
    options = set(FusedConnection().get_config())
    assert set(RIGHT) == options and set(WRONG) == options


@pytest.mark.parametrize("name, value", cases(RIGHT))
def test_right_options(name, value):
    connection = FusedConnection(**{name: value})
    assert getattr(connection, name) == (list(value) if isinstance(value, LISTS) else value)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(connection))
    assert again.get_config() == connection.get_config()


@pytest.mark.parametrize("name, value", cases(WRONG))
def test_wrong_options(name, value):
    with pytest.raises(ValueError) as error:
        FusedConnection(**{name: value})
    message = str(error.value)
    assert f"`{name}`" in message
    assert message.endswith(f"Received: {name}={value!r}")


def test_an_unknown_option():
    with pytest.raises(TypeError, match="temperature"):
        FusedConnection(temperature=1.0)


@pytest.mark.parametrize("layers", [[2], [0, 5], [-3], range(3)])
def test_layers_that_the_model_does_not_have(layers):
    causal_lm = tiny.causal_lm()
    before = [v.path for v in causal_lm.weights]
    with pytest.raises(
        ValueError, match=r"`layers` must hold block numbers from 0 to 1 .*Received: "
    ):
        keras_cc.CCCausalLM(causal_lm, FusedConnection(layers=layers))
    assert [v.path for v in causal_lm.weights] == before
    keras_cc.CCCausalLM(causal_lm, FusedConnection(layers=[-1]))  # it is as it was


@pytest.mark.parametrize("connection", ["fuse", 1, FusedConnection, ["fused"], True])
def test_a_connection_of_no_kind(connection):
    with pytest.raises(
        ValueError,
        match=r"`connection` must be one of \['flare', 'fused', 'selected'\].*Received: conn",
    ):
        keras_cc.CCCausalLM(tiny.causal_lm(), connection)


@pytest.mark.parametrize("objectives", [["contrast"], "infonce", (None,), 3])
def test_objectives(objectives):
    with pytest.raises(ValueError, match=r"`objectives` must be one of.*Received: objectives="):
        keras_cc.CCCausalLM(tiny.causal_lm(), objectives=objectives)


@pytest.mark.parametrize("preprocessor", [1, "template", lambda rows: rows])
def test_a_preprocessor_of_another_kind(preprocessor):
    with pytest.raises(
        TypeError, match=r"`preprocessor` must be a keras_cc.CCPreprocessor.*Received"
    ):
        keras_cc.CCCausalLM(tiny.causal_lm(), preprocessor=preprocessor)


# ---------------------------------------------------------------- compile, fit, evaluate


@pytest.mark.parametrize(
    "option", [{"loss": "mse"}, {"metrics": ["accuracy"]}, {"weighted_metrics": ["accuracy"]},
               {"loss_weights": [1.0]}],
)  # fmt: skip
def test_the_loss_is_no_option_of_compile(model, option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"`{name}` cannot be chosen.*Received: {name}="):
        model.compile("sgd", **option)


@pytest.mark.parametrize("wrong", ["fit", "call"])
def test_one_pivot_a_row(model, wrong):
    x, y, weights = tiny.batch()
    x = {**x, **{name: x[name][:2] for name in ("pivot_token_ids", "pivot_padding_mask")}}
    if wrong == "call":
        message = r"one pivot a row. Received: token_ids.shape=\(3, 9\), pivot_.*shape=\(2, 6\)"
        with pytest.raises(ValueError, match=message):
            model(x)
    else:
        message = r"the same number of rows. Received: .*'token_ids': 3,.*'pivot_token_ids': 2"
        with pytest.raises(ValueError, match=message):
            model.fit(x, y, sample_weight=weights, verbose=0)


@pytest.mark.parametrize("method", ["fit", "evaluate"])
@pytest.mark.parametrize("source", [[], (), {"instruction": [], "output": []}, "arrays"])
def test_an_empty_dataset(model, method, source):
    if source == "arrays":
        x, y, weights = tiny.batch()
        source = ({name: value[:0] for name, value in x.items()}, y[:0], weights[:0])
    with pytest.raises(ValueError, match=r"[Ee]mpty.*Received: "):
        getattr(model, method)(source, verbose=0)


def test_raw_rows_without_a_preprocessor(model):
    with pytest.raises(ValueError, match=r"no preprocessor to prepare it.*Received: "):
        model.fit(connected.ROWS, verbose=0)


def test_a_loss_where_there_is_no_answer_mask(model):
    x, y, weights = tiny.batch()
    with pytest.raises(
        ValueError, match=r"sample_weight must be 0 wherever answer_mask is 0.*Received"
    ):
        model.fit(x, y, sample_weight=np.ones_like(weights), verbose=0)
    del x["answer_mask"]
    with pytest.raises(ValueError, match=r"missing \['answer_mask'\].*Received: keys"):
        model.fit(x, y, sample_weight=weights, verbose=0)


class Interrupted(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt

    on_test_batch_end = on_train_batch_end


@pytest.mark.thorough("callbacks1-fit")
@pytest.mark.parametrize("method", ["fit", "evaluate"])
@pytest.mark.parametrize("callbacks", [[], [Interrupted()]])
def test_what_fails_leaves_a_model_that_works(method, callbacks):
    """On JAX, Keras alone would leave it without weights."""
    model = connected.text_model("llama3", keras_cc.FusedConnection(dropout=0.0))
    model.compile(keras.optimizers.SGD(0.0), **connected.QUICK)
    before = connected.weights(model)
    rows = connected.ROWS if callbacks else [{**connected.ROWS[0], "output": ""}]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt if callbacks else ValueError):
            getattr(model, method)(rows, batch_size=1, callbacks=callbacks, verbose=0)
        connected.assert_weights_equal(connected.weights(model), before, atol=0)
    assert np.isfinite(model.fit(connected.ROWS, verbose=0).history["loss"]).all()
    connected.assert_weights_equal(connected.weights(model), before, atol=0)
