"""One training on one device, on several, or in several processes; the script is the same.

    KERAS_BACKEND=jax python examples/train_distributed.py                   # what is there
    KERAS_BACKEND=jax python examples/train_distributed.py --devices 4       # as if the CPU were 4
    KERAS_BACKEND=jax python examples/train_distributed.py --devices 4 --model-parallel 2
    KERAS_BACKEND=jax python examples/train_distributed.py --processes 2     # two processes here
    KERAS_BACKEND=torch python examples/train_distributed.py --processes 2
    KERAS_BACKEND=tensorflow python examples/train_distributed.py --devices 2

Each process reads the same rows and trains on its part of each batch: the losses are those of one
device. A launcher that sets `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` (torchrun, or a
loop of your own over machines) takes the place of `--processes`.
"""

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tyro


@dataclasses.dataclass
class Arguments:
    """Fine-tune a KerasHub causal language model with CC-Tuning on several devices."""

    preset: str = "demo:gemma3_270m"
    """A KerasHub preset (name, handle or folder), or `demo:` and the name of a demo model."""
    languages: tuple[str, ...] = ("tr", "sw", "id", "en")
    """Languages of the CLDR set to train on."""
    recipe: str = "cc"
    """What is trained: sft, cc, self_distillation, ...; the table is in RECIPES.md."""
    steps: int = 20
    """Training steps."""
    batch_size: int = 8
    """Rows a step, on all devices together."""
    learning_rate: float = 3e-5
    """Of AdamW."""
    max_length: int = 64
    """Tokens of a row, prompt and answer."""
    devices: int | None = None
    """Have this machine's CPU count as so many devices; default: the devices that are there."""
    model_parallel: int = 1
    """Over how many devices each replica of the model is spread (JAX)."""
    backbone: str = "Gemma3Backbone"
    """The preset's KerasHub class, which says how that is done."""
    processes: int = 1
    """Begin so many processes here, each with its devices."""
    output: pathlib.Path = pathlib.Path("runs/distributed")
    """Folder of the merged preset."""
    seed: int = 0
    """Seed of the model's own draws and of the rows' order."""


def begin_processes(args):
    """Run this command in so many processes; ends the others where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(args.processes), "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(port)
    command = [sys.executable, *sys.argv]
    running = {
        number: subprocess.Popen(command, env={**os.environ, **world, "RANK": str(number)})
        for number in range(args.processes)
    }
    try:
        while running:
            time.sleep(0.2)
            for number, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[number]
                if process.returncode:
                    raise SystemExit(
                        f"Process {number} ended with {process.returncode}: the others are ended"
                    )
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def join(args):
    """Join the other processes, and say how the model is shared out: a scope to make it in."""
    import keras

    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    backend = keras.backend.backend()
    if args.model_parallel > 1 and backend != "jax":
        raise SystemExit(f"--model-parallel needs KERAS_BACKEND=jax, not {backend}")
    if backend == "torch":
        if args.devices is not None:
            raise SystemExit("PyTorch shares a batch out among processes: --processes")
        if processes > 1:
            import torch

            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return contextlib.nullcontext()
    if backend == "tensorflow":
        import tensorflow as tf

        if processes > 1:
            raise SystemExit("TensorFlow shares a batch out among devices: --devices")
        if args.devices is not None:
            cpu = tf.config.list_physical_devices("CPU")[0]
            logical = [tf.config.LogicalDeviceConfiguration()] * args.devices
            tf.config.set_logical_device_configuration(cpu, logical)
            names = [f"CPU:{number}" for number in range(args.devices)]
            return tf.distribute.MirroredStrategy(names).scope()
        return tf.distribute.MirroredStrategy().scope()
    if processes > 1:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        keras.distribution.initialize(address, processes, rank)
    devices = keras.distribution.list_devices()
    if args.devices is not None and len(devices) != args.devices * processes:
        raise SystemExit(
            "--devices takes effect where KERAS_BACKEND=jax is in the environment and JAX has no "
            f"accelerator. Received: --devices {args.devices}, and {len(devices)} devices"
        )
    if len(devices) == 1:
        return contextlib.nullcontext()
    if args.model_parallel == 1:
        parallel = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
        return parallel.scope()
    return spread_over(devices, args).scope()


def spread_over(devices, args):
    """Each replica's weights over so many devices, and the batch over the replicas."""
    import keras

    import keras_cc

    replicas, left = divmod(len(devices), args.model_parallel)
    if left:
        raise SystemExit(f"--model-parallel must divide the {len(devices)} devices")
    shape = (replicas, args.model_parallel)
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    layout = keras_cc.distribution.layout_map(args.backbone, mesh)
    return keras_cc.distribution.ModelParallel(layout_map=layout, auto_shard_dataset=False)


def main(args):
    """Run the whole of it; the first process speaks and saves."""
    if args.devices is not None and os.environ.get("KERAS_BACKEND") == "jax":
        flag = f" --xla_force_host_platform_device_count={args.devices}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
    if args.processes > 1 and "RANK" not in os.environ:
        return begin_processes(args)
    first = os.environ.get("RANK", "0") == "0"
    scope = join(args)
    import keras

    import keras_cc

    keras.utils.set_random_seed(args.seed)
    recipe = keras_cc.recipes.get(args.recipe)
    with scope:
        causal_lm, tokenizer = keras_cc.load_preset(args.preset)
        causal_lm.backbone.token_embedding.trainable = False
        preprocessor = keras_cc.CCPreprocessor(
            causal_lm.preprocessor or tokenizer, args.max_length, template="{instruction}\n"
        )
        model = recipe.model(causal_lm, preprocessor=preprocessor)
        model.compile(keras.optimizers.AdamW(args.learning_rate), sampler="greedy")
        rows = keras_cc.data.cldr_rows(args.languages)
        begin = time.time()
        history = model.fit(
            rows,
            batch_size=args.batch_size,
            steps_per_epoch=args.steps,
            seed=args.seed,
            verbose="auto" if first else 0,
        )
        seconds = time.time() - begin
        if model.is_mergeable:
            model.merge()  # in each process: its weights may lie on all of them
        if first:
            print(f"{args.steps} steps in {seconds:.0f} s, compiling among them")
            keras_cc.save_preset(causal_lm, args.output, tokenizer=tokenizer)
            print(f"The model: {args.output}")
    return history.history


if __name__ == "__main__":
    main(tyro.cli(Arguments))
