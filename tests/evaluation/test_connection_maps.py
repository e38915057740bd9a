"""The map of places is the same as connecting by hand, and leaves the model alone."""

import connected
import keras
import numpy as np
import pytest

import keras_cc
from keras_cc.evaluation import Scorer, answer_nats, connection_map

ROWS = {
    "en": [{"instruction": "a fox", "output": "TRY", "instruction_en": "a fox"}],
    "tr": [
        {"instruction": "Kenya'nın para", "output": "KES", "instruction_en": "of Kenya"},
        {"instruction": "the quick", "output": "fox", "instruction_en": "quick"},
    ],
    "sw": [{"instruction": "brown", "output": "dog", "instruction_en": "the lazy dog"}],
}


@pytest.fixture(scope="module")
def model():
    return connected.text_model("llama3", None)


def row_of(model, prompt, answer, pivot=None):
    """`(x, where the answer is told, its ids)` of one row."""
    prompt_ids, answer_ids, pivot_ids = (
        model.preprocessor.prompt_ids([prompt])[0],
        [*model.preprocessor.answer_ids([answer])[0], model.preprocessor.end_token_id],
        None if pivot is None else model.preprocessor.prompt_ids([pivot])[0],
    )
    ids, first = [*prompt_ids, *answer_ids], len(prompt_ids) - 1
    x = {"token_ids": [ids], "padding_mask": [[1] * len(ids)]}
    if pivot is not None:
        x |= {"pivot_token_ids": [pivot_ids], "pivot_padding_mask": [[1] * len(pivot_ids)]}
        x["answer_mask"] = [[0] * first + [1] * len(answer_ids) + [0]]
    return {name: np.asarray(value, "int32") for name, value in x.items()}, first, answer_ids


def by_hand(model, prompt, answer, pivot=None):
    """Nats a token of an answer, from the logits of one row."""
    x, start, answer_ids = row_of(model, prompt, answer, pivot)
    logits = connected.logits(model, x)[0].astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return -np.mean([log_p[start + k, token] for k, token in enumerate(answer_ids)])


def test_a_place_is_what_connecting_there_gives(model):
    before = connected.weights(model)
    found = connection_map(
        model, ROWS, alignments=["last", "answer"], gates=[0.7], layers=["all", [1]], verbose=0
    )
    assert list(found.monolingual) == ["tr", "sw"]  # nothing is borrowed in English
    for language in ("tr", "sw"):
        rows = ROWS[language]
        for nats, path in ((found.monolingual, "instruction"), (found.pivot, "instruction_en")):
            expected = np.mean([by_hand(model, row[path], row["output"]) for row in rows])
            np.testing.assert_allclose(nats[language], expected, rtol=1e-4)
    places = [(p["layers"], p["alignment"], p["gate"]) for p in found.places]
    assert places == [("all", "last", 0.7), ("all", "answer", 0.7), ([1], "last", 0.7),
                      ([1], "answer", 0.7)]  # fmt: skip
    for place in found.places:
        options = {name: place[name] for name in ("alignment", "gate", "layers")}
        connection = keras_cc.FusedConnection(**options, transform=None, alignment_loss_weight=0)
        by_itself = keras_cc.CCCausalLM(
            model.causal_lm, connection, preprocessor=model.preprocessor
        )
        for language in ("tr", "sw"):
            expected = [
                by_hand(by_itself, row["instruction"], row["output"], row["instruction_en"])
                for row in ROWS[language]
            ]
            np.testing.assert_allclose(place["nats"][language], np.mean(expected), rtol=1e-4)
        by_itself.disconnect()
    # The model is as it was, and usable.
    connected.assert_weights_equal(connected.weights(model), before)
    assert model.connection is None and not model.connection_layers()
    nats = answer_nats(Scorer(model, verbose=0), ROWS)
    np.testing.assert_allclose(np.mean(nats["tr"]), found.monolingual["tr"], rtol=1e-4)
    # The best first, in the table as in `best`.
    means = [np.mean(list(place["nats"].values())) for place in found.places]
    assert found.best == found.places[int(np.argmin(means))]
    lines = found.table().splitlines()
    assert len(lines) == 2 + 2 + 4 and f"{min(means):.3f}" in lines[4]


def test_by_default_all_blocks_and_each_third(model):
    found = connection_map(model, ROWS, alignments=["last"], gates=[1.0], verbose=0)
    assert [place["layers"] for place in found.places] == ["all", [0], [1]]  # two blocks


def test_the_published_connection_once_a_layer(model):
    found = connection_map(
        model, ROWS, alignments=["published", "last"], gates=[1.0], layers=[[1]], verbose=0
    )
    places = {(p["alignment"], *p["layers"]): p["nats"]["sw"] for p in found.places}
    assert list(places) == [("last", 1), ("published", 0), ("published", 1)]
    assert abs(places["published", 0] - places["published", 1]) > 1e-3
    published = keras_cc.SelectedConnection(transform=None)
    whole = keras_cc.CCCausalLM(model.causal_lm, published, preprocessor=model.preprocessor)
    selector = whole.connection_layers()["layer_selector"]
    one = ("brown", "dog", "the lazy dog")
    seen = set()
    for sign in (1, -1):  # of the weights of two layers: so each is selected once
        column = np.random.default_rng(0).normal(size=selector.kernel.shape[0])
        selector.kernel.assign(sign * np.stack([column, -column], axis=1).astype("float32"))
        x = {name: keras.ops.convert_to_tensor(v) for name, v in row_of(whole, *one)[0].items()}
        number = int(np.argmax(connected.to_numpy(whole(x)["selection"])[0]))
        np.testing.assert_allclose(by_hand(whole, *one), places["published", number], rtol=1e-4)
        seen.add(number)
    assert seen == {0, 1}
    whole.disconnect()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alignments": ["first"]}, r"alignment.*first"),
        ({"gates": [1.5]}, "gate.*1.5"),
        ({"layers": [[9]]}, "layers.*9"),
        ({"rows": {"en": ROWS["en"]}}, "another language than English.*'en'"),
    ],
)
def test_refused_before_anything_is_run(model, options, message):
    with pytest.raises(ValueError, match=message):
        connection_map(model, **{"rows": ROWS, **options}, verbose=0)
    assert not model.connection_layers()


def test_a_connected_model_is_refused():
    with pytest.raises(ValueError, match=r"without a connection.*FusedConnection"):
        connection_map(connected.text_model("llama3"), ROWS)
