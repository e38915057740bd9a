"""Every supported family: connect, train, merge, and a stock model comes back."""

import connected
import keras
import keras_hub
import numpy as np
import pytest
import tiny
from keras import ops

from keras_cc import CCCausalLM, CCPreprocessor, FusedConnection, supported_backbones
from keras_cc.backbones import surgery
from keras_cc.backbones.families import FAMILIES, REFUSED, family_of


def inputs(x):
    return {name: ops.convert_to_tensor(x[name]) for name in ("token_ids", "padding_mask")}


def logits(model, x):
    outputs = model(inputs(x))
    return ops.convert_to_numpy(outputs["logits"] if isinstance(outputs, dict) else outputs)


def shapes(model):
    return [(weight.path, tuple(weight.shape)) for weight in model.weights]


def fused_layers(model):
    """All sublayers that keras_cc brought."""
    return [x for x in model._flatten_layers() if type(x).__module__.startswith("keras_cc")]


def projections(causal_lm):
    """The feed-forward output layer of each block, as the table of families has it."""
    found = []
    for block in causal_lm.backbone.transformer_layers:
        layer = block
        for name in family_of(causal_lm.backbone).projection.split("."):
            layer = getattr(layer, name)
        found.append(layer)
    return found


def assert_close(actual, expected, scale=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=scale * np.abs(expected).max())


class TestEveryFamily:
    @pytest.mark.thorough(*tiny.UNLIKE)
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_connect_fit_merge(self, name):
        x, y, sample_weight = tiny.batch()
        stock = tiny.causal_lm(name)
        stock_shapes = shapes(stock)
        stock_logits = logits(stock, x)
        inner = projections(stock)

        model = CCCausalLM(stock, FusedConnection(dropout=0.0))
        assert [layer.inner for layer in projections(stock)] == inner
        assert_close(logits(model, x), stock_logits, 1e-5)  # connected, it is still itself
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        before = {w.path: ops.convert_to_numpy(w.value).copy() for w in model.trainable_variables}
        history = model.fit((x, y, sample_weight), batch_size=3, verbose=0).history
        assert np.isfinite(history["loss"]).all()
        for variable in model.trainable_variables:
            value = ops.convert_to_numpy(variable.value)
            assert np.isfinite(value).all()
            if "transform_matrix" in variable.path or "decision_gate" in variable.path:
                assert np.abs(value - before[variable.path]).max() > 1e-7, variable.path

        # A step moves the transform little: make folding it a matter of more than rounding.
        for number, layer in enumerate(model.connection_layers().values()):
            tiny.fill(layer, number)
        expected = logits(model, x)
        assert np.abs(expected - logits_without_transform(stock, x)).max() > 1e-3

        merged = model.merge()
        assert merged is stock
        assert type(merged) is getattr(keras_hub.models, tiny.FAMILIES[name][0] + "CausalLM")
        assert_close(logits(merged, x), expected)
        assert projections(merged) == inner
        assert fused_layers(merged) == []
        assert shapes(merged) == stock_shapes == shapes(tiny.causal_lm(name))

    @pytest.mark.thorough(*tiny.UNLIKE)
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_the_head_alone_gives_the_models_logits(self, name):
        x, _, _ = tiny.batch()
        causal_lm = tiny.causal_lm(name)
        backbone = causal_lm.backbone
        hidden = backbone({key: inputs(x)[key] for key in backbone.input})
        head = surgery.language_model_head(causal_lm)
        np.testing.assert_array_equal(ops.convert_to_numpy(head(hidden)), logits(causal_lm, x))
        # Of some positions alone it gives those positions' logits.
        some = ops.convert_to_numpy(head(hidden[:, 2:5]))
        assert_close(some, logits(causal_lm, x)[:, 2:5], 1e-5)


# The tokenizer of a family that has none of its own.
TOKENIZERS = {"gemma2": "gemma"}


class TestSelectedConnection:
    @pytest.mark.thorough("gemma3", "bloom")
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_connect_fit_generate_disconnect(self, name, monkeypatch):
        tokenizer = connected.tokenizer_of(TOKENIZERS.get(name, name))
        causal_lm = connected.causal_lm(name, tokenizer)
        stock_paths, stock_shapes = [v.path for v in causal_lm.variables], shapes(causal_lm)
        preprocessor = CCPreprocessor(tokenizer, max_length=48, pivot_max_length=40)
        model = CCCausalLM(causal_lm, "selected", preprocessor=preprocessor)
        assert len(shapes(causal_lm)) == len(stock_shapes) + 2  # S and X
        model.compile(keras.optimizers.SGD(0.1), **connected.QUICK)
        causal_lm.compile(sampler="greedy", **connected.QUICK)
        layers = model.connection_layers()
        kernel, delta = layers["layer_selector"].kernel, layers["pooled_transform"].delta
        before = ops.convert_to_numpy(kernel.value).copy()
        history = model.fit(connected.ROWS, batch_size=3, verbose=0).history
        assert np.isfinite(history["loss"]).all()
        moved = np.abs(ops.convert_to_numpy(kernel.value) - before)
        assert np.isfinite(moved).all() and moved.max() > 1e-7
        assert not ops.convert_to_numpy(delta.value).any()

        # Cached generation says what one pass over all its tokens says, without a cache.
        seen = []
        monkeypatch.setattr(
            CCPreprocessor, "detokenize", lambda self, ids, *_, **__: seen.append(ids) or [""]
        )
        prompts, pivots, length = ["the quick", "a dog"], ["a fox", ""], 22
        model.generate(prompts, length, pivot_prompts=pivots, stop_token_ids=None)
        ids = seen[0]
        prompt_mask = preprocessor.generate_preprocess(prompts, length)["padding_mask"]
        is_answer = np.arange(length) >= prompt_mask.sum(axis=1)[:, None] - 1
        alone = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
        pair = {"answer_mask": is_answer, **preprocessor.pivot_preprocess(pivots)}
        paired = connected.logits(model, {**alone, **pair})
        said, follows = paired.argmax(axis=-1)[:, :-1], is_answer[:, :-1]
        np.testing.assert_array_equal(said[follows], ids[:, 1:][follows])

        stock = model.disconnect()
        assert stock is causal_lm and fused_layers(stock) == []
        assert [v.path for v in stock.variables] == stock_paths and shapes(stock) == stock_shapes
        for layer in stock._flatten_layers():
            assert not any(attribute.startswith("cc_") for attribute in dir(layer))
            assert not {"call", "quantized_call"} & set(vars(layer))
        assert not {"call_with_cache", "generate_step", "save_to_preset"} & set(vars(stock))
        # What was added was added from the last prompt token on, where there was a pivot.
        added = np.abs(paired - connected.logits(stock, alone)).max(axis=-1)
        assert added[0][is_answer[0]][0] > 1e-4
        assert max(added[0][~is_answer[0]].max(), added[1].max()) < 2e-5


def logits_without_transform(causal_lm, x):
    """The connected model's logits with every transform back at the identity."""
    kept = []
    for layer in projections(causal_lm):
        delta = layer.transform_matrix.delta
        kept.append((delta, ops.convert_to_numpy(delta.value).copy()))
        delta.assign(np.zeros(delta.shape))
    result = logits(causal_lm, x)
    for delta, value in kept:
        delta.assign(value)
    return result


class TestHead:
    def test_the_soft_cap_is_kept(self):
        # Gemma 2: logits = 30 tanh(h E^T / 30), E the tied embeddings.
        x, _, _ = tiny.batch()
        causal_lm = tiny.causal_lm("gemma2")
        embeddings = causal_lm.backbone.token_embedding.embeddings
        embeddings.assign(20 * ops.convert_to_numpy(embeddings.value))
        hidden = ops.convert_to_numpy(causal_lm.backbone(inputs(x))).astype("float64")
        raw = hidden @ ops.convert_to_numpy(embeddings.value).astype("float64").T
        assert np.abs(raw).max() > 30
        head = surgery.language_model_head(causal_lm)
        found = ops.convert_to_numpy(head(ops.convert_to_tensor(hidden.astype("float32"))))
        assert_close(found, 30 * np.tanh(raw / 30), 1e-5)

    def test_a_model_whose_output_is_not_its_backbones(self):
        causal_lm = tiny.causal_lm("llama3")
        causal_lm.backbone = tiny.causal_lm("llama3").backbone
        message = r"must be a functional KerasHub model.*Received: causal_lm=Llama3CausalLM"
        with pytest.raises(ValueError, match=message):
            surgery.language_model_head(causal_lm)


class TestOptions:
    def test_layers_picks_the_blocks(self):
        causal_lm = tiny.causal_lm("llama3", num_layers=3)
        inner = projections(causal_lm)
        model = CCCausalLM(causal_lm, FusedConnection(layers=[-1, 0]))
        now = projections(causal_lm)
        assert [a is b for a, b in zip(now, inner, strict=True)] == [False, True, False]
        assert sorted(model.connection_layers()) == [
            f"block_{n}/{part}" for n in (0, 2) for part in ("decision_gate", "transform_matrix")
        ]
        x, _, _ = tiny.batch()
        for layer in model.connection_layers().values():
            tiny.fill(layer, 1)
        expected = logits(model, x)
        assert_close(logits(model.merge(), x), expected)

    @pytest.mark.parametrize("layers", [[2], [-3], [0, 5]])
    def test_blocks_that_are_not_there(self, layers):
        causal_lm = tiny.causal_lm("llama3")
        inner = projections(causal_lm)
        message = r"`layers` must hold block numbers from 0 to 1 .*Received: layers=\["
        with pytest.raises(ValueError, match=message):
            CCCausalLM(causal_lm, FusedConnection(layers=layers))
        assert projections(causal_lm) == inner  # nothing has changed

    def test_a_bias_is_folded_too(self):
        # GPT-2's projection has one: T = (h K + b) W = h (K W) + b W.
        causal_lm = tiny.causal_lm("gpt2")
        model = CCCausalLM(causal_lm)
        projection = projections(causal_lm)[0].inner
        for layer in model.connection_layers().values():
            tiny.fill(layer, 1)
        kernel, bias = (ops.convert_to_numpy(w.value) for w in (projection.kernel, projection.bias))
        delta = ops.convert_to_numpy(projections(causal_lm)[0].transform_matrix.delta.value)
        assert np.abs(bias).max() > 0
        model.merge()
        matrix = np.eye(len(delta)) + delta / np.sqrt(len(delta))
        assert_close(ops.convert_to_numpy(projection.kernel.value), kernel @ matrix, 1e-6)
        assert_close(ops.convert_to_numpy(projection.bias.value), bias @ matrix, 1e-6)

    def test_a_non_linear_transform_is_not_merged(self):
        model = CCCausalLM(tiny.causal_lm("llama3"), FusedConnection(transform="mlp"))
        with pytest.raises(ValueError, match=r"is no matrix.*Received: .*transform='mlp'"):
            model.merge()
        assert model.connection is not None and fused_layers(model.causal_lm)

    def test_a_connected_model_is_not_connected_again(self):
        causal_lm = tiny.causal_lm("llama3")
        model = CCCausalLM(causal_lm)
        for connection in ("fused", None):
            with pytest.raises(ValueError, match=r"connected already.*Received: "):
                CCCausalLM(causal_lm, connection)
        model.merge()
        CCCausalLM(causal_lm)  # merged, it is a stock model


def mixtral():
    backbone = keras_hub.models.MixtralBackbone(
        vocabulary_size=tiny.VOCABULARY,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=tiny.HIDDEN,
        intermediate_dim=24,
        num_experts=2,
    )
    return keras_hub.models.MixtralCausalLM(preprocessor=None, backbone=backbone)


def qwen_moe():
    backbone = keras_hub.models.QwenMoeBackbone(
        vocabulary_size=tiny.VOCABULARY,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=tiny.HIDDEN,
        intermediate_dim=24,
        moe_intermediate_dim=8,
        shared_expert_intermediate_dim=8,
        num_experts=2,
        top_k=1,
    )
    return keras_hub.models.QwenMoeCausalLM(preprocessor=None, backbone=backbone)


def bart():
    backbone = keras_hub.models.BartBackbone(
        vocabulary_size=tiny.VOCABULARY,
        num_layers=1,
        num_heads=2,
        hidden_dim=tiny.HIDDEN,
        intermediate_dim=24,
        max_sequence_length=16,
    )
    return keras_hub.models.BartSeq2SeqLM(preprocessor=None, backbone=backbone)


class TestTable:
    def test_supported_backbones_are_those_tested_here(self):
        tested = {prefix + "Backbone" for prefix, _ in tiny.FAMILIES.values()}
        assert set(supported_backbones()) == tested
        assert len(supported_backbones()) == len(FAMILIES)  # each once

    def test_every_name_is_one_of_kerashub(self):
        for name in (*supported_backbones(), *REFUSED):
            assert hasattr(keras_hub.models, name), name

    def test_no_backbone_is_supported_and_refused(self):
        assert not set(supported_backbones()) & set(REFUSED)

    @pytest.mark.parametrize(
        ("make", "reason"),
        [(mixtral, "mixture of experts"), (qwen_moe, "mixture of experts"), (bart, "encoder-dec")],
    )
    def test_refused_by_name_with_the_reason_and_the_list(self, make, reason):
        causal_lm = make()
        weights = shapes(causal_lm)
        with pytest.raises(ValueError) as error:
            CCCausalLM(causal_lm)
        message, name = str(error.value), type(causal_lm.backbone).__name__
        assert message.startswith(f"{name} cannot be connected: ") and reason in message
        for supported in supported_backbones():
            assert supported in message
        assert message.endswith(f"Received: causal_lm.backbone={name}")
        assert shapes(causal_lm) == weights and fused_layers(causal_lm) == []

    @pytest.mark.parametrize("name", REFUSED)
    def test_every_refused_backbone_has_its_reason(self, name):
        backbone = object.__new__(type(name, (), {}))
        with pytest.raises(ValueError, match=f"{name} cannot be connected: {REFUSED[name]}"):
            family_of(backbone)

    def test_an_unknown_backbone(self):
        class NewBackbone:
            pass

        with pytest.raises(ValueError, match=r"not in the table of families.*=NewBackbone$"):
            family_of(NewBackbone())

    def test_a_subclass_is_of_its_parents_family(self):
        class MyBackbone(keras_hub.models.Llama3Backbone):
            pass

        assert family_of(object.__new__(MyBackbone)).projection == "_feedforward_output_dense"
