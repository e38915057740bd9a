"""The file that `keras_cc.distill` keeps the model's answers in, one JSON object a line.

Notable choices:

- The first line names what the answers come from, the hash of all weights included, without those
  of a connection: the English path does not go through them. A file of anything else is refused.
- A file is begun whole and only ever added to, a batch of lines at a time, so that a run that is
  killed leaves at worst one torn line at the end.
"""

import hashlib
import json
import os
import warnings

import keras

from keras_cc import cc_weights
from keras_cc.preprocessing import templates
from keras_cc.whole_files import whole_file

FORMAT = "keras_cc distillation 1"


def header(model, max_length, sampler):
    """What the answers depend on, as it comes back from JSON."""
    facts = {
        "format": FORMAT,
        "backbone": cc_weights.backbone_facts(model.causal_lm.backbone),
        "weights": fingerprint(model),
        "template": templates.serialize(model.preprocessor.template),
        "add_start_token": model.preprocessor.add_start_token,
        "max_length": max_length,
        "sampler": keras.saving.serialize_keras_object(sampler),
        "stop_token_ids": model.preprocessor.stop_token_ids,
    }
    return json.loads(json.dumps(facts))


def fingerprint(model):
    """SHA-256 of the causal LM's weights, each one's shape and float32 values.

    Stored values in their order, and no names: equal on every backend and in every process.
    """
    own = {id(v) for layer in model.connection_layers().values() for v in layer.weights}
    digest = hashlib.sha256()
    for variable in model.causal_lm.weights:
        if id(variable) not in own:
            digest.update(str(tuple(variable.shape)).encode())
            digest.update(cc_weights.to_numpy(variable).astype("<f4", copy=False))
    return digest.hexdigest()


def read(cache, expected):
    """The answers in a cache, by prompt. It is begun where there is none.

    Args:
        cache: path of the file.
        expected: the `header` of the model that is to answer what is missing.

    Returns:
        A dict from prompt to answer.

    Raises:
        ValueError: if the folder is not there, or the file is no cache, or one of another header,
            or has a line that is broken; the file stays as it is.

    Warns:
        UserWarning: where the last line is torn; it is removed.
    """
    path = os.path.abspath(cache)
    if not os.path.isdir(os.path.dirname(path)):
        raise ValueError(f"`cache` must be in a folder that exists. Received: cache={path!r}")
    if not os.path.exists(path):
        with whole_file(path) as unfinished:
            _append_lines(unfinished, [expected])
    with open(path, "rb") as file:
        *lines, torn = file.read().split(b"\n")
    found, *entries = [_parse(line) for line in lines] or [None]
    _check_header(path, found, expected)
    for number, entry in enumerate(entries, start=2):
        types = {k: type(v) for k, v in entry.items()} if isinstance(entry, dict) else None
        if types != {"prompt": str, "answer": str}:
            raise ValueError(
                "`cache` must have a prompt and its answer on every line after the first: delete "
                f"the one that has not. Received: line {number} of cache={path!r}"
            )
    if torn:
        warnings.warn(
            f"The last line of cache={path!r} is torn, as when a run is killed while it writes: "
            "it is removed, and its prompt answered again.",
            stacklevel=3,
        )
        os.truncate(path, os.path.getsize(path) - len(torn))
    return {entry["prompt"]: entry["answer"] for entry in entries}


def append(cache, answers):
    """Add answers, a dict from prompt to answer."""
    _append_lines(cache, [{"prompt": p, "answer": a} for p, a in answers.items()])


def _check_header(path, found, expected):
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(
            f"`cache` must be a file that `distill` wrote ({FORMAT!r}), or a path where there is "
            f"none yet. Received: cache={path!r}, which is something else and stays as it is"
        )
    different = [
        f"{name}: {found.get(name)!r} in the file, {value!r} here"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if different:
        raise ValueError(
            "`cache` holds answers of another model or other settings, and stays as it is: give "
            "another path, or delete the file if nobody needs it. "
            f"Received: cache={path!r} with {'; '.join(different)}"
        )


def _parse(line):
    try:
        return json.loads(line)
    except ValueError:  # not JSON, or not even text
        return None


def _append_lines(path, entries):
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    with open(path, "ab") as file:  # bytes: a line ends in "\n" on every system
        file.write("".join(lines).encode("utf-8"))
