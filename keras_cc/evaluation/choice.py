"""The likeliest of many candidates after a prompt, found without scoring them all.

Candidates that begin alike are one path in a tree of tokens. What a path has lost it cannot win
back, since no log-probability is above 0: so paths are followed from the likeliest down, and once
a whole candidate is likelier than every path that is left, it is the likeliest of all. Found is
what scoring each candidate would find, mostly after two or three passes.
"""

import heapq
import math
from collections.abc import Sequence

import keras

from keras_cc.evaluation.scorer import Ids, Scorer

#: Paths of a prompt that are followed at once.
BEAM = 4


def choose(
    scorer: Scorer,
    contexts: "Sequence[Ids]",
    candidates: "Sequence[Sequence[Ids]]",
    pivots: "Sequence[Ids | None] | None" = None,
) -> list[int]:
    """The likeliest candidate of each context.

        argmax_c  sum_i log p(c_i | context, c_<i)

    Args:
        scorer: a `Scorer`.
        contexts: the ids of each prompt.
        candidates: of each prompt, the ids of its candidates, end token included: without one, a
            candidate that begins another is never less likely.
        pivots: as `Scorer.log_likelihoods` takes them.

    Returns:
        For each prompt the number of a candidate.

    Raises:
        ValueError: for a prompt with fewer than two different candidates, an empty candidate, or
            one that begins another.

    Example:

    ```python
    scorer = keras_cc.evaluation.Scorer(model, verbose=0)
    keras_cc.evaluation.choice.choose(scorer, [[1, 5, 6]], [[[7, 2], [8, 9, 2]]])  # [0] or [1]
    ```
    """
    searches = _searches(contexts, candidates, pivots)
    _run(scorer, searches, pivots is not None)
    return [search.best for search in searches]


def ranks_first(
    scorer: Scorer,
    contexts: "Sequence[Ids]",
    candidates: "Sequence[Sequence[Ids]]",
    golds: Sequence[int],
    totals: Sequence[float],
    pivots: "Sequence[Ids | None] | None" = None,
) -> list[bool]:
    """Whether no candidate is likelier than the right one.

    As `choose`, and cheaper where that one's likelihood is known: nothing is scored where it is
    above one half, and a search ends with the first candidate that is likelier.

    Args:
        scorer, contexts, candidates, pivots: see `choose`.
        golds: of each prompt, the number of the right candidate.
        totals: the natural logarithms of its probability.

    Example:

    ```python
    scorer = keras_cc.evaluation.Scorer(model, verbose=0)
    gold, other = [7, 2], [8, 9, 2]
    (found,) = scorer.log_likelihoods([([1, 5, 6], gold)])
    keras_cc.evaluation.choice.ranks_first(
        scorer, [[1, 5, 6]], [[gold, other]], golds=[0], totals=[found.total]
    )
    ```
    """
    searches = _searches(contexts, candidates, pivots)
    for search, gold, total in zip(searches, golds, totals, strict=True):
        search.start_from(gold, total)
    _run(scorer, searches, pivots is not None)
    return [search.best == search.gold for search in searches]


def _searches(contexts, candidates, pivots):
    if len(candidates) != len(contexts):
        raise ValueError(
            "`candidates` must be as many lists as `contexts`. "
            f"Received: {len(candidates)} for {len(contexts)}"
        )
    trees: dict[int, _Tree] = {}
    searches = []
    for number, (context, some) in enumerate(zip(contexts, candidates, strict=True)):
        if id(some) not in trees:
            trees[id(some)] = _Tree(some, number)
        pivot = None if pivots is None else pivots[number]
        searches.append(_Search(tuple(context), trees[id(some)], pivot))
    return searches


def _run(scorer, searches, with_pivots):
    progress = keras.utils.Progbar(len(searches), unit_name="choice", verbose=scorer.verbose)
    quiet, scorer.verbose = scorer.verbose, 0
    try:
        while under_way := [search for search in searches if not search.is_done]:
            asked = [(search, path) for search in under_way for path in search.next()]
            # From the prompt on, and not from where the path is: a pass may do something there.
            requests = [(search.context, path) for search, path in asked]
            pivots = [search.pivot for search, _ in asked] if with_pivots else None
            found = scorer.log_likelihoods(requests, pivots)
            for (search, path), likelihood in zip(asked, found, strict=True):
                search.add(path, likelihood.total)
            progress.update(sum(search.is_done for search in searches))
    finally:
        scorer.verbose = quiet


class _Tree:
    """What may follow each beginning of the candidates, and which candidate each is in the end."""

    def __init__(self, candidates, number):
        self._candidates = candidates
        self.numbers: dict[tuple[int, ...], int] = {}
        for place, candidate in enumerate(candidates):
            self.numbers.setdefault(tuple(candidate), place)
        after: dict[tuple[int, ...], dict[int, None]] = {}
        for ids in self.numbers:
            for length, token in enumerate(ids):
                after.setdefault(ids[:length], {})[token] = None
        if len(self.numbers) < 2 or () in self.numbers or self.numbers.keys() & after.keys():
            raise ValueError(
                "`candidates` must be two or more different ones a prompt, none of them empty or "
                f"the beginning of another (an end token sees to it). Received: candidates[{number}"
                f"] with {len(self.numbers)} different ones"
            )
        self.after = {path: list(tokens) for path, tokens in after.items()}

    def number_of(self, place):
        """The number that the candidate at `place` is found by: that of the first one alike."""
        return self.numbers[tuple(self._candidates[place])]

    def beyond(self, path):
        """The ways on from `path`: each next token, or where there is one alone, to its end.

        Several next tokens are scored in one row, longer ways in a row each.
        """
        rest = tuple(self.after[path])
        if len(rest) > 1:
            return [(token,) for token in rest]
        while len(following := self.after.get(path + rest, ())) == 1:
            rest += (following[0],)
        return [rest]


class _Search:
    """One prompt's paths, the likeliest first."""

    def __init__(self, context, tree, pivot):
        self.context, self.tree, self.pivot = context, tree, pivot
        self.best, self._total = -1, -math.inf
        self._open: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]

        self.gold: int | None = None

    def start_from(self, gold, total):
        """Look for one that is likelier than `gold` alone."""
        self.gold = self.best = self.tree.number_of(gold)
        self._total = total
        if total > math.log(0.5):  # there is no room for one
            self._open.clear()

    @property
    def is_done(self):
        if self.gold is not None and self.best != self.gold:
            return True
        return not self._open or -self._open[0][0] <= self._total

    def next(self):
        """Takes the likeliest open paths, and yields each way on from them, whole."""
        for _ in range(BEAM):
            if self.is_done:
                return
            _, path = heapq.heappop(self._open)
            yield from (path + rest for rest in self.tree.beyond(path))

    def add(self, path, total):
        if not math.isfinite(total):
            raise FloatingPointError(
                "The log-likelihood of a candidate must be finite: are the weights? "
                f"Received: {total}"
            )
        if path not in self.tree.numbers:
            heapq.heappush(self._open, (-total, path))
        elif total > self._total:
            self.best, self._total = self.tree.numbers[path], total
