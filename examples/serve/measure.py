"""What an exported model costs, and whether it says what the Keras model says.

    KERAS_BACKEND=tensorflow python examples/serve/measure.py runs/gemma --stock demo:gemma3_270m

Parts, each in a process of its own: `texts` (Keras, TensorFlow alone and TensorFlow's C runtime,
token for token; logits of `score`), `cost` (a merged model beside the stock one: operations, and
time in turns), `requests` (a thousand mixed ones), `quantised` (exact match of float, int8 and int4
weights on held-out CLDR questions), `hugging_face` (logits of `transformers` on exported weights).
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import random
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tyro
from tqdm import tqdm

PARTS = ("texts", "cost", "requests", "quantised", "hugging_face")
LANGUAGES = ("en", "tr", "sw", "id", "hi")
TESTS = pathlib.Path(__file__).parents[2] / "tests"


@dataclasses.dataclass
class Arguments:
    """Measure an exported model."""

    preset: tyro.conf.Positional[str]
    """The merged model, as `train_gemma.py` saves it."""
    stock: str = "demo:gemma3_270m"
    """The model that was tuned."""
    template: str = "{instruction}\n"
    """Prompt template."""
    max_length: int = 64
    """Tokens of prompt and answer."""
    turns: int = 10
    """Forward passes of each of two models in `cost`, in turn."""
    rows: int = 40
    """CLDR questions a language in `quantised`."""
    parts: tuple[str, ...] = PARTS
    """What is measured."""


def model_of(args, preset=None):
    """A model with its preprocessor, that answers greedily."""
    import keras_cc.demo

    causal_lm, tokenizer = keras_cc.load_preset(preset or args.preset)
    preprocessor = keras_cc.CCPreprocessor(
        causal_lm.preprocessor or tokenizer, args.max_length, template=args.template
    )
    model = keras_cc.CCCausalLM(causal_lm, None, preprocessor=preprocessor)
    model.compile(sampler="greedy")
    return model


def questions(languages, rows, split="test"):
    """CLDR questions, evenly spaced, by language."""
    import keras_cc
    from keras_cc.comparison.rows import spread

    return {
        language: spread(keras_cc.data.cldr_rows([language], split=split), rows)
        for language in languages
    }


def export(args, folder, preset=None):
    """Export a preset; gives the model too."""
    import keras_cc

    model = model_of(args, preset)
    return model, keras_cc.export_saved_model(model, folder)


def load(folder):
    """The signatures of a SavedModel."""
    import tensorflow as tf
    import tensorflow_text  # noqa: F401 (its operations)

    return tf.saved_model.load(str(folder)).signatures


def ask(folder, prompts):
    """`(texts, errors)`, in a process that imports TensorFlow alone."""
    import tensorflow as tf

    found = load(folder)["generate"](prompts=tf.constant(prompts))
    assert not {"keras_hub", "keras_cc"} & set(sys.modules)
    return [[text.decode() for text in found[key].numpy()] for key in ("text", "error")]


def texts(args):
    """Equal texts of three runtimes, and how far logits are apart."""
    import tensorflow as tf

    sys.path.insert(0, str(TESTS))
    import native_tools

    prompts = [row["instruction"] for rows in questions(LANGUAGES, 4).values() for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        model, folder = export(args, pathlib.Path(scratch, "model"))
        seconds = time.perf_counter() - began
        expected = model.generate(prompts, strip_prompt=True)
        inputs = model.preprocessor.generate_preprocess(prompts[:4])
        tensors = {k: tf.constant(v) for k, v in inputs.items()}
        found = load(folder)["score"](**tensors)["logits"].numpy()
        calls = {"eager": model, "compiled": tf.function(lambda x: model(x))}  # as `predict` does
        real = inputs["padding_mask"] != 0
        differences = {
            name: float(np.abs(found - call(tensors)["logits"].numpy())[real].max())
            for name, call in calls.items()
        }
        alone, _ = apart(ask, folder, prompts)
        result = {
            "prompts": len(prompts),
            "languages": LANGUAGES,
            "answers": expected[:: len(prompts) // 5],
            "equal, TensorFlow alone": sum(map(str.__eq__, expected, alone)),
            "largest difference of logits": differences,
            "largest logit": float(np.abs(found[real]).max()),
            "export, s": seconds,
            "size, MB": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6,
        }
        if native_tools.why_not() is None:
            native = native_tools.ask(native_tools.build(pathlib.Path(scratch)), folder, prompts)
            texts_of = [text for text, _ in native]
            result["equal, C runtime"] = sum(map(str.__eq__, expected, texts_of))
        return result


def cost(args):
    """Operations of the merged and the stock model, and seconds of a forward pass, in turns."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as scratch:
        presets = {"merged": args.preset, "stock": args.stock}
        folders = {
            name: apart(_exported, args, pathlib.Path(scratch, name), preset)
            for name, preset in presets.items()
        }
        counts = {name: _operations(folder) for name, folder in folders.items()}
        served = {name: load(folder) for name, folder in folders.items()}
        seconds = {name: [] for name in served}
        ids = np.random.default_rng(0).integers(5, 1000, (4, args.max_length)).astype("int32")
        inputs = {"token_ids": tf.constant(ids), "padding_mask": tf.ones_like(ids)}
        for turn in tqdm(range(args.turns + 2), desc="turns"):
            for name in sorted(served, reverse=bool(turn % 2)):
                began = time.perf_counter()
                # One forward pass and no answer: answers differ in length between the models.
                served[name]["score"](**inputs)["logits"].numpy()
                seconds[name].append(time.perf_counter() - began)
    ratios = np.divide(seconds["merged"][2:], seconds["stock"][2:])
    return {
        "operations": counts,
        "seconds, median": {name: float(np.median(s[2:])) for name, s in seconds.items()},
        "ratio, median (lowest to highest)": [
            float(f(ratios)) for f in (np.median, np.min, np.max)
        ],
    }


def _exported(args, folder, preset):
    return export(args, folder, preset)[1]


def _operations(folder):
    from tensorflow.core.protobuf import saved_model_pb2

    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0].graph_def
    return len(graph.node) + sum(len(f.node_def) for f in graph.library.function)


def requests(args):
    """A thousand prompts of every kind: each is answered or refused with a message."""
    import tensorflow as tf

    kinds = [
        b"", b"a", b"x" * 10_000, ("é " * 5000).encode(), "🙂👩‍👩‍👧 ok".encode(), b"\xff\xfe",
        "ما هي عملة كينيا؟".encode(), "מה המטבע של קניה?".encode(), b"\xc3", b"a\0b", b"\r\n\t ",
        "肯尼亚的货币是什么?".encode(), b"<eos><|im_end|><start_of_turn>", b"\xed\xa0\x80",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = apart(_exported, args, pathlib.Path(scratch, "model"), None)
        generate = load(folder)["generate"]
        rng, answered, refused, longest = random.Random(0), 0, {}, 0.0
        bar = tqdm(total=1000, desc="requests")
        while bar.n < 1000:
            prompts = [rng.choice(kinds) for _ in range(min(rng.randint(1, 32), 1000 - bar.n))]
            began = time.perf_counter()
            found = generate(prompts=tf.constant(prompts))
            longest = max(longest, time.perf_counter() - began)
            assert len(found["text"]) == len(prompts)
            for error in found["error"].numpy():
                answered += not error
                if error:
                    refused[error.decode()] = refused.get(error.decode(), 0) + 1
            bar.update(len(prompts))
    return {"answered": answered, "refused": refused, "longest batch, s": longest}


def quantised(args):
    """Exact match on the validation territories, of float and of quantised weights."""
    from keras_cc.evaluation.metrics import exact_match, first_line

    held_out = questions(LANGUAGES[:4], args.rows, "validation")
    scores = {}
    for mode in ("float32", "int8", "int4"):
        model = model_of(args)
        if mode != "float32":
            model.causal_lm.backbone.quantize(mode)
            model.forget_compiled()
        scores[mode] = {}
        for language, rows in tqdm(held_out.items(), desc=mode):
            answers = model.generate([row["instruction"] for row in rows], strip_prompt=True)
            hits = [
                exact_match(first_line(text), row["answers"], language)
                for text, row in zip(answers, rows, strict=True)
            ]
            scores[mode][language] = 100 * float(np.mean(hits))
    return scores


def hugging_face(args):
    """The largest difference of logits, `transformers` on PyTorch to Keras."""
    import keras
    import torch
    import transformers

    prompts = [row["instruction"] for rows in questions(LANGUAGES, 1).values() for row in rows]
    model = model_of(args)
    inputs = model.preprocessor.generate_preprocess(prompts)
    logits = keras.ops.convert_to_numpy(model(inputs)["logits"])
    with tempfile.TemporaryDirectory() as folder:
        model.causal_lm.backbone.export_to_transformers(folder)
        other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            found = other(
                input_ids=torch.tensor(inputs["token_ids"]),
                attention_mask=torch.tensor(inputs["padding_mask"]),
            ).logits.numpy()
    real = inputs["padding_mask"] != 0
    difference = np.abs(found - logits)[real]
    same = (found.argmax(-1) == logits.argmax(-1))[real]
    return {"largest": float(difference.max()), "same first choice": f"{same.mean():.2%}"}


def apart(function, *arguments):
    """Call a function in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def main(args):
    """Measure the parts that are asked for."""
    functions = {f.__name__: f for f in (texts, cost, requests, quantised, hugging_face)}
    for part in args.parts:
        print(json.dumps({part: apart(functions[part], args)}, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
