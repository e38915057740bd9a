"""Numbers that go wrong while nothing fails: one warning each."""

import types
import warnings

import keras
import long_run
import numpy as np
import pytest

from keras_cc.callbacks import WatchNumbers

STEPS = 400
TIMES = np.arange(STEPS)


def watch(loss=None, alignment=None, gate=None, weight=1.0, epochs=1, together=1):
    """What is said of these values of each step."""
    connection = types.SimpleNamespace(alignment_loss_weight=weight)
    watching = WatchNumbers()
    watching.set_model(types.SimpleNamespace(connection=connection))
    values = {"loss": loss, "alignment_loss": alignment, "mean_gate": gate}
    values = {name: some for name, some in values.items() if some is not None}
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watching.on_train_begin()
        for epoch in np.array_split(TIMES, epochs):
            watching.on_epoch_begin(0)
            for place in range(0, len(epoch), together):
                last = min(place + together, len(epoch)) - 1
                watching.on_train_batch_begin(place)
                so_far = epoch[: last + 1]
                logs = {name: some[so_far].mean() for name, some in values.items()}
                watching.on_train_batch_end(last, logs)
        said = [str(one.message) for one in caught]
    return said


NOISE = np.random.default_rng(0).normal(size=STEPS)
FALLING = 3 * np.exp(-TIMES / 100) + 0.2 + 0.1 * NOISE


@pytest.mark.once
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("together", [1, 4])
def test_what_goes_well_is_not_spoken_of(epochs, together):
    gate = np.linspace(0.1, 0.9, STEPS)
    assert watch(FALLING, FALLING, gate, epochs=epochs, together=together) == []


@pytest.mark.once
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_loss_that_explodes(epochs):
    (said,) = watch(np.where(TIMES > 250, 8.0, FALLING), epochs=epochs)
    assert "The loss explodes" in said and "Lower the learning rate" in said
    # One bad batch is none, nor is a loss that is high from the start.
    assert watch(np.where(TIMES == 250, 30.0, FALLING)) == []
    assert watch(np.full(STEPS, 12.0)) == []


@pytest.mark.once
def test_an_alignment_loss_that_does_not_fall():
    flat = 1 + 0.05 * NOISE
    (said,) = watch(FALLING, flat)
    assert "has not fallen in 300 steps" in said and "`alignment_loss_weight`" in said
    assert watch(FALLING, flat, weight=0.0) == []  # it is not trained
    assert watch(FALLING, np.where(TIMES < 320, FALLING, 3.0)) == []  # it had fallen


@pytest.mark.once
@pytest.mark.parametrize(("end", "word"), [(0.999, "open"), (0.001, "shut")])
def test_gates_that_are_stuck(end, word):
    gate = np.clip(0.5 + (end - 0.5) * TIMES / 300, *sorted((0.5, end)))
    (said,) = watch(FALLING, gate=gate)
    assert f"The gates are {word}" in said and "`initial_gate`" in said
    assert watch(FALLING, gate=np.full(STEPS, end)) == []  # they were made so


@pytest.mark.thorough
def test_fit_says_it():
    model = long_run.make()
    model.compile(keras.optimizers.Adam(0.003), **long_run.QUICK)
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.003 if epoch < 30 else 0.5)
    options = {"batch_size": 4, "epochs": 60, "verbose": 0, "seed": 0}
    with pytest.warns(UserWarning, match="The loss explodes"):
        model.fit(long_run.ROWS, callbacks=rates, **options)
