"""What training and inference cost, beside what others do: one command, one table.

    python examples/benchmark.py                     # the backends that are installed
    python examples/benchmark.py --model tiny        # to try it, some minutes
    python examples/benchmark.py --device gpu        # adds large shapes in mixed bfloat16

Each measurement is a process of its own; the two of a row are measured in turn, so that a drift of
the machine's speed meets both, and a ratio is taken within each turn (median, lowest, highest). A
row whose library is not there is left out, and said. The result lies in `--output`, as JSON too.
With `--turns 2` and SmolLM2 on 2 CPU cores, `--rows stock transformers published merged pipeline`
took half an hour, `growth` some 24 minutes and `devices` 6.

Beside what `benchmark_step.py` measures:

- `transformers`: a plain step of the same shape in Hugging Face's library on PyTorch, logits at
  all positions, as its trainer does.
- `two_passes`: the scheme of CC-Tuning's authors as its paper describes it, in plain PyTorch: two
  whole passes with logits on both, one English activation added at the last prompt token. Written
  here for the comparison.
- `devices`: the losses of one training on 1, 2 and 4 devices, as which JAX can count a CPU.
- `growth`: steps of longer prompts (pivots half as long, 2 rows, blocks computed twice, so that it
  fits) and of larger batches.
- `epoch`: what `benchmark_epoch.py` measures, on the backend whose step was the fastest.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from typing import Literal

import benchmark_step
import memory
import tyro

HERE = pathlib.Path(__file__).resolve().parent
#: Shapes that are measured: those of `memory.py`, and one for trying the script.
SHAPES = {**memory.SHAPES, "tiny": memory.Shape(512, 32, 2, 2, 1, 16, 64)}
BACKENDS = ("jax", "tensorflow", "torch")
DEVICES = (1, 2, 4)


@dataclasses.dataclass
class Arguments(benchmark_step.Step):
    """What to measure."""

    model: Literal["gemma3_270m", "smollm2_135m", "tiny", "gemma_2b", "llama3_8b"] = "smollm2_135m"
    """Which model; the two large shapes are those of `--device gpu`."""
    backends: tuple[str, ...] = BACKENDS
    """Keras backends; those that are not installed are left out."""
    device: Literal["cpu", "gpu"] = "cpu"
    """cpu, or gpu: adds the large shapes."""
    rows: tuple[str, ...] = (
        "stock", "transformers", "published", "merged", "pipeline", "growth", "devices", "epoch",
    )  # fmt: skip
    """Which comparisons."""
    data: pathlib.Path | None = None
    """Folder with train/xnli and train/xquad for the epoch; without it, CLDR's rows alone."""
    output: pathlib.Path = pathlib.Path("runs/benchmark")
    """Folder of benchmark.json and benchmark.md."""


# ---------------------------------------------------------------- in a process of its own


def hugging_face(args):
    """A Llama of `transformers` of the shape, in float32, with random weights."""
    import torch
    import transformers

    shape = SHAPES[args.model]
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
            intermediate_size=shape.inner, head_dim=shape.head,
            tie_word_embeddings=True, max_position_embeddings=4096,
        )
    )  # fmt: skip


def steps_of(args, step):
    """Seconds of each step, and the peak of memory."""
    seconds = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds[2:]), "gib": peak()}


def peak():
    """GiB that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def transformers_step(args):
    """A plain step: Adam on all weights, loss at the answer's tokens, logits at all."""
    import torch

    model = hugging_face(args)
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)
    ids = torch.randint(3, SHAPES[args.model].vocabulary, (args.batch_size, args.length))
    labels = torch.where(torch.arange(args.length) >= args.length - args.answer_length, ids, -100)

    def step():
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    return steps_of(args, step)


def two_passes_step(args):
    """The authors' scheme: two whole passes with logits on both, one activation connected."""
    import torch

    model = hugging_face(args)
    shape = SHAPES[args.model]
    width, layers, vocabulary = shape.width, shape.layers, shape.vocabulary
    select = torch.nn.Linear(width, layers)
    transform = torch.nn.Linear(width, width, bias=False)
    every = [*model.parameters(), *select.parameters(), *transform.parameters()]
    optimizer = torch.optim.Adam(every, 1e-5)
    target = torch.randint(3, vocabulary, (args.batch_size, args.length))
    pivot = torch.randint(3, vocabulary, (args.batch_size, args.pivot_length))
    last = args.length - args.answer_length - 1
    labels = torch.where(torch.arange(args.length) > last, target, -100)
    activations, added = [], []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda _, __, out: activations.append(out))
        if number == layers // 2:
            block.mlp.register_forward_hook(lambda _, __, out: out + added[0] if added else out)

    def step():
        optimizer.zero_grad()
        activations.clear()
        added.clear()
        model(input_ids=pivot)  # with its logits, and with what a gradient needs
        english = torch.stack([one[:, -1] for one in activations], 1)
        chosen = torch.nn.functional.gumbel_softmax(select(english[:, -1]), hard=True)
        vector = (english * chosen[..., None]).sum(1)
        error = torch.nn.functional.mse_loss(transform(english.mean(1)), vector.detach())
        place = torch.zeros(1, args.length, 1)
        place[:, last] = 1.0
        added.append(vector[:, None] * place)
        (model(input_ids=target, labels=labels).loss + error).backward()
        optimizer.step()

    return steps_of(args, step)


def merged_inference(args):
    """A forward pass of a merged model, or of the stock one: the same class, the same graph."""
    import keras
    import numpy as np

    import keras_cc

    causal_lm = benchmark_step.make_model(args.model)
    if args.worker == "merged":
        model = keras_cc.CCCausalLM(causal_lm)
        causal_lm = model.merge()
    size = causal_lm.backbone.vocabulary_size
    ids = np.random.default_rng(0).integers(3, size, (args.batch_size, args.length)).astype("int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    backbone = causal_lm.backbone
    return steps_of(args, lambda: keras.ops.convert_to_numpy(backbone.predict_on_batch(x))[0, 0, 0])


def pipeline(args):
    """Rows of the CLDR set, read, tokenised, paired and put into batches: seconds a batch."""
    import keras_cc
    from keras_cc.data.batches import PreparedBatches

    if args.model == "tiny":
        sys.path.insert(0, str(HERE.parent / "tests"))
        import tiny_tokenizers

        tokenizer = tiny_tokenizers.llama3_tokenizer()
    else:
        tokenizer = keras_cc.load_preset(f"demo:{args.model}")[1]
    preprocessor = keras_cc.CCPreprocessor(tokenizer, 256, template="{instruction}\n")
    rows = keras_cc.data.cldr_rows(["tr", "sw", "id", "en"])
    made = PreparedBatches(rows, preprocessor, batch_size=args.batch_size, shuffle=True, group=True)
    list(made)  # texts are tokenised anew in each pass; caches of the process are warm
    begin = time.perf_counter()
    count = sum(1 for _ in made)
    return {"seconds": (time.perf_counter() - begin) / count, "gib": peak()}


def matrix_peak(size, turns=5):
    """FLOP a second of a product of two square matrices in bfloat16."""
    import keras

    ones = keras.ops.ones((size, size), "bfloat16")

    def product():
        corner = keras.ops.matmul(ones, ones)[0, 0]
        float(keras.ops.cast(corner, "float32"))  # NumPy's own reading of bfloat16 is not NumPy's

    product()
    begin = time.perf_counter()
    for _ in range(turns):
        product()
    return 2 * size**3 * turns / (time.perf_counter() - begin)


def large_shape(args):
    """A connected step of a large shape with random weights: tokens a second, share of the peak.

    In mixed bfloat16; beyond three thousand million weights with bfloat16 weights and LoRA.
    """
    import keras
    import keras_hub

    import keras_cc

    shape = SHAPES[args.model]
    is_large = shape.weights > 3e9
    peak_flops = matrix_peak(256 if args.model == "tiny" else 8192)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=shape.vocabulary, num_layers=shape.layers, num_query_heads=shape.heads,
        num_key_value_heads=shape.key_heads, hidden_dim=shape.width, intermediate_dim=shape.inner,
        tie_word_embeddings=True, dtype="bfloat16" if is_large else "mixed_bfloat16",
    )  # fmt: skip
    causal_lm = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    if is_large:
        backbone.enable_lora(16)
    connection = keras_cc.FusedConnection(transform="low_rank", rank=64)
    model = keras_cc.CCCausalLM(causal_lm, connection)
    model.compile(keras.optimizers.Adam(1e-5))
    x, y, weights = benchmark_step.pairs(args, shape.vocabulary)
    found = steps_of(args, lambda: model.train_on_batch(x, y, weights))
    tokens = args.batch_size * (args.length + args.pivot_length)
    matrices = shape.weights - shape.embedding
    # 6 FLOP a weight and target token, 4 where only LoRA trains; 2 a weight and pivot token.
    per_row = matrices * ((4 if is_large else 6) * args.length + 2 * args.pivot_length)
    per_row += 6 * shape.embedding * args.answer_length
    done = args.batch_size * per_row / found["seconds"]
    return {**found, "tokens_per_second": tokens / found["seconds"], "share": done / peak_flops}


def on_devices(args):
    """The losses of each step of one training, on 1, 2 and 4 devices."""
    flag = f" --xla_force_host_platform_device_count={DEVICES[-1]}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
    import keras

    import keras_cc

    losses = {}
    begin = time.perf_counter()
    for count in DEVICES:
        devices = keras.distribution.list_devices()[:count]
        spread = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
        keras.utils.set_random_seed(0)
        with spread.scope():
            connection = keras_cc.FusedConnection(dropout=0.0)
            model = keras_cc.CCCausalLM(benchmark_step.make_model(args.model), connection)
            # At 1e-4 SmolLM2's steps blow rounding up on one device as well: with its rows in
            # another order, the second epoch's alignment loss is 6e-3 of it apart.
            model.compile(keras.optimizers.SGD(1e-5))
            size = model.causal_lm.backbone.vocabulary_size
            x, y, weights = benchmark_step.pairs(args, size)
            # Two steps are one batch and its half, which is filled up.
            rows = [*range(args.batch_size), *range(args.batch_size // 2)]
            batches = ({name: value[rows] for name, value in x.items()}, y[rows], weights[rows])
            history = model.fit(
                batches, batch_size=args.batch_size, epochs=2, shuffle=False, verbose=0
            )
        losses[count] = history.history["sft_loss"] + history.history["alignment_loss"]
    return {"seconds": time.perf_counter() - begin, "gib": peak(), "losses": losses}


WORKERS = {
    "devices": on_devices,
    "large": large_shape,
    "transformers": transformers_step,
    "two_passes": two_passes_step,
    "merged": merged_inference,
    "unmerged": merged_inference,
    "pipeline": pipeline,
}


# ---------------------------------------------------------------- all of them


def run(args, worker, backend, **changes):
    """One measurement in a process of its own: of this script's workers, or `benchmark_step`'s."""
    script = "benchmark.py" if worker in WORKERS else "benchmark_step.py"
    names = ("model", "batch_size", "length", "pivot_length", "answer_length", "steps")
    options = {name: getattr(args, name) for name in names} | changes
    command = [sys.executable, str(HERE / script), "--worker", worker]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONWARNINGS": "ignore"}
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if options.get("rematerialize"):  # which XLA undoes on a CPU otherwise
        flag = " --xla_disable_hlo_passes=cse_barrier_expander"
        environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "") + flag
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{worker} on {backend} failed:\n{done.stderr}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{backend}, {worker}: {found['seconds']:.3f} s, {found['gib']:.2f} GiB", file=sys.stderr)
    return found


def in_turn(args, ours, theirs):
    """Measures two `(worker, backend)` in turn; the ratio of each turn, and the medians."""
    turns = [(run(args, *theirs), run(args, *ours)) for _ in range(args.turns)]
    found = {}
    for key in ("seconds", "gib"):
        ratios = sorted(our[key] / their[key] for their, our in turns)
        found[key] = {
            "ratio": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "ours": statistics.median(our[key] for _, our in turns),
            "theirs": statistics.median(their[key] for their, _ in turns),
        }
    return found


def growth(args, backend):
    """Exponents of cost: of the step's time as prompts grow, and as the batch grows."""
    import numpy as np

    lengths, batches = [128, 256, 512, 1024, 2048], [2, 4, 8]
    series = {
        "length": [
            {"length": n, "pivot_length": n // 2, "batch_size": 2, "rematerialize": True}
            for n in lengths
        ],
        "batch_size": [{"batch_size": n} for n in batches],
    }
    found = {}
    for name, values in {"length": lengths, "batch_size": batches}.items():
        steps = [run(args, "cc", backend, **changes) for changes in series[name]]
        seconds = [step["seconds"] for step in steps]
        found[name] = {
            "values": values,
            "seconds": seconds,
            "gib": [step["gib"] for step in steps],
            "exponent": float(np.polyfit(np.log(values), np.log(seconds), 1)[0]),
        }
    return found


def apart(args):
    """How far the losses of several devices are from those of one, as a share of these."""
    losses = run(args, "devices", "jax")["losses"]
    one = losses[str(DEVICES[0])]
    return {
        count: max(abs(a - b) / abs(a) for a, b in zip(one, losses[str(count)], strict=True))
        for count in DEVICES[1:]
    }


def epoch(args, backend):
    """The rows of `benchmark_epoch.py`."""
    import benchmark_epoch

    names = {field.name for field in dataclasses.fields(benchmark_epoch.Arguments)}
    shared = {k: v for k, v in dataclasses.asdict(args).items() if k in names - {"rows"}}
    return benchmark_epoch.measured(benchmark_epoch.Arguments(**shared, backend=backend))


def there(name):
    return importlib.util.find_spec(name) is not None


def fastest(backends, found):
    """The backend whose connected step took the least, of those that were measured."""
    none = {"seconds": {"ours": 0}}
    return min(backends, key=lambda b: found.get(f"KerasHub's fit, {b}", none)["seconds"]["ours"])


def comparisons(args, backends, found):
    """The rows of the table, as they are measured: `(what, against, figures)`."""
    if "stock" in args.rows:
        for backend in backends:
            yield (
                "connected step",
                f"KerasHub's fit, {backend}",
                in_turn(args, ("cc", backend), ("stock", backend)),
            )
    if "transformers" in args.rows and there("transformers") and there("torch"):
        best = fastest(backends, found)
        yield (
            f"connected step, {best}",
            "transformers, plain step",
            in_turn(args, ("cc", best), ("transformers", "torch")),
        )
    if "published" in args.rows and there("transformers") and there("torch"):
        yield (
            "published connection's step, torch",
            "two whole passes, PyTorch",
            in_turn(args, ("cc_published", "torch"), ("two_passes", "torch")),
        )
    if "merged" in args.rows:
        yield (
            f"inference after merge(), {backends[0]}",
            "the stock model",
            in_turn(args, ("merged", backends[0]), ("unmerged", backends[0])),
        )
    if "pipeline" in args.rows:
        yield (
            f"a batch read, tokenised, paired, {backends[0]}",
            "a connected step on it",
            in_turn(args, ("pipeline", backends[0]), ("cc", backends[0])),
        )


def large_shapes(args, backends):
    """Tokens a second of the large shapes, and their share of the matrix peak."""
    if shutil.which("nvidia-smi") is None:
        raise SystemExit("`--device gpu` needs an NVIDIA GPU: there is none here")
    return {
        f"{model}, {backend}": run(args, "large", backend, model=model)
        for model in ("gemma_2b", "llama3_8b")
        for backend in backends
        if backend != "tensorflow"
    }


def main(args):
    """Measure all, print the table, write it."""
    backends = [b for b in BACKENDS if b in args.backends and there(b)]
    for lacking in sorted(set(args.backends) - set(backends)):
        print(f"{lacking} is not installed: left out", file=sys.stderr)
    if not there("transformers"):
        print("transformers is not installed: its rows are left out", file=sys.stderr)
    large = large_shapes(args, backends) if args.device == "gpu" else {}
    found, lines = {}, []
    for what, against, figures in comparisons(args, backends, found):
        found[against] = {"what": what, **figures}
        cells = [what, against]
        for key in ("seconds", "gib"):
            f = figures[key]
            cells.append(f"{f['ratio']:.2f} ({f['lowest']:.2f} to {f['highest']:.2f})")
            cells.append(f"{f['ours']:.3g} / {f['theirs']:.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    grows = growth(args, backends[0]) if "growth" in args.rows else {}
    differences = apart(args) if "devices" in args.rows and "jax" in backends else {}
    epochs, record = epoch(args, fastest(backends, found)) if "epoch" in args.rows else ([], {})
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = (
        f"{args.model}, batch {args.batch_size}, {args.length} + {args.pivot_length} tokens, "
        f"answers {args.answer_length}; {machine}\n\n"
        "| what | against | time ratio | s | memory ratio | GiB |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )
    for name, one in grows.items():
        text += f"\nTime grows with {name} {one['values']} to the power {one['exponent']:.2f}.\n"
    for count, difference in differences.items():
        text += f"\nLosses on {count} devices are those on one to {difference:.1e} of them.\n"
    if epochs:
        text += "\n" + "\n".join(epochs) + "\n"
    for name, one in large.items():
        text += (
            f"\n{name}, mixed bfloat16: {one['tokens_per_second']:,.0f} tokens a second, "
            f"{one['share']:.0%} of the matrix peak.\n"
        )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "benchmark.md").write_text(text, encoding="utf-8")
    record = {
        "machine": machine, "rows": found, "growth": grows, "devices": differences,
        "epoch": record, "large": large,
    }  # fmt: skip
    record["settings"] = {k: str(v) for k, v in dataclasses.asdict(args).items()}
    (args.output / "benchmark.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(text)
    return record


if __name__ == "__main__":
    args = tyro.cli(Arguments)
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args)))
    else:
        main(args)
