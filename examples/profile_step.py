"""Where the seconds of a training step go: by the parts of the model, with the backend's profiler.

    python examples/profile_step.py --model smollm2_135m --backend jax
    python examples/profile_step.py --model gemma3_270m --backend torch --what stock

JAX: what XLA runs says which layer it was made from (the `op_name` of each instruction of the
compiled program), so the seconds of a trace are given to that layer. Fused instructions count where
their root stands. TensorFlow: the names of the graph's nodes, which hold the layers'. PyTorch: the
layer that an operation ran in, or in the backward pass, that of its forward one. Seconds are those
of one step's operations, the sum over those that ran beside each other; host work is the rest of
the step's wall time, none if that is less.
"""

import collections
import dataclasses
import glob
import gzip
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Literal

import benchmark_step

#: The parts of a step, in the order in which they are tried.
PARTS = {
    "finite check": r"is_?finite|reduce_and|IsFinite|vector_norm",
    "optimizer": r"adam|branch_1_fun",
    "embedding": r"token_embedding|UnsortedSegmentSum|embedding_dense_backward|EmbeddingBackward",
    "gate": r"decision_gate",
    "transform": r"transform_matrix",
    "connection, the rest": r"cc_feed_forward_\d+/(?!feedforward|ffw)",
    "attention": r"attention(?!_layer_?norm|layernorm|_norm)",
    "feed-forward and norms": r"transformer_layer|decoder_block|layer_?norm",
}
REST = "loss and the rest"
PRODUCT = r"dot_general|MatMul|::b?mm$|::addmm$|scaled_dot_product"
#: Instructions whose time is that of others.
ENCLOSING = ("conditional", "while", "call")


@dataclasses.dataclass
class Arguments(benchmark_step.Step):
    """What to profile."""

    model: Literal["gemma3_270m", "smollm2_135m", "tiny"] = "smollm2_135m"
    """Which model; `tiny` is random and for trying the script."""
    backend: Literal["tensorflow", "jax", "torch"] = "jax"
    """Keras backend."""
    what: str = "cc"
    """A name of `keras_cc.recipes`, or `stock`: KerasHub's own step."""
    top: int = 0
    """So many of the slowest operations, by name, below the table."""


def make_step(args):
    """A function that trains one step and waits for it."""
    import keras

    import keras_cc

    keras.utils.set_random_seed(0)
    causal_lm = benchmark_step.make_model(args.model)
    x, y, weights = benchmark_step.pairs(args, causal_lm.backbone.vocabulary_size)
    if args.what == "stock":
        model, x = causal_lm, {name: x[name] for name in ("token_ids", "padding_mask")}
    else:
        x["answer_positions"] = keras_cc.data.batches.prepared.answer_positions(x["answer_mask"])
        model = keras_cc.recipes.get(args.what).model(
            causal_lm, preprocessor=None, rematerialize=args.rematerialize
        )
    model.compile(optimizer=keras.optimizers.Adam(1e-5))
    return lambda: model.train_on_batch(x, y, weights)


def is_product(name):
    """Whether an operation is a product of matrices."""
    return bool(re.search(PRODUCT, name.split(" ")[0]))


def part_of(name):
    """The part of a step that an operation's name belongs to."""
    part = next((part for part, pattern in PARTS.items() if re.search(pattern, name)), REST)
    return "head" if part == "embedding" and is_product(name) else part


def instructions(folder):
    """Of the compiled steps in a folder: an instruction's name, to what it was made from."""
    line = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?)[\])}] ([a-z-]+)\((.*)$")
    found = {}
    for path in glob.glob(f"{folder}/*train_step*after_optimizations.txt"):
        for text in pathlib.Path(path).read_text().splitlines():
            match = line.match(text)
            if match and match[3] not in ENCLOSING:
                origin = re.search(r'op_name="([^"]*)"', match[4])
                found[match[1]] = f"{origin[1] if origin else match[1]} {match[2]}]"
    return found


def profile_jax(step, folder):
    """Seconds by the origin of XLA's instructions, and whether they are matrix products."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        step()
    (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    origins = instructions(os.environ["PROFILE_DUMP"])
    seconds = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name in origins:
            seconds[origins[name]] += event["dur"] / 1e6
    return seconds


def profile_tensorflow(step, folder):
    """Seconds by the names of the graph's nodes."""
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tf.profiler.experimental.Profile(folder):
        step()
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    space = xplane_pb2.XSpace.FromString(pathlib.Path(path).read_bytes())
    seconds = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name, _, kind = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if name and kind.isidentifier() and "/" in name + kind:
                    seconds[f"{name} {kind}"] += event.duration_ps / 1e12
    return seconds


def profile_torch(step):
    """Seconds by the layers that an operation ran in; in the backward pass, that of its forward."""
    import keras
    import torch

    def named(method):
        def run(self, *args, **kwargs):
            with torch.profiler.record_function(self.name):
                return method(self, *args, **kwargs)

        return run

    layer, optimizer = keras.layers.Layer, keras.optimizers.Adam
    own = (layer.__call__, optimizer.apply)
    layer.__call__, optimizer.apply = map(named, own)
    with torch.profiler.profile() as profile:
        step()
    layer.__call__, optimizer.apply = own
    paths, origins = {}, {}
    events = list(profile.events() or ())
    for event in events:
        parent, number = event.cpu_parent, event.sequence_nr
        before = paths.get(parent.id, "") if parent is not None else ""
        if event.name.startswith("autograd::engine::evaluate_function"):
            before = origins.get(number, "")
        elif number >= 0 and not event.name.startswith("autograd"):
            origins.setdefault(number, before)
        paths[event.id] = f"{before}/{event.name}"
    seconds = collections.Counter()
    for event in events:
        seconds[paths[event.id]] += event.self_cpu_time_total / 1e6
    return seconds


def work(args):
    """Profile in this process; prints JSON."""
    step = make_step(args)
    for _ in range(2):
        step()
    begin = time.perf_counter()
    step()
    wall = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        if args.backend == "torch":
            seconds = profile_torch(step)
        elif args.backend == "jax":
            seconds = profile_jax(step, folder)
        else:
            seconds = profile_tensorflow(step, folder)
    print(json.dumps({"wall": wall, "seconds": seconds}))


def main(args):
    """Profile in a process of its own, and print the table of parts."""
    with tempfile.TemporaryDirectory() as dump:
        environment = {
            **os.environ,
            "KERAS_BACKEND": args.backend,
            "PROFILE_DUMP": dump,
            "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", "work"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    parts = collections.Counter()
    for name, seconds in found["seconds"].items():
        parts[part_of(name), is_product(name)] += seconds
    total = sum(parts.values())
    print(f"{args.what}, {args.model}, {args.backend}: {found['wall']:.2f} s a step, ", end="")
    print(f"{total:.2f} s in operations; of these, % in matrix products, and in others:")
    for part in (*PARTS, "head", REST):
        shares = [100 * parts[part, kind] / total for kind in (True, False)]
        print(f"| {part} | {shares[0]:.1f} | {shares[1]:.1f} |")
    for name, seconds in sorted(found["seconds"].items(), key=lambda item: -item[1])[: args.top]:
        print(f"{seconds:.3f} {part_of(name)}: {name}")
    return parts


if __name__ == "__main__":
    import tyro

    arguments = tyro.cli(Arguments)
    work(arguments) if arguments.worker else main(arguments)
