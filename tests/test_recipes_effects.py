"""What sets each recipe apart, by values."""

import connected
import keras
import numpy as np
import pytest
from test_recipes import (
    DEV,
    DISTILLED,
    EXPECTED_WARNINGS,
    RATE,
    ROWS,
    backbone_paths,
    build,
    fit,
    run,
)

import keras_cc
from keras_cc import recipes

GATES = {"block_0/decision_gate", "block_1/decision_gate"}
TRANSFORMS = {"block_0/transform_matrix", "block_1/transform_matrix"}

pytestmark = EXPECTED_WARNINGS


def moved(name):
    """What two training steps moved beside the backbone."""
    return connected.moved(run(name).before, run(name).trained) - backbone_paths()


def has_pivot(x):
    return x["pivot_padding_mask"].any(axis=1)


# ---------------------------------------------------------------- plain fine-tuning, and its data


def test_sft_is_a_model_without_a_connection():
    keras.utils.set_random_seed(0)
    preprocessor = run("sft").model.preprocessor
    causal_lm = connected.causal_lm("llama3", preprocessor.tokenizer)
    model = keras_cc.CCCausalLM(causal_lm, connection=None, preprocessor=preprocessor)
    model.compile(keras.optimizers.SGD(RATE), **connected.QUICK)
    history = fit(model, ROWS, steps=2)
    connected.assert_weights_equal(connected.weights(model), run("sft").trained, rtol=0, atol=0)
    assert history["loss"] == run("sft").history["loss"]
    x, y, answers = model.preprocessor(ROWS)
    stock = connected.causal_lm("llama3", preprocessor.tokenizer)
    expected = connected.sft_loss(connected.logits(stock, connected.monolingual(x)), y, answers)
    assert history["loss"][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["translation_sft", "cc_translation"])
def test_translation_adds_rows(name):
    data = run(name).data
    assert data == keras_cc.data.augment_with_translation(ROWS)
    # Of four pairs: an English row each, and an instruction in both directions.
    assert len(data) == 6 + 4 + 2 * 4 and data[:6] == ROWS
    texts = {(row["lang"], row["instruction"], row["output"]) for row in data[6:]}
    assert {
        ("en", "the lazy dog", "no"),
        ("sw", "Translate into English: mbwa mvivu", "the lazy dog"),
        ("en", "Translate into Swahili: the lazy dog", "mbwa mvivu"),
    } <= texts
    layers = set(run(name).model.connection_layers())
    assert layers == (GATES | TRANSFORMS if name == "cc_translation" else set())
    assert len(recipes.get(name).data(run(name).model, ROWS, directions=())) == 6 + 4


@pytest.mark.thorough
def test_cross_lingual_rows_are_added():
    data = run("cross_lingual_sft").data
    assert data == keras_cc.data.cross_lingual_rows(ROWS)
    assert len(data) == 6 + 2 * 4 and data[:6] == ROWS  # of four pairs
    texts = {(row["lang"], row["instruction"], row["output"]) for row in data[6:]}
    assert {("sw", "mbwa mvivu (English)", "no"), ("en", "the cat (French)", "oui")} <= texts
    half = recipes.get("cross_lingual_sft").data(run("sft").model, ROWS, share=0.5)
    assert len(half) == 6 + 2 * 2


@pytest.mark.thorough
def test_distilled_answers_are_the_models_own_and_kept(tmp_path, monkeypatch):
    recipe, model = recipes.get("distilled_sft"), build("distilled_sft")
    cache = tmp_path / "answers.jsonl"
    data = recipe.data(model, ROWS, cache=cache, **DISTILLED)
    prompts = ["the fox", "the lazy dog", "the quick fox", "the house", "the cat", "Answer"]
    answers = model.generate(prompts, DISTILLED["max_length"], strip_prompt=True)
    assert [row["output"] for row in data] == answers and len(set(answers)) > 3
    assert [row["output_gold"] for row in data] == [row["output"] for row in ROWS]
    assert [row["instruction"] for row in data] == [row["instruction"] for row in ROWS]
    assert len(cache.read_text("utf-8").splitlines()) == 1 + 6
    # The answers are in the file: nothing is generated again, unless the model is another.
    content = cache.read_bytes()
    monkeypatch.setattr(model, "generate", None)
    assert recipe.data(model, ROWS, cache=cache, **DISTILLED) == data
    fit(model, data)
    with pytest.raises(ValueError, match=r"`cache` holds answers of another model.*weights: "):
        recipe.data(model, ROWS, cache=cache, **DISTILLED)
    assert cache.read_bytes() == content


# ---------------------------------------------------------------- connections


@pytest.mark.thorough("cc-layers0", "cc_published-layers5")
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("cc", GATES | TRANSFORMS),
        ("cc_equal_weight", TRANSFORMS),
        ("cc_no_transform", GATES),
        ("cc_transform_only", TRANSFORMS),
        ("cc_translation", GATES | TRANSFORMS),
        ("cc_published", {"layer_selector", "pooled_transform"}),
    ],
)
def test_the_parts_of_a_connection_and_that_they_train(name, layers):
    found = run(name).model.connection_layers()
    assert set(found) == layers
    trained = {v.path for layer in found.values() for v in layer.trainable_variables}
    assert moved(name) == trained and trained
    gates = {"cc": 0.1, "cc_equal_weight": 0.5, "cc_transform_only": 0.1}
    if name in gates:  # the gate starts where it stands, and a constant one stays there
        shown = run(name).history["mean_gate"]
        assert shown[0] == pytest.approx(gates[name], rel=1e-6)
        assert (shown[0] == shown[1]) == (name != "cc")
    assert run("cc_equal_weight").history["mean_gate"] == [0.5, 0.5]


def kernels(model):
    """The feed-forward projections, which `merge` folds into."""
    blocks = model.causal_lm.backbone.transformer_layers
    dense = [block._feedforward_output_dense for block in blocks]
    return [connected.to_numpy(getattr(d, "inner", d).kernel) for d in dense]


@pytest.mark.thorough
def test_without_a_transform_there_is_nothing_to_fold():
    changed = {}
    for name in ("cc_no_transform", "cc"):
        model = build(name)
        connected.train_connection(model)
        x = connected.monolingual(model.preprocessor(ROWS)[0])
        expected, before = connected.logits(model, x), kernels(model)
        merged = model.merge()
        np.testing.assert_allclose(connected.logits(merged, x), expected, rtol=1e-4, atol=1e-4)
        changed[name] = not np.array_equal(before, kernels(model))
    assert changed == {"cc_no_transform": False, "cc": True}


@pytest.mark.thorough
def test_transform_only_fuses_nothing():
    model = build("cc_transform_only")
    assert model.connection.dropout == 1.0  # of all rows, not only of these
    x, y, answers = model.preprocessor(ROWS)
    stock = connected.causal_lm("llama3", model.tokenizer)
    plain = connected.logits(stock, connected.monolingual(x))
    expected = connected.sft_loss(plain, y, answers)
    assert run("cc_transform_only").history["sft_loss"][0] == pytest.approx(expected, rel=1e-6)
    assert abs(run("cc_equal_weight").history["sft_loss"][0] - expected) > 1e-3
    # With W other than the identity: through W in pairs, the stock model in English.
    connected.train_connection(model)
    through = connected.logits(model, connected.monolingual(x))
    mixed = np.where(has_pivot(x)[:, None, None], through, plain)
    expected = [connected.sft_loss(logits, y, answers) for logits in (mixed, through, plain)]
    assert np.abs(np.subtract(expected[0], expected[1:])).min() > 1e-3
    assert fit(model, ROWS)["sft_loss"][0] == pytest.approx(expected[0], rel=1e-6)


def test_published_selects_in_training_and_transforms_after_it():
    found = run("cc_published")
    (transform,) = found.model.connection_layers()["pooled_transform"].weights
    assert not found.before[transform.path].any() and not found.trained[transform.path].any()
    assert connected.moved(found.trained, found.finished) == {transform.path}
    (fit_of_x,) = found.found["fits"].values()
    assert fit_of_x.error_after < fit_of_x.error_before
    matrix = np.eye(16) + found.finished[transform.path] / 4  # W = I + D / sqrt(16)
    np.testing.assert_allclose(matrix, fit_of_x.matrix, atol=1e-5)
    with pytest.raises(ValueError, match=r"`merge\(\)` cannot fold this connection"):
        found.model.merge()
    assert found.model.connection is not None


# ---------------------------------------------------------------- objectives


@pytest.mark.thorough("dft-dft_loss-1.0")
@pytest.mark.parametrize(
    ("name", "loss", "weight"),
    [
        ("dft", "dft_loss", 1.0),
        ("dft_logit", "dft_loss", 1.0),
        ("afp", "contrastive_loss", 1 / 1.5),
    ],
)
def test_an_objective_beside_the_task(name, loss, weight):
    history, sft = run(name).history, run("sft").history
    assert min(history[loss]) > 1e-3
    for step in range(2):
        total = history["sft_loss"][step] + weight * history[loss][step]
        assert history["loss"][step] == pytest.approx(total, rel=1e-6)
    assert history["sft_loss"][0] == pytest.approx(sft["sft_loss"][0], rel=1e-6)
    # The second step's task loss is that of other weights than plain fine-tuning's.
    assert abs(history["sft_loss"][1] - sft["sft_loss"][1]) > 1e-3
    assert loss not in sft and moved(name) == set()
    # Rows without a pivot are counted nowhere, nor told apart from others.
    pairs = [row for row in ROWS if not row["lang"].startswith("en")]
    assert fit(build(name), pairs)[loss][0] == pytest.approx(history[loss][0], rel=1e-5)


def test_contrastive_takes_turns_with_the_task():
    model = build("contrastive")
    first = fit(model, ROWS)
    after_task = connected.weights(model)
    second = fit(model, ROWS)
    after_both = connected.weights(model)
    # First the task alone, then the objective alone, and the turns go on over fits.
    assert first["loss"] == pytest.approx(first["sft_loss"], rel=1e-6)
    assert second["loss"] == pytest.approx(second["contrastive_loss"], rel=1e-6)
    assert second["contrastive_loss"][0] > 0.1
    both = {key: first[key] + second[key] for key in first}
    for key, values in run("contrastive").history.items():
        assert both[key] == pytest.approx(values, rel=1e-6), key
    sft = build("sft")
    fit(sft, ROWS)
    connected.assert_weights_equal(after_task, connected.weights(sft), atol=1e-6)
    # The middle of two blocks is the first: its turn does not reach what comes after it.
    (objective,) = model.objectives
    assert objective.target_blocks(2) == (0,) and objective.target_blocks(32) == (15,)
    reached = {p for p in after_both if p.startswith(("token_embedding", "transformer_layer_0"))}
    assert connected.moved(after_task, after_both) == reached


# ---------------------------------------------------------------- interventions


def evaluated(model, rows=DEV):
    return model.evaluate(rows, batch_size=8, verbose=0, return_dict=True)["sft_loss"]


def test_incline_fits_matrices_and_chooses_sigma():
    found, model = run("incline"), run("incline").model
    intervention, search = model.intervention, found.found["search"]
    assert set(found.found["fits"]) == {"block_0", "block_1"}
    for number, layer in intervention.matrices.items():
        kernel = connected.to_numpy(layer.kernel)
        assert np.abs(kernel).max() > 1e-2
        np.testing.assert_allclose(kernel, found.found["fits"][f"block_{number}"].matrix, atol=1e-5)
    # From -1 to 1 by tenths, where 0 is nothing at all.
    tried = [candidate["sigma"] for candidate in search.candidates]
    np.testing.assert_allclose(tried, np.arange(-10, 11) / 10, atol=1e-12)
    assert tuple(tried) == recipes.SIGMAS and 0.0 in tried
    assert search.losses[tried.index(0.0)] == pytest.approx(search.baseline, rel=1e-6)
    assert intervention.sigma == tried[np.argmin(search.losses)] == search.best["sigma"]
    assert np.ptp(search.losses) > 1e-3
    assert evaluated(model) == pytest.approx(search.losses.min(), rel=1e-5)
    connected.assert_weights_equal(
        {path: found.finished[path] for path in found.trained}, found.trained, rtol=0, atol=0
    )


@pytest.mark.thorough
def test_incline_keeps_its_sigma_without_development_rows():
    model = build("incline")
    fit(model, ROWS, steps=2)
    assert model.intervention is None
    for dev_rows in (None, []):
        found = recipes.get("incline").finish(model, ROWS, dev_rows, verbose=0)
        assert set(found) == {"fits"} and model.intervention.sigma == keras_cc.Incline().sigma
        # The matrices are those of the training rows, development rows or none.
        connected.assert_weights_equal(connected.weights(model), run("incline").finished, atol=1e-6)


@pytest.mark.thorough
def test_xtransplant_takes_the_best_pair_of_layers():
    model, search = run("xtransplant").model, run("xtransplant").found["search"]
    pairs = [(c["source_layer"], c["target_layer"]) for c in search.candidates]
    assert sorted(pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    chosen = (model.intervention.source_layer, model.intervention.target_layer)
    assert chosen == pairs[np.argmin(search.losses)] == tuple(search.best.values())
    assert len(set(search.losses)) == 4
    assert evaluated(model) == pytest.approx(search.losses.min(), rel=1e-5)
    assert evaluated(run("sft").model) == pytest.approx(search.baseline, rel=1e-5)
    # Of a deeper model six layers, the first and the last among them.
    assert recipes._spread(18, 6) == [0, 3, 7, 10, 14, 17] and recipes._spread(6, 6) == [*range(6)]


@pytest.mark.parametrize("dev_rows", [None, []])
def test_xtransplant_needs_development_rows(dev_rows):
    model = build("xtransplant")
    with pytest.raises(ValueError, match="`dev_rows` must be given") as caught:
        recipes.get("xtransplant").finish(model, ROWS, dev_rows, verbose=0)
    assert str(caught.value).endswith(f"Received: dev_rows={dev_rows}")
    assert model.intervention is None  # refused before anything is changed


@pytest.mark.thorough
def test_xtransplant_moves_what_differs_and_no_english_row():
    model = build("xtransplant")
    x, _, _ = model.preprocessor(ROWS)
    # Rows whose pivot is their own prompt, which ends at the first answer position.
    ends = np.argmax(x["answer_mask"], axis=1) + 1
    prompt = np.where(np.arange(16) < ends[:, None], x["token_ids"][:, :16], 0)
    own = {**x, "pivot_token_ids": prompt, "pivot_padding_mask": (prompt != 0).astype("int32")}
    plain = connected.logits(model, x)
    for layers in ((0, 0), (1, 1), (0, 1)):
        model.intervention = keras_cc.XTransplant(*layers)
        changed = np.abs(connected.logits(model, x) - plain).max(axis=(1, 2))
        assert changed[has_pivot(x)].min() > 1e-3 and not changed[~has_pivot(x)].any()
        # A prompt's own state in its own place is no change; in another layer it is one.
        changed = np.abs(connected.logits(model, own) - plain).max(axis=(1, 2))
        assert changed.max() < 1e-5 if layers != (0, 1) else changed.min() > 1e-3
    prompts = ["das Haus", "the quick fox"]
    found = model.generate(prompts, 24, pivot_prompts=["the house", ""])
    alone = build("xtransplant").generate(prompts, 24)
    assert found[0] != alone[0] and found[1] == alone[1]
