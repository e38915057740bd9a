"""`fit(resume=)`: a training that was ended goes on as if it had not been."""

import json
import pathlib
import shutil

import connected
import keras
import numpy as np
import pytest
from long_run import BATCHES, EPOCHS, PAIRS, ROWS, NoteRows, make, row, state_of

from keras_cc import Checkpoints, SelfDistillation
from keras_cc.checksums import sealed, unsealed
from keras_cc.objectives import Contrastive
from keras_cc.training import checkpoints


class Ends(Exception):
    pass


class EndAt(keras.callbacks.Callback):
    """Ends the process, as it were, when so many steps were trained."""

    def __init__(self, step):
        super().__init__()
        self.left = step

    def on_train_batch_begin(self, batch, logs=None):
        if not self.left:
            raise Ends
        self.left -= 1


def fit(model, folder, rows=ROWS, **options):
    options = {"batch_size": 2, "epochs": EPOCHS, "verbose": 0, "seed": 7, **options}
    return model.fit(rows, resume=folder, **options)


def names(folder):
    return sorted(pathlib.Path(folder).iterdir())


def newest(kept):
    return max((int(path.name.removeprefix("step-")) for path in names(kept.folder)), default=0)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


def check(tmp_path, ends, how=None, rows=ROWS, **options):
    """Trained in one piece, and ended at each of these steps in turn: the same."""
    how = how or {}
    whole, in_pieces = make(**how), None
    expected = fit(whole, tmp_path / "whole", rows=rows, **options)
    kept = Checkpoints(tmp_path / "pieces", steps=1)
    done = 0
    for end in [*ends, None]:
        in_pieces = make(**how)
        keras.utils.set_random_seed(99)  # nothing may hang on what is drawn by the way
        if end is None:
            found = fit(in_pieces, kept, rows=rows, **options)
        else:
            with pytest.raises(Ends):
                fit(in_pieces, kept, rows=rows, callbacks=EndAt(end - done), **options)
            done = newest(kept)
    assert_same(state_of(in_pieces), state_of(whole))
    assert found.epoch == expected.epoch
    assert found.history.keys() == expected.history.keys()
    for name, values in expected.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=1e-5, err_msg=name)


HOW = {
    "plain": {},
    "accumulated": {"accumulate": 3},
    "lora": {"lora": True},
    "frozen": {"frozen": True},
    "ema": {"use_ema": True, "ema_momentum": 0.5},
}


@pytest.mark.thorough("accumulated")
@pytest.mark.parametrize("how", HOW)
def test_it_goes_on_as_if_it_had_not_been_ended(how, tmp_path):
    # Within an epoch, after the first step, at the end of one, and twice in one.
    ends = (4, 8) if how == "ema" else (1, 4, 6, 7)
    check(tmp_path, ends, HOW[how], validation_data=ROWS[:2])


@pytest.mark.thorough
@pytest.mark.parametrize("end", [2, 5, 7, 10])
def test_a_group_of_accumulated_steps_goes_on_across_epochs(end, tmp_path):
    check(tmp_path, (end,), {"accumulate": 3})


def test_turns_of_an_alternating_objective(tmp_path):
    how = {"accumulate": 2, "objectives": (Contrastive(0, alternating=True),)}
    check(tmp_path, (3, 5), how, rows=PAIRS_ANSWERED)


PAIRS_ANSWERED = [row(number) for number in range(2 * BATCHES)]


def test_own_answers_are_those_from_before(tmp_path):
    objective = SelfDistillation("pivot", refresh=3, start=2, max_new_tokens=4)
    check(tmp_path, (4, 7), {"objectives": (objective,)}, rows=PAIRS)


@pytest.mark.thorough
@pytest.mark.parametrize("epoch_steps", [1, 2])
def test_epochs_that_are_a_part_of_a_pass(epoch_steps, tmp_path):
    check(tmp_path, (1, 3, 5), steps_per_epoch=epoch_steps, epochs=6)


STREAMS = {
    "re-iterable": (lambda: Rows(ROWS), {}),
    "endless": (lambda: endless, {"steps_per_epoch": 3}),
    "generator of one epoch": (lambda: iter(ROWS), {"epochs": 1}),
}


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def endless():
    while True:
        yield from ROWS


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras', of each generator
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("accumulate", [None, 3])
@pytest.mark.thorough("3-re-iterable")
def test_streams(stream, accumulate, tmp_path):
    make_rows, options = STREAMS[stream]
    ends = (1, 3) if options.get("epochs") == 1 else (1, 5)
    options = {"epochs": EPOCHS, **options}
    how = {"accumulate": accumulate}
    whole = make(**how)
    fit(whole, tmp_path / "whole", rows=make_rows(), **options)
    kept = Checkpoints(tmp_path / "pieces", steps=1)
    done = 0
    for end in ends:
        with pytest.raises(Ends):
            fit(make(**how), kept, rows=make_rows(), callbacks=EndAt(end - done), **options)
        done = newest(kept)
    found = make(**how)
    fit(found, kept, rows=make_rows(), **options)
    assert_same(state_of(found), state_of(whole))


@pytest.mark.thorough
def test_a_generator_of_several_epochs_is_kept_at_their_ends(tmp_path):
    many = [*ROWS] * EPOCHS
    whole = make()
    fit(whole, tmp_path / "whole", rows=iter(many), steps_per_epoch=3)
    kept = Checkpoints(tmp_path / "pieces", steps=1)
    with pytest.raises(Ends):
        fit(make(), kept, rows=iter(many), steps_per_epoch=3, callbacks=EndAt(5))
    assert [path.name for path in names(kept.folder)] == ["step-0000000003"]
    found = make()
    fit(found, kept, rows=iter(many), steps_per_epoch=3)
    assert_same(state_of(found), state_of(whole))


@pytest.mark.thorough
def test_what_is_trained_comes_once_an_epoch(tmp_path):
    seen = []
    note = NoteRows(lambda *step: seen.append(step))
    kept = Checkpoints(tmp_path, steps=1)
    with pytest.raises(Ends):
        fit(make(), kept, callbacks=[note, EndAt(6)])
    del seen[newest(kept) :]  # what was trained after it is trained again
    fit(make(), kept, callbacks=note)
    assert [one[:2] for one in seen] == [(e, b) for e in range(EPOCHS) for b in range(BATCHES)]
    for epoch in range(EPOCHS):
        rows = [number for one in seen if one[0] == epoch for number in one[2:]]
        assert sorted(rows) == list(range(len(ROWS)))


@pytest.mark.thorough
def test_a_training_begins_and_ends_once_to_its_callbacks(tmp_path, capsys):
    kept = Checkpoints(tmp_path, steps=1)
    with pytest.raises(Ends):
        fit(make(), kept, callbacks=EndAt(5))
    calls = []

    class Note(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            calls.append("begin")

        def on_train_end(self, logs=None):
            calls.append("end")

        def on_epoch_begin(self, epoch, logs=None):
            calls.append(epoch)

    fit(make(), kept, callbacks=Note(), verbose=2)
    assert calls == ["begin", 1, 2, "end"]
    assert "4/4" in capsys.readouterr().out
    # And it is over: nothing is trained, the model and its history are those of the end.
    model, calls[:] = make(), []
    history = fit(model, kept, callbacks=Note(), verbose=1)
    assert not calls and history.epoch == [0, 1, 2] and len(history.history["loss"]) == 3
    assert "holds this training to its end" in capsys.readouterr().out
    # More epochs are another matter.
    longer, whole = make(), make()
    fit(longer, kept, epochs=4)
    fit(whole, tmp_path / "whole", epochs=4)
    assert_same(state_of(longer), state_of(whole))


def test_one_that_stops_early_has_stopped(tmp_path):
    class Stop(keras.callbacks.Callback):
        ended = False

        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = True

        def on_train_end(self, logs=None):
            self.ended = True

    kept = Checkpoints(tmp_path, steps=1)
    with pytest.raises(Ends):
        fit(make(), kept, callbacks=EndAt(5))
    stop, model = Stop(), make()
    history = fit(model, kept, callbacks=stop)
    assert stop.ended and history.epoch == [0, 1] and model.optimizer.iterations == 5


# ---------------------------------------------------------------- files


@pytest.mark.once
def test_the_newest_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    kept = Checkpoints(tmp_path / "kept", steps=1, keep=2)
    with pytest.raises(Ends):
        fit(make(), kept, callbacks=EndAt(7))
    assert [path.name for path in names(kept.folder)] == ["step-0000000005", "step-0000000006"]
    whole = make()
    fit(whole, tmp_path / "whole")
    for name in ("arrays.npz", "state.json"):
        for damage in ("cut", "bit", "gone"):
            copy = tmp_path / f"{name}-{damage}"
            shutil.copytree(kept.folder, copy)
            file = copy / "step-0000000006" / name
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            if damage == "gone":
                file.unlink()
            else:
                file.write_bytes(content[:-1] if damage == "cut" else content)
            model = make()
            with pytest.warns(UserWarning, match=r"step-0000000006 is damaged .*: the one before"):
                fit(model, copy)
            assert_same(state_of(model), state_of(whole))
            assert len(names(copy)) == 2  # the damaged one is gone
    for path in names(kept.folder):
        (path / "arrays.npz").write_bytes(b"")
    model = make()
    before = state_of(model)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"`resume` must hold a checkpoint that is whole.*: 2 in"),
    ):
        fit(model, kept)
    assert_same(state_of(model), before)


@pytest.mark.once
def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".step-0000000003-abc"
    left.mkdir()
    (left / "arrays.npz").write_bytes(b"half")
    fit(make(), tmp_path, epochs=1)
    assert [path.name for path in names(tmp_path)] == ["step-0000000004"]


@pytest.mark.once
def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path, monkeypatch):
    save, written = np.savez, []

    def full(file, **arrays):
        if len(written) == 2:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        written.append(file)
        save(file, **arrays)

    monkeypatch.setattr(checkpoints.np, "savez", full)
    kept = Checkpoints(tmp_path, steps=1)
    with pytest.raises(OSError, match=r"step 3 could not be written to .*make room.*No space left"):
        fit(make(), kept)
    assert [path.name for path in names(tmp_path)] == ["step-0000000001", "step-0000000002"]
    monkeypatch.undo()
    model, whole = make(), make()
    fit(model, Checkpoints(tmp_path, steps=1))
    fit(whole, tmp_path / "whole")
    assert_same(state_of(model), state_of(whole))


@pytest.mark.once
def test_a_folder_that_cannot_be_written_to(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match=r"`resume` must be a folder that can be written to: .*file"):
        fit(make(), file)


# ---------------------------------------------------------------- refused


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        ({"batch_size": 3}, {}, r"`batch_size` must be 2, as in the training.*Received: batch_siz"),
        ({"seed": 8}, {}, "`seed` must be 7"),
        ({"shuffle": False}, {}, "`shuffle` must be True"),
        ({"rows": ROWS[:-1]}, {}, "`x` must be '7 rows'.*Received: x='6 rows'"),
        ({"steps_per_epoch": 2}, {}, "`steps_per_epoch` must be None"),
        ({}, {"accumulate": 2}, "`gradient_accumulation_steps` must be 1"),
        ({}, {"lora": True}, "`resume` must hold checkpoints of this model"),
        ({}, {"frozen": True}, "`resume` must hold checkpoints of this model"),
    ],
)
def test_another_training_is_refused_and_nothing_changes(options, how, message, tmp_path):
    with pytest.raises(Ends):
        fit(make(), Checkpoints(tmp_path, steps=1), callbacks=EndAt(2))
    model = make(**how)
    before = connected.weights(model)
    with pytest.raises(ValueError, match=message):
        fit(model, tmp_path, **options)
    assert_same(connected.weights(model), before)


@pytest.mark.once
def test_other_frozen_weights_are_refused(tmp_path):
    with pytest.raises(Ends):
        fit(make(frozen=True), Checkpoints(tmp_path, steps=1), callbacks=EndAt(2))
    model = make(frozen=True)
    embeddings = model.causal_lm.backbone.token_embedding.embeddings
    embeddings.assign(keras.ops.convert_to_numpy(embeddings) * 2)
    with pytest.raises(ValueError, match=r"with the same frozen weights.*have another checksum"):
        fit(model, tmp_path)


@pytest.mark.once
def test_steps_that_do_not_divide_a_pass(tmp_path):
    with pytest.raises(ValueError, match=r"`steps_per_epoch` must divide.*=3 for 4 batches"):
        fit(make(), tmp_path, steps_per_epoch=3)


@pytest.mark.once
def test_another_backend_is_refused(tmp_path):
    fit(make(), tmp_path, epochs=1)
    (folder,) = names(tmp_path)
    state = unsealed((folder / "state.json").read_bytes())
    state["run"]["KERAS_BACKEND"] = "another"
    (folder / "state.json").write_bytes(sealed(state))
    with pytest.raises(ValueError, match=r"`KERAS_BACKEND` must be 'another', as in the training"):
        fit(make(), tmp_path)


@pytest.mark.once
def test_another_format_is_refused(tmp_path, monkeypatch):
    fit(make(), tmp_path, epochs=1)
    monkeypatch.setattr(checkpoints, "FORMAT", 2)
    with pytest.raises(ValueError, match=r"of format 2, which this version.*Received: format=1"):
        fit(make(), tmp_path)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": ""}, "`folder` must be a path"),
        ({"folder": 3}, "`folder` must be a path"),
        ({"steps": 0}, "`steps` must be an integer >= 1"),
        ({"minutes": 0}, "`minutes` must be a number > 0"),
        ({"keep": 0}, "`keep` must be an integer >= 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**{"folder": "kept", **options})


@pytest.mark.once
def test_checkpoints_come_by_time_too(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 25))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    steps = []
    write = Checkpoints.write
    monkeypatch.setattr(
        Checkpoints,
        "write",
        lambda self, step, *rest: steps.append(step) or write(self, step, *rest),
    )
    fit(make(), Checkpoints(tmp_path, minutes=1), epochs=1)
    assert steps[-1] == 4 and 1 < len(steps) < 4
    state = json.loads((tmp_path / "step-0000000004" / "state.json").read_text())
    assert state["epoch"] == 1 and state["batch"] == 0
