import keras
import numpy as np
import pytest
from backend_tools import gradients, outputs_after_reload
from keras import ops
from keras.src import testing

from keras_cc.layers import LayerSelector

ROWS, LAYERS, DIM = 3, 4, 5


def softmax(scores):
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def inputs(rows=ROWS, seed=0):
    """Pivot activations `(rows, L, d)` and target embeddings `(rows, d)`."""
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(rows, LAYERS, DIM)).astype("float32")
    return activations, rng.normal(size=(rows, DIM)).astype("float32")


def filled(**options):
    layer = LayerSelector(**options)
    layer.build((None, LAYERS, DIM), (None, DIM))
    layer.kernel.assign(np.random.default_rng(1).normal(size=(DIM, LAYERS)).astype("float32"))
    return layer


def scores(layer, activations, embedding):
    """`z = S mean_l(a_l + e)` in float64, `(rows, L)`."""
    summed = activations.astype("float64") + embedding[:, None]
    return summed.mean(axis=1) @ ops.convert_to_numpy(layer.kernel)


def choose(layer, *args, **kwargs):
    return ops.convert_to_numpy(layer(*args, **kwargs))


class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        for options in ({}, {"temperature": 0.5, "seed": 3}):
            self.run_layer_test(
                LayerSelector,
                init_kwargs=options,
                input_shape={
                    "activations_shape": (2, LAYERS, DIM),
                    "embedding_shape": (2, DIM),
                },
                expected_output_shape=(2, LAYERS),
                expected_num_trainable_weights=1,
                expected_num_non_trainable_weights=0,
                expected_num_seed_generators=1,
                expected_num_losses=0,
                supports_masking=False,
                run_training_check=False,  # it passes one input; see TestTraining
            )


class TestInference:
    def test_against_numpy(self):
        layer, (activations, embedding) = filled(), inputs()
        expected = np.eye(LAYERS)[scores(layer, activations, embedding).argmax(axis=1)]
        assert len(np.unique(expected, axis=0)) > 1  # the rows do not agree
        np.testing.assert_allclose(choose(layer, activations, embedding), expected, atol=1e-6)

    def test_every_part_of_the_formula_decides(self):
        layer, (activations, embedding) = filled(), inputs(rows=50)
        chosen = choose(layer, activations, embedding).argmax(axis=1)
        without = scores(layer, activations, np.zeros_like(embedding)).argmax(axis=1)
        alone = scores(layer, np.zeros_like(activations), embedding).argmax(axis=1)
        assert (chosen != without).any() and (chosen != alone).any()

    def test_is_deterministic_whatever_the_temperature(self):
        results = [choose(filled(temperature=t), *inputs(50)) for t in (0.01, 1, 1, 100)]
        for result in results[1:]:
            np.testing.assert_allclose(result, results[0], atol=1e-6)

    def test_looks_at_each_row_alone(self):
        layer, (activations, embedding) = filled(), inputs()
        before = choose(layer, activations, embedding)
        activations[1], embedding[1] = -3 * activations[1], -3 * embedding[1]
        after = choose(layer, activations, embedding)
        np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
        assert (after[1] != before[1]).any()

    @pytest.mark.large
    def test_a_saved_layer_chooses_the_same(self, tmp_path):
        activations, embedding = inputs(20)
        layer = filled(temperature=0.5)
        arguments = {
            "activations": keras.Input((LAYERS, DIM), name="activations"),
            "embedding": keras.Input((DIM,), name="embedding"),
        }
        model = keras.Model(arguments, {"choice": layer(**arguments)})
        batch = {"activations": activations, "embedding": embedding}
        found = outputs_after_reload(model, batch, tmp_path)["choice"]
        np.testing.assert_array_equal(found, choose(layer, activations, embedding))


class TestTraining:
    temperature = 0.7

    def test_the_noise_is_gumbel(self):
        noise = ops.convert_to_numpy(filled(seed=2).gumbel_noise((100_000,), "float32"))
        assert np.isfinite(noise).all()
        assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
        assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.03)
        for value in (-1.0, 0.0, 2.0):  # P(g < v) = exp(-exp(-v))
            assert (noise < value).mean() == pytest.approx(np.exp(-np.exp(-value)), abs=0.01)

    @pytest.mark.parametrize("temperature", [0.3, 3.0])
    def test_layers_are_drawn_as_often_as_the_softmax_of_the_scores_says(self, temperature):
        # The Gumbel-max theorem: P(arg max of z + noise is l) = softmax(z)_l, at any temperature.
        layer, rows = filled(temperature=temperature, seed=5), 20_000
        activations, embedding = (np.repeat(value, rows, axis=0) for value in inputs(rows=1))
        drawn = choose(layer, activations, embedding, training=True)
        np.testing.assert_allclose(np.sort(drawn, axis=1), [[0, 0, 0, 1]] * rows, atol=1e-5)
        expected = softmax(scores(layer, activations[:1], embedding[:1]))[0]
        assert 0.05 < expected.max() < 0.95
        np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=0.015)
        flattened = softmax(scores(layer, activations[:1], embedding[:1]) / temperature)[0]
        assert np.abs(flattened - expected).max() > 0.05  # what it must not be

    def test_each_call_draws_anew_and_a_seed_repeats_the_draws(self):
        def draws(seed):
            layer = filled(seed=seed)
            return [choose(layer, *inputs(50), training=True) for _ in range(2)]

        one, again, other, unseeded = draws(3), draws(3), draws(4), draws(None)
        np.testing.assert_array_equal(one, again)
        assert (one[0] != one[1]).any() and (one[0] != other[0]).any()
        assert (unseeded[0] != draws(None)[0]).any()

    @pytest.mark.parametrize("training", [True, False])
    def test_gradients_against_the_formula(self, training, monkeypatch):
        """Straight through: d g = d softmax((z + noise) / temperature), by hand in float64."""
        layer, (activations, embedding) = filled(temperature=self.temperature), inputs()
        rng = np.random.default_rng(7)
        noise, goal = rng.gumbel(size=(ROWS, LAYERS)), rng.normal(size=(ROWS, LAYERS))
        monkeypatch.setattr(
            LayerSelector, "gumbel_noise", lambda self, shape, dtype: ops.cast(noise, dtype)
        )
        variables = [layer.kernel, keras.Variable(activations), keras.Variable(embedding)]

        def loss():
            a, e = (variable.value for variable in variables[1:])
            return ops.sum(layer(a, e, training=training) * ops.cast(goal, "float32"))

        found = gradients(loss, variables)
        of_softmax = scores(layer, activations, embedding) + noise * training
        soft = softmax(of_softmax / self.temperature)
        slope = soft * (goal - (soft * goal).sum(axis=1, keepdims=True)) / self.temperature
        summed = (activations + embedding[:, None]).mean(axis=1)
        of_sum = slope @ ops.convert_to_numpy(layer.kernel).T
        expected = [
            summed.T @ slope,
            np.repeat(of_sum[:, None] / LAYERS, LAYERS, axis=1),
            of_sum,
        ]
        for actual, wanted in zip(found, expected, strict=True):
            assert np.abs(wanted).max() > 1e-2
            np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())
        # The value is the hard choice of the same scores.
        chosen = choose(layer, activations, embedding, training=training)
        np.testing.assert_allclose(chosen, np.eye(LAYERS)[of_softmax.argmax(axis=1)], atol=1e-6)

    @pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
    def test_half_precision_draws_nothing_that_is_not_finite(self, policy):
        layer = filled(dtype=policy)
        assert layer.kernel.dtype == "float32"
        drawn = layer(*inputs(5000), training=True)
        assert keras.backend.standardize_dtype(drawn.dtype) == policy.removeprefix("mixed_")
        drawn = ops.convert_to_numpy(ops.cast(drawn, "float32"))
        np.testing.assert_allclose(np.sort(drawn, axis=1), [[0, 0, 0, 1]] * 5000, atol=0.01)

    def test_starts_uniform_within_one_over_the_root_of_the_width(self):
        layer = LayerSelector()
        layer.build((None, 50, 400), (None, 400))
        kernel = ops.convert_to_numpy(layer.kernel)
        assert kernel.shape == (400, 50) and np.abs(kernel).max() <= 1 / 20
        assert kernel.var() == pytest.approx(1 / 400 / 3, rel=0.03)  # uniform: bound^2 / 3


class TestRefused:
    @pytest.mark.parametrize(
        "temperature", [0, 0.0, -1, float("nan"), float("inf"), True, "1", None, [1.0]]
    )
    def test_temperature(self, temperature):
        message = r"`temperature` must be a number > 0\. Received: temperature="
        with pytest.raises(ValueError, match=message):
            LayerSelector(temperature)
