"""Shift: means, language and forward pass against NumPy, one row at a time."""

import connected
import keras
import numpy as np
import pytest
import tiny
from connected import QUICK, logits
from reference import Options
from test_interventions import SiteReference

import keras_cc
from keras_cc import CCCausalLM, FusedConnection, Incline, Shift, search
from keras_cc.interventions.shift import told_at

BLOCKS, LENGTH = 4, 40
PAIRS = {
    "tr": ("Kenya'nın para birimi nedir?", "What is the currency of Kenya?", "Kenya şilini"),
    "sw": ("Sarafu ya Kenya ni ipi?", "What is the currency of Kenya?", "Shilingi"),
}
ROWS = [
    {"lang": lang, "instruction": text, "instruction_en": english, "output": answer}
    for lang, (instruction, pivot, answer) in PAIRS.items()
    for text, english in ((instruction, pivot), (f"{instruction} a", "the fox"), ("a b c", pivot))
]
ENGLISH = {"lang": "en", "instruction": "the quick fox", "output": "yes", "instruction_en": "x"}
PROMPTS = [row["instruction"] for row in ROWS[:2]] + ["Sarafu ya fox", "What is the currency?"]


def make(intervention=None, connection=None, family="llama3", **options):
    model = connected.text_model(family, connection, num_layers=BLOCKS, **options)
    connected.train_connection(model)
    model.intervention = intervention
    model.compile("sgd", sampler="greedy", **QUICK)
    return model


def fitted(*args, connection=None, family="llama3", **options):
    model = make(Shift(*args, **options), connection, family)
    model.fit_transform([*ROWS, ENGLISH], batch_size=2, verbose=0)
    return model


class ShiftReference(SiteReference):
    def shifted(self, ids, moves):
        """Logits, with `moves`, (d,) by block number, added at every token of their outputs."""
        embeddings = self.weights["token_embedding/embeddings"]
        x = embeddings[ids]
        for number in range(self.num_layers):
            block = f"transformer_layer_{number}"
            x = x + self.attention(self.norm(x, f"{block}/self_attention_layernorm/scale"), block)
            f = self.feed_forward(self.norm(x, f"{block}/feedforward_layernorm/scale"), block)
            x = x + self.transform(number, f) + moves.get(number, 0.0)
        return self.norm(x, "sequence_output_layernorm/scale") @ embeddings.T


def reference(model):
    options = Options(layers=tuple(range(BLOCKS)))
    if model.connection is None:
        options = Options(transform=None)
    return ShiftReference(connected.weights(model), BLOCKS, options=options)


def prompt_ids(model, text):
    x = model.preprocessor.generate_preprocess([text], LENGTH)
    return np.asarray(x["token_ids"])[0][np.asarray(x["padding_mask"])[0] == 1]


def mean(numpy_model, ids, block):
    """Over a prompt's tokens, the first left out."""
    return numpy_model.run(ids)[1]["hidden", block][1:].mean(axis=0)


def pivot_ids(model, text):
    x = model.preprocessor.pivot_preprocess([text])
    return np.asarray(x["pivot_token_ids"])[0][np.asarray(x["pivot_padding_mask"])[0] == 1]


def means_by_hand(model, block):
    """Of each language: its prompts' mean, and that of their pivots."""
    numpy_model, found = reference(model), {}
    for lang in sorted(PAIRS):
        rows = [row for row in ROWS if row["lang"] == lang]
        own = [mean(numpy_model, prompt_ids(model, r["instruction"]), block) for r in rows]
        # A pivot is read by the plain model, whatever the connection.
        pivot = [mean(numpy_model, pivot_ids(model, r["instruction_en"]), block) for r in rows]
        found[lang] = np.mean(own, axis=0), np.mean(pivot, axis=0)
    return found


def language_by_hand(model, ids):
    block = told_at(BLOCKS)
    means = means_by_hand(model, block)
    every = {lang: own for lang, (own, _) in means.items()}
    every["en"] = np.mean([pivot for _, pivot in means.values()], axis=0)  # as many rows of each
    prompt = mean(reference(model), ids, block)
    return min(every, key=lambda lang: np.square(every[lang] - prompt).sum())


def moves_by_hand(model, ids):
    """`ids`: the prompt's."""
    shift = model.intervention
    lang = shift.language or language_by_hand(model, ids)
    if lang == "en":
        return {}
    moves = {}
    for number, sign in ((shift.first_layer % BLOCKS, 1), (shift.last_layer % BLOCKS, -1)):
        own, pivot = means_by_hand(model, number)[lang]
        moves[number] = sign * (pivot - own)
    return moves


def batch(model, texts):
    x = model.preprocessor.generate_preprocess(texts, LENGTH)
    width = int(np.asarray(x["padding_mask"]).sum(axis=1).max())
    return {
        name: np.asarray(x[name])[:, :width].astype("int32")
        for name in ("token_ids", "padding_mask")
    }


# ---------------------------------------------------------------- the means


def test_means_are_those_of_numpy():
    model = fitted(0, 2)
    assert model.intervention.languages == ("sw", "tr")
    for number, layer in model.intervention.matrices.items():
        by_hand = means_by_hand(model, number)
        for place, (own, pivot) in enumerate(by_hand.values()):
            shift = connected.to_numpy(layer.shifts)[place]
            np.testing.assert_allclose(shift, pivot - own, atol=2e-5)
            assert np.abs(shift).max() > 1e-2
        assert layer.has_means == (number == told_at(BLOCKS) == 3)
        if layer.has_means:
            expected = [np.mean([pivot for _, pivot in by_hand.values()], axis=0)]
            expected += [own for own, _ in by_hand.values()]
            np.testing.assert_allclose(connected.to_numpy(layer.means), expected, atol=2e-5)


@pytest.mark.thorough
def test_what_a_fit_says():
    model = make(Shift(0, 2))
    fits = model.fit_transform([*ROWS, ENGLISH], batch_size=4, verbose=0)
    assert list(fits) == [f"block_{number}" for number in range(BLOCKS)]
    numpy_model = reference(model)
    for number in (0, BLOCKS - 1):
        differences = {lang: [] for lang in sorted(PAIRS)}
        for row in ROWS:
            own = mean(numpy_model, prompt_ids(model, row["instruction"]), number)
            pivot = mean(numpy_model, pivot_ids(model, row["instruction_en"]), number)
            differences[row["lang"]].append(pivot - own)
        found = fits[f"block_{number}"]
        assert found.rows == {"sw": 3, "tr": 3}
        every = np.concatenate(list(differences.values()))
        left = np.concatenate([d - np.mean(d, axis=0) for d in differences.values()])
        np.testing.assert_allclose(found.error_before, (every**2).sum(-1).mean(), rtol=1e-4)
        np.testing.assert_allclose(found.error_after, (left**2).sum(-1).mean(), rtol=1e-4)
        for lang, (own, pivot) in means_by_hand(model, number).items():
            expected = np.linalg.norm(pivot - own) / np.linalg.norm(pivot)
            np.testing.assert_allclose(found.distances[lang], expected, rtol=1e-4)


@pytest.mark.thorough
def test_columns_and_another_batch_size_give_the_same():
    one, other = fitted(0, 2), make(Shift(0, 2))
    table = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    other.fit_transform(table, batch_size=5, verbose=0)
    for number, layer in one.intervention.matrices.items():
        for mine, theirs in zip(
            layer.weights, other.intervention.matrices[number].weights, strict=True
        ):
            np.testing.assert_allclose(*map(connected.to_numpy, (mine, theirs)), atol=1e-5)


@pytest.mark.thorough
def test_a_second_fit_replaces_the_first():
    model = fitted(0, 2)
    count = len(model.weights)
    model.fit_transform([row for row in ROWS if row["lang"] == "tr"], verbose=0)
    assert model.intervention.languages == ("tr",)
    assert len(model.weights) == count == len(make().weights) + BLOCKS + 1
    x = batch(model, PROMPTS)
    assert np.isfinite(logits(model, x)).all()


# ---------------------------------------------------------------- the forward pass


@pytest.mark.thorough("None-0-2")
@pytest.mark.parametrize("first, last", [(0, 2), (1, -1), (-4, 1)])
@pytest.mark.parametrize("language", [None, "tr"])
def test_it_is_the_numpy_forward_pass(first, last, language):
    model, plain = fitted(first, last, language=language), make()
    x = batch(model, PROMPTS)
    found, before, told = logits(model, x), logits(plain, x), []
    for row, text in enumerate(PROMPTS):
        ids = prompt_ids(model, text)
        moves = moves_by_hand(model, ids)
        expected = reference(model).shifted(ids, moves)
        np.testing.assert_allclose(found[row, : len(ids)], expected, rtol=5e-5, atol=5e-5)
        changed = np.abs(found - before)[row, : len(ids)].max() > 1e-3
        assert changed == bool(moves)
        told.append(language_by_hand(model, ids))
    assert told[:2] == ["tr", "tr"] and len(set(told)) > 1


@pytest.mark.thorough
def test_english_prompts_stay_as_they_are():
    model, plain = fitted(0, 2), make()
    ids = pivot_ids(model, ROWS[0]["instruction_en"])
    assert language_by_hand(model, ids) == "en"
    x = {"token_ids": ids[None], "padding_mask": np.ones_like(ids)[None]}
    np.testing.assert_allclose(logits(model, x), logits(plain, x), atol=1e-5)


def test_before_it_is_fitted_it_changes_nothing():
    model, plain = make(Shift(0, 2)), make()
    x = batch(model, PROMPTS)
    np.testing.assert_allclose(logits(model, x), logits(plain, x), atol=1e-6)
    assert not model.intervention.matrices


@pytest.mark.thorough
def test_beside_a_connection():
    model = fitted(0, 2, connection=FusedConnection(initial_gate=0.5, dropout=0.0))
    x = batch(model, PROMPTS)
    found = logits(model, x)
    numpy_model, shift = reference(model), model.intervention
    means = connected.to_numpy(shift.matrices[told_at(BLOCKS)].means)
    moved = 0
    for row, text in enumerate(PROMPTS):
        ids = prompt_ids(model, text)
        prompt = mean(numpy_model, ids, told_at(BLOCKS))
        place = np.square(means - prompt).sum(axis=-1).argmin()
        moves = {}
        if place:
            vectors = {n: connected.to_numpy(shift.matrices[n].shifts)[place - 1] for n in (0, 2)}
            moves, moved = {0: vectors[0], 2: -vectors[2]}, moved + 1
        expected = numpy_model.shifted(ids, moves)
        np.testing.assert_allclose(found[row, : len(ids)], expected, rtol=5e-5, atol=5e-5)
    assert moved


# ---------------------------------------------------------------- evaluation, training, search


def sft_loss(model):
    return model.evaluate(ROWS, verbose=0, return_dict=True, batch_size=2)["sft_loss"]


@pytest.mark.thorough
def test_training_does_not_see_it_and_evaluation_does():
    found = []
    for model in (make(), fitted(0, 2)):
        before = sft_loss(model)
        model.fit(ROWS, batch_size=3, epochs=1, shuffle=False, verbose=0)
        found.append((before, model.causal_lm.backbone.get_weights()))
    (plain, trained), (shifted, other) = found
    assert abs(plain - shifted) > 1e-4
    theirs = {value.shape for value in trained}
    for value in trained:
        assert any(value.shape == o.shape and np.allclose(value, o, atol=1e-6) for o in other)
    assert theirs


@pytest.mark.thorough
@pytest.mark.parametrize("language", [None, "tr"])
def test_search_sets_the_best_window(language):
    model = fitted(0, 3, language=language)
    grid = {"first_layer": [0, 1], "last_layer": [2, 3]}
    result = search(model, ROWS, grid, batch_size=2, verbose=0)
    by_hand = []
    for candidate in result.candidates:
        shift = Shift(**{**model.intervention.get_config(), **candidate})
        shift.matrices = model.intervention.matrices
        other = make()
        other.intervention = shift
        by_hand.append(sft_loss(other))
    np.testing.assert_allclose(result.losses, by_hand, rtol=1e-5)
    assert len({round(loss, 6) for loss in by_hand}) == 4
    np.testing.assert_allclose(result.baseline, sft_loss(make()), rtol=1e-5)
    best = result.candidates[int(np.argmin(by_hand))]
    assert result.best == best
    assert {name: model.intervention.get_config()[name] for name in best} == best


# ---------------------------------------------------------------- generation, saving


def greedy_by_hand(model):
    found = []
    for text in PROMPTS:
        prompt = ids = prompt_ids(model, text)
        moves = moves_by_hand(model, prompt)
        while len(ids) < LENGTH:
            ids = np.append(ids, reference(model).shifted(ids, moves)[-1].argmax())
        found.append(ids)
    return np.stack(found)


@pytest.mark.thorough("None")
@pytest.mark.parametrize("language", [None, "sw"])
def test_generation(language, seen_ids):
    model = fitted(0, 2, language=language)
    model.generate(PROMPTS, LENGTH, stop_token_ids=None)
    np.testing.assert_array_equal(seen_ids[-1], greedy_by_hand(model))
    found = seen_ids[-1]
    model.intervention = None
    model.generate(PROMPTS, LENGTH, stop_token_ids=None)
    assert (seen_ids[-1] != found).any()


@pytest.mark.filterwarnings("ignore:unclosed file.*vocabulary.spm:ResourceWarning")
def test_a_keras_file_keeps_it(tmp_path):
    model = fitted(1, -1)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert loaded.intervention.get_config() == model.intervention.get_config()
    assert loaded.intervention.languages == ("sw", "tr")
    x = batch(model, PROMPTS)
    np.testing.assert_allclose(logits(loaded, x), logits(model, x), atol=1e-5)


@pytest.mark.thorough
def test_a_weights_file_keeps_it(tmp_path):
    model, other = fitted(0, 2), make(Shift(0, 2, languages=("sw", "tr")))
    model.save_cc_weights(tmp_path / "shift.safetensors")
    other.load_cc_weights(tmp_path / "shift.safetensors")
    x = batch(model, PROMPTS)
    np.testing.assert_allclose(logits(other, x), logits(model, x), atol=1e-6)
    with pytest.raises(ValueError, match=r"whose intervention has languages=\['sw', 'tr'\]"):
        make(Shift(0, 2, languages=("tr",))).load_cc_weights(tmp_path / "shift.safetensors")


@pytest.mark.thorough
def test_it_can_be_taken_off_and_set_again():
    model = fitted(0, 1)
    x = batch(model, PROMPTS)
    shift, found = model.intervention, logits(model, x)
    model.intervention = None
    assert len(model.weights) == len(make().weights)
    assert np.abs(logits(model, x) - found).max() > 1e-3
    model.intervention = shift
    np.testing.assert_allclose(logits(model, x), found, atol=1e-6)
    with pytest.raises(ValueError, match=r"means of 4 blocks of width 16.*Received: .* 2 blocks"):
        CCCausalLM(tiny.causal_lm("llama3"), None).intervention = shift


# ---------------------------------------------------------------- merging


def family_model(family, language, connection=None):
    model = CCCausalLM(tiny.causal_lm(family, num_layers=3), connection)
    connected.train_connection(model)
    model.intervention = Shift(0, -1, language=language, languages=("sw", "tr"))
    for number, layer in model.intervention.matrices.items():
        tiny.fill(layer, 30 + number, 0.5)
    return model


X = connected.monolingual(tiny.batch()[0])


@pytest.mark.parametrize("family", ["opt", "gpt2", "bloom", "gpt_neo_x"])
@pytest.mark.thorough("gpt2")
def test_merge_adds_it_to_the_biases(family):
    model = family_model(family, "tr")
    assert model.is_mergeable
    found = logits(model, X)
    model.intervention, shift = None, model.intervention
    plain = logits(model, X)
    model.intervention = shift
    stock = model.merge()
    assert model.intervention is None and not isinstance(stock, CCCausalLM)
    real = X["padding_mask"] == 1
    np.testing.assert_allclose(logits(stock, X)[real], found[real], rtol=1e-4, atol=1e-4)
    assert np.abs(found - plain)[real].max() > 1e-2


@pytest.mark.thorough
def test_merge_folds_transforms_first():
    model = family_model("gpt2", "sw", FusedConnection(dropout=0.0))
    found, real = logits(model, X), X["padding_mask"] == 1
    np.testing.assert_allclose(logits(model.merge(), X)[real], found[real], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family, language", [("llama3", "tr"), ("gemma3", "tr"), ("gpt2", None)])
def test_merge_refuses_and_says_why(family, language):
    model = family_model(family, language)
    before = connected.weights(model)
    assert not model.is_mergeable
    with pytest.raises(ValueError, match=r"depends on the prompt.*has no bias.*Received: .*Shift"):
        model.merge()
    connected.assert_weights_equal(connected.weights(model), before, atol=0)
    assert model.intervention is not None


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first_layer": 0.5}, r"`first_layer` must be .*Received: first_layer=0.5"),
        ({"last_layer": None}, r"`last_layer` must be .*Received: last_layer=None"),
        ({"language": ""}, r"`language` must be a language code or None. Received: language=''"),
        ({"languages": ("tr", "tr")}, r"`languages` must be .*each once.*Received: languages="),
        ({"languages": (3,)}, r"`languages` must be language codes.*Received: languages=\(3,\)"),
        ({"language": "de", "languages": ("tr",)}, r"`language` must be one of those whose means"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        Shift(**{"first_layer": 0, "last_layer": 1, **arguments})


@pytest.mark.parametrize("window", [(2, 2), (3, 1), (-1, 0)])
@pytest.mark.thorough
def test_a_window_that_is_none(window):
    with pytest.raises(ValueError, match=r"`last_layer` must be behind.*4 blocks. Received: first"):
        make(Shift(*window))
    with pytest.raises(ValueError, match=r"`last_layer` must be behind"):
        search(fitted(0, 2), ROWS, {"last_layer": [0]}, verbose=0)


def test_rows_that_no_mean_can_be_taken_of():
    model = make(Shift(0, 2, language="tr"))
    nameless = [{k: v for k, v in row.items() if k != "lang"} for row in ROWS]
    with pytest.raises(ValueError, match=r"Row 0: a 'lang' is needed.*Received: a row with"):
        model.fit_transform(nameless, verbose=0)
    with pytest.raises(ValueError, match=r"no row has a pivot.*Received: 1 rows without one"):
        model.fit_transform([ENGLISH], verbose=0)
    with pytest.raises(ValueError, match=r"list of row dicts or a dict of columns.*Received: "):
        model.fit_transform(tiny.batch(), verbose=0)
    with pytest.raises(ValueError, match=r"`ridge` and `positions` .*Received: ridge=0.1"):
        model.fit_transform(ROWS, ridge=0.1, verbose=0)
    with pytest.raises(ValueError, match=r"`language` must be one of those.*Received: .*'tr'"):
        model.fit_transform([row for row in ROWS if row["lang"] == "sw"], verbose=0)
    assert model.intervention.languages == () and not model.intervention.matrices
    model.preprocessor = None
    with pytest.raises(ValueError, match=r"needs a preprocessor.*Received: model.preprocessor="):
        model.fit_transform(ROWS, verbose=0)


def test_another_intervention_is_not_asked_for_languages():
    model = make(Incline())
    nameless = [{k: v for k, v in row.items() if k != "lang"} for row in ROWS]
    with pytest.warns(UserWarning):  # few rows
        assert set(model.fit_transform(nameless, verbose=0)) == {"block_0", "block_1"} | {
            "block_2",
            "block_3",
        }
    assert keras_cc.Shift is Shift
