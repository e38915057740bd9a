"""Log-likelihoods of continuations, batched by length: what every benchmark here rests on.

Notable choices:

- Continuations of one context share a row where one, without its last token, begins another: that
  token is not fed to the model. So "A", "B", "C", "D" and "A" with an end token are one row.
- Log-probabilities come back token by token and are summed in float64.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cc.calibration.compiled import Compiled
from keras_cc.cc_causal_lm import CCCausalLM
from keras_cc.data.widths import width_of
from keras_cc.options import count
from keras_cc.passes import runs

Ids = Sequence[int]

#: Positions of a row whose logits are computed together.
LOGITS_AT_ONCE = 128


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """How likely a continuation is.

    Attributes:
        total: float, the natural logarithm of its probability, summed over its tokens.
        is_greedy: bool, whether each of its tokens is the likeliest one at its place.
        tokens: int, how many tokens it has.
    """

    total: float
    is_greedy: bool
    tokens: int


class Scorer:
    """Log-likelihoods under a causal language model, as a user gets it.

        total = sum_i log p(continuation_i | context, continuation_<i)

    The pass is the monolingual one of a connected model, with its intervention if it has one.
    Requests are sorted by length, the longest first (a batch too large for the memory fails at
    once), padded to one of few widths, and answered in the caller's order. Make a new scorer where
    the model gets another connection or intervention: what is compiled here is of the old one.

    Args:
        model: a `CCCausalLM`, or a KerasHub causal language model (its backbone must be one of
            `keras_cc.supported_backbones()` only where it is connected).
        preprocessor: a `CCPreprocessor`, for `prompt_ids` and `answer_ids`; default: the model's.
        batch_size: int, rows a batch.
        verbose: 0 for no progress bar.
        connected: bool, whether the pass is the connected one, with the pivot at hand, of
            requests that have a pivot: what a connection could give, and no user gets.

    Raises:
        ValueError: for `connected=True` and a model without a connection.

    Example:

    ```python
    scorer = keras_cc.evaluation.Scorer(model, batch_size=16)
    requests = list(zip(scorer.prompt_ids(prompts), scorer.answer_ids(answers)))
    [found.total for found in scorer.log_likelihoods(requests)]
    ```
    """

    def __init__(
        self,
        model: Any,
        preprocessor: Any = None,
        *,
        batch_size: int = 8,
        verbose: "int | str" = "auto",
        connected: bool = False,
    ) -> None:
        batch_size = count("batch_size", batch_size, least=1)
        if not isinstance(model, CCCausalLM):
            chosen = "auto" if preprocessor is None else preprocessor
            model = CCCausalLM(model, connection=None, preprocessor=chosen)
        if connected and model.connection is None:
            raise ValueError(
                "`connected` can be True for a model with a connection alone. "
                "Received: connected=True, connection=None"
            )
        self.model = model
        self.connected = connected
        self.preprocessor = model.preprocessor if preprocessor is None else preprocessor
        self.batch_size = batch_size
        self.verbose = 1 if verbose == "auto" else verbose
        self._compiled = Compiled(model, self._log_probabilities)

    @property
    def max_length(self) -> "int | None":
        """Tokens that the model has positions for, or None where its positions have no end."""
        return self.model.max_positions

    def prompt_ids(self, prompts: Sequence[str]) -> list[list[int]]:
        """The ids of prompts under the preprocessor's template, with the start token."""
        return self._checked_preprocessor().prompt_ids(prompts)

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """The ids of answers under the preprocessor's template, without the end token."""
        return self._checked_preprocessor().answer_ids(answers)

    def log_likelihoods(
        self, requests: "Sequence[tuple[Ids, Ids]]", pivots: "Sequence[Ids | None] | None" = None
    ) -> list[LogLikelihood]:
        """Score continuations.

        Args:
            requests: `(context ids, continuation ids)` pairs. A context has at least one id (the
                start token where there is nothing else); an empty continuation scores 0.
            pivots: the ids of each request's pivot prompt, where an intervention reads one.

        Returns:
            A list of `LogLikelihood`, in the order of the requests.

        Raises:
            ValueError: for a context without an id, a request longer than the model's positions,
                or other than one pivot a request.
        """
        found: list[Any] = [None] * len(requests)
        for number, result in self.as_scored(requests, pivots):
            found[number] = result
        return found

    def as_scored(
        self, requests: "Sequence[tuple[Ids, Ids]]", pivots: "Sequence[Ids | None] | None" = None
    ) -> Iterator[tuple[int, LogLikelihood]]:
        """Like `log_likelihoods`, batch by batch: yields `(number of the request, result)`."""
        requests = [(tuple(context), tuple(rest)) for context, rest in requests]
        rows = _rows(requests, self._checked(requests, pivots))
        progress = keras.utils.Progbar(len(rows), unit_name="row", verbose=self.verbose)
        for first in range(0, len(rows), self.batch_size):
            batch = rows[first : first + self.batch_size]
            inputs, positions = self._padded(batch, has_pivots=pivots is not None)
            results = self._compiled.run(inputs)
            for i, row in enumerate(batch):
                start = row.start - 1 - positions[i, 0]
                for k, (number, rest) in enumerate(row.continuations):
                    where = (i, slice(start, start + len(rest)), k)
                    total = results["log_p"][where].astype("float64").sum()
                    is_greedy = results["is_best"][where].all()
                    yield number, LogLikelihood(float(total), bool(is_greedy), len(rest))
            progress.update(first + len(batch))
        for number, (_, rest) in enumerate(requests):
            if not rest:
                yield number, LogLikelihood(0.0, True, 0)

    def _checked(self, requests, pivots):
        limit = self.max_length
        for number, (context, rest) in enumerate(requests):
            if not context:
                raise ValueError(
                    "`requests` must have at least one id of context each (a start token): there "
                    f"is nothing to predict the first one from. Received: requests[{number}][0]=[]"
                )
            if limit is not None and len(context) + len(rest) > limit + 1:
                raise ValueError(
                    f"`requests` must have at most {limit + 1} ids each, context and continuation "
                    f"together, since the model has {limit} positions. Received: "
                    f"requests[{number}] with {len(context)} + {len(rest)} ids"
                )
        if pivots is None:
            return [()] * len(requests)
        if len(pivots) != len(requests):
            raise ValueError(
                "`pivots` must be as many as `requests`. "
                f"Received: {len(pivots)} pivots for {len(requests)} requests"
            )
        return [tuple(pivot or ()) for pivot in pivots]

    def _log_probabilities(self, inputs):
        model = self.model
        if self.connected and "pivot_token_ids" in inputs:
            scope = runs.connected(model, inputs, runs.pivot(model, inputs))
        else:
            scope = runs.user(model, inputs)
        hidden = runs.run(model, inputs, scope)
        log_p, is_best = [], []
        for number in range(sum(name.startswith("labels_") for name in inputs)):
            labels = inputs[f"labels_{number}"]  # (B, k, alternatives)
            where = {"answer_positions": inputs[f"positions_{number}"]}
            logits = ops.cast(self.model.logits(hidden, where), "float32")  # (B, k, vocabulary)
            own = ops.take_along_axis(logits, labels, axis=-1)
            log_p.append(own - ops.logsumexp(logits, axis=-1, keepdims=True))
            best = ops.cast(ops.argmax(logits, axis=-1), "int32")
            is_best.append(ops.equal(best[..., None], labels))
        return {
            "log_p": ops.concatenate(log_p, axis=1),
            "is_best": ops.concatenate(is_best, axis=1),
        }

    def _padded(self, batch, has_pivots):
        token_ids, padding_mask = self._filled([row.ids for row in batch], self.max_length)
        # A row of nothing but padding would have no attention to normalise.
        padding_mask[:, 0] = 1
        answer_mask = np.zeros_like(token_ids)
        window = width_of(max(len(row.ids) - row.start + 1 for row in batch), least=4)
        window = min(window, token_ids.shape[1])
        positions = np.zeros((self.batch_size, window), "int32")
        for i, row in enumerate(batch):
            answer_mask[i, row.start - 1 : len(row.ids)] = 1
            # The window covers the continuation and lies inside the row.
            positions[i] = min(row.start - 1, token_ids.shape[1] - window) + np.arange(window)
        alternatives = width_of(max(len(row.continuations) for row in batch), least=1)
        labels = np.zeros((*positions.shape, alternatives), "int32")
        for i, row in enumerate(batch):
            start = row.start - 1 - positions[i, 0]
            for k, (_, rest) in enumerate(row.continuations):
                labels[i, start : start + len(rest), k] = rest
        inputs = {
            "token_ids": token_ids,
            "padding_mask": padding_mask,
            "answer_mask": answer_mask,
        }
        # In pieces: logits are many times larger than what they are made of. Cut here, since
        # TensorFlow does not know a length inside a function that it has compiled for several.
        for number, first in enumerate(range(0, window, LOGITS_AT_ONCE)):
            piece = slice(first, first + LOGITS_AT_ONCE)
            inputs[f"positions_{number}"] = positions[:, piece]
            inputs[f"labels_{number}"] = labels[:, piece]
        intervention = self.model.intervention
        if intervention is not None:  # as they are now, and not when this was compiled
            swept = np.asarray(intervention.swept(), "float32")
            inputs["intervention_options"] = np.tile(swept, (self.batch_size, 1))
        if has_pivots:
            ids, mask = self._filled([row.pivot for row in batch])
            inputs |= {"pivot_token_ids": ids, "pivot_padding_mask": mask}
        return inputs, positions

    def _filled(self, rows, limit=None):
        """Token ids and padding mask, int32 `(batch_size, width)`.

        Fewer rows than `batch_size` are filled up, so that the last batch compiles nothing new.
        """
        width = width_of(max(map(len, rows)))
        token_ids = np.zeros((self.batch_size, min(width, limit or width)), "int32")
        padding_mask = np.zeros_like(token_ids)
        for i, ids in enumerate(rows):
            token_ids[i, : len(ids)] = ids
            padding_mask[i, : len(ids)] = 1
        return token_ids, padding_mask

    def _checked_preprocessor(self):
        if self.preprocessor is None:
            raise ValueError(
                "`preprocessor` must be given to turn text into ids: "
                "`Scorer(model, keras_cc.CCPreprocessor(tokenizer))`. Received: preprocessor=None"
            )
        return self.preprocessor


@dataclasses.dataclass
class _Row:
    """What is fed to the model once, for continuations that begin alike."""

    ids: tuple[int, ...]
    start: int  # how many of them are context
    pivot: tuple[int, ...]
    continuations: list[tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=list)


def _rows(requests, pivots):
    """The rows that answer the requests, the longest first."""
    keys = [
        (len(context), pivot, context + rest[:-1])
        for (context, rest), pivot in zip(requests, pivots, strict=True)
    ]
    rows: list[_Row] = []
    # What begins another comes right after it, or after others that it begins.
    for number in sorted(range(len(requests)), key=keys.__getitem__, reverse=True):
        start, pivot, ids = keys[number]
        rest = requests[number][1]
        if not rest:
            continue
        last = rows[-1] if rows else None
        if last is None or (last.start, last.pivot, last.ids[: len(ids)]) != (start, pivot, ids):
            rows.append(_Row(ids, start, pivot))
        rows[-1].continuations.append((number, rest))
    return sorted(rows, key=lambda row: -len(row.ids))
