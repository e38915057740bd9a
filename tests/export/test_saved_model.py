"""`export_saved_model`: what it writes answers as the model does, and what it refuses."""

import functools
import json
import os
import pathlib
import random
import subprocess
import sys
import warnings

import connected
import keras
import keras_hub
import numpy as np
import pytest
import tiny
from backend_tools import run_python_for_json

import keras_cc
import keras_cc.demo
from keras_cc.export import __main__
from keras_cc.export import saved_model as module

BACKEND = keras.backend.backend()
on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="traced by TensorFlow; other backends go through a process"
)
LENGTH = 64
PROMPTS = [
    "Kenya'nın para birimi nedir?",
    "the quick brown fox",
    "",
    "केन्या की मुद्रा?",
    "肯尼亚 ما هي",
    "a",
]


def large(value):
    return pytest.param(value, marks=pytest.mark.large)


def text_model(family="llama3", connection="fused", **options):
    """A connected tiny model, as if it had been trained, that answers greedily."""
    model = connected.text_model(family, connection, **options)
    for seed, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, seed, scale=0.1)
    model.compile(sampler="greedy")
    return model


@functools.lru_cache(maxsize=2)  # `exported`, and that of the test
def load(folder):
    import tensorflow as tf
    import tensorflow_text  # noqa: F401 (its operations)

    return tf.saved_model.load(str(folder)).signatures


def ask(folder, prompts, **arguments):
    """`(texts, errors)` of a SavedModel's `generate`."""
    import tensorflow as tf

    generate = load(folder)["generate"]
    arguments = {name: tf.constant(value) for name, value in arguments.items()}
    found = generate(prompts=tf.constant(prompts, tf.string), **arguments)
    return [[text.decode() for text in found[key].numpy()] for key in ("text", "error")]


def answers(model, prompts=PROMPTS, max_length=LENGTH):
    return model.generate(prompts, max_length=max_length, strip_prompt=True)


def meta_graph(folder):
    """What a SavedModel's file holds."""
    from tensorflow.core.protobuf import saved_model_pb2

    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((folder / "saved_model.pb").read_bytes())
    return proto.meta_graphs[0]


def functions_of(folder):
    """The nodes of each function of a SavedModel."""
    return {
        function.signature.name: list(function.node_def)
        for function in meta_graph(folder).graph_def.library.function
    }


def reachable(folder, signature):
    """The operations that a signature runs, in the functions that it calls too."""
    graph, functions = meta_graph(folder), functions_of(folder)
    output = next(iter(graph.signature_def[signature].outputs.values())).name.split(":")[0]
    todo = [node for node in graph.graph_def.node if node.name == output]
    assert todo, output
    found, called = set(), set()
    while todo:
        node = todo.pop()
        found.add(node.op)
        for value in node.attr.values():
            for name in {value.func.name, *(f.name for f in value.list.func)} - called:
                called.add(name)
                todo += functions.get(name, [])
    return found


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model and its SavedModel, whose requests give `max_length`."""
    model = text_model()
    path = tmp_path_factory.mktemp("served") / "tiny"
    folder = keras_cc.export_saved_model(
        model, path, max_length=LENGTH, max_length_argument=True, warmup_prompts=PROMPTS[:2]
    )
    return model, folder


@on_tensorflow
class TestGenerate:
    @pytest.mark.parametrize(
        "family", ["gemma3", *map(large, ("gemma", "gpt2", "mistral", "qwen3", "bloom"))]
    )
    def test_says_what_the_model_says(self, family, tmp_path):
        model = text_model(family)
        prompts = [p for p in PROMPTS if model.preprocessor.prompt_ids([p])[0]]
        folder = keras_cc.export_saved_model(model, tmp_path / family, max_length=LENGTH)
        assert folder == tmp_path / family / "1"
        texts, errors = ask(folder, prompts)
        assert texts == answers(model, prompts) and not any(errors)

    @pytest.mark.large
    @pytest.mark.parametrize("length", [52, LENGTH])
    def test_a_request_gives_its_own_max_length(self, exported, length):
        model, folder = exported
        texts, errors = ask(folder, PROMPTS, max_length=length)
        assert texts == answers(model, max_length=length) and not any(errors)

    @pytest.mark.parametrize("length", [1, 0, -5, LENGTH + 1, 2**31 - 1])
    def test_a_max_length_that_cannot_be_is_said(self, exported, length):
        texts, errors = ask(exported[1], PROMPTS[:2], max_length=length)
        assert texts == ["", ""]
        assert errors == [f"max_length must be from 2 to {LENGTH}."] * 2

    @pytest.mark.parametrize("count", [0, 1, 7, 32])
    def test_any_batch(self, exported, count):
        model, folder = exported
        prompts = (PROMPTS * 6)[:count]
        texts, _ = ask(folder, prompts, max_length=52)
        one_by_one = [answers(model, p, 52) for p in prompts]
        assert texts == one_by_one

    def test_a_refused_prompt_leaves_the_others_their_answers(self, exported):
        model, folder = exported
        texts, errors = ask(folder, ["x" * 999, "a", b"\xff"], max_length=LENGTH)
        assert texts == ["", answers(model, "a"), ""]
        assert [bool(error) for error in errors] == [True, False, True]

    @pytest.mark.large
    def test_a_connected_model_exports_as_the_merged_one(self, exported, tmp_path):
        _, folder = exported
        again = text_model()
        merged = again.merge()
        other = keras_cc.export_saved_model(
            merged, tmp_path / "m", preprocessor=again.preprocessor, max_length=LENGTH
        )
        assert ask(other, PROMPTS)[0] == ask(folder, PROMPTS, max_length=LENGTH)[0]

    @pytest.mark.parametrize("kind", ["selected", large("incline"), large("mlp")])
    def test_what_cannot_be_merged_exports_as_it_answers(self, kind, tmp_path):
        if kind == "incline":
            model = text_model(connection=None, family="llama3")
            model.intervention = keras_cc.Incline()
            for layer in model.connection_layers().values():
                tiny.fill(layer, 5, scale=0.3)
        elif kind == "mlp":
            model = text_model(connection=keras_cc.FusedConnection(transform="mlp"))
        else:
            model = text_model(connection="selected")
        folder = keras_cc.export_saved_model(model, tmp_path / kind, max_length=52)
        expected = answers(model, max_length=52)
        assert ask(folder, PROMPTS)[0] == expected
        plain = model.causal_lm
        if kind != "mlp":  # it does something
            model.intervention = None
            plain = keras_cc.CCCausalLM(model.disconnect(), None, preprocessor=model.preprocessor)
            plain.compile(sampler="greedy")
            assert answers(plain, max_length=52) != expected

    @pytest.mark.large
    def test_with_the_prompt_and_a_template(self, tmp_path):
        model = text_model("gemma")
        inner = model.preprocessor.preprocessor
        preprocessor = keras_cc.CCPreprocessor(inner, 64, template="gemma")
        folder = keras_cc.export_saved_model(
            model, tmp_path / "m", preprocessor=preprocessor, strip_prompt=False
        )
        own, model.preprocessor = model.preprocessor, preprocessor
        assert ask(folder, ["the fox"])[0] == model.generate(["the fox"])
        assert own is not preprocessor

    @pytest.mark.large
    def test_sampled_texts_differ_from_call_to_call(self, tmp_path):
        model = text_model()
        sampler = keras_hub.samplers.TopKSampler(k=20, seed=3)
        folder = keras_cc.export_saved_model(
            model, tmp_path / "m", sampler=sampler, max_length=LENGTH
        )
        import tensorflow as tf

        generate = load(folder)["generate"]
        texts = {generate(prompts=tf.constant(["a"]))["text"].numpy()[0] for _ in range(4)}
        assert len(texts) > 1
        # The model still answers greedily.
        assert answers(model, "a") == answers(model, "a")

    @pytest.mark.large
    def test_a_thousand_mixed_requests(self, exported):
        """Each is answered or refused with a message, and the answers are the model's."""
        import tensorflow as tf

        model, folder = exported
        generate = load(folder)["generate"]
        kinds = [
            b"", b"a", b"x" * 10_000, ("é " * 5000).encode(), "🙂👩‍👩‍👧 ok".encode(),
            "ما هي عملة كينيا؟".encode(), "מה המטבע של קניה?".encode(), b"\xff\xfe\x00", b"\xc3",
            "\ufeffthe\u200f".encode(), b"a\0b", "\ud7ff\ue000\U0010ffff".encode(), b"\r\n\t ",
            b"<|end_of_text|><|eot_id|>", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
        ]  # fmt: skip
        rng, said, count = random.Random(0), {}, 0
        while count < 1000:
            prompts = [rng.choice(kinds) for _ in range(rng.randint(1, 32))]
            found = generate(prompts=tf.constant(prompts), max_length=tf.constant(40))
            texts, errors = found["text"].numpy(), found["error"].numpy()
            assert len(texts) == len(errors) == len(prompts)
            for prompt, text, error in zip(prompts, texts, errors, strict=True):
                assert not (text and error)
                assert said.setdefault(prompt, (text, error)) == (text, error)
            count += len(prompts)
        assert set(said) == set(kinds)
        assert said.pop(b"a\0b") == (b"", b"The prompt holds a NUL character.")
        for prompt, (text, error) in said.items():
            try:
                expected = answers(model, prompt.decode(), 40)
            except UnicodeDecodeError:
                assert error == b"The prompt is not valid UTF-8."
            except ValueError:
                assert error.startswith((b"The prompt has", b"The prompt is too long"))
            else:
                assert (text.decode(), error) == (expected, b"")


@on_tensorflow
class TestScore:
    def test_logits_are_the_models(self, exported):
        import tensorflow as tf

        model, folder = exported
        x, _, _ = tiny.batch()
        inputs = {name: x[name] for name in ("token_ids", "padding_mask")}
        found = load(folder)["score"](**{k: tf.constant(v) for k, v in inputs.items()})
        assert np.abs(found["logits"] - model(inputs)["logits"]).max() <= 1e-4

    def test_log_likelihoods_of_answers(self, tmp_path):
        """Against NumPy, from the model's logits."""
        import tensorflow as tf

        model = text_model()
        folder = keras_cc.export_saved_model(model, tmp_path / "m", score="log_likelihood")
        x, y, weights = tiny.batch()
        inputs = {name: x[name] for name in ("token_ids", "padding_mask", "answer_mask")}
        # The signature reads the answer from the ids: what `y` says, where it is an answer's.
        for row, column in zip(*np.nonzero(weights[:, :-1]), strict=True):
            inputs["token_ids"][row, column + 1] = y[row, column]
        inputs["answer_mask"][:, -1] = 0
        weights = inputs["answer_mask"]
        found = load(folder)["score"](**{k: tf.constant(v) for k, v in inputs.items()})
        logits = np.asarray(model({k: inputs[k] for k in ("token_ids", "padding_mask")})["logits"])
        logits = logits.astype("float64")
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [
            sum(log_p[r, t, inputs["token_ids"][r, t + 1]] for t in np.flatnonzero(weights[r]))
            for r in range(len(weights))
        ]
        np.testing.assert_allclose(found["log_likelihood"], expected, rtol=1e-5)
        np.testing.assert_array_equal(found["tokens"], weights.sum(axis=1))

    def test_nothing_needs_xla(self, exported):
        """TF Serving runs without it, on a GPU and, unless a flag says so, on a CPU."""
        for signature in ("score", "generate"):
            found = reachable(exported[1], signature)
            assert {"Einsum", "MatMul", "BatchMatMulV2"} & found
            assert not [op for op in found if op.startswith("Xla")]

    @pytest.mark.large
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the name of a symbol")
    def test_with_xla_switched_off_as_tf_serving_does(self, exported):
        model, folder = exported
        script = """
import ctypes, json, pathlib, sys
import tensorflow as tf
import tensorflow_text
library = ctypes.CDLL(str(pathlib.Path(tf.__file__).parent / "libtensorflow_cc.so.2"))
library._ZN10tensorflow21DisableXlaCompilationEv()
generate = tf.saved_model.load(sys.argv[1]).signatures["generate"]
found = generate(prompts=tf.constant(["a"]), max_length=tf.constant(64))["text"]
try:
    tf.function(lambda x: x + 1, jit_compile=True)(1.0)
except tf.errors.OpError as error:
    off = "disabled" in str(error)
print(json.dumps([found.numpy()[0].decode(), off]))
"""
        assert run_python_for_json(script, str(folder)) == [answers(model, "a"), True]


@on_tensorflow
class TestSliceUpdate:
    @pytest.mark.parametrize(
        ("starts", "shape"),
        [
            ((0, 2, 0), (3, 1, 4)), ((0, 0, 0), (3, 5, 4)), ((1, 2, 1), (2, 3, 2)),
            ((0, 9, 0), (3, 2, 4)), ((0, -1, 0), (3, 2, 4)),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("known", [True, False])
    def test_is_keras_own(self, starts, shape, known):
        import tensorflow as tf

        from keras_cc.export.serving import slice_update

        rng = np.random.default_rng(0)
        inputs, updates = rng.random((3, 5, 4), "float32"), rng.random(shape, "float32")
        expected = np.asarray(keras.ops.slice_update(inputs, starts, updates))
        spec = [None] * 3
        arguments = (inputs, tf.constant(starts), updates)
        if known:
            found = slice_update(inputs, list(starts), updates)
        else:
            call = tf.function(
                lambda x, s, u: slice_update(x, tf.unstack(s), u),
                [tf.TensorSpec(spec), tf.TensorSpec([3], tf.int32), tf.TensorSpec(spec)],
            )
            found = call(*arguments)
        np.testing.assert_array_equal(found, expected)


@on_tensorflow
class TestFolder:
    def test_a_plain_tensorflow_process_gives_the_same(self, exported):
        """With nothing of Keras or of this package imported."""
        model, folder = exported
        script = """
import json, sys
import tensorflow as tf
import tensorflow_text
generate = tf.saved_model.load(sys.argv[1]).signatures["generate"]
found = generate(prompts=tf.constant(json.loads(sys.argv[2])), max_length=tf.constant(64))
assert not {"keras_hub", "keras_cc"} & set(sys.modules)
print(json.dumps([text.decode() for text in found["text"].numpy()]))
"""
        found = run_python_for_json(script, str(folder), json.dumps(PROMPTS))
        assert found == answers(model)

    @pytest.mark.large
    def test_the_c_runtime_gives_the_same(self, exported, tmp_path):
        import native_tools

        if native_tools.why_not():
            pytest.skip(native_tools.why_not())
        model, folder = exported
        program = native_tools.build(tmp_path)
        found = native_tools.ask(program, folder, [*PROMPTS, "x" * 999], max_length=LENGTH)
        assert [text for text, _ in found] == [*answers(model), ""]
        assert [bool(error) for _, error in found] == [False] * len(PROMPTS) + [True]

    def test_versions_stand_side_by_side(self, exported):
        model, folder = exported
        with pytest.raises(FileExistsError, match="overwrite"):
            keras_cc.export_saved_model(model, folder.parent)
        before = sorted(folder.parent.iterdir())
        assert before == [folder]

    def test_overwrites_when_told_to(self, tmp_path):
        folder = tmp_path / "m" / "2"
        folder.mkdir(parents=True)
        (folder / "old").touch()
        found = keras_cc.export_saved_model(
            text_model(), folder.parent, version=2, overwrite=True, warmup_prompts=()
        )
        assert found == folder and not (folder / "old").exists()
        assert [p.name for p in folder.parent.iterdir()] == ["2"]
        assert not (folder / "assets.extra").exists()

    def test_the_warm_up_file_holds_requests(self, exported):
        pytest.importorskip("tensorflow_serving")
        import tensorflow as tf
        from tensorflow_serving.apis import prediction_log_pb2

        _, folder = exported
        records = tf.data.TFRecordDataset(
            str(folder / "assets.extra" / "tf_serving_warmup_requests")
        )
        requests = []
        for record in records.as_numpy_iterator():
            log = prediction_log_pb2.PredictionLog()
            log.ParseFromString(record)
            assert log.WhichOneof("log_type") == "predict_log"
            requests.append(log.predict_log.request)
        assert {r.model_spec.name for r in requests} == {"tiny"}
        signatures = load(folder)
        for request in requests:
            inputs = {k: tf.constant(tf.make_ndarray(v)) for k, v in request.inputs.items()}
            signatures[request.model_spec.signature_name](**inputs)
        assert [r.model_spec.signature_name for r in requests] == ["generate", "score", "score"]
        assert tf.make_ndarray(requests[0].inputs["prompts"]).tolist() == [
            p.encode() for p in PROMPTS[:2]
        ]

    @pytest.mark.large
    def test_nothing_stays_of_an_export_that_fails(self, tmp_path, monkeypatch):
        import tensorflow as tf

        save = tf.saved_model.save

        def fail(*args, **kwargs):
            save(*args, **kwargs)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tf.saved_model, "save", fail)
        old = tmp_path / "m" / "1"
        old.mkdir(parents=True)
        (old / "served").touch()
        with pytest.raises(OSError, match="No space"):
            keras_cc.export_saved_model(text_model(), tmp_path / "m", overwrite=True)
        assert [p.name for p in old.parent.iterdir()] == ["1"] and (old / "served").exists()

    @pytest.mark.large
    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
    def test_a_disk_that_fills(self, tmp_path):
        """In a process whose files may not grow beyond 20 kB."""
        script = """
import resource, signal, sys
import connected, keras_cc, tiny
model = connected.text_model("llama3")
for layer in model.connection_layers().values():
    tiny.fill(layer, 1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    keras_cc.export_saved_model(model, sys.argv[1])
except Exception as error:
    print("failed:", type(error).__name__)
"""
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "m")],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert "failed:" in done.stdout, done.stderr[-2000:]
        assert list((tmp_path / "m").iterdir()) == []


@on_tensorflow
class TestCost:
    @pytest.mark.large
    def test_a_merged_model_is_the_stock_graph(self, tmp_path):
        """Operation by operation, in every function of the SavedModel."""
        model = text_model()
        stock = connected.causal_lm("llama3", connected.tokenizer_of("llama3"))
        counts = []
        for name, causal_lm in (("merged", model.merge()), ("stock", stock)):
            folder = keras_cc.export_saved_model(
                causal_lm, tmp_path / name, preprocessor=model.preprocessor, max_length=LENGTH
            )
            functions = functions_of(folder).values()
            counts.append(sorted(sorted(node.op for node in nodes) for nodes in functions))
        assert counts[0] == counts[1]


class TestRefusals:
    @pytest.mark.skipif(BACKEND != "torch", reason="the other backends can")
    def test_on_torch_the_way_round_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"python -m keras_cc\.export"):
            keras_cc.export_saved_model(text_model(), tmp_path / "m")
        assert not (tmp_path / "m").exists()

    @pytest.mark.skipif(BACKEND == "torch", reason="refused there as a whole")
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"version": -1}, "version"),
            ({"version": "1"}, "version"),
            ({"max_length": 1}, "max_length"),
            ({"max_length": True}, "max_length"),
            ({"max_length_argument": 64}, "max_length_argument"),
            ({"strip_prompt": "no"}, "strip_prompt"),
            ({"score": "nats"}, "score"),
            ({"sampler": "bees"}, "bees"),
            ({"overwrite": "yes"}, "overwrite"),
        ],
    )
    def test_options(self, options, match, tmp_path):
        with pytest.raises((ValueError, TypeError), match=match):
            keras_cc.export_saved_model(text_model(), tmp_path / "m", **options)
        assert not (tmp_path / "m").exists()

    @pytest.mark.skipif(BACKEND == "torch", reason="refused there as a whole")
    def test_without_a_tokenizer(self, tmp_path):
        with pytest.raises(ValueError, match="must have a tokenizer"):
            keras_cc.export_saved_model(tiny.causal_lm(), tmp_path / "m")

    @pytest.mark.skipif(BACKEND == "torch", reason="refused there as a whole")
    def test_what_reads_the_english_prompt(self, tmp_path):
        model = text_model(connection=None)
        model.intervention = keras_cc.XTransplant(0, 1)
        with pytest.raises(ValueError, match="reads the English prompt"):
            keras_cc.export_saved_model(model, tmp_path / "m")

    @pytest.mark.skipif(BACKEND == "torch", reason="refused there as a whole")
    def test_more_positions_than_the_model_has(self, tmp_path):
        with pytest.raises(ValueError, match="at most 64"):
            keras_cc.export_saved_model(text_model("gpt2"), tmp_path / "m", max_length=65)

    @on_tensorflow
    def test_a_sampler_that_lays_out_rows_anew_under_a_pass(self, tmp_path):
        with pytest.raises(ValueError, match="BeamSampler"):
            keras_cc.export_saved_model(
                text_model(connection="selected"), tmp_path / "m", sampler="beam"
            )
        assert list((tmp_path / "m").iterdir()) == []

    @on_tensorflow
    @pytest.mark.large
    @pytest.mark.parametrize("connection", ["fused", "selected"])
    def test_an_untrained_connection_is_warned_of(self, connection, tmp_path):
        model = connected.text_model("llama3", connection)
        with pytest.warns(UserWarning, match="never trained"):
            keras_cc.export_saved_model(model, tmp_path / "m")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.disconnect()
            keras_cc.export_saved_model(model, tmp_path / "plain")

    def test_a_non_linear_transform_says_what_can_be_exported(self):
        model = text_model(connection=keras_cc.FusedConnection(transform="mlp"))
        with pytest.raises(ValueError, match="export_saved_model"):
            model.merge()


class TestThroughAProcess:
    """From another backend than TensorFlow: in a process of its own."""

    @pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow needs no process, torch is refused")
    @pytest.mark.parametrize("kind", ["connected", large("stock")])
    def test_from_jax(self, kind, tmp_path):
        model = text_model(with_preprocessor=kind == "stock")
        if kind == "stock":
            causal_lm = model.merge()
            assert causal_lm.preprocessor is not None
        folder = keras_cc.export_saved_model(
            model if kind == "connected" else causal_lm,
            tmp_path / "m",
            max_length=LENGTH,
            card=keras_cc.export.ModelCard("tiny"),
        )
        assert ask(folder, PROMPTS)[0] == answers(model)
        card = (folder / "README.md").read_text()
        assert ("FusedConnection" in card) == (kind == "connected")
        assert [p.name for p in folder.parent.iterdir()] == ["1"]

    @pytest.mark.skipif(BACKEND != "jax", reason="TensorFlow needs no process, torch is refused")
    def test_a_process_that_fails_is_an_error_here(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "run_under_tensorflow", _failing)
        with pytest.raises(RuntimeError, match="no memory"):
            keras_cc.export_saved_model(text_model(), tmp_path / "m")
        assert list((tmp_path / "m").iterdir()) == []

    @pytest.mark.large
    @pytest.mark.skipif(BACKEND != "torch", reason="as on torch, which has no other way")
    @pytest.mark.parametrize("kind", ["preset", "keras"])
    def test_the_command_line(self, kind, tmp_path):
        """A saved model of any backend; tokenizer and template come along or are given."""
        with_preprocessor = kind == "preset"
        model = text_model(with_preprocessor=with_preprocessor)
        source = tmp_path / ("model.keras" if kind == "keras" else "model")
        arguments = ["--max-length", str(LENGTH), "--base-model", "tiny", "--languages", "tr", "sw"]
        if kind == "preset":
            model.preprocessor = keras_cc.CCPreprocessor(
                model.preprocessor.preprocessor, LENGTH, template="{instruction} the "
            )
            arguments += ["--template", "{instruction} the "]
            keras_cc.save_preset(model.merge(), source)
        else:
            model.save(source)
        command = [sys.executable, "-m", "keras_cc.export", str(source), str(tmp_path / "served")]
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True, text=True, timeout=300, check=False, env=_environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        folder = pathlib.Path(json.loads(done.stdout.splitlines()[-1])["saved_model"])
        assert folder == tmp_path / "served" / "1"
        prompts = [p for p in PROMPTS if p.isascii()]
        assert ask(folder, prompts)[0] == answers(model, prompts)
        assert "| Languages | tr, sw |" in (folder / "README.md").read_text()

    @on_tensorflow
    def test_the_command_line_refuses_in_a_line(self, tmp_path, capsys):
        tiny.causal_lm().save_to_preset(tmp_path / "preset")
        (tmp_path / "served" / "1").mkdir(parents=True)
        path = str(tmp_path / "served")
        assert __main__.main([str(tmp_path / "preset"), path]) == 1
        assert "must be a preset with a tokenizer" in capsys.readouterr().err
        assert __main__.main(["demo:nothing", path]) == 1
        assert "nothing" in capsys.readouterr().err
        text_model().save(tmp_path / "model.keras")
        assert __main__.main([str(tmp_path / "model.keras"), path]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("FileExistsError: `path` has this version already")


def _failing(arguments, **options):
    return subprocess.CompletedProcess(arguments, 1, stdout="", stderr="no memory")


def _environment():
    root = str(pathlib.Path(keras_cc.__file__).parents[1])
    known = os.environ.get("PYTHONPATH", "")
    return {**connected.environment(), "PYTHONPATH": os.pathsep.join([root, known])}
