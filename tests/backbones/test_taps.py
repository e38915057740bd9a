"""Taps: what passes the sites of every family's blocks, and that nothing else changes."""

import gc

import connected
import numpy as np
import pytest
import tiny
from keras import ops
from reference import Reference

from keras_cc import CCCausalLM
from keras_cc.backbones import taps
from keras_cc.passes import pairing, positions

X, _, _ = tiny.batch()
BLOCKS = (0, 1)
SITES = {("embedding", 0)} | {(k, n) for k in ("attention", "ffn", "hidden") for n in BLOCKS}
D = tiny.HIDDEN


def inputs(x=X):
    return {name: ops.convert_to_tensor(x[name]) for name in ("token_ids", "padding_mask")}


def logits(causal_lm, scope=None):
    with pairing.enter(scope):
        return connected.to_numpy(causal_lm(inputs()))


def observe(causal_lm, sites=SITES):
    """The logits, and the value at each site, `(B, T, d)` in float64, of one pass."""
    scope = pairing.Pass(observed=set(sites))
    found = logits(causal_lm, scope)
    return found, {s: connected.to_numpy(v).astype("float64") for s, v in scope.states.items()}


def tapped_layers(causal_lm):
    return [layer for layer in causal_lm._flatten_layers() if "call" in vars(layer)]


def weight(causal_lm, path):
    (found,) = (v for v in causal_lm.weights if v.path == path)
    return connected.to_numpy(found).astype("float64")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- every family


def rms_norm(values, scale):
    """Gemma's, whose scale is an offset from one."""
    return values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


def normed(causal_lm, name, number, norm, values):
    """`values`, through a norm of Gemma 2 or 3 behind a sublayer; other families have none."""
    if name not in ("gemma2", "gemma3"):
        return values
    return rms_norm(values, weight(causal_lm, f"decoder_block_{number}/{norm}/scale"))


def entering(causal_lm, name):
    """What enters the first block, by hand."""
    ids, length = X["token_ids"], X["token_ids"].shape[1]
    if name == "opt":
        positions = weight(causal_lm, "embeddings/position_embedding/embeddings")
        return weight(causal_lm, "embeddings/token_embedding/embeddings")[ids] + positions[:length]
    embeddings = weight(causal_lm, "token_embedding/embeddings")[ids]
    if name == "gpt2":
        return embeddings + weight(causal_lm, "position_embedding/embeddings")[:length]
    if name == "bloom":
        gamma, beta = (weight(causal_lm, f"embedding_layernorm/{n}") for n in ("gamma", "beta"))
        centred = embeddings - embeddings.mean(-1, keepdims=True)
        variance = (centred**2).mean(-1, keepdims=True)
        return centred / np.sqrt(variance + 1e-5) * gamma + beta
    return embeddings * np.sqrt(D) if name.startswith("gemma") else embeddings


@pytest.mark.thorough(*tiny.UNLIKE)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_sites_of_every_family(name):
    causal_lm = tiny.causal_lm(name)
    before = logits(causal_lm)
    taps.tap(causal_lm)
    np.testing.assert_array_equal(logits(causal_lm), before)  # outside a pass
    found, states = observe(causal_lm)
    np.testing.assert_array_equal(found, before)  # in a pass that only reads
    assert set(states) == SITES and {v.shape for v in states.values()} == {(3, 9, D)}

    # Each block adds its attention's and its feed-forward's output to what entered.
    close(states["embedding", 0], entering(causal_lm, name))
    stream = states["embedding", 0]
    for number in BLOCKS:
        attention, ffn = states["attention", number], states["ffn", number]
        stream = stream + normed(causal_lm, name, number, "post_attention_norm", attention)
        stream = stream + normed(causal_lm, name, number, "post_ffw_norm", ffn)
        close(states["hidden", number], stream)
        assert np.abs(attention).max() > 1e-2 and np.abs(ffn).max() > 1e-2
        stream = states["hidden", number]

    # Which of the two is which: without its projection a feed-forward gives nothing.
    for variable in projection(causal_lm, 0).weights:
        variable.assign(np.zeros(variable.shape))
    _, without = observe(causal_lm)
    assert not without["ffn", 0].any()
    close(without["attention", 0], states["attention", 0])
    assert np.abs(without["attention", 1] - states["attention", 1]).max() > 1e-3

    taps.untap(causal_lm)
    assert tapped_layers(causal_lm) == []
    assert observe(causal_lm)[1] == {}


def projection(causal_lm, number):
    return next(
        layer for (kind, n), layer in taps._tapped_layers(causal_lm) if (kind, n) == ("ffn", number)
    )


# ---------------------------------------------------------------- values


@pytest.fixture
def llama():
    causal_lm = tiny.causal_lm("llama3")
    taps.tap(causal_lm)
    return causal_lm, Reference(connected.weights(causal_lm))


def real(x, row):
    return x["token_ids"][row][x["padding_mask"][row] == 1]


def test_what_the_sites_of_llama_3_see(llama):
    causal_lm, reference = llama
    found, states = observe(causal_lm)
    for row in range(3):
        ids, activations = real(X, row), {}
        close(found[row, : len(ids)], reference.forward(ids, activations.setdefault))
        stream = reference.weights["token_embedding/embeddings"][ids]
        expected = {("embedding", 0): stream}
        for number in BLOCKS:
            block = f"transformer_layer_{number}"
            scaled = reference.norm(stream, f"{block}/self_attention_layernorm/scale")
            expected["attention", number] = reference.attention(scaled, block)
            expected["ffn", number] = activations[number]
            stream = stream + expected["attention", number] + expected["ffn", number]
            expected["hidden", number] = stream
        assert set(states) == set(expected)
        for site, values in expected.items():
            close(states[site][row, : len(ids)], values)
            others = [v for other, v in expected.items() if other != site]
            assert all(np.abs(values - other).max() > 1e-2 for other in others), site


def test_only_what_is_observed_is_kept(llama):
    causal_lm, _ = llama
    assert set(observe(causal_lm, {("ffn", 1)})[1]) == {("ffn", 1)}
    assert observe(causal_lm, set())[1] == {}


def test_an_edit_takes_the_values_place(llama):
    causal_lm, reference = llama
    scope = pairing.Pass(observed={("ffn", 0)})
    scope.edit(("ffn", 0), lambda value: value + 3.0)
    scope.edit(("ffn", 0), lambda value: value * 0.5)  # after the one before
    found = logits(causal_lm, scope)

    def replace(number, f):
        return (f + 3.0) * 0.5 if number == 0 else f

    kept = {}
    for row in range(3):
        ids = real(X, row)
        close(found[row, : len(ids)], reference.forward(ids, replace))
        reference.forward(ids, kept.setdefault)
        state = connected.to_numpy(scope.states["ffn", 0])[row, : len(ids)]
        close(state, replace(0, kept.pop(0)))  # as it left the site
        kept.clear()
    assert np.abs(found - logits(causal_lm)).max() > 0.1


def test_an_edit_of_the_embedding_is_what_enters(llama):
    causal_lm, _ = llama
    scope = pairing.Pass(observed=SITES)
    scope.edit(("embedding", 0), ops.zeros_like)
    logits(causal_lm, scope)
    assert not connected.to_numpy(scope.states["embedding", 0]).any()
    assert not connected.to_numpy(scope.states["hidden", 1]).any()  # no bias: nothing comes of it


# ---------------------------------------------------------------- on and off


def test_tapping_twice_is_tapping_once(llama):
    causal_lm, _ = llama
    layers, calls = tapped_layers(causal_lm), []
    assert len(layers) == 3 * len(BLOCKS)  # block, attention and projection
    methods = [vars(layer)["call"] for layer in layers]
    taps.tap(causal_lm)
    now = [vars(layer)["call"] for layer in tapped_layers(causal_lm)]
    assert all(a is b for a, b in zip(now, methods, strict=True))
    scope = pairing.Pass()
    for site in SITES:
        scope.edit(site, lambda value, site=site: calls.append(site) or value)
    logits(causal_lm, scope)
    assert len(calls) == len(SITES) and set(calls) == SITES
    taps.untap(causal_lm)
    taps.untap(causal_lm)
    assert tapped_layers(causal_lm) == []
    assert not any("quantized_call" in vars(layer) for layer in layers)


def test_a_tapped_model_is_saved_as_any_other(llama, tmp_path):
    causal_lm, _ = llama
    stock = tiny.causal_lm("llama3", seed=3)
    assert [v.path for v in causal_lm.weights] == [v.path for v in stock.weights]
    assert causal_lm.backbone.get_config().keys() == stock.backbone.get_config().keys()
    causal_lm.save_weights(tmp_path / "model.weights.h5")
    stock.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(logits(stock), logits(causal_lm))


def test_a_pass_is_left_when_a_call_fails(llama):
    causal_lm, _ = llama
    before = logits(causal_lm)
    outer, scope = pairing.Pass(observed={("hidden", 1)}), pairing.Pass()

    def fail(value):
        raise RuntimeError("no more")

    scope.edit(("ffn", 1), fail)
    with pairing.enter(outer):
        with pytest.raises(RuntimeError, match="no more"):
            logits(causal_lm, scope)
        assert pairing.current() is outer
        causal_lm(inputs())
    assert pairing.current() is None and set(outer.states) == {("hidden", 1)}
    np.testing.assert_array_equal(logits(causal_lm), before)


@pytest.mark.parametrize("connection", ["fused", "selected", "flare"])
def test_the_passes_of_a_model_are_left_when_a_call_fails(connection):
    model = CCCausalLM(tiny.causal_lm("llama3"), connection)
    broken = {name: X[name] for name in X if name != "padding_mask"}
    with pytest.raises(KeyError, match="padding_mask"):
        model(broken)
    assert pairing.current() is None and not pairing.is_scoring()
    assert np.isfinite(connected.logits(model, X)).all()


def test_under_a_fused_connection_the_ffn_site_is_what_goes_on():
    model = CCCausalLM(tiny.causal_lm("llama3"), "fused", objectives="dft")  # which taps
    connected.train_connection(model)
    _, states = observe(model.causal_lm)
    stream = states["embedding", 0]
    for number in BLOCKS:
        stream = stream + states["attention", number] + states["ffn", number]
        close(states["hidden", number], stream)
    model.disconnect()
    assert tapped_layers(model.causal_lm) == []


# ---------------------------------------------------------------- quantised models


@pytest.mark.thorough("after")
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning")
@pytest.mark.filterwarnings("ignore:.*The use of `x.T` on tensors of dim:UserWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_quantised_model(when, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # Keras calls it for every layer: seconds
    causal_lm = tiny.causal_lm("llama3")
    unquantised = logits(causal_lm)
    if when == "after":
        taps.tap(causal_lm)
    causal_lm.backbone.quantize("int8")
    if when == "before":
        taps.tap(causal_lm)
    assert projection(causal_lm, 0).quantization_mode == "int8"
    found, states = observe(causal_lm)
    np.testing.assert_array_equal(found, logits(causal_lm))
    assert set(states) == SITES and np.abs(found - unquantised).max() > 1e-5
    stream = states["embedding", 0]
    for number in BLOCKS:
        stream = stream + states["attention", number] + states["ffn", number]
        close(states["hidden", number], stream)
    taps.untap(causal_lm)
    np.testing.assert_array_equal(logits(causal_lm), found)
    assert tapped_layers(causal_lm) == []


# ---------------------------------------------------------------- positions


def test_positions_of_a_whole_pass_and_of_a_cached_step():
    where = np.array([[0, 0, 1, 0], [0, 1, 0, 0]], bool)
    scope, whole, one = pairing.Pass(), np.zeros((2, 4, D)), np.zeros((2, 1, D))
    assert scope.at(where, whole) is where
    scope.index = 0  # the prefill, which starts there
    assert scope.at(where, whole) is where
    found = []
    for index in range(4):
        scope.index = ops.convert_to_tensor(index)
        at = scope.at(ops.convert_to_tensor(where), ops.convert_to_tensor(one))
        found.append(ops.convert_to_numpy(at))
    np.testing.assert_array_equal(np.concatenate(found, axis=1), where)


def test_the_last_prompt_token():
    mask = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6], bool)
    answer = np.array([[0, 0, 1, 1, 1, 0], [0] * 6, [0] * 6])
    cases = {
        "no answer": (None, [[4], [1], []]),
        "int": (answer, [[2], [1], []]),  # the first that predicts an answer token
        "bool": (answer.astype(bool), [[2], [1], []]),
    }
    for answers, expected in cases.values():
        found = ops.convert_to_numpy(positions.last_prompt(ops.convert_to_tensor(mask), answers))
        assert [np.flatnonzero(row).tolist() for row in found] == expected


def test_picking_the_value_at_one_position():
    values = np.random.default_rng(0).normal(size=(3, 4, D)).astype("float32")
    values[2] = np.nan  # of a row without a position, nothing may come through
    where = np.zeros((3, 4), bool)
    where[0, 2] = where[1, 0] = True
    found = connected.to_numpy(positions.pick(ops.convert_to_tensor(values), where))
    np.testing.assert_array_equal(found, [values[0, 2], values[1, 0], np.zeros(D)])
