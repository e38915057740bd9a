"""LoRA, gradient accumulation, number types, XLA, callbacks, and losses that are not finite."""

import itertools
import warnings

import connected
import keras
import numpy as np
import pytest
import tiny
from connected import BACKEND, QUICK, ROWS, logits, monolingual

from keras_cc import CCCausalLM, FusedConnection

X, Y, WEIGHTS = tiny.batch()


def make(family="llama3", dtype=None, trained=True, **options):
    connection = FusedConnection(**{"dropout": 0.0, **options})
    model = CCCausalLM(tiny.causal_lm(family, dtype=dtype), connection)
    if trained:
        connected.train_connection(model)
    return model


def fit(model, **kwargs):
    options = {"batch_size": 3, "verbose": 0, "shuffle": False, **kwargs}
    return model.fit(X, Y, sample_weight=WEIGHTS, **options).history


def is_connection(path):
    return "decision_gate" in path or "transform_matrix" in path


# ---------------------------------------------------------------- LoRA


@pytest.mark.thorough("llama3-compiled")
@pytest.mark.parametrize(
    "family, when",
    [("llama3", "before"), ("llama3", "after"), ("llama3", "compiled"), ("gemma3", "before")],
)
def test_lora_trains_together_with_the_connection_and_nothing_else(family, when):
    keras.utils.set_random_seed(0)  # LoRA's own weights
    causal_lm = tiny.causal_lm(family)
    if when == "before":
        causal_lm.backbone.enable_lora(2)
    model = CCCausalLM(causal_lm, FusedConnection(dropout=0.0))
    optimizer = keras.optimizers.SGD(0.002)
    if when == "compiled":
        model.compile(optimizer, **QUICK)
        fit(model)
    if when != "before":
        model.enable_lora(2)
    if when != "compiled":
        model.compile(optimizer, **QUICK)

    trainable = {v.path for v in model.trainable_variables}
    lora = {path for path in trainable if "lora" in path}
    connection = {path for path in trainable if is_connection(path)}
    # Query and value, two blocks, two matrices each; G, b and D in two blocks.
    assert (len(lora), len(connection)) == (8, 6)
    assert trainable == lora | connection

    before = connected.weights(model)
    losses = fit(model, epochs=2)["loss"]
    assert connected.moved(before, connected.weights(model)) == trainable
    assert losses[1] < losses[0]

    alone = logits(model, monolingual(X))
    merged = model.merge()
    np.testing.assert_allclose(logits(merged, monolingual(X)), alone, atol=1e-4)


# ---------------------------------------------------------------- gradient accumulation


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "without_pivot"), [("llama3", "bypass"), ("gemma3", "bypass"), ("llama3", "align")]
)
def test_micro_batches_with_uneven_answers_are_one_batch(family, without_pivot):
    """Answers of 2, 5 and 4 tokens; the last row has no pivot."""
    weights = WEIGHTS.copy()
    weights[0, :5] = 0
    assert weights.sum(axis=1).tolist() == [2, 5, 4]
    after = []
    for micro_batches in (1, 3):
        options = {"alignment_gradient": "full", "without_pivot": without_pivot}
        model = make(family, alignment_loss_weight=2.0, **options)
        if without_pivot == "align":
            for layer in model.connection_layers().values():
                tiny.fill(layer, 3)  # as W = I has no error in the row without a pivot
        steps = micro_batches if micro_batches > 1 else None
        model.compile(keras.optimizers.SGD(0.02, gradient_accumulation_steps=steps), **QUICK)
        before = connected.weights(model)
        batch_size = 3 // micro_batches
        model.fit(X, Y, sample_weight=weights, batch_size=batch_size, shuffle=False, verbose=0)
        after.append(connected.weights(model))
        assert len(connected.moved(before, after[-1])) > 15
    connected.assert_weights_equal(*after, atol=1e-5)


# ---------------------------------------------------------------- number types


@pytest.mark.thorough("gemma3-mixed_bfloat16")
@pytest.mark.parametrize("family, dtype", [("gemma3", "mixed_bfloat16"), ("llama3", "bfloat16")])
def test_bfloat16(family, dtype):
    expected = fit(compiled(make(family)))
    model = make(family, dtype)
    frozen = dtype == "bfloat16"
    if frozen:
        causal_lm = tiny.causal_lm(family, dtype=dtype)
        causal_lm.backbone.trainable = False
        model = CCCausalLM(causal_lm, FusedConnection(dropout=0.0))
        connected.train_connection(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that would not train
        compiled(model, keras.optimizers.Adam(0.01))
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    before = connected.weights(model)
    found = fit(model)
    for name in ("sft_loss", "alignment_loss", "mean_gate"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0.05)
    moved = connected.moved(before, connected.weights(model))
    assert moved == {v.path for v in model.trainable_variables}
    if frozen:
        assert len(moved) == 6 and all(is_connection(path) for path in moved)


def compiled(model, optimizer=None, **kwargs):
    model.compile(optimizer or keras.optimizers.SGD(0.1), **{**QUICK, **kwargs})
    return model


def test_a_pure_bfloat16_backbone_that_is_trained_warns():
    model = make(dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"trainable variables .* are bfloat16, which Adam"):
        compiled(model, "adamw")
    for layer in model.connection_layers().values():
        assert {v.dtype for v in layer.weights} == {"float32"}


@pytest.mark.thorough("mixed_float16")
@pytest.mark.parametrize("dtype", ["mixed_float16", "float16"])
def test_float16_scales_the_loss(dtype):
    # Gemma: Llama's float16 fails on JAX and CPUs, in stock Keras too.
    expected = fit(compiled(make("gemma")))
    model = compiled(make("gemma", dtype), keras.optimizers.SGD(0.01))
    assert model.optimizer.initial_scale == 2**15
    before = connected.weights(model)
    found = fit(model, epochs=3)
    np.testing.assert_allclose(found["sft_loss"][0], expected["sft_loss"][0], rtol=0.02)
    assert found["loss"][2] < found["loss"][0]
    moved = connected.moved(before, connected.weights(model))
    assert any("delta" in path for path in moved)
    assert {layer.compute_dtype for layer in model.connection_layers().values()} == {"float16"}


# ---------------------------------------------------------------- XLA on and off


WAYS = {
    "tensorflow": [
        pytest.param({"jit_compile": False}, id="graph"),
        pytest.param({"jit_compile": True}, id="xla", marks=pytest.mark.large),
    ],
    "jax": [pytest.param({"jit_compile": True}, id="xla")],
    "torch": [],  # there it takes minutes, for a stock model as well
}


@pytest.mark.parametrize("options", WAYS[BACKEND])
def test_compiled_and_eager_steps_agree(options):
    found = []
    for way in (options, {"run_eagerly": True}):
        model = make()
        model.compile(keras.optimizers.SGD(0.05), **way)
        found.append(fit(model, epochs=2)["loss"])
    np.testing.assert_allclose(*found, rtol=1e-5)


# ---------------------------------------------------------------- losses that are not finite

TEXTS = [
    {"id": "one", "instruction": "the fox", "output": "yes", "instruction_en": "a fox"},
    {"id": "two", "instruction": "the dog", "output": "no", "instruction_en": "a dog"},
    {"id": "bad", "instruction": "the Z", "output": "yes", "instruction_en": "a Q"},
    {"id": "four", "instruction": "the fox", "output": "no", "instruction_en": "a fox"},
]


def text_model():
    # Not tied: a broken embedding row reaches the rows with that token alone.
    model = connected.text_model("llama", FusedConnection(dropout=0.0))
    connected.train_connection(model)
    return model


def poison(model, stream, value):
    """Break the embedding of a token that occurs in the row "bad" alone."""
    x = model.preprocessor(TEXTS)[0]
    ids, mask = x[stream + "token_ids"], x[stream + "padding_mask"].astype(bool)
    others = np.concatenate([
        x[name][[0, 1, 3]].ravel() for name in ("token_ids", "pivot_token_ids")
    ])  # fmt: skip
    token = next(t for t in ids[2][mask[2]] if t not in others)
    embeddings = model.causal_lm.backbone.token_embedding.embeddings
    table = connected.to_numpy(embeddings).copy()
    table[token] = value
    embeddings.assign(table)


@pytest.mark.thorough("-nan-None")
@pytest.mark.parametrize(
    "stream, value, steps", [("", np.nan, None), ("pivot_", np.inf, None), ("", np.nan, 2)]
)
def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_rows(stream, value, steps):
    def trained(rows):
        model = text_model()
        poison(model, stream, value)
        compiled(model, keras.optimizers.Adam(0.01, gradient_accumulation_steps=steps))
        if rows is TEXTS:
            message = r"The loss of step 2 \(from 0\) of epoch 1 is not finite\..*"
            message += r"Received: loss=nan for rows bad$"
            with pytest.raises(FloatingPointError, match=message):
                model.fit(rows, batch_size=1, shuffle=False, verbose=0)
        else:
            model.fit(rows, batch_size=1, shuffle=False, verbose=0)
        return model

    broken, good = trained(TEXTS), trained(TEXTS[:2])
    # The weights are those after the two good rows: nothing of the third reached them.
    connected.assert_weights_equal(connected.weights(broken), connected.weights(good), atol=1e-6)
    assert int(broken.optimizer.iterations) == int(good.optimizer.iterations)
    # The model goes on.
    history = broken.fit(TEXTS[:2], batch_size=1, shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()


@pytest.mark.thorough
def test_every_row_of_the_batch_is_named_in_a_later_epoch():
    model = text_model()
    compiled(model)
    breaks = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: poison(model, "", np.nan) if epoch == 1 else None
    )
    message = r"step 1 \(from 0\) of epoch 2 .*Received: loss=nan for rows bad, four$"
    with pytest.raises(FloatingPointError, match=message):
        model.fit(TEXTS, batch_size=2, epochs=3, shuffle=False, verbose=0, callbacks=[breaks])


# ---------------------------------------------------------------- callbacks


def test_schedules_early_stopping_and_checkpoints(tmp_path):
    model = compiled(make(trained=False))
    weights = []
    path = tmp_path / "best.weights.h5"
    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda epoch: [0.1, 0.05, 0.0][min(epoch, 2)]),
        keras.callbacks.EarlyStopping(
            "val_sft_loss", patience=1, mode="min", restore_best_weights=True
        ),
        keras.callbacks.ModelCheckpoint(
            path, "val_sft_loss", save_best_only=True, save_weights_only=True, mode="min"
        ),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: weights.append(connected.weights(model))
        ),
    ]
    history = fit(model, epochs=9, validation_data=(X, Y, WEIGHTS), callbacks=callbacks)
    np.testing.assert_allclose(history["learning_rate"], [0.1, 0.05, 0.0])
    assert connected.moved(weights[0], weights[1]) and not connected.moved(weights[1], weights[2])
    assert history["val_sft_loss"][1] == history["val_sft_loss"][2] < history["val_sft_loss"][0]
    loaded = make(trained=False)
    loaded.load_weights(path)
    np.testing.assert_allclose(logits(loaded, X), logits(model, X), atol=1e-6)


@pytest.mark.thorough
def test_an_interrupted_fit_is_taken_up_again(tmp_path):
    def run(callbacks):
        model = compiled(make(trained=False), keras.optimizers.Adam(0.01))
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        return model, lambda: fit(model, epochs=3, callbacks=[*callbacks, backup])

    def stop(epoch, logs):
        if epoch == 1:
            raise KeyboardInterrupt

    whole = compiled(make(trained=False), keras.optimizers.Adam(0.01))
    expected = fit(whole, epochs=3)["loss"]
    _, fit_interrupted = run([keras.callbacks.LambdaCallback(on_epoch_begin=stop)])
    with pytest.raises(KeyboardInterrupt):
        fit_interrupted()
    model, fit_again = run([])
    np.testing.assert_allclose(fit_again()["loss"], expected[1:], rtol=1e-5)
    connected.assert_weights_equal(
        dict(enumerate(connected.weights(model).values())),
        dict(enumerate(connected.weights(whole).values())),
        atol=1e-5,
    )


# ---------------------------------------------------------------- what is scored while it trains


def plain_model():
    model = connected.text_model("llama3", None)
    model.compile(keras.optimizers.SGD(0.0), **QUICK)
    return model


def scored(model, data, epochs=3, **options):
    options = {"validation_data": data, "batch_size": 1, "verbose": 0, **options}
    return model.fit(ROWS, epochs=epochs, **options).history["val_loss"]


SCORED = {
    "rows": lambda: ROWS,
    "function": lambda: lambda: iter(ROWS),
    "iterable": lambda: Rows(),
    "never ends": lambda: lambda: itertools.cycle(ROWS),
}


class Rows:
    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.thorough("rows")
def test_each_evaluation_begins_at_the_first_row(name):
    model = plain_model()
    first = [model.evaluate(ROWS[:n], batch_size=1, verbose=0) for n in (1, 2, 3)]
    first = [one[0] if isinstance(one, list) else one for one in first]
    assert abs(first[0] - first[1]) > 1e-3
    for steps in (1, 2):
        found = scored(model, SCORED[name](), validation_steps=steps)
        np.testing.assert_allclose(found, [first[steps - 1]] * 3, rtol=1e-4)
    if name != "never ends":
        np.testing.assert_allclose(scored(model, SCORED[name]()), [first[2]] * 3, rtol=1e-4)


def test_more_validation_steps_than_there_are_is_said():
    with pytest.raises(ValueError, match="`validation_steps` must be an integer >= 1"):
        scored(plain_model(), ROWS, validation_steps=0)
    with pytest.warns(UserWarning, match="`validation_steps` is 9, and .* has 3 batches"):
        found = scored(plain_model(), ROWS, validation_steps=9)
    np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-5)


@pytest.mark.thorough
def test_a_generator_is_read_once_and_no_further_than_it_is_scored():
    model, read = plain_model(), []

    def rows():
        for number in itertools.count():
            read.append(number)
            yield ROWS[number % 3]

    expected = scored(model, ROWS, validation_steps=2)
    np.testing.assert_allclose(scored(model, rows(), validation_steps=2), expected, rtol=1e-5)
    assert read == [0, 1]
    expected = scored(model, ROWS)
    np.testing.assert_allclose(scored(model, iter(ROWS)), expected, rtol=1e-5)


class Seen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps = self.scored = 0

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1

    def on_test_batch_end(self, batch, logs=None):
        self.scored += 1


@pytest.mark.parametrize(
    "wrap", [lambda one: one, lambda one: [[one]], lambda one: keras.callbacks.CallbackList([one])]
)
def test_callbacks_as_keras_takes_them(wrap):
    model, seen = plain_model(), Seen()
    history = model.fit(ROWS, batch_size=1, verbose=0, callbacks=wrap(seen))
    assert (seen.steps, seen.scored) == (3, 0)
    assert history.history["loss"]
    model.evaluate(ROWS, batch_size=1, verbose=0, callbacks=wrap(seen))
    assert (seen.steps, seen.scored) == (3, 3)


# ---------------------------------------------------------------- whole, or nothing at all


class OwnSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """As people write them in a notebook: without a configuration."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate / (1.0 + keras.ops.cast(step, "float32"))


class OwnSGD(keras.optimizers.SGD):
    """Of a class that nothing has registered."""


def one_for_each(of_model, of_connection):
    return keras.optimizers.MultiOptimizer(
        lambda variable: of_connection if is_connection(variable.path) else of_model
    )


OPTIMIZERS = {
    "schedule": lambda: keras.optimizers.SGD(OwnSchedule(0.05), momentum=0.9),
    "lambda": lambda: keras.optimizers.SGD(lambda: 0.05, momentum=0.9),
    "class": lambda: OwnSGD(0.05, momentum=0.9),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    "several": lambda: one_for_each(keras.optimizers.Adam(0.01), OwnSGD(0.05)),
    "accumulating": lambda: OwnSGD(0.05, momentum=0.9, gradient_accumulation_steps=2),
}
CHANGES = {
    "merge": lambda model: model.merge(),
    "disconnect": lambda model: model.disconnect(),
    "lora": lambda model: model.enable_lora(2),
}


def all_state(model):
    """Weights and what is trainable of them, in order."""
    return [(v.path, v.trainable, keras.ops.convert_to_numpy(v).tolist()) for v in model.variables]


@pytest.mark.thorough("schedule-merge", "several-disconnect", "accumulating-lora")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_without_a_configuration_starts_anew(name, change):
    """It trains on as one that was made for the changed model does."""
    losses = []
    for is_new in (False, True):
        keras.utils.set_random_seed(0)  # LoRA's own weights
        model, optimizer = make(), OPTIMIZERS[name]()
        model.compile(optimizer, **QUICK)
        fit(model, epochs=2)
        CHANGES[change](model)
        if is_new:
            model.compile(OPTIMIZERS[name](), **QUICK)
        else:
            assert model.optimizer.inner_optimizer is optimizer
        losses.append(fit(model, epochs=3)["loss"])
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]


def test_the_learning_rate_and_what_is_left_out_of_decay_stay():
    model, optimizer = make(), keras.optimizers.AdamW(0.01, weight_decay=0.5)
    model.compile(optimizer, **QUICK)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    fit(model)
    optimizer.learning_rate = 0.0
    model.merge()
    before = connected.weights(model)
    fit(model)
    assert optimizer.iterations == 1 and float(optimizer.learning_rate) == 0.0
    # Decay is a share of the rate, which is 0 here; what is left out is still known.
    connected.assert_weights_equal(connected.weights(model), before)
    kernels = [v for v in model.trainable_variables if "kernel" in v.path]
    assert not any(optimizer._use_weight_decay(v) for v in kernels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "`rank` must be an integer >= 1"),
        (("two",), "`rank` must be an integer"),
        ((2, ["querry"]), r"`target_layer_names` must be names .*'query'.*\['querry'\]"),
        ((2, ["query", "norm"]), "`target_layer_names` must be"),
        ((2, []), "`target_layer_names` must be"),
    ],
)
def test_lora_that_cannot_be_changes_nothing(arguments, message):
    model = make()
    model.compile(keras.optimizers.SGD(0.01), **QUICK)
    fit(model)
    before = all_state(model)
    with pytest.raises(ValueError, match=message):
        model.enable_lora(*arguments)
    assert all_state(model) == before
    fit(model)


def test_a_second_lora_changes_nothing(monkeypatch):
    model = make()
    model.enable_lora(2)
    model.compile(keras.optimizers.SGD(0.01), **QUICK)
    before = all_state(model)
    with pytest.raises(ValueError, match=r"LoRA is enabled already.*rank=3"):
        model.enable_lora(3)
    assert all_state(model) == before
    fit(model)

    other = make()  # what KerasHub refuses on its own, behind its first changes
    before = all_state(other)

    def fail(*_):
        other.causal_lm.backbone.trainable = False
        raise RuntimeError("no")

    monkeypatch.setattr(type(other.causal_lm.backbone), "enable_lora", fail)
    with pytest.raises(RuntimeError, match="no"):
        other.enable_lora(2)
    assert all_state(other) == before
