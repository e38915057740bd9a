"""Every way out of a merged model, opened in a fresh process that does not know `keras_cc`.

A preset for KerasHub (also on another backend, and quantised), a folder for `transformers`, a
file for ONNX runtime: each gives the numbers of the merged model, whose own numbers are those of
the connected one.
"""

import gc
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor

import connected
import numpy as np
import pytest
import tiny
import tiny_tokenizers
from backend_tools import run_python
from connected import BACKEND, logits

import keras_cc.demo
from keras_cc import CCCausalLM

pytestmark = [
    pytest.mark.thorough,
    # KerasHub leaves the vocabulary's file open, and Keras quantises what it can.
    pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*The use of `x.T` on tensors of dim:UserWarning"),
]

OTHER = "tensorflow" if BACKEND == "torch" else "torch"
PRESETS = ["llama3", "gemma3"]
TRANSFORMERS = ["gemma", "gemma3", "llama3", "mistral", "qwen", "gpt2"]
# Mistral's exported tokenizer loses its dummy prefix on the way (KerasHub 0.32, transformers 5).
TOKENIZERS = [family for family in TRANSFORMERS if family != "mistral"]
TEXTS = [
    "What is the currency of Kenya?",
    "Kenya'nın para birimi nedir?",
    "the fox  (1) yes",
    " केन्या की मुद्रा 肯尼亚",
]
PROMPT = "the quick fox"
# Which backend exports which family to ONNX. tf2onnx 1.17 makes Gemma's embedding scale an input
# of the graph; jax2onnx 0.17 cannot trace `jnp.arange(n, None)`, which Keras calls.
ONNX = {}
if importlib.util.find_spec("onnxruntime"):
    if importlib.util.find_spec("torch") and importlib.util.find_spec("onnxscript"):
        ONNX["gemma3"] = "torch"
    if importlib.util.find_spec("tf2onnx"):
        ONNX["llama3"] = "tensorflow"

_DRAW = np.random.default_rng(0)
_LENGTHS = np.array([[12], [9]])  # both are longer than the sliding windows
MASK = (np.arange(12)[None] < _LENGTHS).astype("int32")
X = {"token_ids": _DRAW.integers(3, 60, (2, 12)).astype("int32") * MASK, "padding_mask": MASK}


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def connected_model(family, with_preprocessor=True):
    """A model that was trained in a connection, as far as its numbers tell."""
    if with_preprocessor:
        causal_lm = connected.causal_lm(family, connected.tokenizer_of(family), True)
    else:
        causal_lm = tiny.causal_lm(family)
    model = CCCausalLM(causal_lm)
    connected.train_connection(model)
    return model


def relative_error(found, expected):
    return np.linalg.norm((found - expected)[MASK == 1]) / np.linalg.norm(expected[MASK == 1])


def assert_close(found, expected, atol):
    np.testing.assert_allclose(found[MASK == 1], expected[MASK == 1], rtol=0, atol=atol)


def open_in_fresh_process(script, folder, *names, backend=BACKEND):
    """Run a script with a folder, a result file in it, and names; the arrays that it wrote."""
    result = folder / f"found_on_{backend}.npz"
    run_python(script, folder, result, *names, backend=backend)
    with np.load(result) as file:
        return {name: file[name] for name in file.files}


# ---------------------------------------------------------------- presets

IN_KERAS_HUB = """
import sys
import keras, keras_hub, numpy as np
folder, result, *names = sys.argv[1:]
found, x = {}, dict(np.load(folder + "/x.npz"))
backend = keras.backend.backend()
def logits(model):
    call = lambda x: model(x)
    if backend == "jax":
        import jax
        call = jax.jit(call)
    return keras.ops.convert_to_numpy(call(x))
for name in names:
    name, _, wishes = name.partition(":")
    model = keras_hub.models.CausalLM.from_preset(f"{folder}/{name}")
    found[name] = logits(model)
    if "generate" in wishes:
        model.compile(sampler="greedy")
        found[f"{name}/text"] = model.generate("the quick fox", max_length=16)
    if "kernel" in wishes:
        layer = model.backbone.transformer_layers[1]._feedforward_output_dense
        found[f"{name}/kernel"] = keras.ops.convert_to_numpy(layer._kernel)
        found[f"{name}/scale"] = keras.ops.convert_to_numpy(layer.kernel_scale)
    if backend in wishes:  # the shapes are fixed, and need not be on TensorFlow
        spec = {k: keras.InputSpec(shape=(2, 12), dtype="int32", name=k) for k in x}
        model.export(f"{folder}/{name}.onnx", "onnx", verbose=False, input_signature=[spec])
    if "weights_only" in wishes:
        for layer in model.backbone._flatten_layers():
            if layer.quantization_mode == "int4":
                layer.inputs_quantizer = None
        found[f"{name}/weights_only"] = logits(model)
assert not [name for name in sys.modules if name.startswith("keras_cc")]
np.savez(result, **found)
"""


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """What merged models say, before and after they were quantised and saved as presets.

    The folder; of this process, of a fresh one and of one on another backend: arrays by name.
    """
    folder, expected = tmp_path_factory.mktemp("presets"), {}
    np.savez(folder / "x.npz", **X)
    for family in PRESETS:
        model = connected_model(family)
        expected[f"{family}/connected"] = logits(model, X)
        stock = model.merge()
        expected[family] = logits(stock, X)
        keras_cc.save_preset(stock, folder / family)
        stock.compile(sampler="greedy")
        expected[f"{family}/text"] = stock.generate(PROMPT, max_length=16)
    collect, gc.collect = gc.collect, lambda *_: 0  # Keras calls it for every layer: seconds
    try:
        for mode in ("int8", "int4"):
            stock = connected_model("llama3").merge()
            stock.backbone.quantize(mode)
            expected[mode] = logits(stock, X)
            keras_cc.save_preset(stock, folder / mode)
    finally:
        gc.collect = collect
    wishes = {
        BACKEND: ["llama3:generate", "gemma3:generate", "int8:kernel", "int4:weights_only"],
        OTHER: ["llama3:", "gemma3:", "int8:"],
    }

    def found_on(backend):
        if not importlib.util.find_spec(backend):
            return None
        names = [f"{name},{ONNX.get(name.partition(':')[0])}" for name in wishes[backend]]
        return open_in_fresh_process(IN_KERAS_HUB, folder, *names, backend=backend)

    with ThreadPoolExecutor(2) as pool:
        found, elsewhere = pool.map(found_on, wishes)
    return folder, expected, found, elsewhere


@pytest.mark.large
@pytest.mark.parametrize("family", PRESETS)
def test_a_preset_in_a_fresh_process(presets, family):
    _, expected, found, _ = presets
    assert_close(found[family], expected[family], 1e-5)
    assert_close(found[family], expected[f"{family}/connected"], 1e-4)
    stock = tiny.causal_lm(family, vocabulary_size=found[family].shape[-1])
    assert relative_error(logits(stock, X), found[family]) > 0.01  # there was something to fold
    text = str(found[f"{family}/text"])
    assert text == expected[f"{family}/text"] and len(text) > len(PROMPT)


@pytest.mark.large
@needs(OTHER)
def test_a_preset_on_another_backend(presets):
    _, expected, _, found = presets
    for name in (*PRESETS, "int8"):
        assert_close(found[name], expected[name], 1e-4)


# ---------------------------------------------------------------- int8 and int4


def test_int8(presets):
    _, expected, found, _ = presets
    assert_close(found["int8"], expected["int8"], 1e-5)
    # A weight or activation is off by half of 1/127 of the largest at most: a few percent in all.
    assert 1e-3 < relative_error(found["int8"], expected["llama3"]) < 0.1


def test_the_int8_kernel_is_the_folded_one(presets):
    _, expected, found, _ = presets
    size = expected["llama3"].shape[-1]
    model = CCCausalLM(tiny.causal_lm("llama3", vocabulary_size=size))
    connected.train_connection(model)
    layer = model.causal_lm.backbone.transformer_layers[1]._feedforward_output_dense
    kernel = connected.to_numpy(layer.inner.kernel)
    delta = connected.to_numpy(model.connection_layers()["block_1/transform_matrix"].delta)
    folded = kernel @ (np.eye(tiny.HIDDEN) + delta / np.sqrt(tiny.HIDDEN))
    scale = found["int8/scale"]
    assert found["int8/kernel"].dtype == "int8"
    error = np.abs(found["int8/kernel"] / scale - folded)
    assert (error <= 0.501 / scale).all()
    assert (np.abs(found["int8/kernel"] / scale - kernel) > 2 / scale).any()


def test_int4(presets):
    """Weights of four bits come back; that activations are not quantised does not (Keras 3.15).

    `quantize("int4")` leaves activations alone. The policy `"int4/128"` in a preset does not say
    so, and a loaded layer quantises them to int8: other numbers, without a word.
    """
    _, expected, found, _ = presets
    assert_close(found["int4/weights_only"], expected["int4"], 1e-5)
    assert 1e-3 < np.abs(found["int4"] - expected["int4"]).max() < 0.2
    loaded, _ = keras_cc.load_preset(presets[0] / "int4")
    assert_close(logits(loaded, X), expected["int4"], 1e-5)
    # A step is 1/7 of the largest weight, 18 times int8's.
    ratio = relative_error(expected["int4"], expected["llama3"])
    ratio /= relative_error(expected["int8"], expected["llama3"])
    assert 2 < ratio < 18 * 2


@pytest.mark.parametrize("tokenizer_called", [False, True])
def test_quantising_a_model_whose_tokenizer_was_never_called(tokenizer_called, monkeypatch):
    """Keras reports an unbuilt layer for a tokenizer that was never called; a torch task hides it.

    Ways round: call the tokenizer (or `generate`) once before, or quantise the backbone. After
    the error is too late: every other layer is quantised already.
    """
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    stock = connected_model("llama3").merge()
    if tokenizer_called:
        stock.preprocessor.tokenizer(PROMPT)
    elif BACKEND != "torch":
        with pytest.raises(ValueError, match=r"isn't yet built. Layer 'llama3_tokenizer"):
            stock.quantize("int8")
        with pytest.raises(ValueError, match="is already quantized"):
            stock.quantize("int8")
        return
    before = logits(stock, X)
    stock.quantize("int8")
    assert 1e-3 < relative_error(logits(stock, X), before) < 0.1


# ---------------------------------------------------------------- Hugging Face

IN_TRANSFORMERS = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, result, *names = sys.argv[1:]
found, x = {}, dict(np.load(folder + "/x.npz"))
with open(folder + "/texts.json", encoding="utf-8") as file:
    texts = json.load(file)
inputs = {
    "input_ids": torch.tensor(x["token_ids"]).long(),
    "attention_mask": torch.tensor(x["padding_mask"]).long(),
}
for name in names:
    name, _, wishes = name.partition(":")
    model, info = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{name}", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        found[name] = model.eval()(**inputs).logits.numpy()
    if "tokenizer" in wishes:
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{name}")
        for i, text in enumerate(texts):
            found[f"{name}/{i}"] = tokenizer(text, add_special_tokens=False).input_ids
assert not [name for name in sys.modules if name.startswith("keras")]
np.savez(result, **found)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """As `presets`, of models that KerasHub exported to a folder for `transformers`."""
    folder, expected, names = tmp_path_factory.mktemp("transformers"), {}, []
    np.savez(folder / "x.npz", **X)
    (folder / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    for family in (*TRANSFORMERS, "gemma2"):
        stock = connected_model(family, with_preprocessor=family != "gemma2").merge()
        stock.export_to_transformers(str(folder / family))
        expected[family] = logits(stock, X)
        names.append(f"{family}:tokenizer" if family in TOKENIZERS else family)
        for i, text in enumerate(TEXTS if family in TOKENIZERS else []):
            ids = tiny_tokenizers.ids_of(stock.preprocessor.tokenizer, text)
            expected[f"{family}/{i}"] = np.array(ids)
    return expected, open_in_fresh_process(IN_TRANSFORMERS, folder, *names)


@needs("torch", "transformers")
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_transformers_computes_the_same(exported, family):
    expected, found = exported
    assert_close(found[family], expected[family], 1e-3)


@needs("torch", "transformers")
@pytest.mark.parametrize("family", TOKENIZERS)
def test_transformers_reads_the_same_ids(exported, family):
    expected, found = exported
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(found[f"{family}/{i}"], expected[f"{family}/{i}"], text)


@needs("torch", "transformers")
def test_gemma_2_is_exported_as_another_model(exported):
    """KerasHub 0.32 writes Gemma 2 as Gemma, without its extra norms and caps, and says nothing."""
    expected, found = exported
    assert relative_error(found["gemma2"], expected["gemma2"]) > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_family_without_an_exporter(family, tmp_path):
    stock = connected_model(family, with_preprocessor=False).merge()
    with pytest.raises(ValueError, match="Export to Transformers format not implemented"):
        stock.export_to_transformers(str(tmp_path))


# ---------------------------------------------------------------- ONNX

IN_ONNX_RUNTIME = """
import sys
import numpy as np, onnxruntime
folder, result, *names = sys.argv[1:]
found, x = {}, dict(np.load(folder + "/x.npz"))
for name in names:
    session = onnxruntime.InferenceSession(
        f"{folder}/{name}.onnx", providers=["CPUExecutionProvider"]
    )
    # By name: their order is the alphabet's.
    found[name] = session.run(None, {i.name: x[i.name] for i in session.get_inputs()})[0]
assert not [name for name in sys.modules if name.startswith("keras")]
np.savez(result, **found)
"""


@pytest.mark.parametrize("family", PRESETS)
def test_onnx_runtime_computes_the_same(presets, family):
    """The preset of this backend, exported on a backend that can."""
    folder, expected, _, _ = presets
    if family not in ONNX or ONNX[family] not in (BACKEND, OTHER):
        pytest.skip("needs onnxruntime, and onnxscript with torch or tf2onnx with TensorFlow")
    found = open_in_fresh_process(IN_ONNX_RUNTIME, folder, family)
    assert_close(found[family], expected[family], 1e-4)
