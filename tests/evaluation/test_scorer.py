"""Log-likelihoods: against `logsumexp` in NumPy, one request at a time and without padding."""

import connected
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

import keras_cc
from keras_cc.data.widths import width_of
from keras_cc.evaluation import LogLikelihood, Scorer
from keras_cc.evaluation.scorer import _rows

RNG = np.random.default_rng(0)


def ids(count, vocabulary):
    return RNG.integers(3, vocabulary, count).tolist()


def by_hand(model, requests, width=25, **extra):
    """Every logit of every row, one batch of another width: a list of `LogLikelihood`."""
    token_ids = np.zeros((len(requests), width), "int32")
    padding_mask = np.zeros_like(token_ids)
    for row, (context, rest) in enumerate(requests):
        token_ids[row, : len(context + rest)] = context + rest
        padding_mask[row, : len(context + rest)] = 1
    x = {"token_ids": token_ids, "padding_mask": padding_mask, **extra}
    logits, found = connected.logits(model, x), []
    for row, (context, rest) in enumerate(requests):
        where = slice(len(context) - 1, len(context + rest) - 1)
        total = -connected.cross_entropy(logits[row, where], np.array(rest, int)).sum()
        is_greedy = bool((logits[row, where].argmax(axis=-1) == rest).all())
        found.append(LogLikelihood(total, is_greedy, len(rest)))
    return found


def assert_scores(found, expected):
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    assert [f.is_greedy for f in found] == [e.is_greedy for e in expected]
    np.testing.assert_allclose(
        [f.total for f in found], [e.total for e in expected], rtol=2e-5, atol=2e-5
    )


@pytest.fixture(scope="module")
def model():
    model = connected.text_model("llama3", with_preprocessor=True)
    connected.train_connection(model, scale=0.3)
    return model


class TestScores:
    def test_requests_of_all_lengths_in_the_callers_order(self, model):
        size = model.tokenizer.vocabulary_size()
        lengths = [(1, 1), (5, 3), (16, 1), (3, 13), (20, 4), (2, 0), (9, 2)]
        requests = [(ids(n, size), ids(m, size)) for n, m in lengths]
        found = Scorer(model, batch_size=3, verbose=0).log_likelihoods(requests)
        assert_scores(found, by_hand(model, requests))

    def test_the_likeliest_continuation_is_greedy_and_another_is_not(self, model):
        row = np.zeros((1, 25), "int32")
        row[0, :3] = 5, 9, 11
        mask = (row > 0).astype("int32")
        logits = connected.logits(model, {"token_ids": row, "padding_mask": mask})[0, 2]
        best, worst = int(logits.argmax()), int(logits.argmin())
        requests = [([5, 9, 11], rest) for rest in ([best], [worst], [best, worst])]
        found = Scorer(model, batch_size=2, verbose=0).log_likelihoods(requests)
        assert [f.is_greedy for f in found] == [True, False, False]
        assert_scores(found, by_hand(model, requests))

    def test_continuations_that_begin_alike_share_one_row(self, model, monkeypatch):
        context = ids(7, 40)
        options = [[5], [6], [7], [5], [6, 5], [6, 9], [8, 5], [6, 5, 4, 3], [6, 7, 2]]
        requests = [(context, option) for option in options]
        # Another context of the same ids is another row: its prompt ends elsewhere.
        requests.append(([*context, 6], [5]))
        scorer = Scorer(model, batch_size=2, verbose=0)
        fed, run = [], scorer._compiled.run

        def spy(inputs):
            fed.append(inputs["token_ids"])
            return run(inputs)

        monkeypatch.setattr(scorer._compiled, "run", spy)
        found = scorer.log_likelihoods(requests)
        assert_scores(found, by_hand(model, requests))
        # [6, 5, 4], [6, 7] and [8] after the context, and the one after the longer context: 4 rows.
        assert [rows.shape for rows in fed] == [(2, 16), (2, 16)]

    def test_a_window_of_several_pieces(self, model, monkeypatch):
        monkeypatch.setattr(keras_cc.evaluation.scorer, "LOGITS_AT_ONCE", 4)
        request = (ids(3, 40), ids(11, 40))
        found = Scorer(model, batch_size=1, verbose=0).log_likelihoods([request])
        assert_scores(found, by_hand(model, [request]))

    def test_batch_by_batch_the_longest_first(self, model):
        requests = [(ids(2, 40), ids(1, 40)), (ids(9, 40), ids(3, 40)), (ids(4, 40), [])]
        scorer = Scorer(model, batch_size=1, verbose=0)
        assert [number for number, _ in scorer.as_scored(requests)] == [1, 0, 2]

    def test_nothing_to_score(self, model):
        assert Scorer(model, verbose=0).log_likelihoods([]) == []

    def test_the_text_of_a_row_is_scored_as_evaluate_scores_it(self, model):
        row = connected.ROWS[0]
        scorer = Scorer(model, verbose=0)
        (context,) = scorer.prompt_ids([row["instruction"]])
        (answer,) = scorer.answer_ids([row["output"]])
        ending = [*answer, model.preprocessor.end_token_id]
        (found,) = scorer.log_likelihoods([(context, ending)])
        model.compile("sgd", **connected.QUICK)
        loss = model.evaluate([row], batch_size=1, verbose=0, return_dict=True)["sft_loss"]
        assert found.total == pytest.approx(-loss * len(ending), rel=1e-4)


class TestModels:
    def test_a_stock_model_alone(self):
        stock = connected.causal_lm("llama3", connected.tokenizer_of("llama3"), True)
        scorer = Scorer(stock, batch_size=2, verbose=0)
        assert scorer.prompt_ids(["the fox"]) == keras_cc.CCPreprocessor(
            stock.preprocessor
        ).prompt_ids(["the fox"])
        request = (ids(5, 40), ids(4, 40))
        assert_scores(scorer.log_likelihoods([request]), by_hand(stock, [request]))

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_positions_that_have_an_end(self, family):
        stock = tiny.causal_lm(family, max_sequence_length=20)
        scorer = Scorer(stock, batch_size=1, verbose=0)
        request = (ids(18, 40), ids(3, 40))  # 21 ids: the last one is not fed
        (found,) = scorer.log_likelihoods([request])
        row = np.array([request[0] + request[1]], "int32")[:, :-1]
        logits = connected.logits(stock, {"token_ids": row, "padding_mask": np.ones_like(row)})
        expected = -connected.cross_entropy(logits[:, 17:], np.array([request[1]])).sum()
        assert found.total == pytest.approx(expected, rel=2e-5)
        with pytest.raises(ValueError, match=r"`requests` must have at most 21 ids.*18 \+ 4 ids"):
            scorer.log_likelihoods([(ids(18, 40), ids(4, 40))])

    def test_rotary_positions_have_no_end(self):
        stock = tiny.causal_lm("gpt_neo_x", max_sequence_length=8)
        scorer = Scorer(stock, batch_size=1, verbose=0)
        request = (ids(10, 40), ids(2, 40))
        assert scorer.max_length is None
        assert_scores(scorer.log_likelihoods([request]), by_hand(stock, [request]))

    def test_an_intervention_whose_options_have_changed(self):
        model = connected.text_model("llama3", None, with_preprocessor=True)
        model.intervention = keras_cc.Incline(sigma=0.5)
        for number, layer in enumerate(model.intervention.matrices.values()):
            tiny.fill(layer, 20 + number, 0.5)
        requests = [(ids(6, 40), ids(2, 40))]
        extra = {"answer_mask": (np.arange(25) >= 5).astype("int32")[None]}
        scorer = Scorer(model, batch_size=1, verbose=0)
        found = []
        for sigma in (0.5, -0.5):
            model.intervention.sigma = sigma  # as `keras_cc.search` does
            found += scorer.log_likelihoods(requests)
            model.forget_compiled()
            assert_scores(found[-1:], by_hand(model, requests, **extra))
        assert abs(found[0].total - found[1].total) > 1e-3

    def test_an_intervention_that_reads_the_pivot(self):
        model = connected.text_model("llama3", None, with_preprocessor=True)
        model.intervention = keras_cc.XTransplant(source_layer=0, target_layer=1)
        requests = [(ids(6, 40), ids(2, 40)), (ids(9, 40), ids(3, 40)), (ids(4, 40), ids(2, 40))]
        pivots = [ids(4, 40), None, ids(8, 40)]
        found = Scorer(model, batch_size=2, verbose=0).log_likelihoods(requests, pivots)
        starts = np.array([[len(context) - 1] for context, _ in requests])
        pivot_ids = np.array([list(pivot or []) + [0] * (9 - len(pivot or [])) for pivot in pivots])
        expected = by_hand(
            model,
            requests,
            answer_mask=(np.arange(25) >= starts).astype("int32"),
            pivot_token_ids=pivot_ids.astype("int32"),
            pivot_padding_mask=(pivot_ids > 0).astype("int32"),
        )
        assert_scores(found, expected)
        # And it does something.
        model.intervention = None
        plain = Scorer(model, batch_size=2, verbose=0).log_likelihoods(requests)
        changed = [abs(p.total - f.total) > 1e-4 for p, f in zip(plain, found, strict=True)]
        assert changed == [True, False, True]


class TestBadInput:
    def test_a_context_without_an_id(self, model):
        with pytest.raises(ValueError, match=r"at least one id of context.*requests\[1\]"):
            Scorer(model, verbose=0).log_likelihoods([([5], [6]), ([], [6])])

    def test_as_many_pivots_as_requests(self, model):
        with pytest.raises(ValueError, match="2 pivots for 1 requests"):
            Scorer(model, verbose=0).log_likelihoods([([5], [6])], [[5], [6]])

    @pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
    def test_batch_size(self, model, batch_size):
        with pytest.raises(ValueError, match="`batch_size` must be an integer >= 1"):
            Scorer(model, batch_size=batch_size)

    def test_no_preprocessor(self):
        with pytest.raises(ValueError, match="`preprocessor` must be given"):
            Scorer(tiny.causal_lm(), verbose=0).prompt_ids(["a"])


def test_widths():
    # Powers of two, and the halves between them; every length has one, none is wasteful.
    assert sorted({width_of(n) for n in range(1, 200)}) == [16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert sorted({width_of(n, least=1) for n in range(1, 13)}) == [1, 2, 3, 4, 6, 8, 12]
    assert all(n <= width_of(n) < max(17, 1.5 * n) for n in range(1, 2000))


few_ids = st.lists(st.integers(1, 3), max_size=4).map(tuple)


@given(st.lists(st.tuples(few_ids.filter(len), few_ids, few_ids)))
def test_rows_hold_each_request_once_and_none_begins_another(found):
    requests, pivots = [(context, rest) for context, rest, _ in found], [p for *_, p in found]
    rows = _rows(requests, pivots)
    held = sorted(number for row in rows for number, _ in row.continuations)
    assert held == [number for number, (_, rest) in enumerate(requests) if rest]
    for row in rows:
        for number, rest in row.continuations:
            context, own = requests[number]
            fed = context + own[:-1]
            assert rest == own and pivots[number] == row.pivot
            assert row.start == len(context) and row.ids[: len(fed)] == fed
        begun = [r for r in rows if (r.start, r.pivot, r.ids[: len(row.ids)]) ==
                 (row.start, row.pivot, row.ids)]  # fmt: skip
        assert begun == [row]
    assert [len(row.ids) for row in rows] == sorted((len(r.ids) for r in rows), reverse=True)
