"""Damaged files: python tests/trust/damage.py --copies 2000

Copies of a connection's weights (two formats), of a checkpoint and of a `.keras` file with one byte
that is another, a tail that is missing, or bytes that are too many. Each must be refused, or load
as what was saved: none may load as something else.
"""

import argparse
import collections
import pathlib
import shutil
import sys
import tempfile
import warnings

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def damaged(whole, number, random):
    """A copy of some bytes: one is another, the tail is missing, or there is one too many."""
    place = int(random.integers(len(whole)))
    other = bytes([whole[place] ^ int(random.integers(1, 256))])
    kinds = (
        lambda: whole[:place] + other + whole[place + 1 :],
        lambda: whole[:place],
        lambda: whole + other,
    )
    return kinds[number % 3]()


def count(path, load, whole_is, copies, random):
    """Damages a file so often; returns how many were refused, and how many loaded as saved."""
    happened, whole = collections.Counter(), path.read_bytes()
    for number in range(copies):
        path.write_bytes(damaged(whole, number, random))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = load()
        except Exception as error:
            happened["refused"] += 1
            happened[f"  {type(error).__name__}"] += 1
            continue
        happened["loaded as saved" if whole_is(found) else "LOADED AS SOMETHING ELSE"] += 1
    path.write_bytes(whole)
    assert whole_is(load())
    return happened


def files(folder):
    """What is damaged: name -> (path, load, whether what was loaded is what was saved)."""
    import connected
    import keras
    import tiny

    from keras_cc import CCCausalLM, Checkpoints, FusedConnection

    def make():
        keras.utils.set_random_seed(0)
        model = CCCausalLM(tiny.causal_lm(), FusedConnection(layers=[-1]))
        connected.train_connection(model)
        return model

    def same(expected):
        def is_same(found):
            return found.keys() == expected.keys() and all(
                np.array_equal(found[name], value) for name, value in expected.items()
            )

        return is_same

    model = make()
    weights = connected.weights(model)
    for ending in (".safetensors", ".weights.h5"):
        path = folder / f"connection{ending}"
        model.save_cc_weights(path)

        def load(path=path):
            model.load_cc_weights(path)
            return connected.weights(model)

        yield f"connection{ending}", path, load, same(weights)
        options = pathlib.Path(f"{path}.json")
        yield f"connection{ending}.json", options, load, same(weights)

    model.compile("sgd", **connected.QUICK)
    x, y, sample_weight = tiny.batch()
    kept = Checkpoints(folder / "kept")
    options = {"sample_weight": sample_weight, "batch_size": 3, "verbose": 0}
    model.fit(x, y, resume=kept, **options)

    def newest():
        _, arrays = kept.newest()
        return {name: arrays[name] for name in arrays}

    expected = newest()
    (checkpoint,) = kept.folder.iterdir()
    for name in ("arrays.npz", "state.json"):
        yield f"checkpoint's {name}", checkpoint / name, newest, same(expected)

    path = folder / "model.keras"
    model.save(path)
    expected = connected.weights(model)
    yield (
        "model.keras",
        path,
        lambda: connected.weights(keras.saving.load_model(path)),
        same(expected),
    )


def run(copies, seed=0, only=None):
    random, found = np.random.default_rng(seed), {}
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        for name, path, load, whole_is in files(folder):
            if only is None or only in name:
                found[name] = count(path, load, whole_is, copies, random)
                print(name, dict(found[name]), flush=True)
    finally:
        shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="files whose name has this in it")
    given = parser.parse_args()
    run(given.copies, given.seed, given.only)
