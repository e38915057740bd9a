import keras
import numpy as np
import pytest
import tiny
from keras import ops
from keras.src import testing

from keras_cc.layers import FlareProjection

DIM = 6


@pytest.mark.filterwarnings("ignore:.*`shuffle=True` was passed:UserWarning")  # its own fit
class TestContract(testing.TestCase):
    def test_keras_layer_contract(self):
        for inner, shape in (
            (keras.layers.Dense(5), (2, 7, 5)),
            (keras.layers.EinsumDense("btd,ndh->btnh", (7, 2, 3)), (2, 7, 2, 3)),
        ):
            self.run_layer_test(
                FlareProjection,
                init_kwargs={"inner": inner, "rank": 2},
                input_shape=(2, 7, DIM),
                expected_output_shape=shape,
                expected_num_trainable_weights=4 if isinstance(inner, keras.layers.Dense) else 3,
                expected_num_non_trainable_weights=0,
                expected_num_seed_generators=0,
                expected_num_losses=0,
                supports_masking=False,
            )


@pytest.mark.parametrize(
    "inner",
    [
        lambda: keras.layers.Dense(5),
        lambda: keras.layers.EinsumDense("btd,ndh->btnh", (None, 2, 3)),
        lambda: keras.layers.EinsumDense("abd,dnh->abnh", (None, 2, 3)),
    ],
)
def test_alone_it_is_lora_and_its_fold_is_the_same(inner):
    layer = FlareProjection(inner(), rank=2, alpha=3.0)
    inputs = np.random.default_rng(0).normal(size=(2, 7, DIM)).astype("float32")
    plain = ops.convert_to_numpy(layer.inner(inputs))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(inputs)), plain)
    tiny.fill(layer.low_rank, 1, 0.5)
    down, up = (ops.convert_to_numpy(v).astype("float64") for v in layer.low_rank.weights)
    assert down.shape == (DIM, 2) and up.shape == (2, *plain.shape[2:])
    expected = plain + 3.0 / 2 * np.tensordot(inputs @ down, up, axes=1)
    found = ops.convert_to_numpy(layer(inputs))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(found - plain).max() > 0.1
    layer.inner.kernel.assign(layer.folded()["kernel"])
    np.testing.assert_allclose(ops.convert_to_numpy(layer.inner(inputs)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"rank": 0}, {"rank": 1.5}, {"alpha": -1.0}, {"alpha": "16"}, {"alignment": "first"}],
)
def test_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received"):
        FlareProjection(keras.layers.Dense(5), **options)


def test_inner():
    with pytest.raises(TypeError, match=r"`inner` must be a Keras layer. Received: inner='query'"):
        FlareProjection("query")
