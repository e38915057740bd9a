"""The update on PyTorch is Keras' own, and a NumPy one's, in fewer passes."""

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="is of PyTorch")

SHAPES = ((3, 4), (5,), (2, 3, 2))


def make(optimizer, quick):
    from keras_cc.backbones import surgery

    guarded = keras.optimizers.LossScaleOptimizer(
        optimizer, initial_scale=1.0, dynamic_growth_steps=2**31 - 1
    )
    if quick:
        surgery.quicken(guarded, scales=False)
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape).astype("float32")) for shape in SHAPES]
    return guarded, variables


def gradients_of(step):
    import torch

    rng = np.random.default_rng(100 + step)
    found = [rng.normal(size=shape).astype("float32") for shape in SHAPES]
    # The first in another order of memory than its variable.
    return found, [torch.tensor(found[0].T.copy()).T, *map(torch.tensor, found[1:])]


def reference(variables, steps, rate, beta_1=0.9, beta_2=0.999, epsilon=1e-7, decay=0.0):
    values = [np.array(v, "float64") for v in variables]
    m, v = [0 * value for value in values], [0 * value for value in values]
    for step in range(1, steps + 1):
        alpha = rate(step - 1) * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        for i, gradient in enumerate(gradients_of(step)[0]):
            values[i] *= 1 - decay * rate(step - 1)
            m[i] = beta_1 * m[i] + (1 - beta_1) * gradient
            v[i] = beta_2 * v[i] + (1 - beta_2) * np.square(gradient, dtype="float64")
            values[i] -= alpha * m[i] / (np.sqrt(v[i]) + epsilon)
    return values


def schedule(step):
    return 1e-2 / (1 + 0.5 * step)


@pytest.mark.parametrize("epsilon", [1e-7, 1e-1])
@pytest.mark.parametrize(("name", "decay"), [("Adam", 0.0), ("AdamW", 0.1)])
def test_as_numpy_and_as_keras(name, decay, epsilon):
    found = []
    for quick in (True, False):
        rate = keras.optimizers.schedules.InverseTimeDecay(1e-2, 1, 0.5)
        options = {"weight_decay": decay} if decay else {}
        optimizer = getattr(keras.optimizers, name)(rate, epsilon=epsilon, **options)
        guarded, variables = make(optimizer, quick)
        start = [np.array(v) for v in variables]
        for step in range(1, 7):
            guarded.apply(gradients_of(step)[1], variables)
        expected = reference(start, 6, schedule, epsilon=epsilon, decay=decay)
        for variable, value in zip(variables, expected, strict=True):
            np.testing.assert_allclose(np.array(variable), value, rtol=2e-6, atol=1e-7)
        found.append([np.array(v) for v in guarded.variables])
    for quick, kept in zip(*found, strict=True):  # momenta and counters too
        np.testing.assert_allclose(quick, kept, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_not_finite_is_left_out(wrong, place):
    guarded, variables = make(keras.optimizers.Adam(1e-2), quick=True)
    guarded.apply(gradients_of(1)[1], variables)
    before = [np.array(v) for v in (*variables, *guarded.inner_optimizer.variables)]
    _, gradients = gradients_of(2)
    gradients[place][(-1,) * gradients[place].ndim] = float(wrong)
    guarded.apply(gradients, variables)
    after = [np.array(v) for v in (*variables, *guarded.inner_optimizer.variables)]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)


def test_large_numbers_are_finite():
    import torch

    from keras_cc import torch_updates

    assert bool(torch_updates.are_finite([torch.full((100,), 3e38), None]))


def test_the_fused_kernel_is_used(monkeypatch):
    from keras_cc import torch_updates

    calls = []
    own = torch_updates.adam
    monkeypatch.setattr(torch_updates, "adam", lambda *a, **k: calls.append(1) or own(*a, **k))
    for optimizer, count in (
        (keras.optimizers.Adam(1e-2), 1),
        (keras.optimizers.AdamW(1e-2), 1),
        (keras.optimizers.Adam(1e-2, amsgrad=True), 0),
        (keras.optimizers.SGD(1e-2), 0),
    ):
        calls.clear()
        guarded, variables = make(optimizer, quick=True)
        start = np.array(variables[0])
        guarded.apply(gradients_of(1)[1], variables)
        assert len(calls) == count
        assert np.abs(np.array(variables[0]) - start).max() > 1e-4


def test_accumulation():
    values = []
    for quick in (True, False):
        optimizer = keras.optimizers.Adam(1e-2, gradient_accumulation_steps=3)
        guarded, variables = make(optimizer, quick)
        for step in range(1, 8):
            guarded.apply(gradients_of(step)[1], variables)
        values.append([np.array(v) for v in variables])
    for quick, kept in zip(*values, strict=True):
        np.testing.assert_allclose(quick, kept, rtol=1e-5, atol=1e-7)
