"""Trainings that are killed at random moments, and go on: python tests/trust/kill.py --kills 20

Each is compared with one that was left alone: the same weights and optimizer's state, and each row
once in each epoch. A process is ended by SIGKILL, which nothing in it hears.
"""

import argparse
import functools
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

EPOCHS, ROWS, BATCH_SIZE = 8, 79, 2
HOW = {
    "plain": {},
    "accumulation": {"accumulate": 3},
    "lora": {"lora": True},
    "frozen": {"frozen": True},
}


def train(folder, how, notes):
    """The training: what a process does, however often it is begun."""
    import keras
    import long_run

    import keras_cc

    rows = [long_run.row(number) for number in range(ROWS)]
    model = long_run.make(**HOW[how])
    kept = keras_cc.Checkpoints(folder, steps=3)
    options = {"batch_size": BATCH_SIZE, "epochs": EPOCHS, "seed": 7, "verbose": 0}
    begins = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: print("training", flush=True)
    )
    with open(notes, "a", encoding="utf-8") as file:
        note = long_run.NoteRows(functools.partial(print, file=file, flush=True))
        history = model.fit(rows, resume=kept, callbacks=[begins, note], **options)
    state = long_run.state_of(model)
    with open(pathlib.Path(folder) / "end.npz", "wb") as file:
        np.savez(file, *state.values(), loss=history.history["loss"])


def begin(folder, how):
    command = [sys.executable, __file__, "--train", str(folder), "--how", how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "training":
            return process
    raise RuntimeError(f"The training of {how!r} ended before it began")


def ended(process):
    """How a process ended, its output closed."""
    with process:
        return process.wait()


def rows_trained(folder):
    """The rows of each step, by what trained it last: that is what the weights have of it."""
    steps = {}
    for line in (folder / "notes").read_text(encoding="utf-8").splitlines():
        epoch, batch, *rows = map(int, line.split())
        steps[epoch, batch] = rows
    return steps


def compare(how, kills, seed, most=0.8):
    """Kills a training so often; returns how many weights and epochs were compared.

    Raises:
        AssertionError: where it is not as one that was left alone.
    """
    moments = random.Random(f"{how} {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        whole, pieces = pathlib.Path(scratch, "whole"), pathlib.Path(scratch, "pieces")
        for folder in (whole, pieces):
            folder.mkdir()
        if ended(begin(whole, how)):
            raise RuntimeError("The training that was left alone failed")
        killed = 0
        while True:
            process = begin(pieces, how)
            if killed == kills:
                break
            time.sleep(moments.uniform(0, most))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            ended(process)
            killed += 1
        if ended(process):
            raise RuntimeError("The training that was killed failed at last")
        assert killed == kills, f"it was over after {killed} kills"
        expected, found = np.load(whole / "end.npz"), np.load(pieces / "end.npz")
        assert set(expected) == set(found)
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6, err_msg=name)
        assert rows_trained(pieces) == rows_trained(whole)
        for epoch in range(EPOCHS):
            rows = [r for (e, _), some in rows_trained(pieces).items() if e == epoch for r in some]
            assert sorted(rows) == list(range(ROWS))
        return len(expected.files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--how", nargs="+", choices=HOW, default=list(HOW))
    parser.add_argument("--train", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(given.train, given.how[0], pathlib.Path(given.train, "notes"))
    else:
        for one in given.how:
            arrays = compare(one, given.kills, given.seed)
            print(f"{one}: {given.kills} kills, {arrays} arrays as left alone", flush=True)
