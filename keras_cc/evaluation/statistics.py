"""How sure a score is: bootstrap intervals, and paired tests between methods.

Notable choices:

- The unit that is drawn is the item, in all languages at once: an item's translations are one
  question asked several times, and independent draws would make intervals too narrow.
- The mean is over languages of each language's own mean, so a language with few items counts as
  much as one with many.
- Seeds are drawn too, where there are several. With three of them an interval says little about a
  fourth.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_cc.options import count


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval (NaN where there is a single item).

    Attributes:
        mean, low, high: float.
    """

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A difference of means, the ends of its confidence interval, and how surprising it is.

    Attributes:
        difference, low, high: float, of the method minus the baseline.
        p_value: float, two-sided, from the sign-flip permutation test.
    """

    difference: float
    low: float
    high: float
    p_value: float


def interval(
    scores: Mapping[str, Any],
    items: Mapping[str, Sequence[Any]] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of a mean over languages, seeds and items.

        mean = mean over languages of (mean over seeds and items of the language's scores)

    Percentiles of the means of `resamples` draws with replacement, of items and of seeds; an item
    that is drawn is drawn in all the languages that have it.

    Args:
        scores: dict from language to a float array `(seeds, items)`, or `(items,)` for one seed.
            The seeds are the same ones in every language.
        items: dict from language to the ids of its items, as many as it has scores. The same id
            is the same item in every language. None: the item at the same place is.
        confidence: float in (0, 1).
        resamples: int, number of draws.
        seed: int; the same seed gives the same interval.

    Returns:
        An `Interval`.

    Raises:
        ValueError: for scores that are empty, not finite, or of unequal numbers of seeds; for ids
            that do not go with them.
        ModuleNotFoundError: where SciPy is not installed.

    Example:

    ```python
    scores = {"tr": [[1, 0, 1], [1, 1, 1]], "sw": [[0, 0, 1], [0, 1, 1]]}
    keras_cc.evaluation.statistics.interval(scores).mean  # 0.6667
    ```

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", through
    `scipy.stats.bootstrap`.
    """
    sums, counts, _ = _clusters("scores", scores, items)
    _check_options(confidence, resamples)
    return _bootstrap(sums, counts, confidence, resamples, seed)


def compare(
    scores: Mapping[str, Any],
    baseline: Mapping[str, Any],
    items: Mapping[str, Sequence[Any]] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Difference between two methods on the same items, paired by language, item and seed.

        difference = mean of (scores - baseline), as in `interval`

    The p-value is that of a permutation test: if the two methods were the same, each item's
    differences (in all languages and seeds together) could as well have had the other sign. It is
    exact where there are no more than `resamples` ways to flip them; else it is no less than
    `2 / (resamples + 1)`.

    Args:
        scores: dict from language to a float array `(seeds, items)` or `(items,)`.
        baseline: the same of the other method, in the same languages with the same items in the
            same order. It has as many seeds, or a single one (an untuned model has no seeds) that
            all are compared with.
        items: as in `interval`.
        confidence, resamples, seed: as in `interval`.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: as `interval`, and where the two do not go together.

    Example:

    ```python
    one, other = {"tr": [1, 1, 1, 0]}, {"tr": [0, 1, 0, 0]}
    keras_cc.evaluation.statistics.compare(one, other).difference  # 0.5
    ```

    Source: `scipy.stats.permutation_test` ("samples"); Dror et al. 2018 (ACL), "The hitchhiker's
    guide to testing statistical significance in NLP".
    """
    stats = _scipy_stats()
    _check_options(confidence, resamples)
    ours, theirs = _arrays("scores", scores), _arrays("baseline", baseline)
    if set(ours) != set(theirs):
        raise ValueError(
            "`scores` and `baseline` must be of the same languages. "
            f"Received: {sorted(ours)} and {sorted(theirs)}"
        )
    for language, array in ours.items():
        seeds, size = theirs[language].shape
        if size != array.shape[1] or seeds not in (1, len(array)):
            raise ValueError(
                "`baseline` must have the items of `scores`, and its seeds or a single one. "
                f"Received: {language!r} with shapes {array.shape} and {theirs[language].shape}"
            )
    difference = {language: array - theirs[language] for language, array in ours.items()}
    sums, counts, shares = _clusters("scores", difference, items)
    found = _bootstrap(sums, counts, confidence, resamples, seed)
    # Each item's share of the mean; the shares sum to it. One item, either way up, is no surprise.
    p_value = 1.0
    if shares.size > 1:
        p_value = stats.permutation_test(
            (shares,),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            rng=np.random.default_rng(seed),
        ).pvalue
    return Comparison(found.mean, found.low, found.high, float(p_value))


def ratio(
    numerator: Mapping[str, Any],
    denominator: Mapping[str, Any],
    items: Mapping[str, Sequence[Any]] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of a ratio of two means over the same items and seeds.

        ratio = mean of numerator / mean of denominator, each as in `interval`

    An item, and a seed, that is drawn is drawn in both. For what crosses from one language to
    others, the numerator holds the gains of the others over a floor, the denominator the first
    one's.

    Args:
        numerator: dict from language to a float array `(seeds, items)` or `(items,)`.
        denominator: the same, of other languages and with as many seeds.
        items: as in `interval`, of all the languages of both.
        confidence, resamples, seed: as in `interval`.

    Returns:
        An `Interval`. Its ends are infinite or NaN where the denominator may be 0.

    Raises:
        ValueError: as `interval`; for a language in both.

    Example:

    ```python
    others, english = {"tr": [0.0, 1.0, 0.0, 0.0]}, {"en": [1.0, 1.0, 0.0, 0.0]}
    keras_cc.evaluation.statistics.ratio(others, english).mean  # 0.5
    ```

    Source: as `interval`.
    """
    above, below = _arrays("numerator", numerator), _arrays("denominator", denominator)
    if above.keys() & below.keys():
        raise ValueError(
            "`numerator` and `denominator` must be of different languages. "
            f"Received: {sorted(above.keys() & below.keys())} in both"
        )
    sums, counts, _ = _clusters("scores", {**above, **below}, items)
    _check_options(confidence, resamples)

    def quotient(means):
        with np.errstate(invalid="ignore", divide="ignore"):
            return _mean(means[..., : len(above)]) / _mean(means[..., len(above) :])

    with warnings.catch_warnings():  # that ends are NaN is said by themselves
        warnings.simplefilter("ignore", _scipy_stats().DegenerateDataWarning)
        return _bootstrap(sums, counts, confidence, resamples, seed, quotient)


# --- items as they are drawn ---


def _clusters(name, scores, items):
    """Of L languages, S seeds and U distinct items: sums (L, S, U), counts (L, U), shares (U,)."""
    arrays = _arrays(name, scores)
    sizes = {language: array.shape[1] for language, array in arrays.items()}
    if items is None:
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "`items` must be given where languages have different numbers of items: which are "
                f"translations of one another cannot be told. Received: {sizes}"
            )
        items = {language: range(size) for language, size in sizes.items()}
    for language, size in sizes.items():
        if len(items.get(language, ())) != size:
            raise ValueError(
                f"`items` must hold an id for each score of each language. Received: {size} "
                f"scores and {len(items.get(language, ()))} ids of {language!r}"
            )
    number = {id: None for language in arrays for id in items[language]}
    number = {id: index for index, id in enumerate(number)}
    seeds = len(next(iter(arrays.values())))
    sums = np.zeros((len(arrays), seeds, len(number)))
    counts = np.zeros((len(arrays), len(number)))
    for row, (language, array) in enumerate(arrays.items()):
        places = np.array([number[id] for id in items[language]])
        np.add.at(counts[row], places, 1)  # an id may come twice
        np.add.at(sums[row].T, places, array.T)
    shares = (sums.mean(axis=1) / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    return sums, counts, shares


def _arrays(name, scores):
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError(
            f"`{name}` must be a dict from language to scores, of at least one. "
            f"Received: {name}={scores!r}"
        )
    arrays = {}
    for language, values in scores.items():
        array = np.asarray(values, "float64")
        array = array[None] if array.ndim == 1 else array
        if array.ndim != 2 or not array.size or not np.isfinite(array).all():
            raise ValueError(
                f"`{name}` must be finite, of shape (seeds, items) or (items,), with at least one "
                f"of each. Received: shape {np.shape(values)} for {language!r}, "
                f"{int((~np.isfinite(array)).sum())} not finite"
            )
        arrays[language] = array
    if len({len(array) for array in arrays.values()}) > 1:
        raise ValueError(
            f"`{name}` must have the same seeds in every language. "
            f"Received: { {language: len(array) for language, array in arrays.items()} }"
        )
    return arrays


def _check_options(confidence, resamples):
    if not 0 < confidence < 1:
        raise ValueError(
            f"`confidence` must be between 0 and 1, as 0.95. Received: confidence={confidence!r}"
        )
    count("resamples", resamples, least=1)


# --- resampling ---


def _mean(means):
    # A draw may miss all the items of a small language: then it is a draw of the others.
    return np.nanmean(means, axis=-1)


def _bootstrap(sums, counts, confidence, resamples, seed, of_means=_mean):
    stats = _scipy_stats()
    _, seeds, size = sums.shape
    flat = sums.reshape(-1, size)

    def statistic(item_draws, seed_draws=None, axis=-1):
        drawn = _times_drawn(item_draws, size)  # (R, U)
        seed_share = (
            np.full((*drawn.shape[:-1], seeds), 1 / seeds)
            if seed_draws is None
            else _times_drawn(seed_draws, seeds) / seeds
        )  # (R, S)
        total = (drawn @ flat.T).reshape(*drawn.shape[:-1], -1, seeds)  # (R, L, S)
        number = drawn @ counts.T  # (R, L)
        with np.errstate(invalid="ignore"):
            means = (total * seed_share[..., None, :]).sum(axis=-1) / number
        return of_means(means)

    samples = [np.arange(size)] + ([np.arange(seeds)] if seeds > 1 else [])
    mean = float(statistic(*samples)[0])
    if size < 2:
        return Interval(mean, float("nan"), float("nan"))
    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def _times_drawn(draws, size):
    """How often each of `size` things is in each row of draws: `(..., n)` to `(..., size)`."""
    draws = np.atleast_2d(draws).astype("int64")
    rows = np.arange(len(draws))[:, None] * size
    found = np.bincount((draws + rows).ravel(), minlength=len(draws) * size)
    return found.reshape(len(draws), size).astype("float64")


def _scipy_stats():
    try:
        from scipy import stats
    except ImportError as error:
        raise ModuleNotFoundError(
            "Intervals and tests need SciPy, which is not installed. Install it with: "
            'pip install "keras-cc[evaluation]"'
        ) from error
    return stats
