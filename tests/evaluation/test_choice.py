"""The likeliest candidate: what scoring each of them finds."""

import connected
import numpy as np
import pytest

from keras_cc.evaluation import LogLikelihood, Scorer, choice, choose

END = 2
RNG = np.random.default_rng(1)


class Fixed:
    """A scorer whose model is a table: log p of a token after the tokens so far."""

    verbose = 0

    def __init__(self, seed=0, spread=1.0):
        self.seed, self.spread, self.rows = seed, spread, set()

    def log_p(self, context, path):
        total = 0.0
        for length in range(len(path)):
            key = [self.seed, *context, 1000, *path[:length]]
            draws = np.random.default_rng(key).normal(0, self.spread, 64)
            total += draws[path[length]] - np.log(np.exp(draws).sum())
        return total

    def log_likelihoods(self, requests, pivots=None):
        self.rows |= {(tuple(context), tuple(rest[:-1])) for context, rest in requests}
        return [LogLikelihood(self.log_p(c, r), False, len(r)) for c, r in requests]


def drawn(count, longest=4):
    """Different candidates, some of which begin alike, each with an end."""
    found = {tuple(RNG.integers(3, 9, RNG.integers(1, longest + 1))) for _ in range(count)}
    return [[*map(int, ids), END] for ids in sorted(found)]


@pytest.mark.once
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_it_is_the_likeliest_of_all(spread):
    scorer = Fixed(spread=spread)
    contexts = [[1, number] for number in range(20)]
    candidates = [drawn(30) for _ in contexts]
    found = choose(scorer, contexts, candidates)
    for context, some, number in zip(contexts, candidates, found, strict=True):
        totals = [scorer.log_p(context, ids) for ids in some]
        assert number == int(np.argmax(totals))


@pytest.mark.once
def test_a_sure_model_needs_few_rows():
    scorer, some = Fixed(spread=8.0), drawn(60)
    choose(scorer, [[1, number] for number in range(10)], [some] * 10)
    branches = {tuple(ids[:length]) for ids in some for length in range(len(ids))}
    assert len(scorer.rows) < 0.3 * 10 * len(branches)


@pytest.mark.once
@pytest.mark.parametrize("spread", [0.5, 2.0, 8.0])
def test_the_right_one_ranks_first_where_it_is_the_likeliest(spread):
    some = drawn(40)
    contexts = [[1, number] for number in range(40)]
    whole, quick = Fixed(spread=spread), Fixed(spread=spread)
    best = choose(whole, contexts, [some] * 40)
    golds = [number % len(some) if number % 3 else right for number, right in enumerate(best)]
    totals = [
        one.total
        for one in quick.log_likelihoods(
            [(context, some[gold]) for context, gold in zip(contexts, golds, strict=True)]
        )
    ]
    quick.rows.clear()
    found = choice.ranks_first(quick, contexts, [some] * 40, golds, totals)
    assert found == [
        tuple(some[gold]) == tuple(some[right]) for gold, right in zip(golds, best, strict=True)
    ]
    assert True in found and False in found
    assert len(quick.rows) < len(whole.rows)


@pytest.mark.once
def test_of_a_sure_answer_nothing_is_scored():
    scorer = Fixed()
    some = [[4, END], [5, END], [4, END]]
    assert choice.ranks_first(scorer, [[1], [1]], [some] * 2, [2, 1], [-0.6, -0.1]) == [True, True]
    assert not scorer.rows


@pytest.mark.once
def test_the_same_candidate_twice_is_one():
    assert choose(Fixed(), [[1, 5]], [[[4, END], [4, END], [5, END]]])[0] in (0, 2)


@pytest.mark.once
@pytest.mark.parametrize(
    "some", [[[4, END]], [[4, END], [4, END]], [[4], [4, END]], [[4, END], []]]
)
def test_what_cannot_be_chosen_among_is_refused(some):
    with pytest.raises(ValueError, match=r"`candidates` must be two or more.*candidates\[1\]"):
        choose(Fixed(), [[1], [1]], [[[4, END], [5, END]], some])


@pytest.mark.once
def test_other_numbers_and_what_is_not_finite_are_refused():
    with pytest.raises(ValueError, match="as many lists as `contexts`"):
        choose(Fixed(), [[1]], [])
    with pytest.raises(FloatingPointError, match="must be finite"):
        choose(Fixed(spread=float("nan")), [[1]], [[[4, END], [5, END]]])


def test_by_a_model():
    model = connected.text_model("llama3", with_preprocessor=True)
    connected.train_connection(model, scale=0.3)
    scorer = Scorer(model, batch_size=8, verbose=0)
    some = [[5, 7, END], [5, 8, 9, END], [6, END], [10, 11, 12, END], [10, 11, 13, END]]
    contexts = [[1, 20, 21], [1, 22, 23, 24, 25]]
    totals = scorer.log_likelihoods([(c, ids) for c in contexts for ids in some])
    totals = np.array([one.total for one in totals]).reshape(2, -1)
    assert choose(scorer, contexts, [some, some]) == totals.argmax(axis=1).tolist()
    assert choice.BEAM > 1  # several paths at once
