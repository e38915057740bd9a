"""Time and peak memory of a recipe's training step, beside KerasHub's own `CausalLM.fit`.

    python examples/benchmark_step.py --model gemma3_270m --backend jax
    python examples/benchmark_step.py --recipe cc_published --baseline sft

Both train all weights of the same model on the same target batch with Adam. Each
measurement is a process of its own, the two in turn (baseline, recipe, baseline, ...), so that
a drift of the machine's speed meets both; a ratio is taken within each turn. The time is the
median over the steps after the first two (compilation, warm-up); the memory is the process'
peak resident size, which contains the framework and the weights.
"""

import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Literal


@dataclasses.dataclass
class Step:
    """The batch of a step, and how often it is measured."""

    batch_size: int = 8
    """Rows a step."""
    length: int = 128
    """Target tokens a row."""
    pivot_length: int = 64
    """Pivot tokens a row."""
    answer_length: int = 16
    """Answer tokens a row; they are the last of the target."""
    steps: int = 5
    """Steps a measurement, the first two not counted."""
    turns: int = 3
    """How many times the two are measured."""
    rematerialize: bool = False
    """Whether a recipe's model computes its blocks twice; KerasHub's own cannot."""
    worker: str = ""
    """Measure this one in this process and print JSON (used by the script itself)."""


@dataclasses.dataclass
class Arguments(Step):
    """What to measure."""

    model: Literal["gemma3_270m", "smollm2_135m", "tiny"] = "smollm2_135m"
    """Which model; `tiny` is random and for trying the script."""
    backend: Literal["tensorflow", "jax", "torch"] = "jax"
    """Keras backend."""
    recipe: str = "cc"
    """What is measured: a name of `keras_cc.recipes`."""
    baseline: str = "stock"
    """What it is measured against: `stock`, KerasHub's own `fit`, or another recipe."""


def make_model(name):
    """The causal LM to train, without a preprocessor: batches are made of ids here."""
    import keras_hub

    if name == "tiny":
        backbone = keras_hub.models.Llama3Backbone(
            vocabulary_size=512, num_layers=2, num_query_heads=2, num_key_value_heads=1,
            hidden_dim=32, intermediate_dim=64,
        )  # fmt: skip
        return keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    import keras_cc.demo

    causal_lm, _ = keras_cc.demo.load(name)
    causal_lm.preprocessor = None
    return causal_lm


def pairs(args, vocabulary):
    """A batch of random pairs: `(x, y, sample_weight)`."""
    import numpy as np

    rng = np.random.default_rng(0)
    ids = rng.integers(3, vocabulary, (args.batch_size, args.length + 1)).astype("int32")
    pivot = rng.integers(3, vocabulary, (args.batch_size, args.pivot_length)).astype("int32")
    answer = np.zeros((args.batch_size, args.length), "int32")
    answer[:, -args.answer_length :] = 1
    x = {
        "token_ids": ids[:, :-1],
        "padding_mask": np.ones_like(answer),
        "answer_mask": answer,
        "pivot_token_ids": pivot,
        "pivot_padding_mask": np.ones_like(pivot),
    }
    return x, ids[:, 1:], answer.astype("float32")


def measure(args):
    """Train one of the two for some steps; returns seconds a step and the peak in GiB."""
    import keras
    import numpy as np

    import keras_cc

    keras.utils.set_random_seed(0)
    causal_lm = make_model(args.model)
    x, y, weights = pairs(args, causal_lm.backbone.vocabulary_size)
    if args.worker == "stock":
        model, x = causal_lm, {name: x[name] for name in ("token_ids", "padding_mask")}
    else:
        model = keras_cc.recipes.get(args.worker).model(
            causal_lm, preprocessor=None, rematerialize=args.rematerialize
        )
    model.compile(optimizer=keras.optimizers.Adam(1e-5))

    seconds = []

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.start = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            float(np.asarray(logs["loss"]))  # waits until the step is done
            seconds.append(time.perf_counter() - self.start)

    def repeat(values):
        return np.tile(values, (args.steps, 1))

    model.fit(
        {name: repeat(values) for name, values in x.items()},
        repeat(y),
        sample_weight=repeat(weights),
        batch_size=args.batch_size,
        shuffle=False,
        verbose=0,
        callbacks=[Clock()],
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": statistics.median(seconds[2:]), "gib": peak}))


def compare(args):
    """Measure the two in turn and print a Markdown row."""
    if args.recipe == args.baseline:
        raise SystemExit(f"--recipe and --baseline must differ. Received: {args.recipe} twice")
    environment = {**os.environ, "KERAS_BACKEND": args.backend, "PYTHONWARNINGS": "ignore"}
    found = {args.baseline: [], args.recipe: []}
    for turn in range(args.turns):
        for worker, results in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", worker]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"turn {turn + 1}, {worker}: {results[-1]}", file=sys.stderr, flush=True)

    def ratios(key):
        pairs = zip(found[args.recipe], found[args.baseline], strict=True)
        values = sorted(recipe[key] / baseline[key] for recipe, baseline in pairs)
        return f"{statistics.median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})"

    def medians(key):
        return " / ".join(
            f"{statistics.median(result[key] for result in found[worker]):.2f}"
            for worker in (args.recipe, args.baseline)
        )

    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("| model | backend | compared | time ratio | s a step | memory ratio | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {args.model} | {args.backend} | {args.recipe} / {args.baseline} "
        f"| {ratios('seconds')} | {medians('seconds')} | {ratios('gib')} | {medians('gib')} |"
    )


if __name__ == "__main__":
    import tyro

    arguments = tyro.cli(Arguments)
    measure(arguments) if arguments.worker else compare(arguments)
