"""`keras_cc.search`: each candidate's loss is what `evaluate` says of it, set by hand."""

import itertools

import connected
import numpy as np
import pytest
import tiny
from connected import QUICK, logits

from keras_cc import CCCausalLM, FusedConnection, Incline, SearchResult, XTransplant, search

# Rows with uneven answers, so that a mean over rows or batches is not the mean over tokens.
X, Y, WEIGHTS = tiny.batch(rows=5, prompt_lengths=(4, 3, 6, 5, 2), length=10)
WEIGHTS[0, :5] = WEIGHTS[2, :6] = 0
ROWS = (X, Y, WEIGHTS)


def make(intervention, connection=None, **options):
    model = CCCausalLM(tiny.causal_lm("llama3"), connection)
    connected.train_connection(model)
    model.intervention = intervention
    if isinstance(intervention, Incline):
        for number, layer in intervention.matrices.items():
            tiny.fill(layer, 20 + number, 0.5)
    model.compile("sgd", **{**QUICK, **options})
    return model


def sft_loss(model):
    options = {"sample_weight": WEIGHTS, "batch_size": 5, "verbose": 0, "return_dict": True}
    return model.evaluate(X, Y, **options)["sft_loss"]


def look(model, grid, rows=ROWS, **options):
    return search(model, rows, grid, **{"verbose": 0, "batch_size": 2, **options})


def check(model, result, grid):
    """What was found is what `evaluate` says of every candidate; the best one is set."""
    intervention = model.intervention
    assert isinstance(result, SearchResult)
    combinations = itertools.product(*grid.values())
    assert result.candidates == tuple(
        dict(zip(grid, values, strict=True)) for values in combinations
    )
    assert result.losses.shape == (len(result.candidates),) and result.losses.dtype == np.float64
    assert result.best == result.candidates[result.losses.argmin()]
    assert intervention.get_config() == {**intervention.get_config(), **result.best}
    np.testing.assert_allclose(sft_loss(model), result.losses.min(), rtol=1e-5)
    others = [type(intervention)(**{**intervention.get_config(), **c}) for c in result.candidates]
    for other, loss in zip(others, result.losses, strict=True):
        other.matrices = intervention.matrices
        model.intervention = other
        np.testing.assert_allclose(sft_loss(model), loss, rtol=1e-5)
    assert len({round(loss, 5) for loss in result.losses}) == len(set(map(repr, others)))
    model.intervention = None
    np.testing.assert_allclose(sft_loss(model), result.baseline, rtol=1e-5)


# ---------------------------------------------------------------- what it finds


@pytest.mark.thorough
@pytest.mark.parametrize("site", ["ffn", "attention"])
def test_every_pair_of_layers(site):
    grid = {"source_layer": range(2), "target_layer": [1, 0]}
    model = make(XTransplant(1, 1, site), run_eagerly=False)
    sft_loss(model)  # compiled for what is there before the search
    result = look(model, grid)
    assert model.intervention.site == site
    check(model, result, grid)


@pytest.mark.thorough
def test_one_option_alone_and_negative_layers():
    grid = {"target_layer": (-1, -2)}
    model = make(XTransplant(-2, 0))
    result = look(model, grid)
    assert model.intervention.source_layer == -2
    check(model, result, grid)
    same = look(make(XTransplant(0, 0)), {"target_layer": [1, 0]})
    np.testing.assert_allclose(result.losses, same.losses, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("connection", [None, "fused"])
def test_sigmas(connection):
    connection = FusedConnection(dropout=0.0) if connection else None
    grid = {"sigma": [-0.5, 0.0, 0.25, np.float64(1.0)]}
    model = make(Incline(0.1), connection)
    result = look(model, grid)
    np.testing.assert_allclose(result.losses[1], result.baseline, rtol=1e-5)  # sigma 0
    check(model, result, grid)


def test_a_better_candidate_is_found_and_kept():
    """Rows answered with what one sigma says: there the loss is least."""
    model = make(Incline(0.6))
    labels = np.where(WEIGHTS > 0, logits(model, X).argmax(axis=-1), 0).astype("int32")
    model.intervention.sigma = 0.0
    model.forget_compiled()
    grid = {"sigma": [-1.0, -0.3, 0.0, 0.6, 1.5]}
    result = look(model, grid, (X, labels, WEIGHTS))
    assert result.best == {"sigma": 0.6} and model.intervention.sigma == 0.6
    assert result.losses[3] < result.baseline


@pytest.mark.thorough
def test_the_best_one_is_what_the_model_then_generates():
    model = connected.text_model("llama3", None)
    model.intervention = Incline(0.0)
    for number, layer in model.intervention.matrices.items():
        tiny.fill(layer, 20 + number, 1.0)
    model.compile("sgd", sampler="greedy", **QUICK)
    prompt = {"max_length": 24, "stop_token_ids": None}
    before = model.generate("the quick", **prompt)  # compiled with a sigma of 0
    search(model, connected.ROWS, {"sigma": [0.8]}, verbose=0)
    after = model.generate("the quick", **prompt)
    assert model.intervention.sigma == 0.8 and after != before
    model.forget_compiled()
    assert model.generate("the quick", **prompt) == after


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_of_any_size_give_the_same(batch_size):
    grid = {"source_layer": [0, 1]}
    one, other = (look(make(XTransplant(0, 1)), grid, batch_size=n) for n in (batch_size, 2))
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-6)
    np.testing.assert_allclose(one.baseline, other.baseline, rtol=1e-6)


@pytest.mark.thorough
def test_no_weight_changes_and_progress_can_be_left_out(capsys):
    model = make(Incline(0.1))
    before = connected.weights(model)
    look(model, {"sigma": [0.1, 0.2]})
    connected.assert_weights_equal(connected.weights(model), before, atol=0)
    assert capsys.readouterr() == ("", "")
    look(model, {"sigma": [0.1, 0.2]}, verbose="auto")
    assert "2/2" in capsys.readouterr().out


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "intervention, grid, message",
    [
        (XTransplant(0, 1), {}, r"`grid` must be a dict .*'source_layer', 'target_layer'.*grid={}"),
        (XTransplant(0, 1), None, r"`grid` must be a dict .*Received: grid=None"),
        (XTransplant(0, 1), [("source_layer", [0])], r"`grid` must be a dict .*Received: grid=\["),
        (XTransplant(0, 1), {"sigma": [0.1]}, r"options .* of XTransplant. Received: grid="),
        (XTransplant(0, 1), {"site": ["ffn"]}, r"options .* of XTransplant. Received: grid="),
        (XTransplant(0, 1), {"source_layer": []}, r"at least one value.*source_layer=\[\]"),
        (XTransplant(0, 1), {"source_layer": [0, 2]}, r"`source_layer` must be a block number"),
        (XTransplant(0, 1), {"target_layer": [0.5]}, r"`target_layer` must be an integer"),
        (Incline(), {"source_layer": [0]}, r"options \('sigma',\) of Incline. Received: grid="),
        (Incline(), {"sigma": ["0.1"]}, r"`sigma` must be a number. Received: sigma='0.1'"),
        (Incline(), {"sigma": ()}, r"at least one value to try. Received: sigma=\(\)"),
    ],
)
def test_grids_that_are_refused(intervention, grid, message):
    model = make(intervention)
    before = intervention.get_config()
    with pytest.raises(ValueError, match=message):
        look(model, grid)
    assert model.intervention is intervention and intervention.get_config() == before


def test_a_model_without_an_intervention():
    with pytest.raises(ValueError, match=r"`model` must have an intervention.*intervention=None"):
        look(make(None), {"sigma": [0.1]})


def test_rows_that_cannot_be_used():
    model = make(Incline(0.1))
    with pytest.raises(ValueError, match=r"[Ee]mpty"):
        look(model, {"sigma": [0.2]}, [])
    with pytest.raises(ValueError, match=r"there is no preprocessor"):
        look(model, {"sigma": [0.2]}, connected.ROWS)
    assert model.intervention.sigma == 0.1


def test_rows_without_a_pivot_where_one_is_read():
    x, y, weights = tiny.batch()
    x = {**x, "pivot_padding_mask": np.zeros_like(x["pivot_padding_mask"])}
    model = make(XTransplant(0, 1))
    with pytest.raises(ValueError, match=r"`rows` must have pivots.*Received: 3 rows without"):
        look(model, {"source_layer": [0, 1]}, (x, y, weights))
    assert model.intervention.source_layer == 0


def test_a_loss_that_is_not_a_number_is_not_the_best():
    model = CCCausalLM(tiny.causal_lm(), None, intervention=Incline())
    for layer in model.intervention.matrices.values():
        tiny.fill(layer, 0, 1e3)
    result = search(model, tiny.batch(), {"sigma": [0.1, 3e38]}, verbose=0)
    assert np.isnan(result.losses[1])
    assert result.best == {"sigma": 0.1}, result


def test_an_option_that_is_no_list():
    model = CCCausalLM(tiny.causal_lm(), None, intervention=Incline())
    with pytest.raises(ValueError, match="`grid`"):
        search(model, tiny.batch(), {"sigma": 0.1}, verbose=0)
