"""Several devices and processes come to what one device comes to."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import distributed
import keras
import keras_hub
import long_run
import numpy as np
import pytest
import tiny
from backend_tools import run_python, run_python_for_json

from keras_cc import CCCausalLM, FusedConnection, distribution
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.splitting import Split

BACKEND = keras.backend.backend()
HERE = pathlib.Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "train_distributed.py"


def begin(folder, *names, **environment):
    """Begins `tests/distributed.py` in a process of its own."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(HERE / "distributed.py"), str(folder), *names],
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def found(folder, *processes):
    """What processes wrote, or what they said."""
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def on_cpus(count):
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}"}


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def assert_same(ours, theirs):
    """Trainings of several devices and of one, number by number."""
    assert set(ours) <= set(theirs)
    for name, values in ours.items():
        if isinstance(values, dict):
            assert_same(values, theirs[name])
        elif name == "answers":
            assert values == theirs[name]
        else:
            np.testing.assert_allclose(values, theirs[name], atol=1e-5, err_msg=name)


# ---------------------------------------------------------------- trainings


def check_jax(folder, count, names):
    (of,) = found(folder, begin(folder, *names, **on_cpus(count)))
    for name in names:
        assert_same(of[name], of["one"])
        assert of[f"{name} resumed"] < 1e-6
    return of


@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is of JAX")
def test_devices_of_jax(tmp_path):
    of = check_jax(tmp_path, 4, ["data", "2x2"])
    assert of["data shared out"] and of["2x2 shared out"]
    layouts = of["2x2 layouts"]
    assert layouts["cc_feed_forward_1/decision_gate/kernel"] == ["batch", "model"]
    assert layouts["cc_feed_forward_0/transform_matrix/delta"] == ["batch", "model"]
    assert layouts["transformer_layer_0/feedforward_output_dense/kernel"] == ["model", "batch"]
    assert layouts["sequence_output_layernorm/scale"] == [""]
    assert of["2x2 whole"] == {  # of one head
        f"transformer_layer_{n}/self_attention/{matrix}/kernel": [1]
        for n in (0, 1)
        for matrix in ("key", "value")
    }


@pytest.mark.large
@pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution is of JAX")
@pytest.mark.parametrize(("count", "names"), [(4, ["4x1", "1x4"]), (8, ["4x2", "2x4"])])
def test_more_devices_of_jax(count, names, tmp_path):
    check_jax(tmp_path, count, names)


@pytest.mark.skipif(BACKEND != "jax", reason="jax.distributed")
def test_processes_of_jax(tmp_path):
    world = {"JAX_PROCESSES": "2", "JAX_ADDRESS": f"127.0.0.1:{port()}", **on_cpus(2)}
    both = [begin(tmp_path, JAX_PROCESS=str(n), **world) for n in range(2)]
    ours, theirs = found(tmp_path, *both)
    assert ours == theirs
    assert_same(ours["parallel"], distributed.results())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute")
def test_replicas_of_tensorflow(tmp_path):
    (of,) = found(tmp_path, begin(tmp_path))
    assert_same(of["mirrored"], of["one"])


@pytest.mark.skipif(BACKEND != "torch", reason="torch.distributed")
def test_processes_of_torch(tmp_path):
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    both = [begin(tmp_path, RANK=str(n), **world) for n in range(2)]
    ours, theirs = found(tmp_path, *both)
    assert ours == theirs
    assert_same(ours["parallel"], distributed.results())


# ---------------------------------------------------------------- checkpoints of weights in parts

ORBAX = """
import json, sys
import keras, numpy as np, tiny
from keras_cc import CCCausalLM, FusedConnection, distribution

folder, shape = sys.argv[1], [int(n) for n in sys.argv[2]]
pairs = tiny.batch(4, prompt_lengths=(4, 3, 5, 4))

def fit(model, **options):
    return model.fit(pairs, batch_size=4, epochs=2, shuffle=False, verbose=0, **options).history

mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"))
layout = distribution.layout_map("Llama3Backbone", mesh)
with distribution.ModelParallel(layout_map=layout).scope():
    if len(sys.argv) > 3:
        keras.utils.set_random_seed(0)
        model = CCCausalLM(tiny.causal_lm("llama3"), FusedConnection(dropout=0.0))
        for number, layer in enumerate(model.connection_layers().values()):
            tiny.fill(layer, number)
        model.compile(keras.optimizers.Adam(0.01))
        fit(model, callbacks=[keras.callbacks.OrbaxCheckpoint(folder)])
    else:
        model = keras.saving.load_model(folder)
    kernel = model.causal_lm.backbone.transformer_layers[0]._feedforward_gate_dense.kernel
    parts = {str(part.data.shape) for part in kernel.value.addressable_shards}
    print(json.dumps({"parts": sorted(parts), "loss": fit(model)["loss"]}))
"""


@pytest.mark.large
@pytest.mark.skipif(BACKEND != "jax", reason="a device mesh is of JAX")
def test_orbax_keeps_parts_for_other_meshes(tmp_path, monkeypatch):
    """What Keras' `OrbaxCheckpoint` wrote goes on as on the mesh that it was written on."""
    pytest.importorskip("orbax.checkpoint", reason="needs orbax-checkpoint")
    monkeypatch.setenv("XLA_FLAGS", on_cpus(4)["XLA_FLAGS"])
    folder = tmp_path / "orbax"
    written = run_python_for_json(ORBAX, folder, "22", "train", backend="jax")
    assert written["parts"] == ["(8, 12)"]
    for shape, part in {"22": "(8, 12)", "14": "(16, 6)", "41": "(4, 24)"}.items():
        read = run_python_for_json(ORBAX, folder, shape, backend="jax")
        assert read["parts"] == [part]
        np.testing.assert_allclose(read["loss"], written["loss"], rtol=1e-5)


# ---------------------------------------------------------------- how a batch is shared out


def batches(split, **options):
    preprocessor = distributed.make().preprocessor
    made = PreparedBatches(
        distributed.rows(), preprocessor, batch_size=4, split=split, align_all=False, **options
    )
    return list(made)


@pytest.mark.once
def test_a_batch_is_filled_up_with_rows_that_count_nowhere():
    whole, filled = batches(Split()), batches(Split(4))
    for name in ("token_ids", "row_ids", "pivot_padding_mask"):
        np.testing.assert_array_equal(whole[0][0][name], filled[0][0][name])
    (x, y, weights), (short, _, _) = filled[-1], whole[-1]
    assert len(short["row_ids"]) == 2 and len(y) == len(weights) == 4
    assert all(len(value) == 4 for value in x.values())
    np.testing.assert_array_equal(x["row_ids"], [12, 13, -1, -1])
    for name in ("padding_mask", "pivot_padding_mask", "answer_mask"):
        assert x[name][:2].any() and not x[name][2:].any()
    assert not weights[2:].any()


@pytest.mark.once
@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_part_is_weighted_by_its_tokens(accumulate):
    """The means of parts times their factors, averaged, are the mean over all answer tokens."""
    found = batches(Split(2, parts=2), accumulate=accumulate)
    groups = [found[n : n + accumulate] for n in range(0, len(found), accumulate)]
    for group in groups[: len(found) // accumulate]:
        values = [np.random.default_rng(n).random(y.shape) for n, (_, y, _) in enumerate(group)]
        total = sum((v * w).sum() for v, (_, _, w) in zip(values, group, strict=True))
        expected = total / sum(w.sum() for _, _, w in group)
        means = []
        for value, (x, _, w) in zip(values, group, strict=True):
            half = len(w) // 2
            for part in (slice(0, half), slice(half, None)):
                factor = x["loss_scale"][part][0, 0]
                means.append(factor * (value[part] * w[part]).sum() / max(w[part].sum(), 1))
        assert np.mean(means) == pytest.approx(expected, rel=1e-5)


@pytest.mark.once
def test_processes_share_a_batch_between_them():
    whole = batches(Split(2, parts=2))
    halves = [batches(Split(2, parts=2, processes=2, process=n)) for n in range(2)]
    for (x, y, w), *parts in zip(whole, *halves, strict=True):
        for name, value in x.items():
            np.testing.assert_array_equal(np.concatenate([p[0][name] for p in parts]), value)
        np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), y)
        np.testing.assert_array_equal(np.concatenate([p[2] for p in parts]), w)


# ---------------------------------------------------------------- layouts


@pytest.mark.skipif(BACKEND != "jax", reason="a device mesh is of JAX")
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(
    "connection",
    [FusedConnection(transform="low_rank", rank=2), FusedConnection(), "selected", "flare"],
    ids=["low_rank", "fused", "selected", "flare"],
)
def test_there_is_one_layout_for_each_matrix(family, connection):
    if (family, connection) == ("gpt_neo_x", "flare"):
        pytest.skip("FLARE refuses a family whose query, key and value are one matrix")
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"))
    model = CCCausalLM(tiny.causal_lm(family), connection)
    layouts = distribution.layout_map(model.causal_lm.backbone, mesh)
    for variable in model.weights:
        layout = layouts[variable.path]  # raises where two rules say something
        if len(variable.shape) > 1:
            assert layout is not None, variable.path
            assert len(layout.axes) == len(variable.shape), variable.path
            assert "model" in layout.axes or "batch" in layout.axes, variable.path


@pytest.mark.skipif(BACKEND != "jax", reason="a device mesh is of JAX")
def test_kerashubs_own_map_is_kept():
    mesh = keras.distribution.DeviceMesh((1, 1), ("data", "tensor"))
    of_hub = keras_hub.models.GemmaBackbone.get_layout_map(mesh, "tensor", "data")
    ours = distribution.layout_map("GemmaBackbone", mesh, "data", "tensor")
    assert {key: ours[key].axes for key in of_hub} == {k: of_hub[k].axes for k in of_hub}
    assert ours["x/transform_matrix/delta"].axes == ("data", "tensor")


@pytest.mark.skipif(BACKEND != "jax", reason="a device mesh is of JAX")
def test_layouts_of_what_is_not_there():
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "other"))
    with pytest.raises(ValueError, match=r"`device_mesh` must have the axes.*'other'\)"):
        distribution.layout_map("GemmaBackbone", mesh)
    with pytest.raises(ValueError, match=r"`backbone` must be one of .*Received: backbone='Gem'"):
        distribution.layout_map("Gem", mesh)


# ---------------------------------------------------------------- refused

OF_JAX = """
mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"))
before = distributed.make()
layout = keras_cc.distribution.layout_map("Llama3Backbone", mesh)
with keras_cc.distribution.ModelParallel(layout_map=layout).scope():
    refuses(before, "made under the distribution.*Received: '.*', which is on", batch_size=4)
    refuses(distributed.make(), "a multiple of 2.*Received: batch_size=3", batch_size=3)
missing = keras.distribution.LayoutMap(mesh)
missing["token_embedding/embeddings"] = ("model", None)
missing["transformer_layer.*/(query|key|value)/kernel"] = (None, None, None)
missing["transformer_layer.*/attention_output/kernel"] = (None, None, None)
missing["transformer_layer.*_dense/kernel"] = (None, "model")
with keras.distribution.ModelParallel(layout_map=missing, batch_dim_name="batch").scope():
    refuses(
        distributed.make(),
        "no rule for 'cc_feed_forward_0/decision_gate/kernel', and 3 more",
        batch_size=4,
    )
"""
OF_TENSORFLOW = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
before = distributed.make()
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    refuses(before, "made under the strategy", batch_size=4)
    refuses(distributed.make(), "a multiple of 2.*Received: batch_size=3", batch_size=3)
    refuses(distributed.make(accumulate=2), "must be None on several replicas", batch_size=4)
    refuses(distributed.make(), "`resume` is for one process", batch_size=4, resume="runs")
"""
BEGIN = """
import re, keras, keras_cc, connected, distributed, numpy as np

def refuses(model, message, **options):
    before = connected.weights(model)
    try:
        model.fit(distributed.rows(), verbose=0, **options)
    except ValueError as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(message)
    assert all(np.array_equal(before[k], v) for k, v in connected.weights(model).items())
"""


@pytest.mark.skipif(BACKEND == "torch", reason="below")
def test_refused(monkeypatch):
    if BACKEND == "jax":
        monkeypatch.setenv("XLA_FLAGS", on_cpus(4)["XLA_FLAGS"])
    run_python(BEGIN + (OF_JAX if BACKEND == "jax" else OF_TENSORFLOW))


@pytest.mark.skipif(BACKEND != "torch", reason="torch.distributed")
def test_processes_with_other_models_are_refused(tmp_path):
    script = (
        BEGIN
        + """
import os, torch
torch.distributed.init_process_group("gloo")
model = distributed.make()
refuses(model, "a multiple of 2.*Received: batch_size=3", batch_size=3)
refuses(model, "`resume` is for one process", batch_size=4, resume="runs")
if os.environ["RANK"] == "1":
    model.trainable_variables[0].assign_add(keras.ops.ones_like(model.trainable_variables[0]))
refuses(model, "must begin with the same model.*2 models in 2 processes", batch_size=4)
"""
    )
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **world, "RANK": str(n), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    for process in both:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said


# ---------------------------------------------------------------- the example


@pytest.fixture
def preset(tmp_path):
    from keras_cc import save_preset

    pytest.importorskip("babel", reason="the CLDR set needs babel")
    pytest.importorskip("tyro", reason="the examples parse their flags with tyro")
    size = long_run.TOKENIZER.vocabulary_size()
    preprocessor = keras_hub.models.Llama3CausalLMPreprocessor(long_run.TOKENIZER)
    save_preset(
        tiny.causal_lm("llama3", preprocessor, vocabulary_size=size),
        tmp_path / "preset",
        tokenizer=long_run.TOKENIZER,
    )
    return tmp_path / "preset"


def example(preset, *flags):
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    options = ["--preset", preset, "--backbone", "Llama3Backbone", "--max-length", "128"]
    options += ["--languages", "tr", "en", "--output", preset.parent / "out", *flags]
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), *map(str, options)],
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_example(preset):
    flags = {"jax": ["--devices", "2"], "tensorflow": ["--devices", "2"]}
    process = example(preset, "--steps", "2", *flags.get(BACKEND, ["--processes", "2"]))
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert "2 steps in" in said
    assert keras_hub.models.CausalLM.from_preset(str(preset.parent / "out")) is not None


@pytest.mark.skipif(BACKEND == "tensorflow", reason="its devices are of one process")
def test_where_one_process_dies_the_others_end(preset):
    process = example(preset, "--steps", "5000", "--processes", "2")
    said = ""
    for line in process.stdout:
        said += line
        if "step" in line:
            break
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2, said
    os.kill(int(children[1]), signal.SIGKILL)
    begin = time.monotonic()
    said += process.communicate(timeout=120)[0]
    assert process.returncode == 1 and time.monotonic() - begin < 60
    assert re.search(r"Process [01] ended with -?\d+: the others are ended", said), said
