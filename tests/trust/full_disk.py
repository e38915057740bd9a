"""A disk that is really full: python tests/trust/full_disk.py --times 200

A small disk in memory is filled up to a random rest. Then, in turn: a connection's weights saved
in two formats, a `.keras` file, each over one that is there, and a training with checkpoints. What
does not fit must say so, and what was there must load as it was; once there is room, the training
goes on to what one that was left alone comes to. For Linux, where a user may mount in a namespace.
"""

import argparse
import collections
import errno
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

DISK = 4 * 2**20


def weights_in(path, make):
    """A way to save a connection, whatever its format: `(save, load)`."""
    import connected

    def load():
        model = make()
        model.load_cc_weights(path)
        return connected.weights(model)

    return lambda model: model.save_cc_weights(path), load


def keras_file(path):
    import connected
    import keras

    return lambda model: model.save(path), lambda: connected.weights(keras.saving.load_model(path))


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours)


def fill(disk, rest):
    """Leave about so many bytes of the disk; returns the file that takes the others."""
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - rest)))
    return filler


def is_full(error):
    """Whether an error says that the disk is full, itself or as the cause of what is raised."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def run(disk, times, seed=0):
    """Returns, for each kind of file, how often it fitted and how often it was refused."""
    import long_run

    import keras_cc

    random, happened = np.random.default_rng(seed), collections.Counter()
    first, second = long_run.make(), long_run.make()
    second.fit(long_run.ROWS, batch_size=2, verbose=0, seed=0)
    kinds = {
        "connection.safetensors": weights_in(disk / "connection.safetensors", long_run.make),
        "connection.weights.h5": weights_in(disk / "connection.weights.h5", long_run.make),
        "model.keras": keras_file(disk / "model.keras"),
    }
    for _ in range(times):
        for name, (save, load) in kinds.items():
            save(first)
            before = load()
            size = (disk / name).stat().st_size
            filler = fill(disk, int(random.integers(2**15 + int(1.3 * size))))
            try:
                save(second)
                found = "fitted"
            except Exception as error:
                assert is_full(error), error
                found = "refused"
            filler.unlink()
            assert same(load(), before) == (found == "refused"), (name, found)
            assert sorted(p.name for p in disk.glob(".*")) == []
            happened[f"{name} {found}"] += 1
            for path in disk.glob(f"{name}*"):
                path.unlink()
    options = {"batch_size": 2, "epochs": 2, "seed": 7, "verbose": 0}
    alone = long_run.make()
    alone.fit(long_run.ROWS, **options)
    for number in range(times):
        kept = keras_cc.Checkpoints(disk / str(number), steps=1)
        filler = fill(disk, int(random.integers(int(1.5 * 2**20))))
        try:
            long_run.make().fit(long_run.ROWS, resume=kept, **options)
            happened["training fitted"] += 1
        except OSError as error:
            assert is_full(error), error
            assert "make room there" in str(error) or "can be written to" in str(error), error
            happened["training refused"] += 1
        filler.unlink()
        model = long_run.make()
        model.fit(long_run.ROWS, resume=kept, **options)
        assert same(long_run.state_of(model), long_run.state_of(alone))
        shutil.rmtree(disk / str(number))
    return dict(happened)


def in_a_namespace(folder, *command):
    """A command that has `folder` as its small disk; nobody else sees it."""
    mount = f'mount -t tmpfs -o size={DISK} tmpfs "$0" && exec "$@"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder), *command]


def possible():
    """Whether this machine lets us have such a disk."""
    if not shutil.which("unshare"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        return not subprocess.run(in_a_namespace(folder, "true"), capture_output=True).returncode


def on_a_small_disk(times, seed=0):
    """What `run` says, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--times", str(times), "--seed", str(seed), "--on", folder]
        command = in_a_namespace(folder, sys.executable, __file__, *options)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--on", type=pathlib.Path, help="where the small disk is, once it is there")
    given = parser.parse_args()
    if given.on:
        print(json.dumps(run(given.on, given.times, given.seed)))
    else:
        print(json.dumps(on_a_small_disk(given.times, given.seed)))
