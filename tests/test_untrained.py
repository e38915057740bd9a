"""`TRepLiNa` inside `fit`: its anchor is the model as it was, whatever is trained."""

import connected
import keras
import numpy as np
import pytest
from backend_tools import gradients
from connected import QUICK
from keras import ops
from test_objectives_in_training import (
    ENGLISH,
    PAIRS,
    ROWS,
    WEIGHTS,
    Recording,
    X,
    Y,
    evaluate,
    fit,
    make,
    prompts,
    take,
)

from keras_cc import FlareConnection, TRepLiNa

# The first of two blocks, so that a later one is free.
FIRST = {"layer": 0, "weight": 0.5, "anchor": 2.0, "anchor_error": "plain"}


def cka(*sides):
    """The cosine of the two matrices of centred inner products."""
    centred = [np.asarray(rows) - np.mean(rows, axis=0) for rows in sides]
    one, other = ((rows @ rows.T).ravel() for rows in centred)
    return one @ other / np.sqrt((one @ one) * (other @ other))


def expected_loss(model, untrained, layer=0, anchor=2.0):
    """`(1 - CKA, the anchor)` in NumPy; `untrained` are the weights of the model as it was."""
    numpy_model = Recording(untrained, model.num_blocks)
    states, moved = [], []
    for row, (target, pivot, _) in zip(PAIRS, prompts(model), strict=True):
        numpy_model.stock(X["token_ids"][row][X["padding_mask"][row] == 1])
        before = numpy_model.hidden[layer][1 : len(target[layer]) + 1]
        states.append((target[layer].mean(0), pivot[layer].mean(0)))
        moved.append(((target[layer] - before) ** 2).mean())
    return 1 - cka(*zip(*states, strict=True)), anchor * np.mean(moved)


def kept(model):
    return {copy.name: connected.to_numpy(copy) for copy in model.untrained_weights.variables}


def of_block(weights, number):
    return {path for path in weights if path.startswith(f"transformer_layer_{number}/")}


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("connection", [None, "fused"])
def test_the_loss_before_and_after_training(connection):
    model = make(TRepLiNa(**FIRST), connection, rate=0.2)
    untrained = connected.weights(model)
    alignment, anchor = expected_loss(model, untrained)
    assert (anchor == 0) == (connection is None)  # the connection is part of what has moved
    first = fit(model)
    np.testing.assert_allclose(first["treplina_loss"], alignment + anchor, rtol=2e-4)
    rest = first["sft_loss"][0] + first.get("alignment_loss", [0.0])[0]
    np.testing.assert_allclose(first["loss"], rest + 0.5 * (alignment + anchor), rtol=2e-5)
    fit(model, epochs=3)
    alignment, after = expected_loss(model, untrained)
    assert after > anchor + 1e-3
    found = evaluate(model)["treplina_loss"]
    np.testing.assert_allclose(found, alignment + after, rtol=2e-4)


@pytest.mark.thorough
def test_an_evaluation_before_the_first_fit_changes_nothing():
    model = make(TRepLiNa(**FIRST), rate=0.2)
    untrained = connected.weights(model)
    assert evaluate(model)["treplina_loss"] == pytest.approx(sum(expected_loss(model, untrained)))
    fit(model, epochs=3)
    expected = sum(expected_loss(model, untrained))
    assert evaluate(model)["treplina_loss"] == pytest.approx(expected, rel=2e-4)


@pytest.mark.thorough
def test_the_gradient_takes_the_model_as_it_was_for_a_constant():
    model = make(TRepLiNa(**FIRST), rate=0.2)
    untrained = connected.weights(model)
    fit(model, epochs=2)
    x = {name: ops.convert_to_tensor(value) for name, value in X.items()}

    def loss():
        return ops.sum(model(x, training=True)["treplina_loss"])

    variables = model.trainable_variables
    found = dict(zip((v.path for v in variables), gradients(loss, variables), strict=True))
    learns = {path for path, gradient in found.items() if np.any(gradient)}
    assert learns == of_block(found, 0) | {"token_embedding/embeddings"}
    # By differences of the formula, in one of the weights.
    path = "transformer_layer_0/feedforward_output_dense/kernel"
    variable = next(v for v in variables if v.path == path)
    value = connected.to_numpy(variable)
    sides = []
    for step in (1e-2, -1e-2):
        moved = value.copy()
        moved[3, 5] += step
        variable.assign(moved)
        sides.append(len(PAIRS) * sum(expected_loss(model, untrained)))
    assert found[path][3, 5] == pytest.approx((sides[0] - sides[1]) / 2e-2, rel=1e-2, abs=1e-4)


def test_the_anchor_holds():
    """The same steps of a loss that is CKA and the anchor alone, light and heavy."""
    rows = X, Y, np.zeros_like(WEIGHTS)
    moved = []
    for anchor in (0.0, 5.0):
        model = make(TRepLiNa(0, anchor=anchor, anchor_error="plain", weight=1.0), rate=0.2)
        untrained = connected.weights(model)
        first = expected_loss(model, untrained)[0]
        fit(model, rows, epochs=8)
        alignment, distance = expected_loss(model, untrained, anchor=1.0)
        assert alignment < 0.95 * first
        moved.append(distance)
    assert moved[1] < 0.8 * moved[0]


def test_rows_without_a_pivot_and_too_few_rows_count_nothing():
    model = make(TRepLiNa(**FIRST))
    assert fit(model, take(ROWS, [*ENGLISH, 0]), 3)["treplina_loss"] == [0.0]
    with pytest.raises(ValueError, match="A batch must have at least 3 rows"):
        fit(model, batch_size=2)


# ---------------------------------------------------------------- what is kept


def test_kept_is_what_is_trained_up_to_the_block():
    model = make(TRepLiNa(**FIRST), rate=0.2)
    before = connected.weights(model)
    assert kept(model) == {} and make(TRepLiNa(anchor=0)).untrained_weights is None
    count = len(model.trainable_variables)
    fit(model)
    found = kept(model)
    last = of_block(before, 1)
    assert {name.replace("|", "/") for name in found} == set(before) - last
    for name, value in found.items():
        np.testing.assert_array_equal(value, before[name.replace("|", "/")])
    fit(model, epochs=2)
    for name, value in kept(model).items():  # not what the second fit began with
        np.testing.assert_array_equal(value, found[name])
    assert len(model.trainable_variables) == count


@pytest.mark.thorough
def test_what_is_frozen_is_not_copied_until_it_is_trained():
    model = make(TRepLiNa(**FIRST), rate=0.2)
    embedding = model.causal_lm.backbone.token_embedding
    embedding.trainable = False
    fit(model)
    assert not [name for name in kept(model) if "embedding" in name]
    untrained = connected.weights(make(()))
    assert evaluate(model)["treplina_loss"] == pytest.approx(
        sum(expected_loss(model, untrained)), rel=2e-4
    )
    embedding.trainable = True
    model.compile(keras.optimizers.SGD(0.2), **QUICK)
    fit(model)
    assert [name for name in kept(model) if "embedding" in name]
    assert evaluate(model)["treplina_loss"] == pytest.approx(
        sum(expected_loss(model, untrained)), rel=2e-4
    )


def test_with_lora_the_copy_is_lora_and_the_anchor_the_model_without_it():
    model = make(TRepLiNa(**FIRST))
    untrained = connected.weights(model)
    model.enable_lora(2)
    model.compile(keras.optimizers.SGD(2.0), **QUICK)
    fit(model, epochs=4)
    assert len(kept(model)) == 4 and all("lora" in name for name in kept(model))
    hidden = {}
    for name, weights in (("untrained", untrained), ("now", connected.weights(model))):
        numpy_model = Recording(merged(weights), 2)
        hidden[name] = []
        for row in PAIRS:
            numpy_model.stock(X["token_ids"][row][X["padding_mask"][row] == 1])
            last = int(np.flatnonzero(X["answer_mask"][row])[0])
            hidden[name].append(numpy_model.hidden[0][1 : last + 1])
    moved = [((a - b) ** 2).mean() for a, b in zip(*hidden.values(), strict=True)]
    bare = make(TRepLiNa(layer=0, anchor=0.0))
    bare.enable_lora(2)
    bare.compile(keras.optimizers.SGD(0.0), **QUICK)
    for variable in bare.causal_lm.backbone.variables:
        variable.assign(connected.weights(model)[variable.path])
    found = evaluate(model)["treplina_loss"] - evaluate(bare)["treplina_loss"]
    assert found == pytest.approx(2.0 * np.mean(moved), rel=1e-3) and found > 1e-3


def merged(weights):
    """The weights with LoRA's matrices in their kernels: alpha is its rank in Keras."""
    weights = {path: value for path, value in weights.items() if "untrained" not in path}
    for path in [path for path in weights if path.endswith("lora_kernel_a")]:
        kernel = path.replace("lora_kernel_a", "kernel")
        a, b = weights[path], weights[path.replace("kernel_a", "kernel_b")]
        weights[kernel] = weights[kernel] + np.tensordot(a, b, axes=1)
    return weights


@pytest.mark.thorough
def test_beside_flare_the_anchor_is_the_model_without_its_lora():
    model = make(TRepLiNa(layer=0, weight=0.5), FlareConnection(rank=2))
    for layer in model.connection_layers().values():
        for variable in layer.trainable_variables:
            variable.assign(np.zeros(variable.shape))
    weights = connected.weights(model)
    fit(model)
    x = {name: ops.convert_to_tensor(value) for name, value in X.items()}
    first = connected.to_numpy(model(x, training=True)["treplina_loss"]).sum()
    for layer in model.connection_layers().values():
        for variable in layer.trainable_variables:
            variable.assign(np.ones(variable.shape))
    second = connected.to_numpy(model(x, training=True)["treplina_loss"]).sum()
    assert second > 2 * first
    for name, value in kept(model).items():
        np.testing.assert_array_equal(value, weights[name.replace("|", "/")])


# ---------------------------------------------------------------- saved


@pytest.mark.thorough("keras")
@pytest.mark.parametrize("ending", ["keras", "weights.h5"])
def test_it_is_saved_with_the_model(ending, tmp_path):
    model = make(TRepLiNa(**FIRST), rate=0.2)
    untrained = connected.weights(model)
    fit(model, epochs=3)
    expected = evaluate(model)["treplina_loss"]
    path = tmp_path / f"model.{ending}"
    if ending == "keras":
        model.save(path)
        again = keras.models.load_model(path)
        again.compile(keras.optimizers.SGD(0.2), **QUICK)
    else:
        model.save_weights(path)
        again = make(TRepLiNa(**FIRST), rate=0.2)
        again.optimizer.build(again.trainable_variables)
        again.load_weights(path)
    assert again.objectives[0].get_config() == model.objectives[0].get_config()
    assert evaluate(again)["treplina_loss"] == pytest.approx(expected, rel=1e-5)
    fit(again, epochs=2)
    assert sum(expected_loss(again, untrained)) == pytest.approx(
        evaluate(again)["treplina_loss"], rel=2e-4
    )
    for name, value in kept(again).items():
        np.testing.assert_array_equal(value, kept(model)[name])


@pytest.mark.thorough
def test_a_model_without_an_anchor_loads_what_has_one(tmp_path):
    model = make(TRepLiNa(**FIRST), rate=0.2)
    fit(model)
    model.save_weights(tmp_path / "a.weights.h5")
    plain = make(())
    plain.optimizer.build(plain.trainable_variables)
    plain.load_weights(tmp_path / "a.weights.h5")
    weights = connected.weights(plain)
    found = {path: value for path, value in connected.weights(model).items() if path in weights}
    connected.assert_weights_equal(found, weights, atol=0)
    plain.save_weights(tmp_path / "b.weights.h5")
    again = make(TRepLiNa(**FIRST))
    again.optimizer.build(again.trainable_variables)
    again.load_weights(tmp_path / "b.weights.h5")  # nothing was kept: it starts from here
    assert kept(again) == {}


def test_a_merged_model_has_nothing_of_it():
    model = make(TRepLiNa(**FIRST), "fused")
    fit(model)
    stock = model.merge()
    assert model.untrained_weights is None and model.objectives == ()
    for variable in (*stock.variables, *model.variables):
        assert "untrained" not in variable.path
    assert "treplina_loss" not in fit(model)
