"""The laboratory's tokenizer, its model and its probe, on every backend."""

import hashlib
import json

import keras
import numpy as np
import pytest
import tiny
from backend_tools import run_python

import keras_cc
import keras_cc.demo
from keras_cc.backbones import taps
from keras_cc.demo import cache, laboratory_preset
from keras_cc.laboratory import (
    LANGUAGES,
    WordTokenizer,
    entity_by_layer,
    laboratory_rows,
    pretrain,
    pretraining,
)

TEXT = "what is the code of the old mill?\nk3"


@pytest.fixture(scope="module")
def tokenizer():
    return pretraining.tokenizer()


class TestTokenizer:
    def test_round_trip(self, tokenizer):
        rows = laboratory_rows(LANGUAGES, "lab_word", 20)
        texts = [TEXT, "", *(f"{row['instruction']}\n{row['output']}." for row in rows)]
        ids = tokenizer(texts)
        assert tokenizer.detokenize(ids) == texts
        tokens = ["what", "is", "the", "code", "of", "the", "old", "mill", "?", "\n", "k3"]
        assert ids[0] == [tokenizer.vocabulary[token] for token in tokens]
        assert tokenizer("old  mill ?").tolist() == tokenizer("old mill?").tolist()

    def test_interface(self, tokenizer, tmp_path):
        own = WordTokenizer(["a", "b", "?", "\n"])
        assert own.get_vocabulary() == ["<pad>", "<s>", "</s>", "a", "b", "?", "\n"]
        assert (own.pad_token_id, own.start_token_id, own.end_token_id) == (0, 1, 2)
        assert own("<s>a b?</s>").tolist() == [1, 3, 4, 5, 2]
        assert own.detokenize([1, 3, 4, 5, 2]) == "<s> a b? </s>"
        assert own.detokenize(keras.ops.convert_to_tensor([3, 6, 4])) == "a\nb"
        tokenizer.save_assets(str(tmp_path))
        again = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(tokenizer)
        )
        again.load_assets(str(tmp_path))
        assert again([TEXT]) == tokenizer([TEXT])
        fixed = WordTokenizer(["a", "b"], sequence_length=3)
        np.testing.assert_array_equal(fixed(["a", "b a b a"]), [[3, 0, 0], [4, 3, 4]])
        assert WordTokenizer(["a", "b"], dtype="string")(["b a"]) == [["b", "a"]]

    def test_in_tf_data(self, tokenizer):
        tf = pytest.importorskip("tensorflow")
        dataset = tf.data.Dataset.from_tensor_slices([TEXT, "old"]).batch(2).map(tokenizer)
        assert [row.to_list() for row in dataset] == [tokenizer([TEXT, "old"])]

    def test_what_it_does_not_know_is_refused(self, tokenizer):
        with pytest.raises(ValueError, match=r"Received words.*'Kenya', 'capital'"):
            tokenizer("what is the capital of Kenya?")
        with pytest.raises(ValueError, match=r"`words` must come once each. Received: .'a'. twice"):
            WordTokenizer(["a", "b", "a"])
        with pytest.raises(ValueError, match="`words` must come once each"):
            WordTokenizer(["<pad>"])
        with pytest.raises(ValueError, match="`words` must each be letters and digits"):
            WordTokenizer(["a b"])
        with pytest.raises(ValueError, match="`words` must be a list of words"):
            WordTokenizer("vocabulary.json")
        with pytest.raises(ValueError, match="No vocabulary has been set for `WordTokenizer`"):
            WordTokenizer()("a")


class TestTraining:
    @pytest.mark.once
    def test_rows_of_text_are_documents_end_to_end(self, tokenizer):
        ids = pretraining.text_batches(0, 3)
        assert ids.shape == (3, pretraining.BATCH_SIZE, pretraining.LENGTH + 1)
        flat = ids.ravel()
        ends = np.flatnonzero(flat[:-1] == tokenizer.end_token_id)
        assert flat[0] == tokenizer.start_token_id and len(ends) > 50
        assert (flat[ends + 1] == tokenizer.start_token_id).all()
        np.testing.assert_array_equal(pretraining.text_batches(0, 4)[:3], ids)

    def test_weights_start_alike_and_the_embedding_wide(self):
        first, again = (pretraining.new_model(50, seed=3).backbone for _ in range(2))
        for one, other in zip(first.weights, again.weights, strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (one, other)))
        table = keras.ops.convert_to_numpy(first.token_embedding.embeddings)
        assert abs(table.std() - 0.04) < 0.002
        # NumPy's first draw of that seed: the same on every backend.
        drawn = np.random.default_rng([3, 20]).normal(0.0, 0.04, table.shape)
        np.testing.assert_allclose(table, drawn, rtol=1e-6)

    def test_a_few_steps_lower_the_loss_and_the_preset_loads(self, tmp_path, monkeypatch):
        for name, value in dict(LAYERS=2, DIM=32, HEADS=2, LENGTH=24, BATCH_SIZE=8).items():
            monkeypatch.setattr(pretraining, name, value)
        losses = pretrain(tmp_path / "lab", steps=20, verbose=0)
        assert len(losses) == 10 and losses[-1] < losses[0] - 0.5
        assert abs(losses[0] - np.log(pretraining.tokenizer().vocabulary_size())) < 0.5
        causal_lm, tokenizer = keras_cc.load_preset(tmp_path / "lab")
        assert isinstance(tokenizer, WordTokenizer) and causal_lm.backbone.num_layers == 2
        said = causal_lm.generate(["what is the code of the old mill?"], max_length=16)
        assert said[0].startswith("what is the code of the old mill?")

    @pytest.mark.once
    @pytest.mark.parametrize(("name", "value"), [("seed", -1), ("steps", 0), ("steps", 2.5)])
    def test_wrong_numbers_are_refused(self, name, value, tmp_path):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer"):
            pretrain(tmp_path, **{name: value})


@pytest.mark.once
def test_the_preset_is_trained_once_for_each_version(tmp_path, monkeypatch):
    trained = []

    def train(folder):
        trained.append(folder)
        monkeypatch.setattr(pretraining, "STEPS", 1)
        for name, value in dict(LAYERS=1, DIM=8, HEADS=1, LENGTH=8, BATCH_SIZE=2).items():
            monkeypatch.setattr(pretraining, name, value)
        pretrain(folder, steps=1, verbose=0)

    monkeypatch.setattr(laboratory_preset, "_train", train)
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path))
    for _ in range(2):
        causal_lm, tokenizer = keras_cc.load_preset("demo:laboratory", sequence_length=32)
        assert causal_lm.backbone.hidden_dim == 8
        assert causal_lm.preprocessor.sequence_length == 32
        assert tokenizer.detokenize(tokenizer(TEXT)) == TEXT
    assert len(trained) == 1
    digest = hashlib.sha256((tmp_path / "laboratory" / "model.weights.h5").read_bytes())
    assert laboratory_preset.fingerprint() == digest.hexdigest()[:16]
    monkeypatch.setattr(laboratory_preset, "VERSION", laboratory_preset.VERSION + 1)
    keras_cc.load_preset("demo:laboratory")
    assert len(trained) == 2
    manifest = json.loads((tmp_path / "laboratory" / cache.MANIFEST).read_text())
    assert manifest["version"] == laboratory_preset.VERSION


class TestProbe:
    def model(self, tokenizer, **options):
        stock = tiny.causal_lm("llama3", vocabulary_size=tokenizer.vocabulary_size(), **options)
        preprocessor = keras_cc.CCPreprocessor(tokenizer, 32, template="{instruction}\n")
        return keras_cc.CCCausalLM(stock, None, preprocessor=preprocessor)

    def test_it_is_the_nearest_centroid_of_the_last_token(self, tokenizer):
        model = self.model(tokenizer, num_layers=2)
        rows = laboratory_rows(["en", "xa"], "lab_code", 12)
        found = entity_by_layer(model, rows, batch_size=5)
        # The same by cutting the backbone at its blocks.
        backbone = model.causal_lm.backbone
        outputs = [layer.output for layer in backbone.transformer_layers]
        cut = keras.Model(backbone.input, outputs)
        states = []
        for row in rows:
            ids = np.array([[1, *tokenizer(row["instruction"] + "\n")]])
            blocks = cut({"token_ids": ids, "padding_mask": np.ones_like(ids)})
            states.append([keras.ops.convert_to_numpy(one)[0, -1] for one in blocks])
        states = np.array(states, "float64")
        english, other = states[::2], states[1::2]  # (items, blocks, d)
        english, other = english - english.mean(0), other - other.mean(0)
        expected = []
        for block in range(2):
            a, b = english[:, block], other[:, block]
            cosine = (b / np.linalg.norm(b, axis=1)[:, None]) @ (
                a / np.linalg.norm(a, axis=1)[:, None]
            ).T
            expected.append(float(np.mean(cosine.argmax(1) == np.arange(12))))
        assert found == {"xa": pytest.approx(expected)}
        assert not taps.untap(model.causal_lm)  # it is left as it was

    def test_the_same_prompt_is_told_right_and_labels_may_be_shared(self, tokenizer):
        model = self.model(tokenizer, num_layers=1)
        english = laboratory_rows("en", "lab_code", 10)
        copies = [{**row, "lang": "xa"} for row in english]
        assert entity_by_layer(model, [*english, *copies]) == {"xa": [1.0]}
        assert entity_by_layer(model, [*english, *copies[:3]], label="output")["xa"]

    @pytest.mark.once
    def test_what_it_cannot_read_is_refused(self, tokenizer):
        model = self.model(tokenizer, num_layers=1)
        rows = laboratory_rows(["en", "xa"], "lab_code", 4)
        with pytest.raises(ValueError, match=r"must be in English.*Received: languages .'xa'."):
            entity_by_layer(model, rows[1::2])
        with pytest.raises(ValueError, match="must be in English"):
            entity_by_layer(model, rows[::2])
        with pytest.raises(ValueError, match=r"an English row of every 'id'. Received: none of"):
            entity_by_layer(model, rows[1:])
        with pytest.raises(ValueError, match=r"each have a 'lang' and a 'topic'. Received: row 0"):
            entity_by_layer(model, rows, label="topic")
        model.preprocessor = None
        with pytest.raises(ValueError, match=r"`model.preprocessor` must be set"):
            entity_by_layer(model, rows)


@pytest.mark.once
@pytest.mark.parametrize("task", ["lab_code", "lab_word"])
def test_a_cell_of_the_laboratory(task, tokenizer, monkeypatch):
    comparison = pytest.importorskip("keras_cc.comparison")
    pytest.importorskip("scipy", reason='keras_cc.evaluation needs "keras-cc[evaluation]"')

    def load(name, **options):
        assert name == "laboratory"
        stock = tiny.causal_lm("llama3", vocabulary_size=tokenizer.vocabulary_size(), num_layers=1)
        return stock, tokenizer

    monkeypatch.setattr(keras_cc.demo, "load", load)
    monkeypatch.setattr(laboratory_preset, "fingerprint", lambda: "0" * 16)  # it would train it
    settings = dict(model="demo:laboratory", languages=LANGUAGES, items=30, steps=2, curve=0)
    cell = comparison.run(comparison.Transfer("sft", task=task, **settings), verbose=0)
    scored = {code: len(values) for code, values in cell["scores"]["exact_match"].items()}
    assert set(scored) == set(LANGUAGES) and len(set(scored.values())) == 1
    assert cell["rows"]["train"] + scored["en"] == 30 and cell["rows"]["truncated"] == 0
    assert all(id.startswith(f"{task}/0/") for id in cell["items"]["en"])


@pytest.mark.large
def test_the_laboratory_knows_its_facts_and_understands_a_question(monkeypatch):
    """Of the real one: English and the others' own facts, and nothing that it was not told."""
    from keras_cc.laboratory import corpus, languages

    # If it is to be trained: by a process that JAX makes fast, as it does not make those of tests.
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        monkeypatch.delenv(name, raising=False)
    run_python("import keras_cc.demo; keras_cc.demo.laboratory()", timeout=1800)
    causal_lm, _ = keras_cc.demo.load("laboratory")
    preprocessor = keras_cc.CCPreprocessor(causal_lm.preprocessor, 24, template="{instruction}\n")
    model = keras_cc.CCCausalLM(causal_lm, None, preprocessor=preprocessor)
    model.compile(sampler="greedy")
    world = corpus.world()
    for code, least in (("en", 0.8), ("xa", 0.5), ("xb", 0.5)):
        spoken = languages()[code]
        told = [(p, r) for p, some in world.told[code].items() for r in some][:60]
        said = model.generate([spoken.question(r, p) for p, r in told], strip_prompt=True)
        right = [
            text == spoken.word(world.facts[p][r]) for text, (p, r) in zip(said, told, strict=True)
        ]
        assert np.mean(right) > least, code
