"""Callbacks that watch: what they show is the model of that step, and training does not notice."""

import io
import sys

import connected
import keras
import keras_hub
import numpy as np
import pytest
from backend_tools import run_python
from connected import BACKEND, QUICK, ROWS

import keras_cc
from keras_cc.calibration.atlas import gate_atlas
from keras_cc.callbacks import GateStatistics, SampleGenerations

PROMPTS = ["Kenya'nın para birimi nedir?", "the quick fox"]
PIVOTS = ["What is the currency of Kenya?", "the fox"]
LENGTH = 44
STEPS = 2  # an epoch: three rows, two a batch
JAX = BACKEND == "jax"  # where the rest of the tests compile what they run already


def make(connection="fused", sampler="top_k", seed=3, rate=0.1, **options):
    """A compiled tiny model whose dropout, samplers and weights come from `seed`."""
    keras.utils.set_random_seed(seed)
    model = connected.text_model("llama3", connection)
    if connection is not None:
        connected.train_connection(model)
    model.compile(keras.optimizers.SGD(rate), sampler=sampler, **{**QUICK, **options})
    return model


def fit(model, *callbacks, epochs=2, **options):
    options = {"batch_size": 2, "seed": 5, "verbose": 0, **options}
    return model.fit(ROWS, epochs=epochs, callbacks=list(callbacks), **options).history


def samples(prompts=PROMPTS, **options):
    return SampleGenerations(prompts, max_length=LENGTH, **{"file": io.StringIO(), **options})


def greedy(model, pivot_prompts=None):
    """What the model says, with a compiled loop of its own."""
    model.causal_lm.compile(sampler="greedy")
    return model.generate(PROMPTS, LENGTH, pivot_prompts=pivot_prompts, strip_prompt=True)


class Losses(keras.callbacks.Callback):
    """The loss of every step."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


# ---------------------------------------------------------------- training does not notice


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("connection", "options"),
    [("fused", {}), ("selected", {}), ("fused", {"run_eagerly": False})][: 2 if JAX else 3],
)
def test_training_goes_on_exactly_as_without(connection, options):
    """Connection dropout and Gumbel noise draw from the model's generators at every step."""

    def train(*callbacks):
        model = make(connection, **options)
        losses = Losses()
        history = fit(model, *callbacks, losses, validation_data=ROWS)
        return losses.losses, history, connected.weights(model)

    plain, plain_history, plain_weights = train()
    assert len(set(plain)) == len(plain) == 2 * STEPS
    looks = [samples(), samples(every=1, pivot_prompts=PIVOTS), GateStatistics(ROWS, every=1)]
    watched, history, weights = train(*looks)
    assert watched == plain
    assert all(history[name] == plain_history[name] for name in plain_history)
    connected.assert_weights_equal(weights, plain_weights, rtol=0)
    assert [len(look.history) for look in looks] == [3, 5, 5]


# ---------------------------------------------------------------- when they look


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("every", "steps"),
    [("epoch", [0, 2, 4, 6]), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (9, [0])],
)
def test_steps_at_which_they_look(every, steps):
    model, watch = make(), GateStatistics(ROWS, every=every)
    fit(model, watch, epochs=3)
    assert [step for step, _ in watch.history] == steps


def test_steps_go_on_in_the_next_fit():
    model, look = make(), samples()
    fit(model, look, epochs=1)
    fit(model, look, epochs=1)
    assert [step for step, _ in look.history] == [0, 2, 2, 4]
    assert look.history[1] == look.history[2]


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on torch")
def test_several_steps_at_once():
    model, look = make(steps_per_execution=2, run_eagerly=False), samples(every=1)
    fit(model, look, epochs=2)
    assert [step for step, _ in look.history] == [0, 2, 4]


# ---------------------------------------------------------------- samples


@pytest.mark.thorough
@pytest.mark.parametrize("pivots", [None, PIVOTS], ids=["monolingual", "connected"])
def test_samples_are_those_of_the_weights_at_that_step(pivots):
    model, look = make(), samples(pivot_prompts=pivots)
    fit(model, look, epochs=2)
    # Twins that stop earlier; each compiles its own loop, after its training.
    for epochs, (step, texts) in enumerate(look.history):
        twin = make()
        if epochs:
            fit(twin, epochs=epochs)
        assert step == epochs * STEPS
        assert texts == greedy(twin, pivots)
    assert len({tuple(texts) for _, texts in look.history}) > 1  # training changed them
    assert look.history[-1][1] == greedy(model, pivots)


@pytest.mark.thorough
def test_within_an_epoch_they_see_the_weights_of_that_step():
    """On JAX the weights are outside the model then: it would be another that is looked at."""
    model, look, watch = make(), samples(every=1), GateStatistics(ROWS, every=1)
    fit(model, watch, look, epochs=1)
    twin = make()
    fit(twin, epochs=1, steps_per_epoch=1)
    assert look.history[1] == (1, greedy(twin))
    atlas = gate_atlas(twin, [{**row, "lang": "xx"} for row in ROWS], verbose=0)
    step, seen = watch.history[1]
    assert step == 1
    np.testing.assert_allclose(seen["gate"], atlas.gate["xx"], rtol=1e-5)
    np.testing.assert_allclose(seen["alignment_error"], atlas.alignment_error["xx"], rtol=1e-5)
    assert seen != watch.history[0][1] and seen != watch.history[2][1]


@pytest.mark.thorough
def test_the_connected_path_says_something_else():
    model = make()
    alone, paired = samples(), samples(pivot_prompts=PIVOTS)
    fit(model, alone, paired, epochs=1)
    assert alone.history != paired.history


@pytest.mark.thorough
def test_the_models_own_sampler_stays():
    model = make(sampler=keras_hub.samplers.TopKSampler(k=5, seed=1))
    model.generate(PROMPTS, LENGTH)
    causal_lm = model.causal_lm
    sampler, function = causal_lm.sampler, causal_lm.generate_function
    seeds = [keras.ops.convert_to_numpy(v) for v in sampler.variables]
    look = samples(every=1)
    fit(model, look, epochs=1)
    assert causal_lm.sampler is sampler and causal_lm.generate_function is function
    for before, after in zip(seeds, sampler.variables, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(after), before)
    # Its generator has moved on where it was used; the callback's sampler draws nothing.
    assert look.history[-1][1] == greedy(model)


@pytest.mark.thorough
def test_without_a_connection():
    model, look = make(None), samples()
    fit(model, look, epochs=1)
    assert look.history[-1] == (STEPS, greedy(model))


def test_what_is_shown():
    file = io.StringIO()
    look = samples(file=file)
    texts = ["Kenya şilini", "two\nlines | bar"]
    look.set_model(make())
    look.model.generate = lambda *args, **kwargs: texts
    look.on_train_begin()
    assert file.getvalue() == (
        "\nstep 0\n"
        "  Kenya'nın para birimi nedir? -> Kenya şilini\n"
        "  the quick fox -> two\\nlines | bar\n"
    )
    assert look.history == [(0, texts)]


@pytest.mark.thorough
def test_it_is_shown_on_the_standard_output(capsys):
    fit(make(), SampleGenerations("the quick fox", max_length=LENGTH), epochs=1)
    shown = capsys.readouterr().out
    assert "step 0\n  the quick fox -> " in shown and "step 2\n  the quick fox -> " in shown


# ---------------------------------------------------------------- gates


@pytest.mark.thorough
def test_statistics_are_the_atlas_of_that_step():
    model, watch = make(), GateStatistics(ROWS, batch_size=2)
    history = fit(model, watch, epochs=2)
    rows = [{**row, "lang": "xx"} for row in ROWS]
    for epochs, (step, seen) in enumerate(watch.history):
        twin = make()
        if epochs:
            fit(twin, epochs=epochs)
        atlas = gate_atlas(twin, rows, verbose=0)
        assert step == epochs * STEPS and set(seen) == {"gate", "alignment_error"}
        for name in seen:
            np.testing.assert_allclose(seen[name], getattr(atlas, name)["xx"], rtol=1e-5)
    gates = [seen["gate"] for _, seen in watch.history]
    assert np.abs(np.diff(gates, axis=0)).min() > 1e-6  # training changed them
    assert watch.layers == (0, 1)
    means = [np.mean(seen["gate"]) for _, seen in watch.history[1:]]
    np.testing.assert_allclose(history["rows_gate"], means)
    errors = [np.mean(seen["alignment_error"]) for _, seen in watch.history[1:]]
    np.testing.assert_allclose(history["rows_alignment_error"], errors)


@pytest.mark.thorough
def test_the_last_look_of_an_epoch_goes_into_its_logs():
    model, watch = make(), GateStatistics(ROWS, every=3)
    history = fit(model, watch, epochs=2)
    by_step = {step: np.mean(seen["gate"]) for step, seen in watch.history}
    assert set(by_step) == {0, 3}
    np.testing.assert_allclose(history["rows_gate"], [by_step[0], by_step[3]])


@pytest.mark.thorough
def test_without_a_transform_and_with_a_fixed_gate():
    model = make(keras_cc.FusedConnection(gate=0.25, transform=None))
    watch = GateStatistics(ROWS)
    history = fit(model, watch, epochs=1)
    assert [seen for _, seen in watch.history] == [{"gate": [0.25, 0.25]}] * 2
    assert history["rows_gate"] == [0.25] and "rows_alignment_error" not in history


@pytest.mark.thorough
def test_any_rows_that_fit_takes():
    model = make()
    watch, prepared = GateStatistics(row for row in ROWS), GateStatistics(model.preprocessor(ROWS))
    fit(model, watch, prepared, epochs=1)
    fit(model, watch, epochs=1)
    assert watch.history[:2] == prepared.history and len(watch.history) == 4


@pytest.mark.thorough
def test_of_the_published_connection_it_is_what_is_selected():
    model, watch = make("selected"), GateStatistics(ROWS)
    history = fit(model, watch, epochs=1)
    for _, seen in watch.history:
        assert set(seen) == {"selected"} and sum(seen["selected"]) == 1
    assert not [name for name in history if name.startswith("rows_")]


# ---------------------------------------------------------------- TensorBoard


def events_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    return found.Reload()


def tensors_of(folder):
    """Tag -> {step: NumPy value} of an event file, by TensorBoard's own reader."""
    events = events_of(folder)
    from tensorboard.util.tensor_util import make_ndarray

    return {
        tag: {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


@pytest.mark.thorough
def test_samples_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    model, look = make(), samples(log_dir=tmp_path)
    fit(model, look, epochs=1)
    found = tensors_of(tmp_path / "samples")
    assert set(found) == {"samples"} and set(found["samples"]) == {0, STEPS}
    for step, texts in look.history:
        cells = [text.strip().replace("\n", "\\n").replace("|", "\\|") for text in texts]
        rows = [f"| {prompt} | {cell} |" for prompt, cell in zip(PROMPTS, cells, strict=True)]
        shown = found["samples"][step].item().decode()
        assert shown == "\n".join(["| prompt | text |", "| --- | --- |", *rows])
    metadata = events_of(tmp_path / "samples").SummaryMetadata("samples")
    assert metadata.plugin_data.plugin_name == "text"


@pytest.mark.thorough
@pytest.mark.parametrize("gate", ["dimension", "layer"])
def test_gates_in_tensorboard(tmp_path, gate):
    pytest.importorskip("tensorboard")
    model = make(keras_cc.FusedConnection(gate=gate))
    watch = GateStatistics(ROWS, every=1, log_dir=str(tmp_path))
    fit(model, watch, epochs=1)
    found = tensors_of(tmp_path / "gates")
    curves = {f"{name}/block_{i}" for name in ("gate", "alignment_error") for i in (0, 1)}
    assert set(found) == {*curves, "gates"}
    for step, seen in watch.history:
        for name, values in seen.items():
            for layer, value in enumerate(values):
                np.testing.assert_allclose(found[f"{name}/block_{layer}"][step], value, rtol=1e-6)
    # Of the last look, the histogram: (left edge, right edge, count).
    rows = [{**row, "lang": "xx"} for row in ROWS]
    atlas = gate_atlas(model, rows, verbose=0)
    gates = atlas.gate_by_dimension if gate == "dimension" else atlas.gate["xx"]
    buckets = found["gates"][STEPS]
    assert buckets[:, 2].sum() == np.size(gates) == (32 if gate == "dimension" else 2)
    np.testing.assert_allclose(buckets[0, 0], np.min(gates), rtol=1e-5)
    np.testing.assert_allclose(buckets[-1, 1], np.max(gates), rtol=1e-5)


@pytest.mark.thorough
def test_a_fit_that_fails_leaves_events_and_the_next_one_adds_to_them(tmp_path):
    pytest.importorskip("tensorboard")
    model, watch = make(), GateStatistics(ROWS, every=1, log_dir=tmp_path)

    def stop(batch, logs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, watch, keras.callbacks.LambdaCallback(on_train_batch_end=stop))
    assert set(tensors_of(tmp_path / "gates")["gate/block_0"]) == {0, 1}
    fit(model, watch, epochs=1)
    assert set(tensors_of(tmp_path / "gates")["gate/block_0"]) == {0, 1, 2, 3}


_WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None  # as where it is not installed
from keras_cc.callbacks.event_file import EventFile
events = EventFile(sys.argv[1])
events.scalar("a/b", 0.5, 7)
events.text("c", "Kenya şilini", 7)
events.histogram("d", [[1.0, 2.0], [3.0, 5.0]], 7)
events.close()
"""


@pytest.mark.large
@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow is the backend at hand")
def test_tensorboard_needs_no_tensorflow(tmp_path):
    pytest.importorskip("tensorboard")
    run_python(_WITHOUT_TENSORFLOW, tmp_path)
    found = tensors_of(tmp_path)
    assert found["a/b"][7] == 0.5 and found["c"][7].item().decode() == "Kenya şilini"
    assert found["d"][7][0, 0] == 1 and found["d"][7][-1, 1] == 5
    assert found["d"][7][:, 2].sum() == 4


@pytest.mark.parametrize("callback", [SampleGenerations, GateStatistics])
def test_tensorboard_that_is_not_installed(callback, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install tensorboard.*leave it out"):
        callback(["the fox"], log_dir=tmp_path)
    callback(["the fox"])  # which needs none


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("every", [0, -1, True, 2.5, "step", None])
@pytest.mark.parametrize("callback", [SampleGenerations, GateStatistics])
def test_every(callback, every):
    with pytest.raises(ValueError, match=rf"`every` must be .* Received: every={every!r}"):
        callback(["the fox"], every=every)
    assert callback(["the fox"], every=3).every == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([[]], r"`prompts` must be one or more strings\. Received: prompts=\[\]"),
        ([[1]], r"`prompts` must be one or more strings\. Received: prompts=\[1\]"),
        ([["a"], "epoch", None, [None]], r"`pivot_prompts` must be one or more strings"),
        ([["a", "b"], "epoch", None, ["a"]], "1 pivot prompts for 2 prompts"),
    ],
)
def test_prompts(arguments, message):
    with pytest.raises(ValueError, match=message):
        SampleGenerations(*arguments)


@pytest.mark.thorough
def test_what_cannot_be_shown_is_refused_before_the_first_step():
    plain, model = make(None), make()
    before = [connected.weights(plain), connected.weights(model)]
    english = [ROWS[2]]
    for wrong, callback, message in (
        (plain, samples(pivot_prompts=PIVOTS), "`pivot_prompts` need a connection"),
        (plain, GateStatistics(ROWS), "`model` must be a CCCausalLM with a connection"),
        (model, GateStatistics(english), "`rows` must have pivots"),
        (model, SampleGenerations("the fox " * 40), "needs at least 1, and room"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(wrong, callback)
        assert callback.history == []
    for model_after, weights in zip((plain, model), before, strict=True):
        connected.assert_weights_equal(connected.weights(model_after), weights, rtol=0)
    fit(model, samples(), GateStatistics(ROWS), epochs=1)  # both still work
    fit(plain, samples(), epochs=1)
