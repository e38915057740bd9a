"""An epoch of real rows, at their own lengths: beside KerasHub's `fit`, and TRL with packing.

    python examples/benchmark_epoch.py --data ../shared/data
    python examples/benchmark_epoch.py --data ../shared/data --backend torch --turns 2

The rows are CLDR's questions and, from a folder with `train/TASK/LANG.jsonl`, those of XNLI and
XQuAD, as many of each, in Turkish, Hindi, Swahili and Russian where there are any. Rows of more
than `--max-length` tokens are left out, and counted. An epoch is put together of the steps of some
of its batches, evenly spaced in the order of their size, so compilation is not in it.

- ours: the recipe's batches as `fit` makes them, rows of like length together, with the pivots.
- KerasHub's `fit`: every batch padded to `--max-length`, logits at all positions, no pivots.
- `trl`: `SFTTrainer` on the same rows without pivots, `packing=True`, on a Llama of `transformers`
  of that shape; left out where it is not installed (`pip install trl`).
"""

import collections
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Literal

import benchmark
import benchmark_step

LANGUAGES = ("tr", "hi", "sw", "ru")


@dataclasses.dataclass
class Arguments(benchmark_step.Step):
    """What to measure."""

    model: Literal["gemma3_270m", "smollm2_135m", "tiny"] = "smollm2_135m"
    """Which model; `tiny` is random and for trying the script."""
    backend: Literal["tensorflow", "jax", "torch"] = "jax"
    """Keras backend."""
    recipe: str = "cc"
    """What is measured: a name of `keras_cc.recipes`."""
    data: pathlib.Path | None = None
    """Folder with train/xnli and train/xquad; without it, CLDR's rows alone."""
    rows: int = 480
    """Rows of the epoch."""
    sample: int = 12
    """Batches of the epoch that are trained on, to know what all take."""
    max_length: int = 384
    """Tokens of the longest row, and the width of KerasHub's and TRL's rows."""


def tokenizer_of(args):
    """The model's tokenizer, as `CCPreprocessor` takes it."""
    if args.model == "tiny":
        sys.path.insert(0, str(benchmark.HERE.parent / "tests"))
        import tiny_tokenizers

        return tiny_tokenizers.llama3_tokenizer()
    import keras_cc

    return keras_cc.load_preset(f"demo:{args.model}")[1]


def real_rows(args, preprocessor):
    """`(rows, how many were too long)`, as many of each set."""
    import numpy as np

    import keras_cc

    sets = [keras_cc.data.cldr_rows([*LANGUAGES[:3]])]
    for task in ("xnli", "xquad") if args.data else ():
        files = [args.data / "train" / task / f"{language}.jsonl" for language in LANGUAGES]
        sets.append([row for f in files if f.exists() for row in keras_cc.data.load_jsonl(f)])
    rng, found, too_long = np.random.default_rng(0), [], 0
    for rows in sets:
        taken = []
        for place in rng.permutation(len(rows)):
            row = {name: rows[place][name] for name in ("instruction", "output", "instruction_en")}
            (ids,) = preprocessor.prompt_ids([row["instruction"] + row["output"]])
            (pivot,) = preprocessor.prompt_ids([row["instruction_en"]])
            if max(len(ids), len(pivot)) > args.max_length - 4:
                too_long += 1
            else:
                taken.append(row)
            if len(taken) == math.ceil(args.rows / len(sets)):
                break
        found += taken
    return found[: args.rows], too_long


def prepared(args):
    """The preprocessor and the rows."""
    import keras_cc

    preprocessor = keras_cc.CCPreprocessor(
        tokenizer_of(args), args.max_length, args.max_length, template="{instruction}\n"
    )
    return preprocessor, real_rows(args, preprocessor)


def size(batch):
    """Tokens of the targets, the pivots and the answers' positions."""
    x, y, _ = batch
    return y.size, x["pivot_token_ids"].size, x["answer_positions"].size


def ours(args):
    """Seconds of an epoch of a recipe, from a sample of its batches."""
    import keras
    import numpy as np

    import keras_cc
    from keras_cc.data import widths
    from keras_cc.data.batches import PreparedBatches

    preprocessor, (rows, too_long) = prepared(args)
    keras.utils.set_random_seed(0)
    if args.model == "tiny":
        import tiny

        causal_lm = tiny.causal_lm(vocabulary_size=preprocessor.tokenizer.vocabulary_size())
    else:
        causal_lm = benchmark_step.make_model(args.model)
    model = keras_cc.recipes.get(args.recipe).model(causal_lm, preprocessor=None)
    model.compile(keras.optimizers.Adam(1e-5))
    source = PreparedBatches(
        rows, preprocessor, args.batch_size, shuffle=True, seed=0, group=True,
        most_shapes=widths.MAX_SHAPES if model.jit_compile else None,
    )  # fmt: skip
    batches = sorted(source, key=size)
    sample = {round(n) for n in np.linspace(0, len(batches) - 1, min(args.sample, len(batches)))}
    sample = [batches[place] for place in sorted(sample)]

    def step(batch):
        x, y, weights = batch
        return float(np.asarray(model.train_on_batch(x, y, weights)[0]))

    # What is compiled, traced or kept by the C library is so before it is timed, and the order is
    # none of the sizes.
    new = [*{size(batch): batch for batch in sample}.values()]
    for batch in new if model.jit_compile else (sample[-1], sample[0], sample[-1]):
        step(batch)
    random.Random(0).shuffle(sample)
    found = []
    for batch in sample:
        begin = time.perf_counter()
        step(batch)
        found.append(time.perf_counter() - begin)
    seconds = len(batches) * statistics.mean(found)
    tokens = sum(len(ids) for ids in preprocessor.prompt_ids([r["instruction"] for r in rows]))
    return {
        "seconds": seconds, "gib": benchmark.peak(), "rows": len(rows), "too_long": too_long,
        "padding": source.padding_share(), "mean_tokens": tokens / len(rows),
    }  # fmt: skip


def trl(args):
    """Seconds of an epoch of TRL's `SFTTrainer` with packing."""
    import datasets
    import tokenizers
    import transformers

    library = importlib.import_module("trl")  # whose names are lazy
    preprocessor, (rows, _) = prepared(args)
    packed = preprocessor.pack(rows)
    data = datasets.Dataset.from_list([{"input_ids": list(row.ids)} for row in packed])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    named = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            times[-1] = time.perf_counter() - times[-1]

    with tempfile.TemporaryDirectory() as folder:
        options = library.SFTConfig(
            output_dir=folder, packing=True, max_length=args.max_length, max_steps=args.steps,
            per_device_train_batch_size=args.batch_size, learning_rate=1e-5, use_cpu=True,
            report_to="none", save_strategy="no", gradient_checkpointing=False, bf16=False,
            dataloader_drop_last=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = library.SFTTrainer(
            benchmark.hugging_face(args), options, train_dataset=data, processing_class=named,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
        steps = math.ceil(len(trainer.train_dataset) / args.batch_size)
    return {"seconds": steps * statistics.median(times[2:]), "gib": benchmark.peak()}


def run(args, worker, script=__file__, **changes):
    """One measurement in a process of its own."""
    skipped = ("worker", "turns", "backend", "rematerialize")
    options = {k: v for k, v in dataclasses.asdict(args).items() if k not in skipped}
    if script != __file__:
        options = {k: options[k] for k in ("model", "batch_size", "answer_length", "steps")}
    command = [sys.executable, str(script), "--worker", worker]
    for name, value in (options | changes).items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "KERAS_BACKEND": args.backend, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{worker} failed:\n{done.stderr}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{worker}: {found}", file=sys.stderr, flush=True)
    return found


def measured(args):
    """Measure all in turn: the table's rows, and the figures of each turn."""
    batches = math.ceil(args.rows / args.batch_size)
    script = benchmark.HERE / "benchmark_step.py"
    turns = collections.defaultdict(list)
    for _ in range(args.turns):
        own = run(args, "ours")
        step = run(args, "stock", script, length=args.max_length)
        others = {"KerasHub's fit": batches * step["seconds"]}
        if importlib.util.find_spec("trl"):
            others["TRL, packing"] = run(args, "trl")["seconds"]
        for name, seconds in others.items():
            turns[name].append({"ours": own["seconds"], "theirs": seconds})
    lines = [f"{own['rows']} rows, {own['mean_tokens']:.0f} tokens a prompt, {own['padding']}"]
    for name, found in turns.items():
        ratios = [turn["ours"] / turn["theirs"] for turn in found]
        lines.append(
            f"| an epoch, {args.recipe}, {args.backend} | {name} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{found[-1]['ours']:.0f} / {found[-1]['theirs']:.0f} |"
        )
    return lines, dict(turns)


def main(args):
    """Measure all, print the table's rows."""
    lines, turns = measured(args)
    print("\n".join(lines))
    return turns


WORKERS = {"ours": ours, "trl": trl}

if __name__ == "__main__":
    import tyro

    arguments = tyro.cli(Arguments)
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
    else:
        main(arguments)
