"""`CCCausalLM`: the loss and every metric against numbers worked out beside it."""

import connected
import keras
import numpy as np
import pytest
import tiny
from connected import QUICK, ROWS, logits, monolingual

import keras_cc

METRICS = {"loss", "sft_loss", "alignment_loss", "mean_gate", "token_accuracy"}


def make(family="llama3", trained=True, **options):
    connection = keras_cc.FusedConnection(**{"dropout": 0.0, **options})
    model = keras_cc.CCCausalLM(tiny.causal_lm(family), connection)
    if trained:
        connected.train_connection(model)
    return model


def compiled(model, learning_rate=0.1, **kwargs):
    model.compile(keras.optimizers.SGD(learning_rate), **{**QUICK, **kwargs})
    return model


def first_logs(model, x, y, weights, **kwargs):
    history = model.fit(x, y, sample_weight=weights, batch_size=len(y), verbose=0, **kwargs)
    return {name: values[0] for name, values in history.history.items()}


# ---------------------------------------------------------------- losses and metrics


@pytest.mark.thorough("gemma3")
@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_the_first_step_reports_the_connected_pass_of_the_untouched_weights(family):
    model = make(family, alignment_loss_weight=0.7)
    x, y, weights = tiny.batch()
    outputs = connected.outputs(model, x)
    sft = connected.sft_loss(outputs["logits"], y, weights)
    # Means over the real tokens of the two rows that have a pivot; the first token of each is
    # a sink, which is not fused.
    tokens = x["padding_mask"][:2].sum()
    np.testing.assert_array_equal(
        outputs["alignment_tokens"], [*x["padding_mask"][:2].sum(axis=1), 0]
    )
    alignment = outputs["alignment_error"].sum() / tokens

    logs = first_logs(compiled(model), x, y, weights)

    assert set(logs) == METRICS
    np.testing.assert_allclose(logs["sft_loss"], sft, rtol=1e-5)
    np.testing.assert_allclose(logs["alignment_loss"], alignment, rtol=1e-4)
    np.testing.assert_allclose(logs["loss"], sft + 0.7 * alignment, rtol=1e-5)
    np.testing.assert_allclose(logs["mean_gate"], outputs["gate"].sum() / (tokens - 2), rtol=1e-5)
    np.testing.assert_allclose(
        logs["token_accuracy"], connected.token_accuracy(outputs["logits"], y, weights), rtol=1e-6
    )


def test_a_constant_gate_has_the_alignment_loss_of_the_formula():
    # With W = I: T - Ff = -alpha (A - F), so the plain error grows with alpha squared.
    losses = {}
    x, y, weights = tiny.batch()
    for gate in (0.2, 0.4):
        model = make(trained=False, gate=gate, layers=[0], alignment_error="plain")
        logs = first_logs(compiled(model), x, y, weights)
        np.testing.assert_allclose(logs["mean_gate"], gate, atol=1e-7)
        losses[gate] = logs["alignment_loss"]
    assert losses[0.2] > 0
    np.testing.assert_allclose(losses[0.4], 4 * losses[0.2], rtol=1e-5)


def test_evaluate_scores_the_monolingual_path_and_reports_the_connected_one():
    model = compiled(make())
    x, y, weights = tiny.batch()
    alone, paired = logits(model, monolingual(x)), logits(model, x)
    np.testing.assert_allclose(alone, logits(model.causal_lm, monolingual(x)), atol=1e-6)

    # Two batches of unequal size: every mean is over all their tokens.
    result = model.evaluate(x, y, sample_weight=weights, batch_size=2, verbose=0, return_dict=True)

    assert set(result) == METRICS | {"connected_sft_loss"}
    expected = connected.sft_loss(alone, y, weights)
    np.testing.assert_allclose(result["sft_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        result["connected_sft_loss"], connected.sft_loss(paired, y, weights), rtol=1e-5
    )
    np.testing.assert_allclose(
        result["token_accuracy"], connected.token_accuracy(alone, y, weights), rtol=1e-6
    )
    assert abs(result["sft_loss"] - result["connected_sft_loss"]) > 1e-3
    # Nothing but the monolingual loss: the alignment is no part of what a user gets.
    whole = model.evaluate(x, y, sample_weight=weights, batch_size=3, verbose=0, return_dict=True)
    np.testing.assert_allclose(whole["loss"], expected, rtol=1e-5)


def test_validation_data_is_scored_as_evaluate_does_and_stands_beside_the_training_metrics():
    model = compiled(make(), learning_rate=0.0)
    x, y, weights = tiny.batch()
    logs = first_logs(model, x, y, weights, validation_data=(x, y, weights))
    assert set(logs) == METRICS | {f"val_{name}" for name in METRICS | {"connected_sft_loss"}}
    alone = connected.sft_loss(logits(model, monolingual(x)), y, weights)
    np.testing.assert_allclose(logs["val_sft_loss"], alone, rtol=1e-5)
    np.testing.assert_allclose(logs["val_connected_sft_loss"], logs["sft_loss"], rtol=1e-5)


def test_the_progress_bar_shows_the_parts(capsys):
    x, y, weights = tiny.batch()
    compiled(make()).fit(x, y, sample_weight=weights, batch_size=3, verbose=2)
    shown = capsys.readouterr().out
    for name in METRICS:
        assert f"{name}: " in shown
    assert "connected_sft_loss" not in shown and "last_rows" not in shown


# ---------------------------------------------------------------- what data looks like


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_raw_rows_train_as_the_arrays_that_the_preprocessor_makes_of_them(family):
    results = []
    for raw in (True, False):
        model = compiled(connected.text_model(family, keras_cc.FusedConnection(dropout=0.0)))
        source = {"x": ROWS}
        if not raw:
            x, y, weights = model.preprocessor(ROWS)
            assert x["pivot_padding_mask"].any(axis=1).tolist() == [True, True, False]
            source = {"x": x, "y": y, "sample_weight": weights}
        history = model.fit(**source, batch_size=3, shuffle=False, verbose=0).history
        results.append((history, connected.weights(model)))
    # To rounding: rows are padded to what they need, where no shape is compiled.
    (raw_history, raw_weights), (history, weights) = results
    assert raw_history.keys() == history.keys()
    for name, values in history.items():
        assert raw_history[name] == pytest.approx(values, rel=1e-5), name
    connected.assert_weights_equal(raw_weights, weights, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_validation_data_takes_raw_rows_too():
    model = compiled(connected.text_model("llama3"), learning_rate=0.0)
    history = model.fit(ROWS, batch_size=3, validation_data=ROWS[:2], verbose=0).history
    result = model.evaluate(ROWS[:2], verbose=0, return_dict=True)
    np.testing.assert_allclose(history["val_sft_loss"], [result["sft_loss"]], rtol=1e-6)


@pytest.mark.thorough("15")
@pytest.mark.parametrize("pivot_length", [4, 15])
def test_target_and_pivot_differ_in_length_and_padding_changes_nothing(pivot_length):
    model = make()
    x, _, _ = tiny.batch(length=9, pivot_length=pivot_length)
    before = logits(model, x)
    assert before.shape == (3, 9, tiny.VOCABULARY)
    longer = {
        name: np.pad(value, [(0, 0), (0, 5)], constant_values=0 if "mask" in name else 7)
        for name, value in x.items()
    }
    for name in ("token_ids", "pivot_token_ids"):
        mask = longer[name.replace("token_ids", "padding_mask")]
        longer[name] = np.where(mask, longer[name], 7)
    after = logits(model, longer)[:, :9]
    real = x["padding_mask"].astype(bool)
    np.testing.assert_allclose(after[real], before[real], atol=2e-5)


def test_rows_without_a_pivot_bypass_the_connection():
    model, stock = make(), tiny.causal_lm()
    x, y, weights = tiny.batch()
    plain = logits(stock, monolingual(x))
    outputs = connected.outputs(model, x)
    paired = outputs["logits"]
    np.testing.assert_allclose(paired[2], plain[2], atol=1e-5)
    real = x["padding_mask"].astype(bool)
    assert np.abs(paired[:2] - plain[:2])[real[:2]].max() > 1e-2
    assert outputs["alignment_error"][2] == 0
    # A batch of such rows alone is plain fine-tuning: no alignment, no gate, no transform.
    alone = {**x, "pivot_padding_mask": np.zeros_like(x["pivot_padding_mask"])}
    logs = first_logs(compiled(model), alone, y, weights)
    assert logs["alignment_loss"] == 0 and logs["mean_gate"] == 0
    np.testing.assert_allclose(logs["loss"], connected.sft_loss(plain, y, weights), rtol=1e-5)


@pytest.mark.thorough("bypass")
@pytest.mark.parametrize("without_pivot", ["bypass", "align", "transform"])
def test_connection_dropout_sends_samples_through_the_transform(without_pivot):
    x, y, weights = tiny.batch()
    # Every sample, whatever is drawn.
    model = make(dropout=0.999999, without_pivot=without_pivot)
    through = logits(model, monolingual(x))
    if without_pivot != "transform":
        through[2] = logits(tiny.causal_lm(), monolingual(x))[2]  # no pivot: F(x), as ever
    logs = first_logs(compiled(model), x, y, weights)
    np.testing.assert_allclose(logs["sft_loss"], connected.sft_loss(through, y, weights), rtol=1e-5)


# ---------------------------------------------------------------- plain fine-tuning


@pytest.mark.thorough("gemma3")
@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_without_a_connection_a_step_is_the_stock_models(family):
    x, y, weights = tiny.batch()
    stock = tiny.causal_lm(family)
    stock.compile(
        keras.optimizers.SGD(0.02),
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        **QUICK,
    )
    inputs = {name: x[name] for name in stock.backbone.input}
    stock_logs = stock.train_on_batch(inputs, y, weights, return_dict=True)

    model = compiled(keras_cc.CCCausalLM(tiny.causal_lm(family), connection=None), 0.02)
    before = logits(model.causal_lm, monolingual(x))
    logs = first_logs(model, x, y, weights)

    assert set(logs) == {"loss", "sft_loss", "token_accuracy"}
    np.testing.assert_allclose(logs["loss"], stock_logs["loss"], rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], connected.sft_loss(before, y, weights), rtol=1e-5)
    np.testing.assert_allclose(
        logs["token_accuracy"], stock_logs["sparse_categorical_accuracy"], rtol=1e-6
    )
    ours, theirs = connected.weights(model.causal_lm), connected.weights(stock)
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# ---------------------------------------------------------------- logits where answers are


def test_logits_at_answer_positions_alone_give_the_same_step():
    family = "gemma2"  # with soft caps in the head
    x, y, weights = tiny.batch()
    positions = keras_cc.data.prepared.answer_positions(x["answer_mask"])
    model = make(family)
    everywhere = logits(model, x)
    picked = logits(model, {**x, "answer_positions": positions})
    assert picked.shape == (3, positions.shape[1], tiny.VOCABULARY)
    assert positions.shape[1] < 9
    np.testing.assert_allclose(
        picked, np.take_along_axis(everywhere, positions[..., None], axis=1), atol=1e-6
    )

    after = []
    for inputs in (x, {**x, "answer_positions": positions}):
        model = compiled(make(family))
        logs = model.train_on_batch(inputs, y, weights, return_dict=True)
        after.append((logs, connected.weights(model)))
    (logs, one), (other_logs, other) = after
    for name in METRICS:
        np.testing.assert_allclose(logs[name], other_logs[name], rtol=1e-5)
    connected.assert_weights_equal(one, other, atol=1e-6)


def test_fit_asks_for_logits_at_answer_positions(monkeypatch):
    model = compiled(make())
    shapes = []
    compute_loss = type(model).compute_loss

    def spy(self, x=None, y=None, y_pred=None, *args, **kwargs):
        shapes.append(tuple(y_pred["logits"].shape))
        return compute_loss(self, x, y, y_pred, *args, **kwargs)

    monkeypatch.setattr(type(model), "compute_loss", spy)
    x, y, weights = tiny.batch()
    model.fit(x, y, sample_weight=weights, batch_size=3, verbose=0)
    # The longest answer has 5 positions, and windows are powers of two: 8 of the 9 positions.
    assert set(shapes) == {(3, 8, tiny.VOCABULARY)}


# ---------------------------------------------------------------- learning


@pytest.mark.thorough
def test_one_batch_is_overfitted_on_both_paths():
    model = make(trained=False, dropout=0.5)
    model.compile(keras.optimizers.Adam(1e-2))
    x, y, weights = tiny.batch()
    before = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    history = model.fit(x, y, sample_weight=weights, epochs=30, verbose=0, seed=0).history
    after = model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True)
    assert history["sft_loss"][-1] < 0.3 * history["sft_loss"][0]
    for path in ("sft_loss", "connected_sft_loss"):
        assert after[path] < 0.3 * before[path]
    assert after["token_accuracy"] == 1


@pytest.mark.thorough
def test_the_order_of_rows_is_drawn_from_the_seed():
    runs = []
    for seed in (0, 0, 1):
        model = compiled(make())
        x, y, weights = tiny.batch()
        history = model.fit(
            x, y, sample_weight=weights, batch_size=1, epochs=2, seed=seed, verbose=0
        )
        runs.append(history.history["loss"])
    assert runs[0] == runs[1] != runs[2]
