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


class OwnAnswers:
    """The teacher's greedy answers to the rows of a training that have none.

    Args:
        model: a `CCCausalLM` with a preprocessor.
        objective: the `keras_cc.SelfDistillation` that asks for them.

    Attributes:
        answers: dict from `(ids of the prompt, ids of the pivot prompt)` to the ids of the answer,
            its end token included; None where there is none yet, or none of use.
        empty, unfinished, too_long: how many answers of the last refresh were left out: those
            that end where they begin, that do not end in `max_new_tokens`, and that do not fit
            into `max_length` behind their prompt.
        refreshes: how often they were made.
    """

    def __init__(self, model: Any, objective: Any) -> None:
        self._model, self.objective = model, objective
        self._teacher, self._most = objective.teacher, objective.max_new_tokens
        self._greedy = generation.Sampling("greedy")
        self.answers: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int] | None] = {}
        self.empty = self.unfinished = self.too_long = self.refreshes = 0

    def give(self, rows: "list[Any]") -> tuple[list[Any], np.ndarray]:
        """Rows with the answers that are known.

        Args:
            rows: packed rows. Those with a pivot and without an answer are noted, to be answered
                at the next refresh.

        Returns:
            `(rows, is_own)`, the second bool `(rows,)`: whether the answer is the model's.
        """
        given, is_own = [], np.zeros(len(rows), "bool")
        for place, row in enumerate(rows):
            answer = None
            if row.pivot and len(row.ids) == row.prompt_length:
                answer = self.answers.setdefault((tuple(row.ids), tuple(row.pivot)))
            is_own[place] = answer is not None
            given.append(row if answer is None else row._replace(ids=[*row.ids, *answer]))
        return given, is_own

    def refresh(self) -> None:
        """Has the model answer everything that was noted."""
        self.empty = self.unfinished = self.too_long = 0
        self.refreshes += 1
        keys = sorted(self.answers, key=lambda key: len(self._context(key)))
        with self._greedy.of(self._model.causal_lm):
            for first in range(0, len(keys), BATCH_SIZE):
                batch = keys[first : first + BATCH_SIZE]
                for key, answer in zip(batch, self._answer(batch), strict=True):
                    self.answers[key] = self._usable(key, answer)

    def said(self) -> str:
        """What a user is told of the last refresh."""
        kept = sum(answer is not None for answer in self.answers.values())
        return (
            f"{kept} of {len(self.answers)} pairs of prompts have the model's own answer; left "
            f"out: {self.empty} empty, {self.unfinished} without an end, {self.too_long} too long"
        )

    def _context(self, key):
        prompt, pivot = key
        if self._teacher == "connected":
            return prompt
        if self._teacher == "pivot":
            return pivot
        return pivot + prompt[int(prompt[0] == pivot[0]) :]  # one start token is enough

    def _answer(self, keys):
        """The ids that follow each context, as far as a stop token, that included."""
        model, contexts = self._model, [self._context(key) for key in keys]
        pivots = [pivot for _, pivot in keys]
        missing = BATCH_SIZE - len(keys)
        contexts, pivots = contexts + contexts[-1:] * missing, pivots + pivots[-1:] * missing
        width = width_of(max(map(len, contexts)) + self._most)
        inputs = _filled(contexts, width, "")
        if self._teacher == "connected":
            inputs |= _filled(pivots, width_of(max(map(len, pivots))), "pivot_")
            inputs["answer_positions"] = generation.answer_positions(inputs)
        elif model.connection is not None:  # as an English row: around it and its transform
            inputs |= _filled([()] * BATCH_SIZE, 8, "pivot_")
        inputs["prompt_positions"] = np.arange(width_of(max(map(len, contexts))), dtype="int32")
        stops = tuple(int(token) for token in model.preprocessor.stop_token_ids)
        plain = model.connection is None
        if plain:
            del inputs["prompt_positions"]
        outputs = ops.convert_to_numpy(generation.run(model, inputs, stops)["token_ids"])
        found = []
        for context, row in zip(contexts[: len(keys)], outputs, strict=False):
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

    A training that goes on after `start` begins with them.
    """

    def __init__(self, answers: OwnAnswers, batches: Any) -> None:
        super().__init__()
        self._answers, self._batches = answers, batches
        self._start, self._every = answers.objective.start, answers.objective.refresh
        self._step = 0
        self._last = -1

    def on_train_begin(self, logs=None):
        for rows in self._batches.packed_unanswered():
            self._answers.give(rows)
        self._step = self._batches.step
        if self._step >= self._start:
            self._refresh()

    def on_epoch_begin(self, epoch, logs=None):
        self._last = -1

    def on_train_batch_end(self, batch, logs=None):
        # Keras may run several steps at once, and then names the last one.
        before, self._step = self._step, self._step + batch - self._last
        self._last = batch
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


def _filled(rows, width, prefix):
    token_ids = np.zeros((len(rows), width), "int32")
    mask = np.zeros_like(token_ids)
    for i, ids in enumerate(rows):
        token_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
    return {f"{prefix}token_ids": token_ids, f"{prefix}padding_mask": mask}
