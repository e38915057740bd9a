"""`export_saved_model`: a model as a versioned folder that TF Serving serves."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_cc.backbones.families import family_of
from keras_cc.cc_causal_lm import CCCausalLM
from keras_cc.export.model_card import FILE, ModelCard
from keras_cc.generation import get_sampler
from keras_cc.layers import TransformMatrix
from keras_cc.options import choice, count, flag
from keras_cc.preprocessing import CCPreprocessor
from keras_cc.whole_files import whole_folder

LOGITS = "logits"
SCORES = (LOGITS, "log_likelihood")
WARMUP_PROMPTS = ("What is the currency of Kenya?",)


def export_saved_model(
    causal_lm: Any,
    path: "str | os.PathLike[str]",
    *,
    version: int = 1,
    overwrite: bool = False,
    preprocessor: Any = None,
    max_length: int | None = None,
    max_length_argument: bool = False,
    sampler: Any = "greedy",
    strip_prompt: bool = True,
    score: str = "logits",
    warmup_prompts: Sequence[str] = WARMUP_PROMPTS,
    card: ModelCard | None = None,
) -> pathlib.Path:
    """Write a model as `path/version/`, a SavedModel with two signatures.

    `generate`: strings in, strings out; template, tokenizer and KV cache are inside the graph.

        prompts      string (B,)     any batch size
        max_length   int32 ()        with `max_length_argument` alone
        -> text      string (B,)     as `CCCausalLM.generate` gives it, "" where there is an error
        -> error     string (B,)     "" or why this prompt was not answered: it is not UTF-8, holds
                                     NUL, has no token, or leaves no room in `max_length`

    `score`: one forward pass.

        token_ids, padding_mask   int32 (B, T)
        -> logits                 float32 (B, T, vocabulary)

    or, with `score="log_likelihood"`, `answer_mask` int32 `(B, T)` beside them, 1 where the *next*
    token is one of the answer's (as `CCPreprocessor` makes it), and

        -> log_likelihood         float32 (B,), nats, the sum over the answer's tokens
        -> tokens                 int32 (B,), how many those are

    Neither holds an operation that needs XLA, without which TF Serving runs by default.

    What is exported is what a user gets: the monolingual path, merged or not, with a selected
    connection or an `Incline` intervention too. The folder appears when it is whole. In it are also
    a warm-up file, which TF Serving reads by itself, and a model card, `README.md`.

    TensorFlow traces the model. On the JAX backend it is saved and traced in a process of its own,
    for which a temporary folder needs room for the model. On PyTorch, save it and export the
    file with `python -m keras_cc.export`.

    Args:
        causal_lm: a `CCCausalLM`, or a KerasHub causal language model (as `merge()` gives it).
        path: the model's folder; versions are folders in it.
        version: int, the version's number.
        overwrite: bool, whether a version that is there is replaced.
        preprocessor: a `CCPreprocessor`, whose template prompts are put into; by default the
            `CCCausalLM`'s own, for another model one without a template.
        max_length: int, tokens of prompt and answer together. Default: the preprocessor's.
        max_length_argument: bool, whether a request gives its own `max_length`, up to this one.
        sampler: name of a KerasHub sampler, or a `keras_hub.samplers.Sampler`.
        strip_prompt: bool, whether `text` is the answer alone.
        score: `"logits"` or `"log_likelihood"`, what the signature `score` gives.
        warmup_prompts: strings for the warm-up file; () for none.
        card: a `ModelCard`. Its `method` is filled in from a `CCCausalLM`.

    Returns:
        The version's folder.

    Raises:
        FileExistsError: if the version is there and `overwrite` is False.
        ValueError: on the PyTorch backend, without a tokenizer, for a tokenizer that cannot be put
            into a graph, an intervention that reads English prompts, or an option that has no such
            value. Nothing is written then.
        OSError, or what TensorFlow raises: as writing fails, for example on a full disk. A version
            that was there is as it was, and nothing else of the version's name stays behind.
        RuntimeError: on JAX, if the process that runs TensorFlow fails, with what it printed.

    Warns:
        UserWarning: if the model has a connection that was never trained.

    Example:

    ```python
    model.merge()
    keras_cc.export_saved_model(model, "served/my_gemma", max_length=64)

    import tensorflow as tf
    import tensorflow_text  # the operations that the graph's tokenizer is made of

    served = tf.saved_model.load("served/my_gemma/1")
    served.signatures["generate"](prompts=tf.constant(["Kenya'nın para birimi nedir?"]))["text"]
    ```

    Source: CC-Tuning (arXiv 2506.00875), whose inference is monolingual.
    """
    _check_backend()
    model, preprocessor = _wrapped(causal_lm, preprocessor)
    count("version", version)
    options = {
        "max_length": _checked_length(model, preprocessor, max_length),
        "max_length_argument": flag("max_length_argument", max_length_argument),
        "strip_prompt": flag("strip_prompt", strip_prompt),
        "score": choice("score", score, SCORES),
    }
    sampler = get_sampler(sampler)
    folder = pathlib.Path(path).resolve() / str(version)
    if not flag("overwrite", overwrite) and folder.exists():
        raise FileExistsError(
            "`path` has this version already, and it may be served: give another `version`, or "
            f"`overwrite=True`. Received: version={version}, and there is {folder}"
        )
    _warn_if_untrained(model)
    card = dataclasses.replace(card or ModelCard())
    if card.method is None and model is causal_lm:
        card.method = _method(model)
    text = card.text()  # its report may not fit; then nothing has been written
    arguments = (sampler, options, list(warmup_prompts), folder.parent.name)
    own, model.preprocessor = model.preprocessor, preprocessor
    try:
        # TF Serving watches the parent for numbers: what is unfinished is not named as one.
        with whole_folder(folder) as unfinished:
            if keras.backend.backend() == "tensorflow":
                _write(model, unfinished, *arguments)
            else:
                _write_apart(model, unfinished, *arguments)
            (unfinished / FILE).write_text(text, encoding="utf-8")
    finally:
        model.preprocessor = own
    return folder


def _write(model, folder, sampler, options, warmup_prompts, name):
    """The SavedModel and its warm-up file, on TensorFlow."""
    import tensorflow as tf

    from keras_cc.export import warmup
    from keras_cc.export.serving import Server

    server = Server(model, sampler=sampler, **options)
    tf.saved_model.save(server, str(folder), signatures=server.functions)
    if not warmup_prompts:
        return
    request = {"prompts": list(warmup_prompts)}
    if options["max_length_argument"]:
        request["max_length"] = options["max_length"]
    scores = []
    for row in model.preprocessor.prompt_ids(warmup_prompts):
        ones = [[1] * len(row)]
        masks = ["padding_mask"] if options["score"] == LOGITS else ["padding_mask", "answer_mask"]
        scores.append({"token_ids": [row], **dict.fromkeys(masks, ones)})
    warmup.write(folder, name, {"generate": [request], "score": scores})


def _write_apart(model, folder, sampler, options, warmup_prompts, name):
    """The same from another backend: through a file, in a process that runs TensorFlow."""
    import keras_hub

    with tempfile.TemporaryDirectory(prefix="keras_cc_export_") as scratch:
        file, task = pathlib.Path(scratch, "model.keras"), pathlib.Path(scratch, "task.json")
        model.save(file)
        request = {
            "file": str(file),
            "folder": str(folder),
            "sampler": keras_hub.samplers.serialize(sampler),
            "options": options,
            "warmup_prompts": warmup_prompts,
            "name": name,
        }
        task.write_text(json.dumps(request), encoding="utf-8")
        script = "import sys; from keras_cc.export import saved_model; "
        script += "saved_model._write_request(sys.argv[1])"
        done = run_under_tensorflow(["-c", script, str(task)], capture_output=True)
    if done.returncode:
        raise RuntimeError(
            f"The export's TensorFlow process ended with {done.returncode}:\n{done.stderr[-4000:]}"
        )


def _write_request(task):
    import keras_hub

    import keras_cc.demo  # noqa: F401 (its tokenizer's class, for files that name it)

    request = json.loads(pathlib.Path(task).read_text(encoding="utf-8"))
    _write(
        keras.models.load_model(request["file"], compile=False),
        pathlib.Path(request["folder"]),
        keras_hub.samplers.deserialize(request["sampler"]),
        request["options"],
        request["warmup_prompts"],
        request["name"],
    )


def run_under_tensorflow(arguments: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
    """Run Python with these arguments in a fresh process on the TensorFlow backend."""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # The package as it is here, installed or not.
    root = str(pathlib.Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, text=True, check=False, **options)


def _check_backend():
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax"):
        raise ValueError(
            "`export_saved_model` writes a TensorFlow graph, which this backend cannot trace. Save "
            'the model, `keras_cc.save_preset(model.merge(), "my_model")` or '
            '`model.save("my_model.keras")`, and export what was saved: `python -m '
            "keras_cc.export my_model served/my_model` does it in a process with the right "
            f"backend. Received: KERAS_BACKEND={backend}"
        )


def _wrapped(causal_lm, preprocessor):
    """A `CCCausalLM` that answers as `causal_lm` does, and the preprocessor to export it with."""
    model = causal_lm
    if not isinstance(causal_lm, CCCausalLM):
        model = CCCausalLM(causal_lm, None, preprocessor=None)
    if preprocessor is None:
        preprocessor = model.preprocessor
    inner = model.causal_lm.preprocessor
    if preprocessor is None and inner is not None:
        preprocessor = CCPreprocessor(inner, max_length=inner.sequence_length)
    if preprocessor is None or not preprocessor.has_vocabulary:
        raise ValueError(
            "`causal_lm` must have a tokenizer with its vocabulary, which becomes a part of the "
            "graph: give `preprocessor=keras_cc.CCPreprocessor(tokenizer)`, or export a preset "
            f"that has one. Received: preprocessor={preprocessor!r}"
        )
    if model.intervention is not None and model.intervention.needs_pivot:
        raise ValueError(
            f"{model.intervention!r} reads the English prompt, which a server is not given: set "
            "`model.intervention = None` to export the model without it. "
            f"Received: intervention={model.intervention!r}"
        )
    return model, preprocessor


def _checked_length(model, preprocessor, max_length):
    if max_length is None:
        max_length = preprocessor.max_length
    max_length = count("max_length", max_length, least=2)
    backbone = model.causal_lm.backbone
    attribute = family_of(backbone).positions
    most = None if attribute is None else getattr(backbone, attribute)
    if most is not None and max_length > most:
        raise ValueError(
            f"`max_length` must be at most {most}, the positions that this model knows. "
            f"Received: max_length={max_length}"
        )
    return max_length


def _warn_if_untrained(model):
    transforms = [
        layer for layer in model.connection_layers().values() if isinstance(layer, TransformMatrix)
    ]
    if transforms and all(transform.is_identity for transform in transforms):
        warnings.warn(
            "This connection was never trained: its transforms are the identity, and what is "
            "exported is the model without it. Call `fit` or `fit_transform` first.",
            stacklevel=3,
        )


def _method(model):
    parts = [model.method, repr(model.intervention) if model.intervention else ""]
    return ", ".join(filter(None, parts))
