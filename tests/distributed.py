"""Trainings on several devices, for tests that begin them as processes of their own.

python tests/distributed.py FOLDER  # writes what it found to FOLDER/<process>.json
"""

import contextlib
import json
import os
import pathlib
import sys
import tempfile

DEVICES = 4


def rows():
    """Of a last batch of two rows, some without a pivot, all of those in one part of a batch."""
    import long_run

    found = [long_run.row(number) for number in range(14)]
    for row in found[4:6]:
        row["instruction_en"] = None
    return found


def make(accumulate=None, objectives=()):
    import connected
    import keras
    import long_run
    import tiny

    from keras_cc import CCCausalLM, CCPreprocessor, FusedConnection

    keras.utils.set_random_seed(0)
    size = long_run.TOKENIZER.vocabulary_size()
    causal_lm = tiny.causal_lm("llama3", vocabulary_size=size)
    connection = FusedConnection(dropout=0.0, initial_gate=0.5)
    preprocessor = CCPreprocessor(long_run.TOKENIZER, 48)
    model = CCCausalLM(causal_lm, connection, objectives, preprocessor=preprocessor)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulate)
    model.compile(optimizer, sampler="greedy", **connected.QUICK)
    return model


def results(fit_transform=False, generates=False):
    """What trainings come to: losses, weights, scores, answers."""
    import connected
    import keras
    import numpy as np

    found = {}
    both = {"accumulate": 3, "objectives": ["dft"]}
    if keras.backend.backend() == "tensorflow":
        del both["accumulate"]  # refused
    trainings = {"plain": {}, "both": both}
    for name, options in trainings.items():
        model = make(**options)
        history = model.fit(rows(), batch_size=4, epochs=2, shuffle=False, verbose=0).history
        found[name] = {key: history[key] for key in ("sft_loss", "alignment_loss", "mean_gate")}
        weights = connected.weights(model)
        found[name]["weights"] = {k: np.asarray(v).ravel()[:8].tolist() for k, v in weights.items()}
    found["scores"] = model.evaluate(rows()[:6], batch_size=4, verbose=0, return_dict=True)
    found["scores"].pop("loss")
    if generates:
        prompts = ["dog Kenya", "fox", "the"]
        found["answers"] = (
            model.generate(prompts, 20),
            model.generate(prompts, 20, pivot_prompts=["dog", "fox the", "Kenya"]),
        )
    if fit_transform:
        model = make()
        model.fit_transform(rows(), batch_size=4, verbose=0)
        delta = model.connection_layers()["block_0/transform_matrix"].delta
        found["fit_transform"] = np.asarray(delta).ravel()[:8].tolist()
    return found


def is_shared_out():
    """Whether the rows of a compiled function are shared out among the devices."""
    import keras
    import numpy as np

    from keras_cc.distribution import shared_out

    rows = 2 * len(keras.distribution.list_devices())
    x = shared_out({"rows": np.zeros((rows, 3))})["rows"]
    kept = shared_out({"rows": np.zeros((rows + 1, 3))})["rows"]
    return isinstance(kept, np.ndarray) and not x.sharding.is_fully_replicated


class Interrupt(Exception):
    """Ends a training in its midst."""


def resumed(expected):
    """How far a training that was ended and went on is from one that was left alone."""
    import connected
    import keras
    import numpy as np

    from keras_cc import Checkpoints

    def interrupt(batch, logs):
        if batch == 2:
            raise Interrupt

    options = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(folder, steps=1)
        callback = keras.callbacks.LambdaCallback(on_train_batch_end=interrupt)
        with contextlib.suppress(Interrupt):
            make().fit(rows(), resume=kept, callbacks=[callback], **options)
        model = make()
        model.fit(rows(), resume=kept, **options)
    weights = connected.weights(model)
    return max(
        float(np.abs(np.asarray(weights[name]).ravel()[:8] - value).max())
        for name, value in expected.items()
    )


def of_jax(names):
    import keras

    import keras_cc

    if "JAX_PROCESSES" in os.environ:
        parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
        keras.distribution.set_distribution(parallel)
        return {"parallel": results()}
    found = {"one": results(True, True)}
    for name in names:
        if name == "data":
            distribution = keras.distribution.DataParallel()
        else:
            shape = tuple(map(int, name.split("x")))
            mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"))
            layout = keras_cc.distribution.layout_map("Llama3Backbone", mesh)
            distribution = keras_cc.distribution.ModelParallel(layout_map=layout)
        with distribution.scope():
            found[name] = results(True, True)
            found[f"{name} shared out"] = is_shared_out()
            found[f"{name} resumed"] = resumed(found[name]["plain"]["weights"])
            if name != "data":
                found[f"{name} layouts"] = {
                    v.path: [n or "" for n in v.value.sharding.spec] for v in make().weights
                }
                found[f"{name} whole"] = distribution.left_whole
    return found


def of_tensorflow(names):
    import tensorflow as tf

    devices = [tf.config.LogicalDeviceConfiguration()] * DEVICES
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    found = {"one": results()}
    strategy = tf.distribute.MirroredStrategy([f"CPU:{n}" for n in range(DEVICES)])
    with strategy.scope():
        found["mirrored"] = results()
    return found


def of_torch(names):
    import torch

    torch.distributed.init_process_group("gloo")
    found = {"parallel": results()}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
    backend = os.environ["KERAS_BACKEND"]
    number = os.environ.get("RANK", os.environ.get("JAX_PROCESS", "0"))
    if "JAX_PROCESSES" in os.environ:
        import keras

        keras.distribution.initialize(
            os.environ["JAX_ADDRESS"], int(os.environ["JAX_PROCESSES"]), int(number)
        )
    of = {"jax": of_jax, "tensorflow": of_tensorflow, "torch": of_torch}[backend]
    found = of(sys.argv[2:])
    (pathlib.Path(sys.argv[1]) / f"{number}.json").write_text(json.dumps(found))
