"""Activations that are computed twice: the same training, and less that is kept."""

import connected
import keras
import numpy as np
import pytest
import tiny

from keras_cc import (
    DFT,
    CCCausalLM,
    Consistency,
    FlareConnection,
    FusedConnection,
    SelectedConnection,
)

FULL = FusedConnection(dropout=0.5, pivot_gradient=True, alignment_gradient="full", gate="layer")
CASES = {
    "fused": lambda: {"connection": FusedConnection(dropout=0.5)},
    "full": lambda: {"connection": FULL},
    "answer": lambda: {"connection": FusedConnection(alignment="answer")},
    "selected": lambda: {"connection": SelectedConnection()},
    "flare": lambda: {"connection": FlareConnection()},
    "plain": lambda: {"connection": None},
    "objectives": lambda: {"connection": "fused", "objectives": [DFT(), Consistency()]},
}


def trained(family, options, rematerialize, steps=3, rate=0.02, **compiling):
    """Weights and history after some steps of SGD, from weights that are all not zero."""
    keras.utils.set_random_seed(5)
    no_dropout = {"dropout": 0.0} if family in ("gpt2", "opt") else {}
    causal_lm = tiny.causal_lm(family, **no_dropout)
    model = CCCausalLM(causal_lm, rematerialize=rematerialize, **options)
    for number, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, 3 + number)
    model.compile(keras.optimizers.SGD(rate), **compiling)
    history = model.fit(
        tiny.batch(), batch_size=3, epochs=steps, shuffle=False, verbose=0, seed=1
    ).history
    return {v.path: np.array(v) for v in model.trainable_variables}, history


def check_alike(family, options, **compiling):
    # Sharp attention: rounding grows by eight in each step, see `trajectory.py`.
    rate = 0.001 if family == "gemma3" else 0.02
    (kept, history), (twice, other) = (
        trained(family, options(), flag, rate=rate, **compiling) for flag in (False, True)
    )
    assert history.keys() == other.keys() and len(set(history["loss"])) > 1
    for name, values in history.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-5, atol=1e-6)
    start = {v.path: np.array(v) for v in CCCausalLM(tiny.causal_lm(family)).variables}
    assert any(not np.array_equal(start.get(path), value) for path, value in kept.items())
    for (path, value), again in zip(kept.items(), twice.values(), strict=True):
        np.testing.assert_allclose(value, again, rtol=1e-5, atol=1e-6, err_msg=path)


# All on PyTorch, which compiles nothing; elsewhere those that differ most.
FAMILIES = tiny.FAMILIES if connected.BACKEND == "torch" else tiny.UNLIKE


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    check_alike(family, CASES["fused"], **connected.QUICK)


@pytest.mark.parametrize("case", [case for case in CASES if case != "fused"])
@pytest.mark.thorough("full", "selected")
def test_every_connection(case):
    check_alike("llama3", CASES[case], **connected.QUICK)


@pytest.mark.parametrize("case", ["full", pytest.param("objectives", marks=pytest.mark.large)])
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="runs eagerly")
def test_compiled(case):
    check_alike("llama3", CASES[case])


def test_mixed_precision():
    def made(rematerialize):
        keras.utils.set_random_seed(5)
        causal_lm = tiny.causal_lm("llama3", dtype="mixed_bfloat16")
        model = CCCausalLM(causal_lm, rematerialize=rematerialize)
        model.compile(keras.optimizers.SGD(0.02), **connected.QUICK)
        history = model.fit(tiny.batch(), batch_size=3, epochs=2, shuffle=False, verbose=0)
        return history.history["loss"]

    np.testing.assert_allclose(made(False), made(True), rtol=1e-3)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only torch tells what it keeps")
@pytest.mark.parametrize("case", ["fused", "full", "plain"])
def test_less_is_kept(case):
    import torch

    def kept(rematerialize):
        causal_lm = tiny.causal_lm("llama3", num_layers=8)
        model = CCCausalLM(causal_lm, rematerialize=rematerialize, **CASES[case]())
        x, *_ = tiny.batch()
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            outputs = model(x, training=True)
        weights = {w.value.data_ptr() for w in model.weights}
        assert outputs["logits"].requires_grad
        return sum(size for place, size in sizes.items() if place not in weights)

    assert kept(True) < 0.5 * kept(False)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only XLA says what it needs")
def test_less_is_needed():
    import jax

    def needed(rematerialize):
        causal_lm = tiny.causal_lm("llama3", num_layers=8)
        model = CCCausalLM(causal_lm, rematerialize=rematerialize)
        x, y, weights = tiny.batch(prompt_lengths=(20, 20, 20), length=200)
        trained = [v.value for v in model.trainable_variables]
        fixed = [v.value for v in model.non_trainable_variables]

        def loss(values):
            outputs, _ = model.stateless_call(values, fixed, x, training=True)
            return model.compute_loss(x, y, outputs, weights)

        def stateless_loss(values):
            with keras.StatelessScope():
                return loss(values)

        # On a CPU, XLA takes away what keeps the two computations apart.
        options = {"xla_disable_hlo_passes": "cse_barrier_expander"}
        compiled = jax.jit(jax.grad(stateless_loss)).lower(trained).compile(options)
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(True) < 0.7 * needed(False)


def test_it_is_saved_and_is_no_matter_at_inference(tmp_path):
    keras.utils.set_random_seed(0)
    model = CCCausalLM(tiny.causal_lm("llama3"), rematerialize=True)
    x, *_ = tiny.batch()
    model.compile("sgd", **connected.QUICK)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.rematerialize is True
    plain = CCCausalLM(tiny.causal_lm("llama3"))
    for inputs in (x, {name: x[name] for name in ("token_ids", "padding_mask")}):
        logits = [keras.ops.convert_to_numpy(m(inputs)["logits"]) for m in (model, loaded, plain)]
        np.testing.assert_array_equal(logits[0], logits[1])
        np.testing.assert_array_equal(logits[0], logits[2])


@pytest.mark.parametrize("wrong", [1, None, "full"])
def test_bad_input(wrong):
    with pytest.raises(ValueError, match=f"`rematerialize` must be .*Received: .*{wrong!r}"):
        CCCausalLM(tiny.causal_lm("llama3"), rematerialize=wrong)


def test_random_blocks_are_refused():
    causal_lm = tiny.causal_lm("gpt2", dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout=0.*Received: .*rate=0\.1"):
        CCCausalLM(causal_lm, rematerialize=True)
    CCCausalLM(causal_lm)  # nothing has changed
