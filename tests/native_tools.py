"""A SavedModel, asked in TensorFlow's C runtime: builds `native/ask.c` and calls it."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

SOURCE = pathlib.Path(__file__).parent / "native" / "ask.c"
LIBRARIES = ("libtensorflow_cc.so.2", "libtensorflow_framework.so.2")
# What KerasHub's tokenizers use: SentencePiece, and the splitting before byte pairs.
OP_LIBRARIES = ("_sentencepiece_tokenizer.so", "_regex_split_ops.so")


def why_not() -> str | None:
    """The reason why the program cannot be built here, None if it can."""
    if not sys.platform.startswith("linux"):
        return "the C program is built on Linux"
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    wheel = _package_folder("tensorflow")
    if wheel is None:
        return "tensorflow is not installed"
    needed = [wheel / name for name in LIBRARIES]
    needed.append(wheel / "include" / "tensorflow" / "c" / "c_api.h")
    missing = [path.name for path in needed if not path.is_file()]
    return f"tensorflow comes without {', '.join(missing)}" if missing else None


def build(folder) -> pathlib.Path:
    """Compiles the program into `folder`, against the installed TensorFlow; returns its path.

    Raises:
        RuntimeError: with what the compiler said, warnings included, if it said anything.
    """
    wheel = _package_folder("tensorflow")
    program = pathlib.Path(folder) / "ask"
    command = ["gcc", SOURCE, "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1"]
    # As a system's: warnings in another release's headers are not this program's.
    command += ["-isystem", wheel / "include", f"-L{wheel}"]
    command += [f"-l:{name}" for name in LIBRARIES]
    command += [f"-Wl,-rpath,{wheel}", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return program


def tensor_names(saved_model_dir, signature) -> tuple[dict[str, str], dict[str, str]]:
    """The tensors of a signature's inputs and of its outputs, by what the signature calls them.

    Read from the file: nothing of the model is loaded.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    content = (pathlib.Path(saved_model_dir) / "saved_model.pb").read_bytes()
    (graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    if signature not in graph.signature_def:  # Reading a protobuf map would add an empty one.
        raise KeyError(signature)
    found = graph.signature_def[signature]
    return (
        {name: info.name for name, info in found.inputs.items()},
        {name: info.name for name, info in found.outputs.items()},
    )


def op_libraries() -> list[pathlib.Path]:
    """TensorFlow Text's libraries that a graph with a KerasHub tokenizer needs, if installed."""
    text = _package_folder("tensorflow_text")
    if text is None:
        return []
    paths = [text / "python" / "ops" / name for name in OP_LIBRARIES]
    return [path for path in paths if path.is_file()]


def run(program, *arguments) -> subprocess.CompletedProcess:
    """Runs the program; its output is bytes, its complaints are text."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [program, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    done.stderr = done.stderr.decode("utf-8", "replace")
    return done


def ask(
    program, saved_model_dir, prompts, max_length=None, signature="generate"
) -> list[tuple[str, str]]:
    """What the model answers in the C runtime: a text and an error for each prompt.

    Args:
        program: path of the program, as `build` returned it.
        saved_model_dir: folder of a SavedModel.
        prompts: list of strings, without NUL characters.
        max_length: int for the signature's `max_length`; None if it has none.
        signature: name of a signature from `prompts` to `text` and `error`.

    Raises:
        RuntimeError: with what the program said, if it failed.
    """
    inputs, outputs = tensor_names(saved_model_dir, signature)
    arguments = ["--model", saved_model_dir, "--input", inputs["prompts"]]
    for library in op_libraries():
        arguments += ["--library", library]
    if max_length is not None:
        arguments += ["--max-length", inputs["max_length"], max_length]
    arguments += ["--text", outputs["text"], "--error", outputs["error"], "--", *prompts]
    done = run(program, *arguments)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    *strings, rest = done.stdout.decode("utf-8").split("\0")
    if rest or len(strings) != 2 * len(prompts):
        raise RuntimeError(f"not two strings for each of {len(prompts)} prompts: {done.stdout!r}")
    return list(zip(strings[::2], strings[1::2], strict=True))


def _package_folder(name) -> pathlib.Path | None:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(name)
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None
