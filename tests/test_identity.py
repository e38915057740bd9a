"""What must change nothing, and what must not learn: against the stock model itself."""

import keras
import numpy as np
import pytest
import tiny
from backend_tools import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_cc import CCCausalLM, FusedConnection
from keras_cc.passes import runs


def tensors(x):
    return {name: ops.convert_to_tensor(value) for name, value in x.items()}


def numpy(outputs):
    return {name: ops.convert_to_numpy(value) for name, value in outputs.items()}


def connected(family="llama3", **options):
    """A model with random gates and transforms."""
    model = CCCausalLM(tiny.causal_lm(family), FusedConnection(rank=3, **options))
    for number, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, 3 + number)
    return model


def target_only(x):
    return {name: x[name] for name in ("token_ids", "padding_mask")}


def stock_logits(family, x):
    return ops.convert_to_numpy(tiny.causal_lm(family)(tensors(target_only(x))))


def assert_close(actual, expected, scale=1e-5, message=""):
    limit = scale * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit, err_msg=message)


class TestUntouched:
    """A gate of 0 and the transform as it starts are the stock model."""

    @pytest.mark.thorough
    @pytest.mark.parametrize("family", ["llama3", "gemma3"])
    def test_logits_and_gradients_are_the_stock_models(self, family):
        x, y, sample_weight = tiny.batch()
        inputs, labels = tensors(x), ops.convert_to_tensor(y)
        stock = tiny.causal_lm(family)
        expected = stock_logits(family, x)
        model = CCCausalLM(tiny.causal_lm(family), FusedConnection(gate=0.0))
        assert_close(ops.convert_to_numpy(model(inputs)["logits"]), expected)
        alone = model(tensors(target_only(x)))["logits"]
        assert_close(ops.convert_to_numpy(alone), expected)

        def stock_loss():
            # Written from the formula: mean over answer tokens of -log softmax[label].
            logits = stock(tensors(target_only(x)), training=True)
            log_probabilities = ops.log_softmax(logits, axis=-1)
            one_hot = ops.one_hot(labels, tiny.VOCABULARY)
            nats = -ops.sum(log_probabilities * one_hot, axis=-1)
            return ops.sum(nats * ops.convert_to_tensor(sample_weight)) / float(sample_weight.sum())

        def loss():
            outputs = model(inputs, training=True)
            return model.compute_loss(inputs, labels, outputs, sample_weight)

        assert_close(ops.convert_to_numpy(loss()), ops.convert_to_numpy(stock_loss()))
        expected = dict(
            zip(
                (v.path for v in stock.trainable_variables),
                gradients(stock_loss, stock.trainable_variables),
                strict=True,
            )
        )
        found = dict(
            zip(
                (v.path for v in model.trainable_variables),
                gradients(loss, model.trainable_variables),
                strict=True,
            )
        )
        assert set(expected) <= set(found)
        assert all(np.abs(g).max() > 0 for g in expected.values())
        for path, gradient in expected.items():
            assert_close(found[path], gradient, message=path)

    def test_plain_fine_tuning_is_the_stock_model(self):
        x, _, _ = tiny.batch()
        model = CCCausalLM(tiny.causal_lm("llama3"), connection=None)
        outputs = numpy(model(tensors(x)))
        assert set(outputs) == {"logits"}
        assert_close(outputs["logits"], stock_logits("llama3", x))

    def test_disconnecting_gives_the_stock_model_back(self):
        x, _, _ = tiny.batch()
        model = connected()
        stock = model.disconnect()
        logits = ops.convert_to_numpy(stock(tensors(target_only(x))))
        np.testing.assert_array_equal(logits, stock_logits("llama3", x))


@pytest.fixture(
    scope="class",
    params=[("llama3", "attention"), ("gemma3", "last"), ("bloom", "mean")],
    ids=lambda param: "-".join(param),
)
def model(request):
    family, alignment = request.param
    model = connected(family, alignment=alignment)
    model.compile("sgd", run_eagerly=True)
    return model


class TestPadding:
    def changed(self, x, seed):
        rng = np.random.default_rng(seed)
        x = dict(x)
        for ids, mask in (
            ("token_ids", "padding_mask"),
            ("pivot_token_ids", "pivot_padding_mask"),
        ):
            noise = rng.integers(0, tiny.VOCABULARY, x[ids].shape).astype("int32")
            x[ids] = np.where(x[mask] == 1, x[ids], noise)
        return x

    @pytest.mark.thorough("bloom-mean")
    @settings(max_examples=4, deadline=None)
    @given(seed=st.integers(0, 1000))
    def test_padded_ids_change_no_output(self, model, seed):
        x, y, sample_weight = tiny.batch()
        other = self.changed(x, seed)
        before, after = (numpy(model(tensors(inputs))) for inputs in (x, other))
        real = x["padding_mask"] == 1
        assert_close(after["logits"][real], before["logits"][real], 1e-6)
        for name in ("gate", "gate_tokens", "alignment_error", "alignment_tokens"):
            assert_close(after[name], before[name], 1e-6, name)
        losses = [
            ops.convert_to_numpy(
                model.compute_loss(tensors(inputs), y, dict(outputs), sample_weight)
            )
            for inputs, outputs in ((x, before), (other, after))
        ]
        assert_close(losses[1], losses[0], 1e-6)

    @pytest.mark.thorough("bloom-mean")
    def test_padded_ids_change_no_metric(self, model):
        x, y, sample_weight = tiny.batch()
        results = [
            model.evaluate((inputs, y, sample_weight), batch_size=3, verbose=0, return_dict=True)
            for inputs in (x, self.changed(x, 1))
        ]
        assert results[0].keys() == results[1].keys()
        for name, value in results[0].items():
            assert_close(results[1][name], value, 1e-6, name)

    @pytest.mark.thorough("bloom-mean")
    def test_real_ids_do(self, model):
        # The counterpart: the checks above can fail.
        x, _, _ = tiny.batch()
        for ids in ("token_ids", "pivot_token_ids"):
            other = {**x, ids: x[ids].copy()}
            other[ids][0, 0] = (x[ids][0, 0] + 1) % tiny.VOCABULARY
            before, after = (numpy(model(tensors(inputs)))["logits"] for inputs in (x, other))
            assert np.abs(after[0] - before[0])[x["padding_mask"][0] == 1].max() > 1e-4
            assert_close(after[1:], before[1:], 1e-6)  # and in that row alone


class TestBypass:
    @pytest.mark.thorough("True-attention")
    @pytest.mark.parametrize("alignment", ["attention", "last"])
    @pytest.mark.parametrize("training", [False, True])
    def test_a_row_without_pivot_is_the_stock_models(self, alignment, training):
        x, _, _ = tiny.batch()
        model = connected(alignment=alignment, dropout=0.5)
        outputs = numpy(model(tensors(x), training=training))
        stock = stock_logits("llama3", x)
        assert_close(outputs["logits"][2], stock[2])
        assert np.abs(outputs["logits"][:2] - stock[:2]).max() > 1e-2
        for name in ("gate", "gate_tokens", "alignment_error", "alignment_tokens"):
            assert outputs[name][2] == 0 and (outputs[name][:2] > 0).all()

    def test_a_batch_without_any_pivot_is_plain_fine_tuning(self):
        x, y, sample_weight = tiny.batch()
        x["pivot_padding_mask"][:] = 0
        model = connected()
        inputs = tensors(x)
        outputs = model(inputs, training=True)
        stock = stock_logits("llama3", x)
        assert_close(ops.convert_to_numpy(outputs["logits"]), stock)
        loss = model.compute_loss(inputs, ops.convert_to_tensor(y), outputs, sample_weight)
        exponentials = np.exp(stock.astype("float64"))
        picked = np.take_along_axis(exponentials, y[..., None], -1)[..., 0]
        nats = np.log(exponentials.sum(-1) / picked)
        expected = (nats * sample_weight).sum() / sample_weight.sum()
        assert_close(ops.convert_to_numpy(loss), expected)

    def test_each_row_stands_alone(self):
        # Mixing rows with and without pivot in one batch changes neither.
        x, _, _ = tiny.batch()
        model = connected()
        whole = numpy(model(tensors(x)))["logits"]
        order = [2, 0, 1]
        shuffled = numpy(model(tensors({name: v[order] for name, v in x.items()})))["logits"]
        assert_close(shuffled, whole[order])


class TestConnectionDropout:
    ROWS = 64

    def repeated(self):
        x, _, _ = tiny.batch()
        return {name: np.repeat(value[:1], self.ROWS, 0) for name, value in x.items()}

    def test_close_to_1_training_is_the_monolingual_path(self):
        x, _, _ = tiny.batch()
        model = connected(dropout=0.999999)
        alone = numpy(model(tensors(target_only(x))))["logits"]
        training = numpy(model(tensors(x), training=True))["logits"]
        # At padding there is no connection, and what comes out there is nobody's.
        real = x["padding_mask"] == 1
        real[2] = False
        assert_close(training[real], alone[real])
        assert_close(training[2], stock_logits("llama3", x)[2])  # no pivot: not dropped, bypassed
        inference = numpy(model(tensors(x), training=False))["logits"]
        assert np.abs(inference[real] - alone[real]).max() > 1e-2

    def test_drops_its_share_of_the_samples_at_every_layer_together(self):
        keras.utils.set_random_seed(0)
        model = connected(dropout=0.25)
        x = self.repeated()
        real = x["padding_mask"][0] == 1
        alone = numpy(model(tensors(target_only(x))))["logits"][0, real]
        fused = numpy(model(tensors(x)))["logits"][0, real]
        shares = []
        for _ in range(2):
            training = numpy(model(tensors(x), training=True))["logits"][:, real]
            dropped = np.abs(training - alone).max((1, 2)) < 1e-4
            kept = np.abs(training - fused).max((1, 2)) < 1e-4
            assert (dropped ^ kept).all()  # the one or the other, in no row a mixture
            shares.append(dropped)
        # 128 draws at 0.25: four standard deviations are 0.153.
        assert abs(np.mean(shares) - 0.25) < 0.153
        assert (shares[0] != shares[1]).any()  # drawn anew for every batch

    def test_without_it_nothing_is_drawn(self):
        model = connected(dropout=0.0)
        x, _, _ = tiny.batch()
        training, inference = (numpy(model(tensors(x), training=t)) for t in (True, False))
        assert_close(training["logits"], inference["logits"], 1e-6)


class TestGradientSwitches:
    def variables(self, model):
        return {v.path: v for v in model.trainable_variables}

    def nonzero(self, model, loss):
        """Paths of the variables that get a gradient, exact zeros apart."""
        named = self.variables(model)
        found = gradients(loss, named.values())
        return {path for path, g in zip(named, found, strict=True) if np.abs(g).max() > 0}

    def pivot_rows(self, x):
        """Ids that occur in the pivot alone."""
        target = set(x["token_ids"].reshape(-1).tolist())
        pivot = x["pivot_token_ids"][x["pivot_padding_mask"] == 1].tolist()
        return sorted(set(pivot) - target)

    @pytest.mark.thorough("attention-False", "attention-True")
    @pytest.mark.parametrize("pivot_gradient", [False, True])
    @pytest.mark.parametrize("alignment", ["attention", "mean", "last"])
    def test_the_pivots_pass_learns_only_if_told(self, pivot_gradient, alignment):
        # Llama 1 has a head of its own: an embedding learns from its token's occurrence alone.
        x, y, sample_weight = tiny.batch()
        rows = self.pivot_rows(x)
        assert rows
        model = connected(
            "llama",
            alignment=alignment,
            pivot_gradient=pivot_gradient,
            alignment_gradient="full",
            dropout=0.0,
        )
        embeddings = self.variables(model)["token_embedding/embeddings"]
        inputs = tensors(x)

        def loss():
            outputs = model(inputs, training=True)
            return model.compute_loss(inputs, ops.convert_to_tensor(y), outputs, sample_weight)

        (found,) = gradients(loss, [embeddings])
        seen = np.unique(x["token_ids"][x["padding_mask"] == 1])
        assert (np.abs(found[seen]).max(1) > 0).all()
        if pivot_gradient:
            # "last" reads the last token, whose attention reaches the others of its row.
            assert (np.abs(found[rows]).max(1) > 0).all()
        else:
            np.testing.assert_array_equal(found[rows], 0)

    @pytest.mark.skipif(keras.backend.backend() != "torch", reason="compilers see it themselves")
    @pytest.mark.parametrize(
        ("options", "objectives", "kept"),
        [({}, (), False), ({"pivot_gradient": True}, (), True), ({}, ["contrastive"], True)],
    )
    def test_torch_keeps_nothing_of_a_constant_pivot(self, options, objectives, kept):
        model = CCCausalLM(tiny.causal_lm("llama"), FusedConnection(**options), objectives)
        scope = runs.pivot(model, tensors(tiny.batch()[0]), training=True)
        assert {one.requires_grad for one in scope.activations.values()} == {kept}

    def alignment_learns(self, alignment_gradient, pivot_gradient=False):
        model = connected(
            "llama", alignment_gradient=alignment_gradient, pivot_gradient=pivot_gradient, dropout=0
        )
        inputs = tensors(tiny.batch()[0])

        def loss():
            return ops.sum(model(inputs, training=True)["alignment_error"])

        return self.nonzero(model, loss), set(self.variables(model))

    TRANSFORMS = frozenset(f"cc_feed_forward_{n}/transform_matrix/delta" for n in (0, 1))
    LAST_GATE = frozenset(f"cc_feed_forward_1/decision_gate/{name}" for name in ("kernel", "bias"))
    # Behind the last feed-forward: no alignment error depends on them.
    HEAD = frozenset({"sequence_output_layernorm/scale", "token_embedding/reverse_embeddings"})

    def test_transform_learns_from_the_alignment_alone(self):
        learning, _ = self.alignment_learns("transform")
        assert learning == self.TRANSFORMS

    def test_stream_moves_the_target_towards_a_fixed_fusion(self):
        learning, every = self.alignment_learns("stream")
        # The first gate is part of the stream that enters the second block; the last one
        # only decides the fixed goal.
        assert learning == every - self.HEAD - self.LAST_GATE

    def test_full_is_the_formulas_gradient(self):
        learning, every = self.alignment_learns("full")
        assert learning == every - self.HEAD

    def test_no_alignment_loss_no_gradient_for_the_transform(self):
        model = connected(alignment_loss_weight=0.0, dropout=0.0)
        x, y, sample_weight = tiny.batch()
        inputs = tensors(x)

        def loss():
            outputs = model(inputs, training=True)
            return model.compute_loss(inputs, ops.convert_to_tensor(y), outputs, sample_weight)

        learning = self.nonzero(model, loss)
        assert not learning & self.TRANSFORMS
        assert learning >= self.LAST_GATE
