"""Merging, disconnecting and saving: what comes back is the stock model, or the same model."""

import gc
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import connected
import h5py
import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy
import tiny
from connected import QUICK, ROWS, logits, monolingual

import keras_cc.demo
from keras_cc import CCCausalLM, FusedConnection

pytestmark = [
    # KerasHub leaves the vocabulary's file open, and Keras quantises what it can.
    pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*The use of `x.T` on tensors of dim:UserWarning"),
]


def make(family="llama3", trained=True, dtype=None, **options):
    model = CCCausalLM(tiny.causal_lm(family, dtype=dtype), FusedConnection(**options))
    if trained:
        connected.train_connection(model)
    return model


def projection(causal_lm, block):
    block = causal_lm.backbone.transformer_layers[block]
    return block.ffw_linear if hasattr(block, "ffw_linear") else block._feedforward_output_dense


def layers_of_keras_cc(model):
    return [x for x in model._flatten_layers() if type(x).__module__.startswith("keras_cc")]


X, Y, WEIGHTS = tiny.batch()


# ---------------------------------------------------------------- merge


@pytest.mark.thorough("llama3-linear", "gpt_neo_x-low_rank")
@pytest.mark.parametrize("transform", ["linear", "low_rank", None])
@pytest.mark.parametrize("family", ["llama3", "gemma3", "gpt_neo_x"])  # the last has biases
def test_merge_folds_the_transform_into_the_stock_model(family, transform):
    causal_lm, stock = tiny.causal_lm(family), tiny.causal_lm(family)
    model = CCCausalLM(causal_lm, FusedConnection(transform=transform, rank=3))
    connected.train_connection(model)
    before = logits(model, monolingual(X))
    expected = {path: value.copy() for path, value in connected.weights(stock).items()}
    for block in range(2):
        layer = model.connection_layers().get(f"block_{block}/transform_matrix")
        if transform is None:
            assert layer is None
            continue
        values = {v.name: connected.to_numpy(v) for v in layer.weights}
        if transform == "linear":
            delta = values["delta"] / np.sqrt(tiny.HIDDEN)
        else:
            delta = values["down"] @ values["up"]
        for variable in projection(stock, block).weights:  # kernel and, where there is one, bias
            expected[variable.path] = expected[variable.path] @ (np.eye(tiny.HIDDEN) + delta)

    merged = model.merge()

    assert merged is causal_lm and type(merged) is type(stock)
    assert layers_of_keras_cc(merged) == [] and "save_to_preset" not in vars(merged)
    found = [connected.to_numpy(v) for v in merged.weights]
    for value, (path, other) in zip(found, expected.items(), strict=True):
        np.testing.assert_allclose(value, other, atol=1e-5, err_msg=path)
    after = logits(merged, monolingual(X))
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
    if transform is None:
        np.testing.assert_allclose(after, logits(stock, monolingual(X)), atol=1e-6)
    else:
        assert np.abs(after - logits(stock, monolingual(X))).max() > 1e-2


def test_a_bfloat16_projection_is_folded_in_float32_and_rounded_once():
    model = make(dtype="bfloat16", layers=[0])
    kernel = connected.to_numpy(projection(model.causal_lm, 0).inner.kernel)
    delta = connected.to_numpy(model.connection_layers()["block_0/transform_matrix"].delta)
    merged = projection(model.merge(), 0).kernel
    assert merged.dtype == "bfloat16"
    matrix = np.eye(tiny.HIDDEN, dtype="float32") + delta / np.sqrt(np.float32(tiny.HIDDEN))
    exact = keras.ops.convert_to_tensor(kernel @ matrix)
    once = connected.to_numpy(keras.ops.cast(exact, "bfloat16"))
    np.testing.assert_allclose(connected.to_numpy(merged), once, rtol=2**-8)


def test_merging_twice_and_training_on():
    model = make()
    model.compile(keras.optimizers.SGD(0.1), **QUICK)
    model.fit(X, Y, sample_weight=WEIGHTS, verbose=0)
    merged = model.merge()
    before = connected.weights(merged)
    assert model.merge() is merged and model.disconnect() is merged
    connected.assert_weights_equal(connected.weights(merged), before, atol=0)
    assert model.connection is None and model.connection_layers() == {}
    # From here on it is a plain fine-tuner of the merged model.
    result = model.evaluate(X, Y, sample_weight=WEIGHTS, verbose=0, return_dict=True)
    expected = connected.sft_loss(logits(merged, monolingual(X)), Y, WEIGHTS)
    assert set(result) == {"loss", "sft_loss", "token_accuracy"}
    np.testing.assert_allclose(result["sft_loss"], expected, rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.1), **QUICK)
    history = model.fit(X, Y, sample_weight=WEIGHTS, verbose=0).history
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)
    assert connected.moved(before, connected.weights(merged))


@pytest.mark.thorough
def test_training_on_after_a_merge_needs_no_compile():
    model = make(trained=False)
    model.compile(keras.optimizers.Adam(1e-3), **QUICK)
    model.fit(X, Y, sample_weight=WEIGHTS, verbose=0)
    merged = model.merge()
    expected = connected.sft_loss(logits(merged, monolingual(X)), Y, WEIGHTS)
    history = model.fit(X, Y, sample_weight=WEIGHTS, verbose=0).history
    np.testing.assert_allclose(history["loss"], [expected], rtol=1e-5)


@pytest.mark.thorough
def test_the_merged_model_is_connected_again():
    model = make()
    merged = model.merge()
    before = logits(merged, monolingual(X))
    again = CCCausalLM(merged, FusedConnection(alignment="mean", dropout=0.0))
    np.testing.assert_allclose(logits(again, monolingual(X)), before, atol=1e-6)
    connected.train_connection(again, seed=7)
    assert np.abs(logits(again, X) - before).max() > 1e-2
    after = logits(again, monolingual(X))
    again.merge()
    np.testing.assert_allclose(logits(merged, monolingual(X)), after, atol=1e-4)


def test_disconnect_gives_back_the_model_as_it_was():
    causal_lm = tiny.causal_lm()
    before, paths = logits(causal_lm, monolingual(X)), [v.path for v in causal_lm.weights]
    model = CCCausalLM(causal_lm)
    connected.train_connection(model)
    assert np.abs(logits(causal_lm, monolingual(X)) - before).max() > 1e-2
    assert model.disconnect() is causal_lm
    np.testing.assert_allclose(logits(causal_lm, monolingual(X)), before, atol=1e-6)
    assert [v.path for v in causal_lm.weights] == paths and layers_of_keras_cc(causal_lm) == []


# ---------------------------------------------------------------- merges that are refused


def refused(model, message):
    before, paired = connected.weights(model), logits(model, X)
    with pytest.raises(ValueError, match=message):
        model.merge()
    connected.assert_weights_equal(connected.weights(model), before, atol=0)
    np.testing.assert_array_equal(logits(model, X), paired)
    assert model.connection is not None
    with pytest.raises(ValueError, match="cannot be saved as a preset"):
        model.causal_lm.save_to_preset("nowhere")


def test_a_transform_that_is_no_matrix():
    refused(make(transform="mlp"), r"non-linear.*Received: .*transform='mlp'")


def test_lora_on_a_connected_projection():
    model = make()
    projection(model.causal_lm, 1).inner.enable_lora(2)  # block 0 alone could be folded
    refused(model, r"cannot fold into a projection that carries LoRA.*Received: LoRA on ")


def test_a_quantised_projection(monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # Keras calls it for every layer: seconds
    model = make()
    before = logits(model, monolingual(X))
    model.causal_lm.quantize("int8")
    refused(model, r"folds into float weights only.*Received: .* quantised to 'int8'")
    after = logits(model, monolingual(X))
    assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.99
    model.disconnect()
    assert layers_of_keras_cc(model.causal_lm) == []


def test_a_quantised_model_can_be_connected_and_its_connection_stays_float32():
    causal_lm = tiny.causal_lm()
    for block in range(2):
        projection(causal_lm, block).quantize("int8")
    before = logits(causal_lm, monolingual(X))
    model = CCCausalLM(causal_lm)
    np.testing.assert_allclose(logits(model, monolingual(X)), before, atol=1e-5)
    for layer in model.connection_layers().values():
        assert {v.dtype for v in layer.weights} == {"float32"}
    refused(model, r"folds into float weights only.*Received: .* quantised to 'int8'")


# ---------------------------------------------------------------- presets


@pytest.mark.thorough("gemma3")
@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_the_merged_model_is_saved_as_a_preset_and_the_connected_one_is_not(family, tmp_path):
    model = connected.text_model(family, with_preprocessor=True)
    connected.train_connection(model)
    x, _, _ = model.preprocessor(ROWS)
    for part in (model.causal_lm, model.causal_lm.backbone):
        with pytest.raises(ValueError, match=r"call `merge\(\)`.*Received: save_to_preset on "):
            part.save_to_preset(str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    merged = model.merge()
    expected = logits(merged, monolingual(x))
    keras_cc.save_preset(merged, str(tmp_path / "merged"))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path / "merged"))
    assert type(loaded) is type(merged)
    np.testing.assert_allclose(logits(loaded, monolingual(x)), expected, atol=1e-5)
    assert "keras_cc" not in (tmp_path / "merged" / "config.json").read_text()


# ---------------------------------------------------------------- .keras files

KINDS = [("llama3", False), ("gemma3", True)]

IN_A_FRESH_PROCESS = """
import sys, json, keras, numpy as np, keras_cc
folder, result = sys.argv[1], {}
with open(f"{folder}/rows.json", encoding="utf-8") as file:
    rows = json.load(file)
for name in sys.argv[2:]:
    model = keras.models.load_model(f"{folder}/{name}.keras")
    x = model.preprocessor(rows)[0]
    alone = {k: x[k] for k in ("token_ids", "padding_mask")}
    for path, inputs in (("alone", alone), ("paired", x)):
        result[f"{name}/{path}"] = keras.ops.convert_to_numpy(model(inputs)["logits"])
    result[f"{name}/steps"] = int(model.optimizer.iterations)
    result[f"{name}/ids"] = x["token_ids"]
    result[f"{name}/text"] = model.generate(rows[0]["instruction"], 40)
    result[f"{name}/loss"] = model.fit(rows, batch_size=3, shuffle=False, verbose=0).history["loss"]
    for number, weight in enumerate(model.trainable_weights):
        result[f"{name}/weights/{number}"] = keras.ops.convert_to_numpy(weight)
np.savez(f"{folder}/result.npz", **result)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each kind, what the model that was saved says and what the one that was loaded says."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "rows.json").write_text(json.dumps(ROWS), encoding="utf-8")
    expected = {}
    for family, with_preprocessor in KINDS:
        name = f"{family}-{with_preprocessor}"
        model = connected.text_model(
            family, FusedConnection(dropout=0.0, layers=[1]), with_preprocessor
        )
        model.compile(keras.optimizers.Adam(0.05), sampler="greedy", **QUICK)
        model.fit(ROWS, batch_size=3, shuffle=False, verbose=0)
        model.save(folder / f"{name}.keras")
        x = model.preprocessor(ROWS)[0]
        found = {"alone": logits(model, monolingual(x)), "paired": logits(model, x)}
        found["ids"], found["steps"] = x["token_ids"], int(model.optimizer.iterations)
        found["text"] = model.generate(ROWS[0]["instruction"], 40)
        history = model.fit(ROWS, batch_size=3, shuffle=False, verbose=0).history
        found["loss"] = history["loss"]
        for number, weight in enumerate(model.trainable_weights):
            found[f"weights/{number}"] = connected.to_numpy(weight)
        expected[name] = found
    subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, str(folder), *expected],
        check=True,
        env=connected.environment(),
    )
    with np.load(folder / "result.npz") as file:
        loaded = {name: file[name] for name in file.files}
    return expected, loaded


@pytest.mark.thorough
@pytest.mark.parametrize("family, with_preprocessor", KINDS)
def test_a_keras_file_loads_in_a_fresh_process(saved, family, with_preprocessor):
    expected, loaded = saved
    name = f"{family}-{with_preprocessor}"
    expected = expected[name]
    loaded = {k.removeprefix(name + "/"): v for k, v in loaded.items() if k.startswith(name)}
    assert set(loaded) == set(expected)
    # The tokenizer, its vocabulary and the preprocessor's options.
    np.testing.assert_array_equal(loaded["ids"], expected["ids"])
    for path in ("alone", "paired"):
        np.testing.assert_allclose(loaded[path], expected[path], atol=1e-4)
    assert np.abs(loaded["alone"] - loaded["paired"]).max() > 1e-3
    assert loaded["text"] == expected["text"]  # the greedy sampler
    # A second step of Adam: its moments were kept.
    assert loaded["steps"] == expected["steps"] == 1
    np.testing.assert_allclose(loaded["loss"], expected["loss"], rtol=1e-5)
    for key in expected:
        if key.startswith("weights/"):
            np.testing.assert_allclose(loaded[key], expected[key], atol=1e-4)


def test_a_preprocessor_with_a_tokenizer_of_its_own_keeps_it(tmp_path):
    model = connected.text_model("gemma3", with_preprocessor=True)
    model.preprocessor = keras_cc.CCPreprocessor(connected.tokenizer_of("llama3"), max_length=40)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.tokenizer) is keras_hub.tokenizers.Llama3Tokenizer
    assert loaded.preprocessor.max_length == 40
    for theirs, ours in zip(loaded.preprocessor(ROWS), model.preprocessor(ROWS), strict=True):
        np.testing.assert_equal(theirs, ours)
    assert type(loaded.causal_lm.preprocessor.tokenizer) is keras_hub.tokenizers.Gemma3Tokenizer


@pytest.mark.thorough("fused")
@pytest.mark.parametrize("connection", ["fused", None])
def test_a_keras_file_without_text(connection, tmp_path):
    options = FusedConnection(alignment="mean", gate=0.4, transform="low_rank", rank=2)
    model = CCCausalLM(tiny.causal_lm(), options if connection else None)
    connected.train_connection(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.preprocessor is None and loaded.tokenizer is None
    assert repr(loaded.connection) == repr(model.connection)
    np.testing.assert_allclose(logits(loaded, X), logits(model, X), atol=1e-6)
    merged = loaded.merge()
    np.testing.assert_allclose(
        logits(merged, monolingual(X)), logits(model, monolingual(X)), atol=1e-4
    )


def test_whole_weights_in_keras_own_format(tmp_path):
    model, other = make(), make(trained=False)
    model.save_weights(tmp_path / "all.weights.h5")
    other.load_weights(tmp_path / "all.weights.h5")
    np.testing.assert_allclose(logits(other, X), logits(model, X), atol=1e-6)


# ---------------------------------------------------------------- the connection's weights alone

ENDINGS = [".safetensors", ".weights.h5"]


def read(path):
    if path.endswith(".safetensors"):
        return safetensors.numpy.load_file(path)
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]}) if hasattr(item, "shape") else None
        )
    return found


def write(path, weights):
    if path.endswith(".safetensors"):
        return safetensors.numpy.save_file(weights, path)
    with h5py.File(path, "w") as file:
        for name, value in weights.items():
            file[name] = value


@pytest.mark.thorough(".safetensors")
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_connections_weights_by_layer_path(ending, tmp_path):
    path = str(tmp_path / f"connection{ending}")
    model = make(layers=[-1])
    model.save_cc_weights(path)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f"connection{ending}", f"connection{ending}.json"]
    )
    stored = read(path)
    assert {name: value.shape for name, value in stored.items()} == {
        "block_1/decision_gate/kernel": (16, 16),
        "block_1/decision_gate/bias": (16,),
        "block_1/transform_matrix/delta": (16, 16),
    }
    assert {value.dtype for value in stored.values()} == {np.dtype("float32")}
    layer = model.connection_layers()["block_1/transform_matrix"]
    np.testing.assert_array_equal(
        stored["block_1/transform_matrix/delta"], connected.to_numpy(layer.delta)
    )
    with open(path + ".json", encoding="utf-8") as file:
        options = json.load(file)
    assert options["connection"]["config"]["layers"] == [-1]
    assert options["backbone"]["class"] == "Llama3Backbone"
    assert options["backbone"]["hidden_dim"] == 16

    other = make(trained=False, layers=[-1])
    assert np.abs(logits(other, X) - logits(model, X)).max() > 1e-2
    other.load_cc_weights(path)
    np.testing.assert_array_equal(logits(other, X), logits(model, X))
    # The options in the file make the connection that they fit.
    connection = keras.saving.deserialize_keras_object(options["connection"])
    CCCausalLM(tiny.causal_lm(), connection).load_cc_weights(path)


@pytest.mark.thorough(".safetensors")
@pytest.mark.parametrize("ending", ENDINGS)
def test_saving_never_leaves_half_a_file(ending, tmp_path, monkeypatch):
    path = str(tmp_path / f"connection{ending}")
    model = make()
    model.save_cc_weights(path)
    before = read(path)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    connected.train_connection(model, seed=9)
    with pytest.raises(OSError, match="disk full"):
        model.save_cc_weights(path)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [f"connection{ending}", f"connection{ending}.json"]
    )
    np.testing.assert_equal(read(path), before)


def sign(path, **changes):
    """Have the options say that the weights are as they are now."""
    options = json.loads(pathlib.Path(path + ".json").read_text(encoding="utf-8"))
    options |= changes
    del options["sha256"]
    options["weights_sha256"] = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    content = json.dumps(options, sort_keys=True).encode()
    options["sha256"] = hashlib.sha256(content).hexdigest()
    text = json.dumps(options, indent=2) + "\n"
    pathlib.Path(path + ".json").write_text(text, encoding="utf-8")


@pytest.mark.thorough(".safetensors")
@pytest.mark.parametrize("ending", ENDINGS)
def test_damage_anywhere_is_found_before_anything_changes(ending, tmp_path, request):
    """One byte that is another, a tail that is missing, bytes that are too many."""
    path = tmp_path / f"connection{ending}"
    model, random = make(layers=[-1]), np.random.default_rng(0)
    model.save_cc_weights(path)
    before = connected.weights(model)
    count = 1000 if request.config.getoption("--run-large") else 30
    for name in (path, pathlib.Path(f"{path}.json")):
        whole = name.read_bytes()
        for number in range(count):
            place = int(random.integers(len(whole)))
            other = bytes([whole[place] ^ int(random.integers(1, 256))])
            damaged = [
                whole[:place] + other + whole[place + 1 :],
                whole[:place],
                whole + other,
            ][number % 3]
            name.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"damaged|format"):
                model.load_cc_weights(path)
        name.write_bytes(whole)
    connected.assert_weights_equal(connected.weights(model), before, atol=0)
    model.load_cc_weights(path)


def not_loaded(model, path, message):
    before = connected.weights(model)
    with pytest.raises(ValueError, match=message):
        model.load_cc_weights(path)
    connected.assert_weights_equal(connected.weights(model), before, atol=0)


def h5_chunked(file, key, value):
    file.create_dataset(key, data=value, chunks=True, compression="gzip")


def h5_elsewhere(file, key, value):
    external = [("elsewhere", 0, value.nbytes)]
    file.create_dataset(key, value.shape, value.dtype, external=external)


def h5_virtual(file, key, value):
    import h5py

    layout = h5py.VirtualLayout(value.shape, value.dtype)
    layout[...] = h5py.VirtualSource("elsewhere", "x", value.shape)
    file.create_virtual_dataset(key, layout)


def h5_without_its_values(file, key, value):
    file.create_dataset(key, value.shape, value.dtype)


@pytest.mark.once
@pytest.mark.parametrize(
    "make_one",
    [h5_chunked, h5_elsewhere, h5_virtual, h5_without_its_values],
    ids=lambda f: f.__name__,
)
def test_arrays_of_hdf5_lie_in_the_file_as_they_are(make_one, tmp_path):
    """Right checksums: what decompresses to any size, or reads another file, is refused."""
    import h5py

    path = str(tmp_path / "connection.weights.h5")
    model = make()
    model.save_cc_weights(path)
    stored = read(path)
    with h5py.File(path, "w") as file:
        for key, value in stored.items():
            make_one(file, key, value)
    sign(path)
    not_loaded(model, path, r"must hold the arrays that `save_cc_weights`.*not a plain array")


@pytest.mark.once
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_no_weights_under_right_checksums(ending, tmp_path):
    path = str(tmp_path / f"connection{ending}")
    model = make()
    model.save_cc_weights(path)
    stored = read(path)
    write(path, {key: value.astype("float64") for key, value in stored.items()})
    sign(path)
    not_loaded(model, path, r"not of float32: \{'block_.*float64")
    pathlib.Path(path).write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}{}{}{}")
    sign(path)
    not_loaded(model, path, r"must hold the arrays that `save_cc_weights` writes. Received: ")
    write(path, stored)
    for wrong in ({"backbone": ["Llama3Backbone"]}, {"connection": "fused"}, {"madx": 1}):
        kept = json.loads(pathlib.Path(path + ".json").read_text(encoding="utf-8"))
        sign(path, **wrong)
        not_loaded(model, path, r"must have options that `save_cc_weights` wrote. Received: \[")
        pathlib.Path(path + ".json").write_text(json.dumps(kept), encoding="utf-8")
    sign(path, connection={"class_name": "FusedConnection", "config": 7})
    not_loaded(model, path, "saved from a model whose connection has")


@pytest.mark.once
def test_a_keras_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, model = tmp_path / "model.keras", make()
    model.save(path)
    before = path.read_bytes()

    def half(self, path, **kwargs):
        pathlib.Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", half)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.keras"]
    monkeypatch.undo()
    connected.train_connection(model, seed=9)
    model.save(str(path))
    np.testing.assert_array_equal(logits(keras.saving.load_model(path), X), logits(model, X))
    model.save(tmp_path / "folder", zipped=False)
    assert (tmp_path / "folder" / "config.json").exists()
    with pytest.raises(ValueError, match="extension"):
        model.save(tmp_path / "model.h4")
    with pytest.raises(OSError, match=r"none.model\.keras"):
        model.save(tmp_path / "none" / "model.keras")


@pytest.mark.thorough(".safetensors")
@pytest.mark.parametrize("ending", ENDINGS)
def test_weights_that_do_not_fit_are_refused_with_nothing_changed(ending, tmp_path):
    path = str(tmp_path / f"connection{ending}")
    model = make()
    model.save_cc_weights(path)
    other_options = r"saved from a model whose connection has {}=.*Received: path="
    not_loaded(make("gemma3"), path, r"another backbone.*Received: .*'class': 'Llama3Backbone'")
    deeper = CCCausalLM(tiny.causal_lm(num_layers=3))
    not_loaded(deeper, path, r"another backbone: .*'num_layers': 3.*Received: .*'num_layers': 2")
    not_loaded(make(layers=[0]), path, other_options.format("layers"))
    not_loaded(make(gate="layer"), path, other_options.format("gate"))
    not_loaded(make(transform="low_rank"), path, other_options.format("transform"))
    plain = CCCausalLM(tiny.causal_lm(), connection=None)
    not_loaded(plain, path, r"Received: ")

    stored = read(path)
    write(path, {**stored, "block_1/decision_gate/bias": np.zeros(4, "float32")})
    not_loaded(model, path, r"`path` must hold the weights that .*json' was written with")
    sign(path)
    not_loaded(model, path, r"block_1/decision_gate/bias must have the shape \(16,\).*\(4,\)")
    del stored["block_1/decision_gate/bias"]
    write(path, stored)
    sign(path)
    not_loaded(model, path, r"`path` must hold exactly the weights .*Received: \[")
    sign(path, format=1)
    not_loaded(model, path, r"`path` must be of format 3.*Received: format=1")
    os.unlink(path + ".json")
    not_loaded(model, path, r"must be what `save_cc_weights` wrote. Received: no .*json")
    os.unlink(path)
    not_loaded(model, path, r"must be what `save_cc_weights` wrote. Received: no ")


def test_endings_and_connections_that_cannot_be_saved(tmp_path):
    model = make()
    for name in ("connection.npz", "connection.h5", "connection"):
        for method in (model.save_cc_weights, model.load_cc_weights):
            with pytest.raises(ValueError, match=r"`path` must end in one of .*Received: path="):
                method(tmp_path / name)
    model.merge()
    nothing = r"no connection and no intervention to save.*Received: connection=None"
    with pytest.raises(ValueError, match=nothing):
        model.save_cc_weights(tmp_path / "connection.safetensors")
    assert os.listdir(tmp_path) == []


def test_what_a_model_was_tuned_with_is_known_after_the_merge():
    """For model cards."""
    model = CCCausalLM(tiny.causal_lm(), FusedConnection(rank=3), ["dft"])
    known = model.method
    assert known.startswith("FusedConnection(") and "rank=3" in known and "DFT(" in known
    model.merge()
    assert model.connection is None and model.method == known
    assert CCCausalLM(tiny.causal_lm(), None).method == "plain fine-tuning"
