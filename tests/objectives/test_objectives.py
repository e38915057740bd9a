"""What objectives share: options, names, serialisation, pooling. And the batches of the others."""

import dataclasses
import inspect
import math
import re

import keras
import numpy as np
import pytest
from backend_tools import gradients
from keras import ops

import keras_cc.objectives
from keras_cc.objectives import DFT, Contrastive, Objective, PairStates, TRepLiNa
from keras_cc.objectives import objective as shared

BLOCKS, DIM, VOCABULARY = 6, 5, 7
HEAD = np.random.default_rng(9).normal(size=(DIM, VOCABULARY)).astype("float32")


def make_rows(lengths, seed=0):
    """One dict a row: both streams' states by block, without padding; no pivot where it is 0."""
    rng = np.random.default_rng(seed)

    def stream(length):
        states = rng.normal(0.3, 1, (BLOCKS, length, DIM)).astype("float32")
        states[:, :1] *= 50  # a sink
        return states

    return [
        {
            "target": stream(prompt),
            "pivot": stream(pivot),
            "ids": rng.integers(0, VOCABULARY, pivot),
        }
        for prompt, pivot in lengths
    ]


def pack(rows, padding=0, left=0, garbage=0.0, dtype="float32", seed=5):
    """The `PairStates` of rows, right-padded (`left`: on the left too), answers behind prompts."""
    rng = np.random.default_rng(seed)
    states = {}
    for name in ("target", "pivot"):
        lengths = [row[name].shape[1] for row in rows]
        answer = 2 if name == "target" else 0
        total = left + max(max(lengths), 1) + answer + padding
        hidden = np.full((BLOCKS, len(rows), total, DIM), garbage, "float32")
        mask = np.zeros((len(rows), total), bool)
        ids = np.zeros((len(rows), total), "int32")
        for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            hidden[:, b, left : left + length] = row[name]
            hidden[:, b, left + length : left + length + answer] = rng.normal(size=DIM)
            mask[b, left : left + length] = True
            if name == "pivot":
                ids[b, left : left + length] = row["ids"]
        states[name] = {i: ops.cast(hidden[i], dtype) for i in range(BLOCKS)}
        states[f"{name}_mask"] = ops.convert_to_tensor(mask)
    has_pivot = np.array([row["pivot"].shape[1] > 0 for row in rows])
    return PairStates(
        **states,
        has_pivot=ops.convert_to_tensor(has_pivot),
        pivot_token_ids=ops.convert_to_tensor(ids),
        # What reads the answers is tested where there are passes.
        answer_mask=None,
        labels=None,
        is_own=None,
        logits=None,
        lens=lambda hidden: ops.tanh(ops.matmul(hidden, ops.cast(HEAD, hidden.dtype))) * 4,
        num_blocks=BLOCKS,
    )


def lens_of_one(hidden):
    """The logits of one vector, in NumPy."""
    return np.tanh(hidden.astype("float64") @ HEAD.astype("float64")) * 4


def pooled(hidden, pooling, sink_tokens=1):
    """One vector of one stream's states, in NumPy, or None without a token to pool."""
    hidden = hidden.astype("float64")[sink_tokens:]
    if not len(hidden):
        return None
    return hidden[-1] if pooling == "last" else hidden.sum(0) / len(hidden)


def cosine(a, b):
    return sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))


def result(objective, states):
    values, counts = objective(states)
    for tensor in (values, counts):
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"
    return ops.convert_to_numpy(values), ops.convert_to_numpy(counts)


def state_gradients(objective, states):
    """Gradients of the summed loss for every state, as `(stream, block)` to an array."""
    streams = ("target", "pivot")
    keys = [(name, i) for name in streams for i in range(BLOCKS)]
    variables = [keras.Variable(ops.cast(getattr(states, n)[i], "float32")) for n, i in keys]

    def loss():
        values = dict(zip(keys, (variable.value for variable in variables), strict=True))
        target, pivot = ({i: values[name, i] for i in range(BLOCKS)} for name in streams)
        return ops.sum(objective(dataclasses.replace(states, target=target, pivot=pivot))[0])

    return dict(zip(keys, gradients(loss, variables), strict=True))


# ---------------------------------------------------------------- options

NUMBERS = {"weight": [0, 0.5, 3, np.float32(0.5)], "sink_tokens": [0, 4, np.int64(2)]}
NO_NUMBERS = {
    "weight": [-1, "1", None, True, float("nan"), float("inf")],
    "sink_tokens": [-1, 0.5, None, True],
}
FLAGS, NO_FLAGS = [True, False], [None, "yes", 1, 0]
RIGHT_BLOCKS = [0, 5, -1, 0.01, 0.5, 0.99, np.int64(3), np.float32(0.5)]
WRONG_BLOCKS = [None, True, "0.5", 0.0, 1.0, 1.5, -0.5, float("nan"), [1]]
RIGHT = {
    DFT: {
        "form": ["feature", "logit"],
        "bottom": RIGHT_BLOCKS,
        "middle": RIGHT_BLOCKS,
        "pooling": ["last", "mean"],
        "pivot_gradient": FLAGS,
        "alternating": FLAGS,
        **NUMBERS,
    },
    Contrastive: {
        "layer": RIGHT_BLOCKS,
        "pooling": ["last", "mean"],
        "temperature": [0.05, 1, 20],
        "pivot_gradient": FLAGS,
        "alternating": FLAGS,
        **NUMBERS,
    },
    TRepLiNa: {
        "layer": RIGHT_BLOCKS,
        "pooling": ["last", "mean"],
        "anchor": [0, 5, 0.5],
        "anchor_error": ["relative", "plain"],
        "pivot_gradient": FLAGS,
        "alternating": FLAGS,
        **NUMBERS,
    },
}
WRONG = {
    DFT: {
        "form": ["features", None, 1, ["feature"]],
        "bottom": WRONG_BLOCKS,
        "middle": WRONG_BLOCKS,
        "pooling": ["max", None, True],
        "pivot_gradient": NO_FLAGS,
        "alternating": NO_FLAGS,
        **NO_NUMBERS,
    },
    Contrastive: {
        "layer": WRONG_BLOCKS,
        "pooling": ["max", None, True],
        "temperature": [0, -1, "0.1", None, True, float("nan"), float("inf")],
        "pivot_gradient": NO_FLAGS,
        "alternating": NO_FLAGS,
        **NO_NUMBERS,
    },
    TRepLiNa: {
        "layer": WRONG_BLOCKS,
        "pooling": ["max", None, True],
        "anchor": NO_NUMBERS["weight"],
        "anchor_error": ["absolute", None, True],
        "pivot_gradient": NO_FLAGS,
        "alternating": NO_FLAGS,
        **NO_NUMBERS,
    },
}


def cases(table):
    return [(c, name, v) for c, options in table.items() for name in options for v in options[name]]


@pytest.mark.parametrize("cls", [DFT, Contrastive, TRepLiNa])
def test_every_option_has_right_and_wrong_values(cls):
    options = set(cls().get_config())
    assert set(RIGHT[cls]) == options and set(WRONG[cls]) == options
    assert options == set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("cls, name, value", cases(RIGHT))
def test_right_options_survive_serialisation(cls, name, value):
    objective = cls(**{name: value})
    assert getattr(objective, name) == value
    saved = keras.saving.serialize_keras_object(objective)
    assert saved["registered_name"] == f"keras_cc>{cls.__name__}"
    again = keras.saving.deserialize_keras_object(saved)
    assert type(again) is cls
    assert again.get_config() == objective.get_config()
    assert {type(v) for v in again.get_config().values()} <= {str, int, float, bool}
    assert repr(again) == repr(objective) and f"{name}={again.get_config()[name]!r}" in repr(again)


@pytest.mark.parametrize("cls, name, value", cases(WRONG))
def test_wrong_options(cls, name, value):
    with pytest.raises(ValueError) as error:
        cls(**{name: value})
    assert str(error.value).startswith(f"`{name}` must be ")
    assert str(error.value).endswith(f"Received: {name}={value!r}")


def test_an_unknown_option():
    with pytest.raises(TypeError, match="layers"):
        Contrastive(layers=3)


def test_what_the_trainer_asks():
    assert (DFT().name, DFT().least_rows, DFT().alternating) == ("dft", 1, False)
    contrastive = Contrastive()
    assert (contrastive.name, contrastive.least_rows) == ("contrastive", 2)
    assert contrastive.alternating and contrastive.weight == 1.0


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    "value, num_blocks, expected",
    [
        (0, 6, 0),
        (5, 6, 5),
        (-1, 6, 5),
        (-6, 6, 0),
        (0.5, 32, 15),  # the output of the sixteenth block
        (0.5, 18, 8),
        (0.25, 18, 3),  # 4.5 blocks, rounded to 4
        (0.25, 2, 0),
        (0.01, 30, 0),
        (0.99, 30, 29),
        (0.5, 1, 0),
    ],
)
def test_block_numbers(value, num_blocks, expected):
    assert Contrastive(layer=value).target_blocks(num_blocks) == (expected,)
    assert Contrastive(layer=value).pivot_blocks(num_blocks) == (expected,)


def test_blocks_of_dft():
    feature = DFT(bottom=4, middle=-3)
    assert feature.target_blocks(12) == (4, 9)
    assert feature.pivot_blocks(12) == (4, 11)
    assert DFT("logit", bottom=4, middle=-3).target_blocks(12) == (4, 9)
    assert DFT("logit", bottom=4, middle=-3).pivot_blocks(12) == (11,)
    # In a model of two blocks both are the first one.
    assert DFT().target_blocks(2) == (0,) and DFT().pivot_blocks(2) == (0, 1)
    assert DFT(bottom=-1, middle=-1).pivot_blocks(3) == (2,)


@pytest.mark.parametrize("value", [6, 7, -7])
@pytest.mark.parametrize("cls, name", [(DFT, "bottom"), (DFT, "middle"), (Contrastive, "layer")])
def test_a_block_that_the_model_does_not_have(cls, name, value):
    objective = cls(**{name: value})
    for blocks in (objective.target_blocks, objective.pivot_blocks):
        with pytest.raises(ValueError) as error:
            blocks(6)
        assert f"`{name}` must be a block number from 0 to 5" in str(error.value)
        assert str(error.value).endswith(f"model of 6 blocks. Received: {name}={value}")


# ---------------------------------------------------------------- names and objects


class Custom(Objective):
    name = "custom"

    def target_blocks(self, num_blocks):
        return (0,)

    pivot_blocks = target_blocks

    def __call__(self, states):
        return states.has_pivot, states.has_pivot


class TestGet:
    def test_names_configurations_and_objects(self):
        assert type(keras_cc.objectives.get("dft")) is DFT
        assert type(keras_cc.objectives.get("contrastive")) is Contrastive
        for objective in (DFT(bottom=1), Custom()):
            assert keras_cc.objectives.get(objective) is objective
        saved = keras.saving.serialize_keras_object(Contrastive(layer=-2))
        assert keras_cc.objectives.get(saved).layer == -2

    @pytest.mark.parametrize("wrong", ["dftt", "", None, 3, True, DFT, {}, {"a": 1}, ["dft"]])
    def test_anything_else(self, wrong):
        message = r"`objective` must be one of \['consistency', 'contra.*Received: objective="
        with pytest.raises(ValueError, match=message) as error:
            keras_cc.objectives.get(wrong)
        assert str(error.value).endswith(f"={wrong!r}")

    def test_one_or_several(self):
        assert keras_cc.objectives.get_all(()) == keras_cc.objectives.get_all([]) == ()
        first, second = Custom(), DFT()
        assert keras_cc.objectives.get_all(first) == (first,)
        found = keras_cc.objectives.get_all([first, second, "contrastive"])
        assert found[:2] == (first, second) and type(found[2]) is Contrastive
        assert isinstance(keras_cc.objectives.get_all("dft")[0], DFT)
        saved = [keras.saving.serialize_keras_object(o) for o in (DFT(weight=2), Contrastive())]
        assert [o.weight for o in keras_cc.objectives.get_all(saved)] == [2.0, 1.0]

    @pytest.mark.parametrize("wrong", [None, 3, (None,), ["contrastive", "sft"], [["dft"]]])
    def test_wrong_ones(self, wrong):
        with pytest.raises(ValueError, match=r"`objectives` must be one of.*Received: objectives="):
            keras_cc.objectives.get_all(wrong)

    def test_two_of_a_name(self):
        twice = [Contrastive(layer=0), "dft", Contrastive(layer=1)]
        with pytest.raises(ValueError, match=r"`objectives` must have different names.*Received: "):
            keras_cc.objectives.get_all(twice)

    def test_an_objective_has_to_be_complete(self):
        with pytest.raises(TypeError, match="abstract"):
            Objective()
        assert Custom(weight=2, alternating=True).get_config() == {
            "weight": 2.0,
            "alternating": True,
        }
        assert repr(Custom()) == "Custom(weight=1.0, alternating=False)"


@pytest.mark.parametrize(
    "documented",
    [Objective, DFT, Contrastive, keras_cc.objectives.get, keras_cc.objectives.get_all],
)
def test_docstring_examples_run(documented):
    blocks = re.findall(r"```python\n(.*?)```", inspect.getdoc(documented), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(code, {"keras": keras, "keras_cc": keras_cc})


# ---------------------------------------------------------------- pooling


class TestPool:
    @pytest.mark.parametrize("method", ["mean", "last"])
    def test_by_hand_with_garbage_outside_of_the_mask(self, method):
        hidden = np.full((3, 4, 2), np.nan, "float32")
        hidden[0, 1:3] = [[1, 2], [5, 10]]
        hidden[1, :4] = [[1, 1], [2, 2], [3, 3], [6, 6]]
        mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], bool)
        expected = {"mean": [[3, 6], [3, 3], [0, 0]], "last": [[5, 10], [6, 6], [0, 0]]}
        found = shared.pool(ops.convert_to_tensor(hidden), ops.convert_to_tensor(mask), method)
        np.testing.assert_array_equal(ops.convert_to_numpy(found), expected[method])

    def test_sums_in_float32(self):
        # In float16 the sum of 64 times 2000 is infinite.
        hidden = ops.cast(np.full((1, 64, 2), 2000.0), "float16")
        found = shared.pool(hidden, ops.ones((1, 64), "bool"), "mean")
        assert keras.backend.standardize_dtype(found.dtype) == "float32"
        np.testing.assert_array_equal(ops.convert_to_numpy(found), [[2000, 2000]])

    def test_unit_vectors_and_their_gradient(self):
        vectors = keras.Variable(np.array([[3, 4], [0, 0], [1e-4, 0], [3e8, 4e8]], "float32"))
        found = ops.convert_to_numpy(shared.unit(vectors.value))
        np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0], [1, 0], [0.6, 0.8]], rtol=1e-6)
        (slope,) = gradients(lambda: ops.sum(shared.unit(vectors)[:, 0]), [vectors])
        # d (x / |x|) / dx = 1 / |x| - x^2 / |x|^3;  dy = - x y / |x|^3
        np.testing.assert_allclose(slope[0], [1 / 5 - 9 / 125, -12 / 125], rtol=1e-5)
        np.testing.assert_array_equal(slope[1], [0, 0])

    def test_sink_tokens_are_the_first_real_ones(self):
        rows = make_rows([(4, 3), (2, 4), (1, 3), (3, 0)])
        for left in (0, 2):
            masks = shared.content_masks(pack(rows, left=left), 1)
            target, pivot, counted = (ops.convert_to_numpy(mask) for mask in masks)
            assert target.sum(1).tolist() == [3, 1, 0, 2]
            assert pivot.sum(1).tolist() == [2, 3, 2, 0]
            assert counted.tolist() == [True, True, False, False]
            assert not target[:, : left + 1].any()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "objective", [DFT(), DFT("logit"), Contrastive()], ids=["dft", "logit", "nce"]
)
def test_a_row_that_is_said_to_have_no_pivot_is_not_counted(objective):
    # Whatever its mask says: the other rows are what they are without it.
    rows = make_rows([(4, 3), (3, 5), (5, 4)])
    states = pack(rows)
    states.has_pivot = ops.convert_to_tensor(np.array([True, False, True]))
    values, counts = result(objective, states)
    assert counts.tolist() == [1, 0, 1] and values[1] == 0
    without, _ = result(objective, pack([rows[0], rows[2]]))
    np.testing.assert_allclose(values[[0, 2]], without, rtol=1e-5, atol=1e-6)
    assert not any(g[1].any() for g in state_gradients(objective, states).values())
