import keras
import numpy as np
import pytest
from keras import ops
from test_objectives import (
    BLOCKS,
    DIM,
    cosine,
    lens_of_one,
    make_rows,
    pack,
    pooled,
    result,
    state_gradients,
)

from keras_cc.objectives import DFT

# The third row has no pivot, the fourth no token behind its first one.
LENGTHS = [(5, 3), (3, 6), (4, 0), (1, 4), (6, 5)]
COUNTED = [1, 1, 0, 0, 1]
OBJECTIVES = {
    "feature-last": DFT(bottom=1, middle=3),
    "feature-mean": DFT(bottom=1, middle=3, pooling="mean"),
    "logit": DFT("logit", bottom=1, middle=3),
}


def expected_feature(row, bottom, middle, pooling, sink_tokens):
    def state(stream, block):
        return pooled(row[stream][block], pooling, sink_tokens)

    return (1 - cosine(state("pivot", bottom), state("target", bottom))) + (
        1 - cosine(state("pivot", BLOCKS - 1), state("target", middle))
    )


def log_probabilities(hidden):
    logits = lens_of_one(hidden)
    return logits - np.log(np.exp(logits).sum())


def expected_logit(row, bottom, middle, sink_tokens):
    at_bottom = log_probabilities(row["target"][bottom][-1])
    at_middle = log_probabilities(row["target"][middle][-1])
    answer = np.exp(log_probabilities(row["pivot"][BLOCKS - 1][-1]))
    text = [-at_bottom[token] for token in row["ids"][sink_tokens:]]
    return sum(text) / len(text) - sum(answer * at_middle)


class TestValues:
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    @pytest.mark.parametrize("sink_tokens", [0, 1, 2])
    @pytest.mark.parametrize("bottom, middle", [(0, 2), (1, -2), (0.5, 0.9), (3, 3)])
    def test_feature_against_numpy(self, pooling, sink_tokens, bottom, middle):
        objective = DFT(
            bottom=bottom, middle=middle, pooling=pooling, sink_tokens=sink_tokens, weight=7.0
        )
        rows = make_rows(LENGTHS)
        numbers = {-2: 4, 0.5: 2, 0.9: 4}
        i, j = numbers.get(bottom, bottom), numbers.get(middle, middle)
        values, counts = result(objective, pack(rows))
        for b, row in enumerate(rows):
            usable = min(row["target"].shape[1], row["pivot"].shape[1]) > sink_tokens
            expected = expected_feature(row, i, j, pooling, sink_tokens) if usable else 0
            assert counts[b] == usable
            assert values[b] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert (values > 0.1).sum() >= 3

    @pytest.mark.parametrize("sink_tokens", [0, 1, 2])
    def test_logit_against_numpy(self, sink_tokens):
        rows = make_rows(LENGTHS, seed=1)
        objective = DFT("logit", bottom=2, middle=4, sink_tokens=sink_tokens)
        values, counts = result(objective, pack(rows))
        for b, row in enumerate(rows):
            usable = min(row["target"].shape[1], row["pivot"].shape[1]) > sink_tokens
            expected = expected_logit(row, 2, 4, sink_tokens) if usable else 0
            assert counts[b] == usable
            assert values[b] == pytest.approx(expected, rel=1e-5, abs=1e-6)

    def test_by_hand(self):
        # Bottom: the same direction; middle: opposite. 0 + 2. Turned by 90 degrees: 1 + 1.
        (row,) = make_rows([(2, 2)])
        ones = np.ones(DIM, "float32")
        row["pivot"][0, 1], row["target"][0, 1] = ones, 3 * ones
        row["pivot"][BLOCKS - 1, 1], row["target"][2, 1] = 0.5 * ones, -ones
        assert result(DFT(bottom=0, middle=2), pack([row]))[0] == pytest.approx([2.0])
        turned = np.array([1, -1, 0, 0, 0], "float32")
        row["target"][0, 1] = row["target"][2, 1] = turned
        assert result(DFT(bottom=0, middle=2), pack([row]))[0] == pytest.approx([2.0])
        row["target"][0, 1], row["target"][2, 1] = ones, ones
        assert result(DFT(bottom=0, middle=2), pack([row]))[0] == pytest.approx([0.0], abs=1e-6)

    @pytest.mark.thorough("feature-last")
    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
    def test_padding_answers_and_other_rows_change_nothing(self, objective):
        rows = make_rows(LENGTHS)
        values, counts = result(objective, pack(rows))
        assert counts.tolist() == COUNTED
        for options in ({"padding": 3}, {"left": 2}, {"garbage": np.nan}, {"seed": 6}):
            again, again_counts = result(objective, pack(rows, **options))
            np.testing.assert_array_equal(again_counts, counts)
            np.testing.assert_allclose(again, values, rtol=1e-6, atol=1e-6)
        alone = [result(objective, pack([row]))[0][0] for row in rows]
        np.testing.assert_allclose(alone, values, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
    def test_half_precision_states(self, objective, dtype):
        states = pack(make_rows(LENGTHS), dtype=dtype)
        values, counts = result(objective, states)
        assert counts.tolist() == COUNTED
        full, _ = result(objective, pack(make_rows(LENGTHS)))
        np.testing.assert_allclose(values, full, atol=0.1)
        assert np.abs(values - full).max() > 0  # the states really were rounded

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_lens_is_given_the_blocks_dtype_and_few_positions(self, dtype):
        states, seen = pack(make_rows(LENGTHS), dtype=dtype), []
        inner = states.lens

        def lens(hidden):
            seen.append((tuple(hidden.shape), keras.backend.standardize_dtype(hidden.dtype)))
            return inner(hidden)

        states.lens = lens
        result(OBJECTIVES["logit"], states)
        assert seen == [((5, 2, DIM), dtype), ((5, 1, DIM), dtype)]
        seen.clear()
        result(OBJECTIVES["feature-last"], states)
        assert not seen

    def test_only_the_blocks_asked_for_are_read(self):
        for objective in OBJECTIVES.values():
            states = pack(make_rows(LENGTHS))
            full, _ = result(objective, states)
            states.target = {i: states.target[i] for i in objective.target_blocks(BLOCKS)}
            states.pivot = {i: states.pivot[i] for i in objective.pivot_blocks(BLOCKS)}
            np.testing.assert_array_equal(result(objective, states)[0], full)


class TestGradients:
    @pytest.mark.thorough("logit")
    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
    def test_the_target_alone_learns_by_default(self, objective):
        found = state_gradients(objective, pack(make_rows(LENGTHS), garbage=np.nan))
        for (stream, block), gradient in found.items():
            assert np.isfinite(gradient).all()
            per_row = np.abs(gradient).sum((1, 2))
            expected = COUNTED if stream == "target" and block in (1, 3) else [0] * 5
            assert (per_row > 0).tolist() == [bool(one) for one in expected], (stream, block)

    @pytest.mark.parametrize("pooling", ["last", "mean"])
    def test_the_pivot_learns_where_asked(self, pooling):
        states = pack(make_rows(LENGTHS))
        shut = state_gradients(DFT(bottom=1, middle=3, pooling=pooling), states)
        objective = DFT(bottom=1, middle=3, pooling=pooling, pivot_gradient=True)
        found = state_gradients(objective, states)
        learning = {key for key, gradient in found.items() if np.abs(gradient).max() > 0}
        assert learning == {("target", 1), ("target", 3), ("pivot", 1), ("pivot", BLOCKS - 1)}
        for block in (1, 3):
            np.testing.assert_array_equal(found["target", block], shut["target", block])
        # A sink, and what stands behind the prompt, are not pooled.
        assert not found["pivot", 1][:, 0].any()
        assert not found["target", 1][0, 5:].any() and found["target", 1][0, 4].any()

    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
    def test_zero_states_and_empty_masks_give_finite_gradients(self, objective):
        states = pack(make_rows(LENGTHS))
        states.target = {i: ops.zeros_like(h) for i, h in states.target.items()}
        states.pivot = {i: ops.zeros_like(h) for i, h in states.pivot.items()}
        values, _ = result(objective, states)
        assert np.isfinite(values).all()
        if objective.form == "feature":  # nothing has a direction: two cosines of 0
            np.testing.assert_array_equal(values, 2 * np.array(COUNTED))
        assert all(np.isfinite(g).all() for g in state_gradients(objective, states).values())
        states = pack(make_rows(LENGTHS))
        states.target_mask = ops.zeros_like(states.target_mask)  # has_pivot says otherwise
        values, counts = result(objective, states)
        assert not values.any() and not counts.any()
        assert not any(g.any() for g in state_gradients(objective, states).values())

    def test_a_step_down_the_logit_gradient_moves_the_lens_to_the_answer(self):
        # d CE(p, softmax(z)) / dz = softmax(z) - p: with the lens's own slope, by differences.
        rows = make_rows([(3, 4)], seed=2)
        objective = DFT("logit", bottom=1, middle=3)
        found = state_gradients(objective, pack(rows))
        for block in (1, 3):
            for d in range(DIM):
                sides = []
                for step in (1e-3, -1e-3):
                    moved = {**rows[0], "target": rows[0]["target"].astype("float64")}
                    moved["target"][block, -1, d] += step
                    sides.append(expected_logit(moved, 1, 3, 1))
                slope = (sides[0] - sides[1]) / 2e-3
                assert found["target", block][0, 2, d] == pytest.approx(slope, rel=1e-3, abs=1e-5)


class TestRefused:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"pooling": "mean"}, r'`pooling` must be "last" with form="logit".*pooling=\'mean\''),
            ({"pivot_gradient": True}, r"`pivot_gradient` must be False with form=.*gradient=True"),
        ],
    )
    def test_options_that_the_logit_form_has_no_use_for(self, options, message):
        DFT("feature", **options)
        with pytest.raises(ValueError, match=message):
            DFT("logit", **options)
