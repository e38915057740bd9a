"""FLARE: equal to its NumPy reference, in training, alone, merged, saved and in generation."""

import connected
import keras
import numpy as np
import pytest
import tiny
from backend_tools import gradients
from connected import QUICK, logits, monolingual
from reference import Reference

import keras_cc
from keras_cc import CCCausalLM, FlareConnection, generation
from keras_cc.layers.flare_projection import FLARE_ALIGNMENTS

pytestmark = [
    # KerasHub leaves the vocabulary's file open.
    pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning"),
]
RANK, ALPHA = 3, 4.0


class FlareReference(Reference):
    """Query and value with LoRA, its bottleneck fused with the pivot's, token by token."""

    alignment, layers = "position", (0, 1)

    def rows_of(self, x):
        for row in range(len(x["token_ids"])):
            ids = x["token_ids"][row][x["padding_mask"][row] == 1]
            pivot = x["pivot_token_ids"][row][x["pivot_padding_mask"][row] == 1]
            yield ids, pivot, int(np.flatnonzero(x["answer_mask"][row])[0])

    def run(self, ids, pivot_ids=(), last=0):
        self.mode, self.seen, self.last = "pivot", {}, last
        if len(pivot_ids):
            self.forward(pivot_ids, lambda number, f: f)
        self.mode = "connected" if len(pivot_ids) else "alone"
        return self.forward(ids, lambda number, f: f)

    def project(self, x, block, name):
        projected, number = super().project(x, block, name), int(block[-1])
        if name == "key" or number not in self.layers:
            return projected
        if self.mode == "pivot":
            self.seen[block] = x  # query and value read the same
            return projected
        down, up = (self.weights[f"cc_{name}_{number}/low_rank/{k}"] for k in ("down", "up"))
        for t in range(len(x)):
            bottleneck = x[t] @ down
            if self.mode == "connected":
                source = self.source(self.seen[block], x[t], t)
                if source is not None:
                    bottleneck = np.maximum(source @ down + bottleneck, 0)
            projected[t] += ALPHA / RANK * np.tensordot(bottleneck, up, axes=1)
        return projected

    def source(self, pivot, x, t):
        if self.alignment == "position":
            return pivot[t] if t < len(pivot) else None
        if self.alignment == "last":
            return pivot[-1] if t == self.last else None
        if self.alignment == "mean":
            return pivot.mean(0)
        weights = np.exp(pivot @ x / np.sqrt(len(x)))
        return weights @ pivot / weights.sum()


def make(alignment="position", family="llama3", frozen=True, drawn=True, **options):
    causal_lm = tiny.causal_lm(family)
    causal_lm.backbone.trainable = not frozen
    model = CCCausalLM(causal_lm, FlareConnection(RANK, ALPHA, alignment, **options))
    if drawn:
        connected.train_connection(model, scale=0.4)
    return model


def reference_of(model):
    reference = FlareReference(connected.weights(model.causal_lm))
    reference.alignment = model.connection.alignment
    return reference


def rows_are(found, expected, x):
    for row, wanted in enumerate(expected):
        real = x["padding_mask"][row] == 1
        np.testing.assert_allclose(found[row][real], wanted, atol=1e-4)


class TestAgainstTheReference:
    @pytest.mark.parametrize("alignment", FLARE_ALIGNMENTS)
    def test_connected_and_alone(self, alignment):
        model, (x, _, _) = make(alignment), tiny.batch()
        reference = reference_of(model)
        rows = list(reference.rows_of(x))
        assert [len(pivot) for _, pivot, _ in rows][-1] == 0  # a plain row is among them
        expected = [reference.run(*row) for row in rows]
        rows_are(logits(model, x), expected, x)
        alone = [reference.run(ids) for ids, _, _ in rows]
        rows_are(logits(model, monolingual(x)), alone, x)
        np.testing.assert_allclose(expected[-1], alone[-1])
        for paired, single in zip(expected[:-1], alone[:-1], strict=True):
            assert np.abs(paired - single).max() > 0.01

    def test_some_blocks(self):
        model, (x, _, _) = make(layers=[-1]), tiny.batch()
        assert set(model.connection_layers()) == {
            "block_1/query/low_rank", "block_1/value/low_rank"
        }  # fmt: skip
        reference = reference_of(model)
        reference.layers = (1,)
        rows_are(logits(model, x), [reference.run(*row) for row in reference.rows_of(x)], x)

    def test_untrained_it_changes_nothing(self):
        model, (x, _, _) = make(drawn=False), tiny.batch()
        stock = tiny.causal_lm()
        expected = logits(stock, monolingual(x))
        np.testing.assert_allclose(logits(model, x), expected, atol=1e-5)
        np.testing.assert_allclose(logits(model, monolingual(x)), expected, atol=1e-5)


class TestTraining:
    def test_the_loss_is_of_the_connected_pass(self):
        model, (x, y, weights) = make(), tiny.batch()
        expected = connected.sft_loss(logits(model, x), y, weights)
        alone = connected.sft_loss(logits(model, monolingual(x)), y, weights)
        model.compile(keras.optimizers.SGD(0.05), **QUICK)
        scores = model.evaluate((x, y, weights), batch_size=3, verbose=0, return_dict=True)
        assert scores["loss"] == pytest.approx(alone, rel=1e-4)
        assert scores["connected_sft_loss"] == pytest.approx(expected, rel=1e-4)
        before = connected.weights(model)
        history = model.fit((x, y, weights), batch_size=3, epochs=2, verbose=0).history
        assert history["loss"][0] == pytest.approx(expected, rel=1e-4)
        assert history["loss"][1] < history["loss"][0]
        # The model is frozen, and every matrix of LoRA learns.
        assert connected.moved(before, connected.weights(model)) == {
            f"cc_{name}_{number}/low_rank/{matrix}"
            for name in ("query", "value") for number in (0, 1) for matrix in ("down", "up")
        }  # fmt: skip

    @pytest.mark.parametrize(
        "path",
        [
            "cc_query_0/low_rank/down",
            "cc_value_1/low_rank/down",
            "cc_value_0/low_rank/up",
            "transformer_layer_0/feedforward_output_dense/kernel",
        ],
    )
    def test_gradients_are_those_of_the_reference_and_none_reaches_the_pivot(self, path):
        model, (x, y, weights) = make(frozen=False), tiny.batch()
        reference = reference_of(model)
        pivots = []
        for ids, pivot, last in reference.rows_of(x):
            reference.run(ids, pivot, last)
            pivots.append(dict(reference.seen))

        def nats():
            """Of the target's pass, what the pivot's left held as it is."""
            total = 0.0
            for row, (ids, pivot, _) in enumerate(reference.rows_of(x)):
                reference.mode = "connected" if len(pivot) else "alone"
                reference.seen = pivots[row]
                found = reference.forward(ids, lambda number, f: f)
                k = len(ids)
                lost = connected.cross_entropy(found[None], y[row : row + 1, :k])
                total += (lost * weights[row, :k]).sum()
            return total / weights.sum()

        (variable,) = [v for v in model.trainable_variables if v.path == path]

        def loss():
            tensors = {key: keras.ops.convert_to_tensor(value) for key, value in x.items()}
            found = model(tensors)["logits"]
            log_p = keras.ops.log_softmax(found, axis=-1)
            own = keras.ops.take_along_axis(log_p, keras.ops.convert_to_tensor(y)[..., None], -1)
            counted = keras.ops.convert_to_tensor(weights)
            return -keras.ops.sum(own[..., 0] * counted) / weights.sum()

        (found,) = gradients(loss, [variable])
        for index in [(0,) * found.ndim, tuple(n - 1 for n in found.shape)]:
            values, h = reference.weights[path], 1e-5
            start = values[index]
            values[index] = start + h
            above = nats()
            values[index] = start - h
            slope = (above - nats()) / (2 * h)
            values[index] = start
            assert found[index] == pytest.approx(slope, rel=2e-3, abs=2e-5)
        assert np.abs(found).max() > 1e-4


class TestEveryFamily:
    @pytest.mark.thorough(*tiny.UNLIKE)
    @pytest.mark.parametrize("name", [name for name in tiny.FAMILIES if name != "gpt_neo_x"])
    def test_connect_and_merge(self, name):
        x, _, _ = tiny.batch()
        untouched = logits(tiny.causal_lm(name), monolingual(x))
        model = make(family=name)
        alone, paired = logits(model, monolingual(x)), logits(model, x)
        scale = np.abs(untouched).max()
        assert np.abs(alone - untouched).max() > 1e-2 * scale
        assert np.abs(paired - alone)[:2].max() > 1e-3 * scale
        stock = model.causal_lm
        assert model.merge() is stock
        real = x["padding_mask"] == 1
        found = logits(stock, monolingual(x))
        np.testing.assert_allclose(found[real], alone[real], atol=1e-4 * scale)
        assert [w.path for w in stock.weights] == [w.path for w in tiny.causal_lm(name).weights]

    def test_one_projection_for_all_three(self):
        stock, (x, _, _) = tiny.causal_lm("gpt_neo_x"), tiny.batch()
        before, paths = logits(stock, monolingual(x)), [w.path for w in stock.weights]
        with pytest.raises(ValueError, match=r"query, key and value are one.*GPTNeoXBackbone"):
            CCCausalLM(stock, "flare")
        np.testing.assert_array_equal(logits(stock, monolingual(x)), before)
        assert [w.path for w in stock.weights] == paths


class TestSavedAndGenerated:
    def test_saved_whole(self, tmp_path):
        model, (x, _, _) = make("attention"), tiny.batch()
        model.save(tmp_path / "flare.keras")
        loaded = keras.saving.load_model(tmp_path / "flare.keras")
        assert loaded.connection.get_config() == model.connection.get_config()
        np.testing.assert_allclose(logits(loaded, x), logits(model, x), atol=1e-6)

    def test_its_weights_alone(self, tmp_path):
        model, other, (x, _, _) = make(), make(drawn=False), tiny.batch()
        model.save_cc_weights(tmp_path / "flare.safetensors")
        other.load_cc_weights(tmp_path / "flare.safetensors")
        np.testing.assert_allclose(logits(other, x), logits(model, x), atol=1e-6)
        third = CCCausalLM(tiny.causal_lm(), FlareConnection(RANK, 2 * ALPHA))
        with pytest.raises(ValueError, match=r"alpha=4.0, this one has alpha=8.0"):
            third.load_cc_weights(tmp_path / "flare.safetensors")

    def test_disconnected(self):
        model, (x, _, _) = make(), tiny.batch()
        expected = logits(tiny.causal_lm(), monolingual(x))
        np.testing.assert_allclose(logits(model.disconnect(), monolingual(x)), expected, atol=1e-5)

    @pytest.mark.parametrize("alignment", FLARE_ALIGNMENTS)
    def test_the_cached_loop_says_what_the_whole_pass_finds_likeliest(self, alignment):
        tokenizer = connected.tokenizer_of("llama3")
        preprocessor = keras_cc.CCPreprocessor(tokenizer, max_length=24)
        causal_lm = connected.causal_lm("llama3", tokenizer)
        connection = FlareConnection(RANK, ALPHA, alignment)
        model = CCCausalLM(causal_lm, connection, preprocessor=preprocessor)
        connected.train_connection(model, scale=0.4)
        model.compile("sgd", sampler="greedy", **QUICK)
        inputs = preprocessor.generate_preprocess(["the quick fox"], 20)
        pivot = preprocessor.pivot_preprocess(["What is the currency of Kenya?"])
        start = int(inputs["padding_mask"].sum())
        ids = keras.ops.convert_to_numpy(
            generation.run(model, {**inputs, **pivot}, None)["token_ids"]
        ).astype("int32")
        ones = np.ones_like(ids)
        answers = ones * (np.arange(ids.shape[1]) >= start - 1)
        x = {"token_ids": ids, "padding_mask": ones, "answer_mask": answers, **pivot}
        whole = logits(model, x)
        np.testing.assert_array_equal(ids[0, start:], whole[0, start - 1 : -1].argmax(-1))
        assert np.abs(whole - logits(model, monolingual(x))).max() > 0.01


def test_options():
    assert keras_cc.connections.get("flare").get_config() == {
        "rank": 8, "alpha": 16.0, "alignment": "position", "layers": "all"
    }  # fmt: skip
    for options in ({"rank": 0}, {"alpha": "a"}, {"alignment": "first"}, {"layers": []}):
        (name,) = options
        with pytest.raises(ValueError, match=f"`{name}` must be .*Received"):
            FlareConnection(**options)
