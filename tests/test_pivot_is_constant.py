"""Where no gradient goes into the pivot's pass, nothing of it is kept for one, on any backend."""

import keras
import pytest
import tiny

from keras_cc import CCCausalLM, FusedConnection

BACKEND = keras.backend.backend()


def model_and_batch(pivot_gradient):
    connection = FusedConnection(dropout=0.0, pivot_gradient=pivot_gradient)
    model = CCCausalLM(tiny.causal_lm("llama3", num_layers=8), connection)
    # Pivots are long here, so that what is kept of them shows.
    return model, tiny.batch(length=9, pivot_length=200)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA's memory")
def test_xla_needs_less():
    import jax

    def needed(pivot_gradient):
        model, (x, y, weights) = model_and_batch(pivot_gradient)
        fixed = [v.value for v in model.non_trainable_variables]

        def loss(values):
            with keras.StatelessScope():
                outputs, _ = model.stateless_call(values, fixed, x, training=True)
                return model.compute_loss(x, y, outputs, weights)

        values = [v.value for v in model.trainable_variables]
        compiled = jax.jit(jax.grad(loss)).lower(values).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert needed(False) < 0.5 * needed(True)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's graph")
def test_tensorflow_has_no_gradient_of_it():
    import tensorflow as tf

    def products(pivot_gradient):
        model, (x, y, weights) = model_and_batch(pivot_gradient)

        @tf.function
        def gradients():
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x, y, model(x, training=True), weights)
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        graph = gradients.get_concrete_function().graph
        products = [op for op in graph.get_operations() if "MatMul" in op.type]
        backward = [op for op in products if op.name.startswith("gradient_tape")]
        return len(products) - len(backward), len(backward)

    (forward, constant), (same, whole) = products(False), products(True)
    assert forward == same
    assert constant < 0.6 * whole  # the target's alone, of which there are as many


@pytest.mark.skipif(BACKEND != "torch", reason="torch tells what it keeps")
def test_torch_keeps_less():
    import torch

    def kept(pivot_gradient):
        model, (x, *_) = model_and_batch(pivot_gradient)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            assert model(x, training=True)["logits"].requires_grad
        return sum(sizes.values())

    assert kept(False) < 0.5 * kept(True)
