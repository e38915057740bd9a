"""A model's own answers to pairs of prompts that have none, made anew while it trains.

They are kept by the ids of both prompts, so that a row has its answer wherever it comes from, and
are given to rows as they leave for training. Made from the ids themselves, they are what the model
said, to the token.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_cc import generation
from keras_cc.data.widths import width_of

#: Prompts that are answered at a time.
BATCH_SIZE = 32
_COUNTS = ("_owed", "empty", "unfinished", "too_long", "refreshes")


class OwnAnswers:
    """The teacher's greedy answers to the rows of a training that have none.

    Args:
        model: a `CCCausalLM` with a preprocessor.
        objective: the `keras_cc.SelfDistillation` that asks for them.

    Attributes:
        answers: dict from `(ids of the prompt, ids of the pivot prompt)` to the ids of the answer,
            its end token included; None where there is none yet, or none of use.
        said: dict from the ids of a pivot prompt to the ids of the answer to it, of the teacher
            `"in_turn"` alone; None where there is none yet, or none of use.
        empty, unfinished, too_long: how many answers of the last refresh were left out: those
            that end where they begin, that do not end in `max_new_tokens`, and that do not fit
            into `max_length` behind their prompt.
        refreshes: how often they were made.
    """

    def __init__(self, model: Any, objective: Any) -> None:
        self._model, self.objective = model, objective
        self._teacher, self._most = objective.teacher, objective.max_new_tokens
        self._in_turn, self._practice = objective.teacher == "in_turn", objective.practice
        self._owed = 0.0  # of a row to practise on
        self._greedy = generation.Sampling("greedy")
        self.answers: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int] | None] = {}
        self.said: dict[tuple[int, ...], list[int] | None] = {}
        self.empty = self.unfinished = self.too_long = self.refreshes = 0

    def give(self, rows: "list[Any]") -> tuple[list[Any], np.ndarray]:
        """Rows with the answers that are known.

        Args:
            rows: packed rows. Those with a pivot and without an answer are noted, to be answered
                at the next refresh. Of those with both, a share practises what the teacher
                `"in_turn"` does.

        Returns:
            `(rows, is_own)`, the second bool `(rows,)`: whether the answer is the model's.
        """
        given, is_own = [], np.zeros(len(rows), "bool")
        for place, row in enumerate(rows):
            answer, prompt, pivot = None, tuple(row.ids[: row.prompt_length]), tuple(row.pivot)
            if pivot and self._in_turn:
                self.said.setdefault(pivot)
            if pivot and len(row.ids) == row.prompt_length:
                answer = self.answers.setdefault((prompt, pivot))
            elif self._practises(pivot):
                context = self._context((prompt, pivot))
                ids = [*context, *row.ids[row.prompt_length :]]
                if len(ids) <= self._model.preprocessor.max_length:
                    row = row._replace(ids=ids, prompt_length=len(context), pivot=[])
            is_own[place] = answer is not None
            given.append(row if answer is None else row._replace(ids=[*row.ids, *answer]))
        return given, is_own

    def _practises(self, pivot):
        """Whether a row with an answer and this pivot is asked in turn, now."""
        if self.said.get(pivot) is None:
            return False
        self._owed += self._practice
        self._owed -= (due := self._owed >= 1)
        return due

    def refresh(self) -> None:
        """Has the model answer everything that was noted.

        The teacher `"in_turn"` has the pivot prompts answered first, and the others from the
        second time on, when that has been practised.
        """
        self.empty = self.unfinished = self.too_long = 0
        self.refreshes += 1
        with self._greedy.of(self._model.causal_lm):
            if self._in_turn:
                pivots = sorted(self.said, key=len)
                for batch in _batches(pivots):
                    found = self._continued(batch)
                    self.said |= {
                        pivot: answer if answer and len(answer) > 1 else None
                        for pivot, answer in zip(batch, found, strict=True)
                    }
                if self.refreshes == 1:
                    return
            known = [key for key in self.answers if not self._in_turn or self.said[key[1]]]
            for key in set(self.answers) - set(known):  # no answer is older than this refresh
                self.answers[key] = None
                self.unfinished += 1
            for batch in _batches(sorted(known, key=lambda key: len(self._context(key)))):
                for key, answer in zip(batch, self._answer(batch), strict=True):
                    self.answers[key] = self._usable(key, answer)

    def summary(self) -> str:
        """What a user is told of the last refresh."""
        kept = sum(answer is not None for answer in self.answers.values())
        return (
            f"{kept} of {len(self.answers)} pairs of prompts have the model's own answer; left "
            f"out: {self.empty} empty, {self.unfinished} without an end, {self.too_long} too long"
        )

    def state(self) -> dict[str, Any]:
        """What a training goes on with, for `restore`: of lists and numbers."""
        return {
            "answers": [[*key, answer] for key, answer in self.answers.items()],
            "said": [[pivot, answer] for pivot, answer in self.said.items()],
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self.answers = {(tuple(p), tuple(v)): answer for p, v, answer in state["answers"]}
        self.said = {tuple(pivot): answer for pivot, answer in state["said"]}
        for name in _COUNTS:
            setattr(self, name, state[name])

    def _context(self, key):
        prompt, pivot = key
        if self._teacher == "connected":
            return prompt
        if self._teacher == "pivot":
            return pivot
        # One start token is enough.
        return (*pivot, *(self.said.get(pivot) or ()), *prompt[int(prompt[0] == pivot[0]) :])

    def _answer(self, keys):
        """The ids that follow each key's context, as far as a stop token, that included."""
        pivots = [pivot for _, pivot in keys] if self._teacher == "connected" else None
        return self._continued([self._context(key) for key in keys], pivots)

    def _continued(self, contexts, pivots=None):
        model, count = self._model, len(contexts)
        contexts = [*contexts, *contexts[-1:] * (BATCH_SIZE - count)]
        stops = tuple(int(token) for token in model.preprocessor.stop_token_ids)
        width = width_of(max(map(len, contexts)) + self._most)
        inputs = generation.filled(contexts, width, stops)
        if pivots is not None:
            pivots = [*pivots, *pivots[-1:] * (BATCH_SIZE - count)]
            inputs |= _pivots(pivots, width_of(max(map(len, pivots))))
            inputs["answer_positions"] = generation.answer_positions(inputs)
        elif model.connection is not None:  # as an English row: around it and its transform
            inputs |= _pivots([()] * BATCH_SIZE, 8)
        if model.connection is not None:
            reach = width_of(max(map(len, contexts)))
            inputs["prompt_positions"] = np.arange(reach, dtype="int32")
        outputs = ops.convert_to_numpy(generation.run(model, inputs, stops)["token_ids"])
        found = []
        for context, row in zip(contexts[:count], outputs, strict=False):
            said = row[len(context) : len(context) + self._most].tolist()
            end = next((n for n, token in enumerate(said) if token in stops), None)
            found.append(None if end is None else said[: end + 1])
        return found

    def _usable(self, key, answer):
        if answer is None:
            self.unfinished += 1
        elif len(answer) == 1:
            self.empty += 1
            return None
        elif len(key[0]) + len(answer) > self._model.preprocessor.max_length:
            self.too_long += 1
            return None
        return answer


class Refresh(keras.callbacks.Callback):
    """Has the answers made from the objective's `start` on, and every `refresh` steps anew.

    A training that goes on after `start` begins with them, unless it has them from before.

    Args:
        answers: an `OwnAnswers`.
        batches: what is trained on, whose `step` has been counted when a step ends.
    """

    def __init__(self, answers: OwnAnswers, batches: Any) -> None:
        super().__init__()
        self._answers, self._batches = answers, batches
        self._start, self._every = answers.objective.start, answers.objective.refresh
        self._step = 0

    def on_train_begin(self, logs=None):
        for rows in self._batches.packed_unanswered():
            self._answers.give(rows)
        self._step = self._batches.step
        if self._step >= self._start and not self._answers.refreshes:
            self._refresh()

    def on_train_batch_end(self, batch, logs=None):
        before, self._step = self._step, self._batches.step
        if self._count(self._step) > self._count(before):
            self._refresh()

    def _count(self, step):
        """How many refreshes there are up to a step."""
        return (step - self._start) // self._every + 1 if step >= self._start else 0

    def _refresh(self):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # JAX keeps the state outside the model while it trains
        self._answers.refresh()


def of(model: Any) -> "OwnAnswers | None":
    """The own answers that an objective of the model asks for, or None.

    Raises:
        ValueError: for two objectives that ask.
    """
    asking = [o for o in model.objectives if getattr(o, "refresh", None) is not None]
    if len(asking) > 1:
        raise ValueError(
            "One objective may have the model answer rows that have no answer: a row has one. "
            f"Received: `refresh` of {len(asking)} objectives"
        )
    if not asking:
        return None
    return OwnAnswers(model, asking[0])


def _batches(keys):
    return [keys[first : first + BATCH_SIZE] for first in range(0, len(keys), BATCH_SIZE)]


def _pivots(rows, width):
    found = generation.filled(rows, width, ())
    return {f"pivot_{name}": value.astype("int32") for name, value in found.items()}
