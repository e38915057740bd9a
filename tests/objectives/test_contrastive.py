import math

import keras
import numpy as np
import pytest
from keras import ops
from test_objectives import cosine, make_rows, pack, pooled, result, state_gradients

from keras_cc.objectives import Contrastive

# The third row has no pivot, the fourth no token behind its first one.
LENGTHS = [(5, 3), (3, 6), (4, 0), (1, 4), (6, 5), (4, 4)]
COUNTED = [1, 1, 0, 0, 1, 1]


def expected_losses(rows, layer, pooling="mean", temperature=0.1, sink_tokens=1):
    """`(values, counts)`, each anchor against each candidate, one at a time."""
    pairs = {}
    for b, row in enumerate(rows):
        streams = [pooled(row[name][layer], pooling, sink_tokens) for name in ("target", "pivot")]
        if all(stream is not None for stream in streams):
            pairs[b] = streams
    values = [0.0] * len(rows)
    if len(pairs) < 2:
        return values, [0] * len(rows)
    for b, (target, own) in pairs.items():
        scores = [math.exp(cosine(target, pivot) / temperature) for _, pivot in pairs.values()]
        values[b] = -math.log(math.exp(cosine(target, own) / temperature) / sum(scores))
    return values, [int(b in pairs) for b in range(len(rows))]


class TestValues:
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    @pytest.mark.parametrize("sink_tokens", [0, 1, 2])
    @pytest.mark.parametrize("temperature", [0.05, 0.1, 2.0])
    def test_against_numpy(self, pooling, sink_tokens, temperature):
        options = {"pooling": pooling, "sink_tokens": sink_tokens, "temperature": temperature}
        rows = make_rows(LENGTHS)
        expected, expected_counts = expected_losses(rows, 4, **options)
        values, counts = result(Contrastive(layer=4, weight=7.0, **options), pack(rows))
        np.testing.assert_array_equal(counts, expected_counts)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
        assert max(expected) > 0.5

    def test_a_matching_batch_beats_a_shuffled_one(self):
        rows = make_rows([(4, 4)] * 3)
        for row in rows:
            row["pivot"][2] = row["target"][2]
        matching, _ = result(Contrastive(layer=2), pack(rows))
        turned = [{**row, "pivot": rows[b - 1]["pivot"]} for b, row in enumerate(rows)]
        shuffled, _ = result(Contrastive(layer=2), pack(turned))
        assert (matching < shuffled).all()
        np.testing.assert_allclose(matching, expected_losses(rows, 2)[0], rtol=1e-4, atol=1e-6)

    def test_the_target_is_the_anchor(self):
        # Turned round, the pivots being the anchors, the numbers are others.
        rows = make_rows([(5, 3), (3, 6), (6, 5)])
        back = [{**row, "target": row["pivot"], "pivot": row["target"]} for row in rows]
        for row, length in zip(back, (5, 3, 6), strict=True):
            row["ids"] = np.zeros(length, int)
        values, _ = result(Contrastive(layer=4), pack(rows))
        other_way, _ = result(Contrastive(layer=4), pack(back))
        assert np.abs(values - other_way).max() > 0.01
        np.testing.assert_allclose(values, expected_losses(rows, 4)[0], rtol=1e-5, atol=1e-5)

    def test_as_mid_align_writes_it(self):
        # LogSoftmax over the rows of cos(parallel_1[row], parallel_0[column]), its diagonal.
        rows = make_rows([(5, 3), (3, 6), (6, 5)])
        means = [[pooled(row[name][2], "mean", 0) for row in rows] for name in ("pivot", "target")]
        matrix = np.array([[cosine(p, t) for t in means[1]] for p in means[0]]) / 0.1
        log_softmax = matrix - np.log(np.exp(matrix).sum(axis=0, keepdims=True))
        values, _ = result(Contrastive(sink_tokens=0), pack(rows))  # block 2 of 6 by default
        np.testing.assert_allclose(values, -np.diag(log_softmax), rtol=1e-4, atol=1e-5)

    def test_the_same_pivot_twice_costs_log_two(self):
        (row,) = make_rows([(4, 4)])
        values, _ = result(Contrastive(), pack([row] * 2))
        np.testing.assert_allclose(values, [math.log(2)] * 2, rtol=1e-6)

    @pytest.mark.parametrize("pivots", [0, 1, 2])
    def test_fewer_than_two_pivots_are_nothing(self, pivots):
        objective, states = Contrastive(), pack(make_rows(LENGTHS))
        states.has_pivot = ops.convert_to_tensor(np.arange(6) < pivots)
        values, counts = result(objective, states)
        assert counts.tolist() == [1, 1, 0, 0, 0, 0] if pivots == 2 else not counts.any()
        assert values.any() == (pivots == 2)
        slopes = state_gradients(objective, states).values()
        assert any(slope.any() for slope in slopes) == (pivots == 2)

    def test_a_batch_of_one_row_is_nothing(self):
        values, counts = result(Contrastive(), pack(make_rows([(5, 3)])))
        assert not values.any() and not counts.any()

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_padding_answers_and_rows_without_a_pivot_change_nothing(self, pooling):
        objective, rows = Contrastive(pooling=pooling), make_rows(LENGTHS)
        values, counts = result(objective, pack(rows))
        assert counts.tolist() == COUNTED
        for options in ({"padding": 3}, {"left": 2}, {"garbage": np.nan}, {"seed": 6}):
            again, again_counts = result(objective, pack(rows, **options))
            np.testing.assert_array_equal(again_counts, counts)
            np.testing.assert_allclose(again, values, rtol=1e-5, atol=1e-5)
        kept = [b for b, one in enumerate(COUNTED) if one]
        without, _ = result(objective, pack([rows[b] for b in kept]))
        np.testing.assert_allclose(without, values[kept], rtol=1e-5, atol=1e-5)
        fewer, _ = result(objective, pack([rows[b] for b in kept[:-1]]))
        assert (fewer < values[kept[:-1]]).all()  # a row with a pivot is a negative

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision_states(self, dtype):
        rows = make_rows(LENGTHS)
        for row in rows:  # their squares overflow float16
            row["target"] *= 300
            row["pivot"] *= 300
        values, counts = result(Contrastive(layer=3), pack(rows, dtype=dtype))
        assert counts.tolist() == COUNTED
        expected, _ = expected_losses(rows, 3)
        np.testing.assert_allclose(values, expected, atol=0.15)

    def test_only_the_block_asked_for_is_read(self):
        objective, states = Contrastive(layer=3), pack(make_rows(LENGTHS))
        full, _ = result(objective, states)
        states.target, states.pivot = {3: states.target[3]}, {3: states.pivot[3]}
        np.testing.assert_array_equal(result(objective, states)[0], full)

    @pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="TensorFlow alone traces unknown sizes"
    )
    def test_a_batch_of_unknown_size(self):
        import tensorflow as tf

        objective, states = Contrastive(layer=3), pack(make_rows(LENGTHS))

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, None, 5)),
                tf.TensorSpec((None, None, 5)),
                tf.TensorSpec((None, None), tf.bool),
                tf.TensorSpec((None, None), tf.bool),
                tf.TensorSpec((None,), tf.bool),
            ]
        )
        def traced(target, pivot, target_mask, pivot_mask, has_pivot):
            states.target, states.pivot = {3: target}, {3: pivot}
            states.target_mask, states.pivot_mask = target_mask, pivot_mask
            states.has_pivot = has_pivot
            return objective(states)

        eager, _ = result(objective, states)
        tensors = states.target[3], states.pivot[3], states.target_mask, states.pivot_mask
        values, _ = traced(*tensors, states.has_pivot)
        np.testing.assert_allclose(values.numpy(), eager, rtol=1e-5, atol=1e-6)


class TestGradients:
    @pytest.mark.parametrize("pivot_gradient", [True, False])
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_who_learns(self, pooling, pivot_gradient):
        objective = Contrastive(layer=3, pooling=pooling, pivot_gradient=pivot_gradient)
        found = state_gradients(objective, pack(make_rows(LENGTHS), garbage=np.nan))
        for (stream, block), gradient in found.items():
            assert np.isfinite(gradient).all()
            learns = block == 3 and (stream == "target" or pivot_gradient)
            expected = COUNTED if learns else [0] * len(COUNTED)
            per_row = np.abs(gradient).sum((1, 2))
            assert (per_row > 0).tolist() == [bool(one) for one in expected], (stream, block)

    def test_against_differences_of_the_formula(self):
        rows = make_rows([(3, 4), (4, 3), (3, 3)], seed=3)
        found = state_gradients(Contrastive(layer=1, temperature=0.5), pack(rows))
        for stream in ("target", "pivot"):
            for d in range(5):
                sides = []
                for step in (1e-4, -1e-4):
                    moved = [dict(row) for row in rows]
                    moved[0][stream] = rows[0][stream].astype("float64")
                    moved[0][stream][1, 2, d] += step
                    sides.append(sum(expected_losses(moved, 1, temperature=0.5)[0]))
                slope = (sides[0] - sides[1]) / 2e-4
                assert found[stream, 1][0, 2, d] == pytest.approx(slope, rel=1e-3, abs=1e-5)

    def test_zero_states_and_empty_masks_give_finite_gradients(self):
        objective, states = Contrastive(), pack(make_rows(LENGTHS))
        states.target = {i: ops.zeros_like(h) for i, h in states.target.items()}
        states.pivot = {i: ops.zeros_like(h) for i, h in states.pivot.items()}
        values, _ = result(objective, states)  # nothing has a direction: four equal candidates
        np.testing.assert_allclose(values, math.log(4) * np.array(COUNTED), rtol=1e-6)
        assert all(np.isfinite(g).all() for g in state_gradients(objective, states).values())
        states = pack(make_rows(LENGTHS))
        states.pivot_mask = ops.zeros_like(states.pivot_mask)  # has_pivot says otherwise
        values, counts = result(objective, states)
        assert not values.any() and not counts.any()
        assert not any(g.any() for g in state_gradients(objective, states).values())

    @pytest.mark.thorough
    def test_descent_finds_every_pair(self):
        objective, states = Contrastive(layer=0), pack(make_rows([(4, 4)] * 4, seed=4))
        first = result(objective, states)[0].sum()
        for _ in range(40):
            found = state_gradients(objective, states)
            for stream in ("target", "pivot"):
                blocks = getattr(states, stream)
                blocks[0] = blocks[0] - ops.convert_to_tensor(0.3 * found[stream, 0])
        assert result(objective, states)[0].sum() < 0.3 * first
