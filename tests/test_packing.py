"""Several pairs in a row: the same losses and weights as one pair a row."""

import connected
import hypothesis
import hypothesis.strategies as st
import keras
import numpy as np
import pytest
import tiny

from keras_cc import (
    DFT,
    CCCausalLM,
    FlareConnection,
    FusedConnection,
    SelectedConnection,
)
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.packing import Packing

# All on PyTorch, which compiles nothing; elsewhere those that differ most.
FAMILIES = tiny.FAMILIES if connected.BACKEND == "torch" else (*tiny.UNLIKE, "falcon")
UNLEARNT = [family for family in FAMILIES if family not in ("gpt2", "opt")]
LENGTHS = (9, 5, 12, 7, 3, 10, 4, 8)
PIVOTS = (4, 6, 0, 3, 8, 2, 5, 0)
ANSWERS = (3, 1, 4, 2, 1, 0, 2, 3)  # one pair has none, and a pivot


def arrays(lengths=LENGTHS, pivots=PIVOTS, answers=ANSWERS, seed=0):
    """`(x, y, sample_weight)`, one pair a row."""
    rng = np.random.default_rng(seed)
    rows, width, pivot_width = len(lengths), max(lengths) + 1, max(max(pivots), 1) + 2
    mask = np.arange(width) < np.array(lengths)[:, None]
    pivot_mask = np.arange(pivot_width) < np.array(pivots)[:, None]
    behind = np.array(lengths)[:, None] - 1 - np.arange(width)
    answer = (behind > 0) & (behind <= np.array(answers)[:, None])
    ids = np.where(mask, rng.integers(3, tiny.VOCABULARY, (rows, width)), 0).astype("int32")
    pivot_ids = rng.integers(3, tiny.VOCABULARY, (rows, pivot_width))
    x = {
        "token_ids": ids,
        "padding_mask": mask.astype("int32"),
        "answer_mask": answer.astype("int32"),
        "pivot_token_ids": np.where(pivot_mask, pivot_ids, 0).astype("int32"),
        "pivot_padding_mask": pivot_mask.astype("int32"),
    }
    return x, np.roll(ids, -1, axis=1), answer.astype("float32")


def trained(pack, family="llama3", connection="fused", accumulate=None, lora=None, **options):
    keras.utils.set_random_seed(3)
    compiling = options.pop("compiling", connected.QUICK)
    model = CCCausalLM(tiny.causal_lm(family), connection, **options)
    for number, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, 3 + number)
    if lora:
        model.enable_lora(lora)
    # Rounding grows with the steps, see `trajectory.py`.
    rate = 0.001 if family == "gemma3" else 0.02
    model.compile(keras.optimizers.SGD(rate, gradient_accumulation_steps=accumulate), **compiling)
    answers = [max(a, 1) for a in ANSWERS] if connection is None else ANSWERS
    history = model.fit(
        arrays(answers=answers), batch_size=4, epochs=2, shuffle=False, verbose=0, pack=pack
    ).history
    return {v.path: np.array(v) for v in model.trainable_variables}, history


def check_alike(pack=24, **options):
    (one, history), (packed, other) = (trained(pack=p, **options) for p in (None, pack))
    assert history.keys() == other.keys()
    for name in history.keys() - {"loss"}:  # a mean over batches, which it weights by their rows
        np.testing.assert_allclose(history[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)
    moved = 0.0
    for (path, value), again in zip(one.items(), packed.values(), strict=True):
        np.testing.assert_allclose(value, again, rtol=2e-5, atol=5e-6, err_msg=path)
        moved = max(moved, np.abs(value).max())
    assert moved > 0


NO_DROPOUT = FusedConnection(dropout=0.0)


@pytest.mark.parametrize("family", UNLEARNT)
def test_every_family(family):
    check_alike(family=family, connection=NO_DROPOUT)


@pytest.mark.parametrize(
    "options",
    [
        {"alignment": "mean", "gate": "layer"},
        {"alignment": "last"},
        {"sink_tokens": 0},
        {"sink_tokens": 3},
        {"without_pivot": "align", "pivot_gradient": True, "alignment_gradient": "full"},
        {"dropout": 1.0, "without_pivot": "transform"},
        {"dropout": 1.0},
    ],
    ids=str,
)
@pytest.mark.thorough("{'alignment': 'last'}")
def test_every_option(options):
    check_alike(connection=FusedConnection(**{"dropout": 0.0, **options}))


@pytest.mark.parametrize(
    "options",
    [
        {"connection": None},
        {"connection": NO_DROPOUT, "rematerialize": True},
        {"connection": NO_DROPOUT, "accumulate": 2},
        {"connection": NO_DROPOUT, "lora": 2},
        {"connection": NO_DROPOUT, "pack": 13},
        {"connection": NO_DROPOUT, "pack": 100},
    ],
    ids=str,
)
@pytest.mark.thorough
def test_what_is_beside_it(options):
    check_alike(**options)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="runs eagerly")
def test_compiled():
    check_alike(connection=NO_DROPOUT, compiling={})


def test_connection_dropout_is_drawn_for_each_pair():
    keras.utils.set_random_seed(1)
    model = CCCausalLM(tiny.causal_lm("llama3"), FusedConnection(dropout=0.5))
    (packed,) = PreparedBatches(arrays(), batch_size=8, packing=Packing(40))
    x, segments = packed[0], packed[0]["segment_ids"]
    from keras_cc.passes import runs

    found = set()
    for _ in range(20):
        pivot = runs.pivot(model, x, training=True)
        scope = runs.connected(model, x, pivot, training=True)
        dropped = np.array(scope.through_transform)
        for row in range(len(segments)):
            for number in set(segments[row]) - {0}:
                of_pair = dropped[row][segments[row] == number]
                assert len(set(of_pair.tolist())) == 1  # a pair is dropped whole
                found.add((row, int(number), bool(of_pair[0])))
    with_pivot = sum(1 for length in PIVOTS if length > 1)  # one token is a sink
    assert len({(row, n) for row, n, is_dropped in found if is_dropped}) == with_pivot


@pytest.mark.parametrize("family", ["llama3", "bloom", "gemma3"])
def test_a_pair_sees_itself_alone(family):
    model = CCCausalLM(tiny.causal_lm(family), NO_DROPOUT)
    for number, layer in enumerate(model.connection_layers().values()):
        tiny.fill(layer, 3 + number)
    (packed,) = PreparedBatches(arrays(), batch_size=8, packing=Packing(40))
    x = packed[0]
    other = {name: np.array(value) for name, value in x.items()}
    for name, segments in (("token_ids", "segment_ids"), ("pivot_token_ids", "pivot_segment_ids")):
        first = x[segments] == 1
        other[name] = np.where(first, (x[name] + 7) % tiny.VOCABULARY, x[name]).astype("int32")
    before, after = (
        keras.ops.convert_to_numpy(model({k: v for k, v in inputs.items() if k not in DROPPED})[
            "logits"
        ])
        for inputs in (x, other)
    )  # fmt: skip
    of_first = x["segment_ids"] == 1
    rest = x["segment_ids"] > 1
    np.testing.assert_allclose(before[rest], after[rest], atol=1e-5)
    assert np.abs(before[of_first] - after[of_first]).max() > 1e-2


DROPPED = ("answer_positions", "row_ids")


@hypothesis.given(
    st.lists(
        st.tuples(st.integers(2, 12), st.integers(0, 9), st.integers(0, 11)), min_size=1, max_size=9
    ),
    st.integers(12, 40),
    st.integers(1, 4),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_every_pair_is_there_once_and_whole(pairs, width, multiple):
    lengths, pivots, answers = (list(values) for values in zip(*pairs, strict=True))
    answers = [min(a, n - 1) for a, n in zip(answers, lengths, strict=True)]
    x, y, weight = arrays(lengths, pivots, answers)
    expected = sorted(
        (
            x["token_ids"][i, :n].tolist(), y[i, :n].tolist(), weight[i, :n].tolist(),
            x["pivot_token_ids"][i, :p].tolist(),
        )
        for i, (n, p) in enumerate(zip(lengths, pivots, strict=True))
    )  # fmt: skip
    packed, labels, weights = Packing(width, multiple)((dict(x), y, weight), str)
    rows = len(labels)
    assert rows % multiple == 0 and labels.shape == (rows, width)
    found = []
    for row in range(rows):
        segments, pivot = packed["segment_ids"][row], packed["pivot_segment_ids"][row]
        assert ((segments != 0) == (packed["padding_mask"][row] != 0)).all()
        assert ((pivot != 0) == (packed["pivot_padding_mask"][row] != 0)).all()
        assert set(pivot) <= set(segments) | {0}
        for number in sorted(set(segments) - {0}):
            (places,) = np.nonzero(segments == number)
            assert (np.diff(places) == 1).all()
            found.append(
                (
                    packed["token_ids"][row, places].tolist(), labels[row, places].tolist(),
                    weights[row, places].tolist(),
                    packed["pivot_token_ids"][row][pivot == number].tolist(),
                )
            )  # fmt: skip
        at = packed["answer_positions"][row]
        assert weights[row, at].sum() == weights[row].sum()
    assert sorted(found) == expected


def test_few_shapes_and_the_share_of_padding():
    rng = np.random.default_rng(0)
    lengths, pivots = rng.integers(4, 30, 160), rng.integers(0, 20, 160)
    batches = PreparedBatches(
        arrays(lengths, pivots, [2] * 160), batch_size=16, packing=Packing(64)
    )
    shapes = {(*y.shape, x["pivot_token_ids"].shape[1]) for x, y, _ in batches}
    assert len(shapes) <= 3
    packing = batches.packing
    real = lengths.sum() + pivots.sum()
    assert packing.token_count - packing.padding_count == real
    assert f"{1 - real / packing.token_count:.0%} of the tokens" in batches.padding_share()


def test_text(tmp_path):
    model = connected.text_model("llama3", NO_DROPOUT)
    model.compile("sgd", **connected.QUICK)
    history = model.fit(connected.ROWS * 4, batch_size=6, pack=96, verbose=0, seed=0).history
    assert np.isfinite(history["sft_loss"]).all()


# ---------------------------------------------------------------- bad input


def test_pairs_that_are_longer_than_a_row():
    def packed(width, **lengths):
        return list(PreparedBatches(arrays(**lengths), batch_size=8, packing=Packing(width)))

    with pytest.raises(ValueError, match=r"row 2: 12 tokens.*pack=11, and 1 of the batch's 8 p"):
        packed(11)
    with pytest.raises(ValueError, match=r"row 2: 12 tokens.*pack=7, and 5 of the batch's 8"):
        packed(7)
    with pytest.raises(ValueError, match=r"row 4: 20 tokens, of the target or of the pivot.*=12"):
        packed(12, pivots=(4, 6, 0, 3, 20, 2, 5, 0))


@pytest.mark.parametrize("pack", [1, 0, -4, 2.5, "all", True])
def test_a_width_that_is_none(pack):
    model = CCCausalLM(tiny.causal_lm("llama3"))
    model.compile("sgd")
    with pytest.raises(ValueError, match="`pack` must be"):
        model.fit(arrays(), pack=pack)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gpt2", {}, "learnt a vector for each place"),
        ("opt", {"connection": None}, "learnt a vector for each place"),
        ("llama3", {"connection": SelectedConnection()}, "one pair a row"),
        ("llama3", {"connection": FlareConnection()}, "one pair a row"),
        ("llama3", {"connection": FusedConnection(alignment="answer")}, "one pair a row"),
        ("llama3", {"objectives": [DFT()]}, "row by row"),
    ],
)
def test_what_cannot_be_packed(family, options, reason):
    model = CCCausalLM(tiny.causal_lm(family), **options)
    model.compile("sgd")
    before = [np.array(v) for v in model.variables]
    with pytest.raises(ValueError, match=rf"`pack` must be None here.*{reason}.*Received: pack=24"):
        model.fit(arrays(), batch_size=4, pack=24)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, np.array(variable))
