"""MAD-X: what the adapters compute, what each stage trains, and languages that are swapped."""

import keras
import numpy as np
import pytest
import tiny
from connected import (
    QUICK,
    causal_lm,
    logits,
    monolingual,
    moved,
    text_model,
    to_numpy,
    tokenizer_of,
    weights,
)
from keras import ops

import keras_cc
from keras_cc import cc_weights
from keras_cc.adapters import MADX, text_rows
from keras_cc.backbones.families import family_of, owner_of

X = monolingual(tiny.batch()[0])
TEXTS = {"en": ["the quick fox", "the lazy dog"], "tr": ["hızlı tilki", "tembel köpek"]}
ROWS = [{"instruction": "the fox", "output": "yes"}, {"instruction": "the dog", "output": "no"}]


def parts(stock):
    """`(adapted layers of the blocks, invertible adapter)`, found by the model alone."""
    family = family_of(stock.backbone)
    owners = [owner_of(block, family.projection) for block in stock.backbone.transformer_layers]
    invertible = [layer for layer in stock._flatten_layers() if layer.name == "invertible_adapter"]
    return [getattr(*owner) for owner in owners], invertible


def numpy_weights(layer):
    return {v.name: to_numpy(v).astype("float64") for v in layer.weights}


def bottleneck(x, w, name=""):
    inner = np.maximum(x @ w[f"{name}down"] + w[f"{name}down_bias"], 0)
    return inner @ w[f"{name}up"] + w[f"{name}up_bias"]


def coupled(x, w):
    a, b = np.split(x.astype("float64"), 2, axis=-1)
    a = a + bottleneck(b, w, "first_")
    return np.concatenate([a, b + bottleneck(a, w, "second_")], axis=-1)


def uncoupled(x, w):
    a, b = np.split(x.astype("float64"), 2, axis=-1)
    b = b - bottleneck(a, w, "second_")
    return np.concatenate([a - bottleneck(b, w, "first_"), b], axis=-1)


class TestEveryFamily:
    @pytest.mark.thorough(*tiny.UNLIKE)
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_against_a_model_that_is_changed_by_hand(self, name):
        """Embeddings are transformed in their table, logits taken by NumPy."""
        stock = tiny.causal_lm(name)
        untouched, paths = logits(stock, X), [w.path for w in stock.weights]
        adapters = MADX(stock, reduction_factor=4, task_reduction_factor=8)
        np.testing.assert_allclose(logits(stock, X), untouched, atol=1e-5)
        blocks, (invertible,) = parts(stock)
        layers = [getattr(b, f"{k}_adapter") for b in blocks for k in ("language", "task")]
        for seed, layer in enumerate((*layers, invertible)):
            tiny.fill(layer, seed, 0.3)

        other = tiny.causal_lm(name)
        embedding, w = other.backbone.token_embedding, numpy_weights(invertible)
        table = to_numpy(embedding.embeddings)
        head = table.T if embedding.tie_weights else to_numpy(embedding.reverse_embeddings)
        embedding.embeddings.assign(coupled(table, w))
        family = family_of(other.backbone)
        for block, own in zip(other.backbone.transformer_layers, blocks, strict=True):
            projection = getattr(*owner_of(block, family.projection))
            object.__setattr__(projection, "call", by_hand(projection.call, own))
        inputs = {key: ops.convert_to_tensor(value) for key, value in X.items()}
        hidden = to_numpy(other.backbone(inputs))
        expected = uncoupled(hidden, w) @ head
        if embedding.logit_soft_cap is not None:
            expected = np.tanh(expected / embedding.logit_soft_cap) * embedding.logit_soft_cap
        real = X["padding_mask"].astype(bool)
        scale = np.abs(expected[real]).max()
        np.testing.assert_allclose(logits(stock, X)[real], expected[real], atol=1e-4 * scale)
        assert np.abs(expected - untouched)[real].max() > 0.05 * scale

        assert adapters.remove() is stock
        np.testing.assert_array_equal(logits(stock, X), untouched)
        assert [w.path for w in stock.weights] == paths


def by_hand(projection, block):
    adapters = block.language_adapter, block.task_adapter
    values = [{k: v.astype("float32") for k, v in numpy_weights(a).items()} for a in adapters]

    def call(inputs, **kwargs):
        f = projection(inputs, **kwargs)
        for w in values:
            w = {key: ops.convert_to_tensor(value) for key, value in w.items()}
            inner = ops.relu(ops.matmul(f, w["down"]) + w["down_bias"])
            f = f + ops.matmul(inner, w["up"]) + w["up_bias"]
        return f

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with adapters of two languages and a task, what each stage moved, its file."""
    model = text_model("llama3", None, seed=3)
    adapters = MADX(model.causal_lm, task_reduction_factor=4)
    seen, states = {}, {}

    def fit(stage, rows):
        before = weights(model)
        model.compile(keras.optimizers.Adam(0.01), sampler="greedy", **QUICK)
        losses = model.fit(rows, epochs=3, batch_size=2, verbose=0).history["loss"]
        assert losses[-1] < losses[0]
        seen[stage] = moved(before, weights(model))
        states[stage] = logits(model, X)

    for language, texts in TEXTS.items():
        adapters.train_language(language)
        fit(language, text_rows(texts))
    adapters.train_task()
    fit("task", ROWS)
    path = tmp_path_factory.mktemp("adapters") / "madx.safetensors"
    adapters.save(path)
    return model, adapters, seen, states, path


class TestStages:
    def test_each_trains_its_own_adapters_alone(self, trained):
        _, _, seen, _, _ = trained
        of_language = [f"language_adapter/{name}" for name in BOTTLENECK] * 2
        of_language += [
            f"invertible_adapter/{k}_{n}" for k in ("first", "second") for n in BOTTLENECK
        ]
        of_task = [f"task_adapter/{name}" for name in BOTTLENECK] * 2
        ends = {stage: sorted("/".join(p.split("/")[-2:]) for p in seen[stage]) for stage in seen}
        assert ends == {
            "en": sorted(of_language),
            "tr": sorted(of_language),
            "task": sorted(of_task),
        }

    def test_languages_are_swapped_and_the_task_stays(self, trained):
        model, adapters, _, states, _ = trained
        assert adapters.languages == ("en", "tr") and adapters.language == "en"
        np.testing.assert_array_equal(logits(model, X), states["task"])
        blocks, _ = parts(model.causal_lm)
        task = numpy_weights(blocks[0].task_adapter)
        adapters.language = "tr"
        turkish = logits(model, X)
        assert np.abs(turkish - states["task"]).max() > 1e-3
        assert np.abs(turkish - states["tr"]).max() > 1e-3  # the task's adapters are there
        for key, value in numpy_weights(blocks[0].task_adapter).items():
            np.testing.assert_array_equal(value, task[key])
        adapters.language = "en"
        np.testing.assert_array_equal(logits(model, X), states["task"])

    def test_a_language_is_trained_without_the_task_and_goes_on_where_it_was(self, trained):
        model, adapters, _, states, _ = trained
        try:
            adapters.train_language("tr")
            np.testing.assert_array_equal(logits(model, X), states["tr"])
            adapters.train_language("sw")
            assert adapters.languages == ("en", "tr")  # it is the identity still
            plain = logits(text_model("llama3", None, seed=3), X)
            np.testing.assert_allclose(logits(model, X), plain, atol=1e-5)
        finally:
            adapters.language = "en"
        assert adapters.languages == ("en", "tr")
        np.testing.assert_array_equal(logits(model, X), states["task"])

    def test_no_language(self, trained):
        model, adapters, _, states, _ = trained
        adapters.language = None
        without = logits(model, X)
        adapters.language = "en"
        assert np.abs(without - states["task"]).max() > 1e-3

    def test_generates_with_the_language_at_hand(self, trained):
        model, adapters, _, _, _ = trained
        said = {}
        for language in ("en", "tr"):
            adapters.language = language
            inputs = model.preprocessor.generate_preprocess(["the fox"], 16)
            found = keras_cc.generation.run(model, inputs, None)
            ids = ops.convert_to_numpy(found["token_ids"]).astype("int32")
            start = int(inputs["padding_mask"].sum())
            whole = logits(model, {"token_ids": ids, "padding_mask": np.ones_like(ids)})
            # The cached loop says what the whole pass finds likeliest.
            np.testing.assert_array_equal(ids[0, start:], whole[0, start - 1 : -1].argmax(-1))
            said[language] = whole
        adapters.language = "en"
        assert np.abs(said["en"] - said["tr"]).max() > 1e-3


BOTTLENECK = ("down", "down_bias", "up", "up_bias")


class TestSaving:
    @pytest.mark.parametrize("ending", [".safetensors", ".weights.h5"])
    def test_another_model_loads_them(self, trained, tmp_path, ending):
        model, adapters, *_ = trained
        adapters.save(tmp_path / f"all{ending}")
        fresh = text_model("llama3", None, seed=3)
        loaded = MADX(fresh.causal_lm, task_reduction_factor=4)
        loaded.load(tmp_path / f"all{ending}")
        assert loaded.languages == ("en", "tr") and loaded.language is None
        for language in ("en", "tr"):
            adapters.language = loaded.language = language
            np.testing.assert_array_equal(logits(fresh, X), logits(model, X))
        adapters.language = "en"

    def test_loading_replaces_what_is_at_hand(self, trained):
        model, adapters, _, states, path = trained
        blocks, _ = parts(model.causal_lm)
        tiny.fill(blocks[0].language_adapter, 5)
        assert np.abs(logits(model, X) - states["task"]).max() > 1e-3
        adapters.load(path)
        np.testing.assert_array_equal(logits(model, X), states["task"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [({}, "must hold adapters with the options"), ({"num_layers": 1}, "another backbone")],
    )
    def test_what_does_not_fit(self, trained, options, message):
        other = text_model("llama3", None, **options)
        adapters = MADX(other.causal_lm)
        before = weights(other)
        with pytest.raises(ValueError, match=message):
            adapters.load(trained[-1])
        assert not adapters.languages and not moved(before, weights(other))

    def test_files_of_another_kind(self, trained, tmp_path):
        adapters = trained[1]
        connected = text_model("llama3")
        connected.save_cc_weights(tmp_path / "cc.safetensors")
        with pytest.raises(ValueError, match=r"must hold adapters .* Received: options None"):
            adapters.load(tmp_path / "cc.safetensors")
        with pytest.raises(ValueError, match="saved with another connection"):
            connected.load_cc_weights(trained[-1])
        with pytest.raises(ValueError, match="Received: no "):
            adapters.load(tmp_path / "none.safetensors")
        weights, options = cc_weights.read(trained[-1], trained[0].causal_lm.backbone)
        options = {"madx": options["madx"]}
        for key in ("elsewhere/tr/down", "down"):
            path = tmp_path / "kind.safetensors"
            one = next(iter(weights.values()))
            cc_weights.write(path, {key: one}, options, trained[0].causal_lm.backbone)
            with pytest.raises(ValueError, match=rf"must hold adapters of .* Received: '{key}'"):
                adapters.load(path)
        with pytest.raises(ValueError, match="`path` must end in"):
            adapters.save(tmp_path / "adapters.npz")

    def test_nothing_to_save(self, tmp_path):
        with pytest.raises(ValueError, match="no trained adapters to save"):
            MADX(tiny.causal_lm()).save(tmp_path / "none.safetensors")


class TestBesideOthers:
    def test_frozen_as_it_was(self):
        stock = tiny.causal_lm()
        stock.backbone.token_embedding.trainable = False
        before = [(v.path, v.trainable) for v in stock.variables]
        adapters = MADX(stock)
        assert not stock.trainable_variables
        adapters.train_language("tr")
        assert {p.path.split("/")[-2] for p in stock.trainable_variables} == {
            "language_adapter", "invertible_adapter"
        }  # fmt: skip
        adapters.remove()
        assert [(v.path, v.trainable) for v in stock.variables] == before
        assert not stock.backbone.token_embedding.trainable and stock.trainable

    def test_without_invertible_adapters(self):
        stock = tiny.causal_lm()
        adapters = MADX(stock, invertible=False)
        adapters.train_language("tr")
        assert {p.path.split("/")[-2] for p in stock.trainable_variables} == {"language_adapter"}
        assert parts(stock)[1] == [] and "call" not in vars(stock.backbone.token_embedding)

    def test_weights_are_float32_in_a_bfloat16_model(self):
        stock = tiny.causal_lm(dtype="bfloat16")
        adapters = MADX(stock)
        adapters.train_language("tr")
        assert {v.dtype for v in stock.trainable_variables} == {"float32"}
        assert np.isfinite(logits(stock, X)).all()
        assert keras.backend.standardize_dtype(stock(X).dtype) == "bfloat16"

    def test_objectives_go_on_reading_the_blocks(self):
        model = text_model("llama3", None)
        with_objective = keras_cc.CCCausalLM(
            model.causal_lm, None, "dft", preprocessor=model.preprocessor
        )
        adapters = MADX(model.causal_lm)
        adapters.train_task(None)
        with_objective.compile(keras.optimizers.Adam(0.01), **QUICK)
        rows = [{**ROWS[0], "instruction_en": "a fox"}, {**ROWS[1], "instruction_en": "a dog"}]
        before = weights(with_objective)
        history = with_objective.fit(rows, epochs=2, batch_size=2, verbose=0).history
        assert history["dft_loss"][0] > 0
        changed = moved(before, weights(with_objective))
        assert changed and all("/task_adapter/" in path for path in changed)

    def test_lora_may_be_enabled_beside(self):
        stock = tiny.causal_lm()
        adapters = MADX(stock)
        stock.backbone.enable_lora(2)
        adapters.train_task(None)
        assert {p.path.split("/")[-2] for p in stock.trainable_variables} == {"task_adapter"}


class TestRefused:
    @pytest.mark.parametrize("language", ["sw", "", "EN", 3, ("tr",)])
    def test_a_language_that_was_not_trained(self, trained, language):
        model, adapters, _, states, _ = trained
        message = r"trained \(`train_language`\) or loaded, \['en', 'tr'\].*Received: language="
        with pytest.raises(ValueError, match=message):
            adapters.language = language
        with pytest.raises(ValueError, match=message):
            adapters.train_task(language)
        assert adapters.language == "en"
        np.testing.assert_array_equal(logits(model, X), states["task"])

    @pytest.mark.parametrize("language", ["", "a/b", None, 3, "the fox"])
    def test_a_language_that_is_no_code(self, trained, language):
        with pytest.raises(ValueError, match='`language` must be a code such as "tr"'):
            trained[1].train_language(language)

    def test_merging_and_saving_whole(self, trained, tmp_path):
        model = trained[0]
        assert not model.is_mergeable
        with pytest.raises(ValueError, match=r"`merge\(\)` cannot fold adapters, .* not linear"):
            model.merge()
        for save in (
            lambda: model.save(tmp_path / "model.keras"),
            lambda: model.causal_lm.save(tmp_path / "model.keras"),
            lambda: model.causal_lm.save_to_preset(tmp_path / "preset"),
            lambda: model.causal_lm.backbone.save_to_preset(tmp_path / "preset"),
        ):
            with pytest.raises(ValueError, match=r"cannot be saved whole.*`adapters.save\(path\)`"):
                save()

    def test_two_of_them_and_a_connection(self):
        stock = tiny.causal_lm()
        adapters = MADX(stock)
        with pytest.raises(ValueError, match="`causal_lm` has adapters already"):
            MADX(stock)
        with pytest.raises(ValueError, match="`causal_lm` has adapters already"):
            keras_cc.CCCausalLM(stock)
        adapters.remove()
        assert keras_cc.CCCausalLM(stock).connection_layers()
        with pytest.raises(ValueError, match="`causal_lm` is connected"):
            MADX(stock)

    def test_a_stage_without_compiling_anew(self):
        model = text_model("llama3", None)
        adapters = MADX(model.causal_lm)
        adapters.train_language("en")
        model.compile(keras.optimizers.Adam(0.01), **QUICK)
        rows = text_rows(TEXTS["en"])
        model.fit(rows, batch_size=2, verbose=0)
        model.fit(rows, batch_size=2, verbose=0)
        adapters.train_task("en")
        before = weights(model)
        with pytest.raises(ValueError, match=r"compile it anew. Received: 8 variables more and 16"):
            model.fit(ROWS, batch_size=2, verbose=0)
        assert not moved(before, weights(model))
        model.compile(keras.optimizers.Adam(0.01), **QUICK)
        model.fit(ROWS, batch_size=2, verbose=0)
        assert all("/task_adapter/" in path for path in moved(before, weights(model)))

    def test_after_they_were_removed(self):
        adapters = MADX(tiny.causal_lm())
        adapters.remove()
        for act in (
            adapters.remove,
            lambda: adapters.train_language("tr"),
            lambda: adapters.train_task(None),
            lambda: adapters.load("none.safetensors"),
        ):
            with pytest.raises(ValueError, match="adapters have been removed"):
                act()

    @pytest.mark.parametrize(
        "options",
        [{"reduction_factor": 0}, {"task_reduction_factor": 1.5}, {"invertible": "yes"}],
    )
    def test_options(self, options):
        stock = tiny.causal_lm()
        (name,) = options
        with pytest.raises(ValueError, match=f"`{name}` must be .*Received"):
            MADX(stock, **options)
        MADX(stock)  # nothing had changed


def test_removed_adapters_can_still_be_saved(tmp_path):
    adapters = MADX(tiny.causal_lm(), invertible=False)
    adapters.train_language("tr")
    blocks, _ = parts(adapters.causal_lm)
    tiny.fill(blocks[1].language_adapter, 2)
    expected = logits(adapters.causal_lm, X)
    adapters.remove()
    adapters.save(tmp_path / "tr.safetensors")
    other = MADX(tiny.causal_lm(), invertible=False)
    other.load(tmp_path / "tr.safetensors")
    other.language = "tr"
    np.testing.assert_array_equal(logits(other.causal_lm, X), expected)


class TestTextRows:
    def test_the_first_word_is_the_prompt(self):
        texts = ["the quick fox ", "猫が好き", "one", "a", "", " two words"]
        rows = text_rows(texts)
        assert [(row["instruction"], row["output"]) for row in rows] == [
            ("the", " quick fox"), ("猫", "が好き"), ("o", "ne"), ("two", " words")
        ]  # fmt: skip

    def test_no_text_is_lost(self):
        tokenizer = tokenizer_of("llama3")
        preprocessor = keras_cc.CCPreprocessor(tokenizer, 32)
        texts = TEXTS["en"] + TEXTS["tr"]
        x, _, counted = preprocessor(text_rows(texts))
        for text, ids, mask, answer in zip(
            texts, x["token_ids"], x["padding_mask"], counted, strict=True
        ):
            assert tokenizer.detokenize(ids[mask.astype(bool)].tolist()[1:-1]) == text
            assert answer.sum() >= mask.sum() - 1 - len(tokenizer(text.split()[0]))

    def test_one_string(self):
        with pytest.raises(TypeError, match="`texts` must be an iterable of strings"):
            text_rows("the quick fox")


def test_kerashub_trains_them_too():
    """The causal LM's own `fit`, on arrays."""
    stock = causal_lm("llama3", tokenizer_of("llama3"))
    adapters = MADX(stock)
    adapters.train_language("tr")
    stock.compile(
        optimizer=keras.optimizers.Adam(0.01),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        **QUICK,
    )
    y = np.roll(X["token_ids"], -1, axis=1)
    history = stock.fit(
        X, y, sample_weight=X["padding_mask"], epochs=3, shuffle=False, verbose=0
    ).history
    assert history["loss"][-1] < history["loss"][0]
    assert adapters.languages == ("tr",)
