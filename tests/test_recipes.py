"""Every recipe: the same five lines, English rows that go around it, and their page's table."""

import copy
import dataclasses
import functools
import pathlib
import re

import connected
import keras
import numpy as np
import pytest
from backend_tools import gradients
from keras import ops

import keras_cc
from keras_cc import recipes

PAGE = pathlib.Path(__file__).parents[1] / "examples" / "RECIPES.md"
NAMES = (
    "sft", "translation_sft", "cross_lingual_sft", "distilled_sft", "cc", "cc_equal_weight",
    "cc_no_transform", "cc_transform_only", "cc_translation", "cc_published", "own_answers",
    "own_answers_in_turn",
    "self_distillation", "xtune", "cc_distilled", "dft", "dft_logit", "contrastive",
    "afp", "treplina", "incline", "xtransplant",
)  # fmt: skip
ROWS = [
    {"id": "fox", "lang": "tr", "instruction": "hızlı tilki", "output": "evet",
     "instruction_en": "the fox", "output_en": "yes"},
    {"id": "dog", "lang": "sw", "instruction": "mbwa mvivu", "output": "hapana",
     "instruction_en": "the lazy dog", "output_en": "no"},
    {"id": "quick", "lang": "en", "instruction": "the quick fox", "output": "yes",
     "instruction_en": "the quick fox"},
    {"id": "house", "lang": "de", "instruction": "das Haus", "output": "nein",
     "instruction_en": "the house", "output_en": "no"},
    {"id": "cat", "lang": "fr", "instruction": "le chat", "output": "oui",
     "instruction_en": "the cat", "output_en": "yes"},
    {"id": "answer", "lang": "en-GB", "instruction": "Answer", "output": "no"},
]  # fmt: skip
DEV = [
    {"lang": "tr", "instruction": "kedi", "output": "hayır", "instruction_en": "a cat"},
    {"lang": "en", "instruction": "yes or no", "output": "yes", "instruction_en": "yes or no"},
    {"lang": "sw", "instruction": "nyumba", "output": "ndiyo", "instruction_en": "a house"},
]
# In English by its language, with a pivot or without; by its text; and rows without a pivot.
ENGLISH = [
    {"lang": "en", "instruction": "the fox", "output": "because", "instruction_en": "the fox"},
    {"lang": "en-US", "instruction": "the dog", "output": "no", "instruction_en": "a brown dog"},
    {"lang": "en", "instruction": "the lazy dog", "output": "no"},
    {"instruction": "the question", "output": "yes", "instruction_en": "the question"},
    {"lang": "fr", "instruction": "le renard", "output": "non"},
    {"instruction": "la maison", "output": "oui", "instruction_en": ""},
]
RATE = 0.1
DISTILLED = {"max_length": 24, "verbose": False}

# The tiny model never stops by itself, and six rows do not determine a matrix.
EXPECTED_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.* fills max_length"),
    pytest.mark.filterwarnings("ignore:.* not determined in every direction"),
    pytest.mark.filterwarnings("ignore:Too few rows to hold some out"),
]
pytestmark = EXPECTED_WARNINGS


def options_of_data(recipe):
    return DISTILLED if recipe.augment == "distillation" else {}


def build(name):
    """A recipe's model, of the same weights and draws each time, compiled with SGD."""
    keras.utils.set_random_seed(0)
    tokenizer = connected.tokenizer_of("llama3")
    model = recipes.get(name).model(
        connected.causal_lm("llama3", tokenizer),
        preprocessor=keras_cc.CCPreprocessor(tokenizer, max_length=64, pivot_max_length=16),
    )
    model.compile(keras.optimizers.SGD(RATE), sampler="greedy", **connected.QUICK)
    return model


def fit(model, source, steps=1):
    """The history of so many steps, one an epoch."""
    options = {"batch_size": 6, "steps_per_epoch": 1, "shuffle": False, "verbose": 0}
    return model.fit(source, epochs=steps, **options).history


@dataclasses.dataclass
class Run:
    """What the five lines left: weights by path, before, after `fit` and after `finish`."""

    model: keras_cc.CCCausalLM
    data: list
    history: dict
    found: dict
    before: dict
    trained: dict
    finished: dict


@functools.cache
def run(name):
    recipe, model = recipes.get(name), build(name)
    rows, dev_rows = copy.deepcopy((ROWS, DEV))
    before = connected.weights(model)
    data = recipe.data(model, rows, **options_of_data(recipe))
    history = fit(model, data, steps=2)
    trained = connected.weights(model)
    found = recipe.finish(model, rows, dev_rows, verbose=0)
    assert (rows, dev_rows) == (ROWS, DEV)
    return Run(model, data, history, found, before, trained, connected.weights(model))


@functools.cache
def backbone_paths():
    return set(connected.weights(build("sft")))


# ---------------------------------------------------------------- the five lines


@pytest.mark.thorough("cc", "cc_published", "contrastive", "incline")
@pytest.mark.parametrize("name", NAMES)
def test_the_same_lines_serve_every_recipe(name):
    found = run(name)
    model, recipe = found.model, recipes.get(name)
    assert np.isfinite(found.history["loss"]).all() and len(found.history["loss"]) == 2
    assert connected.moved(found.before, found.trained) >= backbone_paths()
    assert all(np.isfinite(value).all() for value in found.finished.values())
    # Evaluated and generated is what a user gets.
    scores = model.evaluate(DEV, batch_size=3, verbose=0, return_dict=True)
    assert scores["loss"] == pytest.approx(scores["sft_loss"]) and 0 < scores["loss"] < 10
    pivots = {"pivot_prompts": ["a cat", ""]} if name == "xtransplant" else {}
    assert [type(text) for text in model.generate(["kedi", "a"], 12, **pivots)] == [str, str]
    if name == "xtransplant":
        with pytest.raises(ValueError, match="`pivot_prompts` must be given"):
            model.generate("kedi", 12)
    # What needs no finishing is not touched by it.
    if not recipe.fits and recipe.intervention is None:
        assert found.found == {} and model.intervention is None
        assert not connected.moved(found.trained, found.finished)
    if recipe.augment is None:
        assert recipe.data(model, ROWS) is ROWS


# ---------------------------------------------------------------- rows in English


@functools.cache
def plain_step():
    """`(loss, weights)` of one step on ENGLISH: the stock model, next tokens, no library code."""
    sft = build("sft")
    causal_lm = sft.causal_lm
    x, y, answers = sft.preprocessor(ENGLISH)
    assert not x["pivot_padding_mask"].any()

    def loss():
        logits = causal_lm(connected.monolingual(x))
        nats = -ops.take_along_axis(ops.log_softmax(logits, axis=-1), y[..., None], axis=-1)
        return ops.sum(ops.multiply(nats[..., 0], answers)) / answers.sum()

    found = gradients(loss, causal_lm.trainable_variables)
    weights = connected.weights(causal_lm)
    expected = connected.sft_loss(connected.logits(causal_lm, connected.monolingual(x)), y, answers)
    for variable, gradient in zip(causal_lm.trainable_variables, found, strict=True):
        weights[variable.path] = weights[variable.path] - RATE * gradient
    return expected, weights


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_english_rows_alone_train_as_plain_fine_tuning(name):
    loss, weights = plain_step()
    model = build(name)
    connected.train_connection(model)  # gates and transforms that would change any row
    before = connected.weights(model)
    history = fit(model, ENGLISH)
    after = connected.weights(model)
    np.testing.assert_allclose(history["loss"], loss, rtol=1e-6)
    connected.assert_weights_equal(
        {path: value for path, value in after.items() if path in backbone_paths()},
        weights,
        atol=1e-5,
        rtol=1e-5,
    )
    # The step is no small one, and it is the backbone's alone.
    assert max(np.abs(after[path] - before[path]).max() for path in weights) > 0.01
    assert connected.moved(before, after) <= backbone_paths()
    if name == "contrastive":  # on its own turn such a batch has nothing to say
        assert fit(model, ENGLISH)["loss"] == [0.0]
        assert not connected.moved(after, connected.weights(model))


@pytest.mark.thorough("cc", "contrastive")
@pytest.mark.parametrize("name", NAMES)
def test_the_pivot_text_of_english_rows_changes_nothing(name):
    recipe, model = recipes.get(name), build(name)
    rows = [{**row} for row in ROWS]
    for row in rows:
        if row["lang"].startswith("en"):
            row["instruction_en"] = "a brown dog"
    data = recipe.data(model, rows, **options_of_data(recipe))
    x, y, answers = model.preprocessor(data)
    is_english = ~x["pivot_padding_mask"].any(axis=1)
    assert is_english.sum() == len(data) - 4 and not x["pivot_token_ids"][is_english].any()
    # Nor do tokens that no mask shows.
    x["pivot_token_ids"][is_english] = np.arange(5, 21)
    answered = any(getattr(objective, "refresh", None) for objective in model.objectives)
    # The model's own answers are given to rows of text alone.
    history = fit(model, data if answered else (x, y, answers), steps=2)
    for key, expected in run(name).history.items():
        assert history[key] == pytest.approx(expected, rel=1e-6), key
    connected.assert_weights_equal(connected.weights(model), run(name).trained, atol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["cc_published", "incline", "xtransplant"])
def test_finishing_passes_english_rows_over(name):
    model = build(name)
    pairs, dev_pairs = [
        [row for row in rows if not row["lang"].startswith("en")] for rows in (ROWS, DEV)
    ]
    fit(model, run(name).data, steps=2)
    found = recipes.get(name).finish(model, pairs, dev_pairs, verbose=0)
    connected.assert_weights_equal(connected.weights(model), run(name).finished, atol=1e-4)
    if name == "xtransplant":  # an English row adds the same to the sum of every candidate
        assert found["search"].best == run(name).found["search"].best


# ---------------------------------------------------------------- what a recipe is


def test_each_recipe_says_what_it_is():
    assert tuple(recipes.names()) == NAMES
    for name in recipes.names():
        recipe = recipes.get(name)
        assert isinstance(recipe, recipes.Recipe) and recipes.get(recipe) is recipe
        assert recipe.name == name and recipe.changes and recipe.paper
        assert re.search(r"arXiv \d{4}\.\d{5}|chongli17/CrossLingualAlignment", recipe.paper)
    assert len({recipes.get(name).changes for name in NAMES}) == len(NAMES)


def test_what_the_sources_of_the_objectives_say():
    options = {}
    for name in ("dft", "dft_logit", "contrastive", "afp"):
        (objective,) = recipes.get(name).objectives()
        options[name] = objective.get_config()
    assert [options[name]["form"] for name in ("dft", "dft_logit")] == ["feature", "logit"]
    mid_align, afp = (
        {key: options[name][key] for key in ("layer", "temperature", "pooling", "alternating")}
        for name in ("contrastive", "afp")
    )
    assert [*mid_align.values()] == [0.5, 0.1, "mean", True]
    # Its run_sup_example.sh: POOLER="last-1" (0 being the embedding), CL_TEMP=0.05.
    assert [*afp.values()] == [0, 0.05, "last", False]


def test_the_page_has_one_row_for_each_recipe():
    section = PAGE.read_text(encoding="utf-8").split("\n## The recipes\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == sorted(NAMES)


@pytest.mark.parametrize("identifier", ["cc-tuning", "", "SFT", None, 3, ["cc"], keras_cc.DFT()])
def test_a_recipe_that_is_none(identifier):
    with pytest.raises(ValueError, match="`recipe` must be one of") as caught:
        recipes.get(identifier)
    message = str(caught.value)
    assert all(repr(name) in message for name in NAMES)
    assert message.endswith(f"Received: recipe={identifier!r}")


# ---------------------------------------------------------------- the data


@pytest.mark.thorough("translation_sft")
@pytest.mark.parametrize("name", ["translation_sft", "cross_lingual_sft", "distilled_sft", "sft"])
def test_the_preprocessors_columns_are_the_recipes(name):
    recipe, model = recipes.get(name), build(name)
    columns = {"instruction": "q", "output": "a", "instruction_en": "q_en"}
    model.preprocessor = keras_cc.CCPreprocessor(
        model.preprocessor.preprocessor,
        max_length=64,
        instruction_column="q",
        output_column="a",
        pivot_column="q_en",
    )
    renamed = [{columns.get(key, key): value for key, value in row.items()} for row in ROWS]
    data = recipe.data(model, renamed, **options_of_data(recipe))
    expected = recipe.data(build(name), ROWS, **options_of_data(recipe))
    assert [(row["q"], row["a"]) for row in data] == [
        (row["instruction"], row["output"]) for row in expected
    ]


def test_options_that_a_recipe_has_no_use_for():
    with pytest.raises(TypeError, match=r"'sft' leaves the rows as they are.*share"):
        recipes.get("sft").data(build("sft"), ROWS, share=0.5)
