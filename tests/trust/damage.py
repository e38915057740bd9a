"""Damaged files: python tests/trust/damage.py --copies 2000 [--atheris 60]

Copies of a connection's weights (two formats), of a checkpoint and of a `.keras` file with one byte
that is another, a tail that is missing, or bytes that are too many. Each must be refused, or load
as what was saved: none may load as something else. `--atheris` goes on from there: for so many
seconds, files of connection weights made by coverage (`pip install atheris`), *with the right
checksums*, as an enemy would write them: each is refused by the library's own words, with nothing
changed, or holds other weights of the same shapes.
"""

import argparse
import collections
import json
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


def sealed_again(content, of_options, weights, options):
    """Writes bytes as the weights, or as their options, and the checksums that go with them."""
    from keras_cc import checksums

    stated = json.loads(options.read_bytes())
    if of_options:
        try:
            stated = json.loads(content)
        except (ValueError, RecursionError):
            options.write_bytes(content)
            return
    else:
        weights.write_bytes(content)
    if isinstance(stated, dict):
        stated.pop("sha256", None)
        stated["weights_sha256"] = checksums.file_digest(weights)
        options.write_bytes(checksums.sealed(stated))
    else:
        options.write_bytes(content)


def check_enemy(content, kinds):
    """Loads one input, whose first byte says what it stands for; returns what happened."""
    if not content:
        return "refused"
    name, load = kinds[content[0] // 2 % 2]
    weights, options = name, pathlib.Path(f"{name}.json")
    kept, before = (weights.read_bytes(), options.read_bytes()), load(None)
    sealed_again(content[1:], content[0] % 2, weights, options)
    try:
        found = load(weights)
    except ValueError as error:
        assert "Received: " in str(error), error
        found = load(None)
        assert all(np.array_equal(found[key], value) for key, value in before.items())
        return "refused"
    finally:
        weights.write_bytes(kept[0])
        options.write_bytes(kept[1])
    assert {key: one.shape for key, one in found.items()} == {
        key: one.shape for key, one in before.items()
    }
    return "loaded"


def enemy_files(folder):
    """Good files to begin with: the kinds of `check_enemy`, and inputs that are whole."""
    import connected
    import tiny

    from keras_cc import CCCausalLM, FusedConnection

    model = CCCausalLM(tiny.causal_lm(), FusedConnection(layers=[-1]))
    kinds, whole = [], []

    def load(path):
        if path is not None:
            model.load_cc_weights(path)
        return connected.weights(model)

    for number, ending in enumerate((".safetensors", ".weights.h5")):
        path = folder / f"connection{ending}"
        model.save_cc_weights(path)
        kinds.append((path, load))
        whole.append(bytes([2 * number]) + path.read_bytes())
        whole.append(bytes([2 * number + 1]) + pathlib.Path(f"{path}.json").read_bytes())
    return kinds, whole


def fuzz(seconds):
    import atheris

    happened = collections.Counter()
    with tempfile.TemporaryDirectory() as scratch:
        with atheris.instrument_imports(include=["keras_cc.cc_weights", "keras_cc.checksums"]):
            import keras_cc  # noqa: F401
        folder = pathlib.Path(scratch)
        kinds, whole = enemy_files(folder)

        def one(content):
            happened[check_enemy(content, kinds)] += 1
            if not happened.total() % 1_000:  # the fuzzer ends the process, and says nothing
                print(dict(happened), flush=True)

        most = max(map(len, whole)) + 256
        arguments = [sys.argv[0], f"-max_total_time={seconds}", f"-max_len={most}", "-verbosity=0"]
        corpus = folder / "corpus"
        corpus.mkdir()
        for number, content in enumerate(whole):
            (corpus / str(number)).write_bytes(content)
        atheris.Setup([*arguments, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="files whose name has this in it")
    parser.add_argument("--atheris", type=int, default=0, help="seconds")
    given = parser.parse_args()
    if given.atheris:
        fuzz(given.atheris)
    else:
        run(given.copies, given.seed, given.only)
