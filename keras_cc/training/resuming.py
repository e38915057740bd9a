"""A training that is ended at any moment, and goes on as if it had not been."""

import copy
import hashlib
import time
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_cc.backbones import surgery
from keras_cc.data.feeding import as_keras_data
from keras_cc.training import checkpoints


class Phase(NamedTuple):
    """One call of Keras' `fit`.

    Attributes:
        first, end: int, the epochs that it trains, from the first on, before the end.
        steps: int, `steps_per_epoch` as Keras is told, or None.
        batches: int, how many batches its data has, or None: a pass, or no end.
        skipped: int, the batches of its first epoch that were trained before.
    """

    first: int
    end: int
    steps: "int | None" = None
    batches: "int | None" = None
    skipped: int = 0


class OneRun(keras.callbacks.CallbackList):
    """Several phases as one training to the callbacks: it begins once, ends once, counts on."""

    is_first = is_last = True
    shift = 0
    _logs: Any = None

    def begin(self, phase, is_first, is_last):
        """Say which phase comes."""
        self.is_first, self.is_last, self.shift = is_first, is_last, phase.skipped

    def stop(self):
        """End the training before its last phase."""
        super().on_train_end(self._logs)

    def on_train_begin(self, logs=None):
        if self.is_first:
            super().on_train_begin(logs)

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch + self.shift, logs)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch + self.shift, logs)

    def on_epoch_end(self, epoch, logs=None):
        self._logs = logs
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        if self.is_last:
            super().on_train_end(logs)


class Resuming(keras.callbacks.Callback):
    """Keeps checkpoints of a training, and puts a model back where the newest one was made.

    Args:
        model: the `CCCausalLM` that trains. It is compiled.
        where: a folder, or `keras_cc.Checkpoints`.

    Attributes:
        state: the dict of the checkpoint that is gone on from, or None.
    """

    def __init__(self, model, where):
        super().__init__()
        self.checkpoints = checkpoints.get(where)
        self.checkpoints.open()
        self.set_model(model)
        self._frozen_digest, self._metrics = None, []
        self.state, self._arrays = self.checkpoints.newest() or (None, None)

    # ---------------------------------------------------------------- before training

    def _restore(self):
        model = self.model
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        variables, frozen = _variables(model)
        self._check_model(variables, frozen)
        values = [self._arrays[f"a{number}"] for number in range(len(variables))]
        metrics = {id(variable) for variable in model.metrics_variables}
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
            if self.state["batch"] and id(variable) in metrics:
                self._metrics.append((variable, value))
        self._arrays = None

    def _check_model(self, variables, frozen):
        here, there = _facts(variables, self.model.optimizer), self.state["variables"]
        if here != there:
            different = [pair for pair in zip(here, there, strict=False) if pair[0] != pair[1]]
            raise ValueError(
                "`resume` must hold checkpoints of this model, made, frozen and compiled as it was "
                f"then. Received: {self._folder} with {len(there)} variables that train or count, "
                f"for a model with {len(here)}; the first that differs here and there: "
                f"{different[0] if different else 'one that only one of them has'}"
            )
        self._frozen_digest = _digest(frozen)
        if self.state["frozen"] != self._frozen_digest:
            raise ValueError(
                "`resume` must hold checkpoints of a model with the same frozen weights: load it "
                f"from where it was loaded then. Received: {self._folder}, whose {len(frozen)} "
                "frozen variables have another checksum"
            )

    @property
    def _folder(self):
        return str(self.checkpoints.folder)

    def go_on(self, batches, answers, epochs, steps_per_epoch, initial_epoch=0):
        """Put model and data where the training was, and say what is left of it.

        Args:
            batches: the `PreparedBatches` that it trains on.
            answers: its `OwnAnswers`, or None.
            epochs, initial_epoch: int.
            steps_per_epoch: int or None, as `fit` was given it.

        Returns:
            A list of `Phase`, empty where the training has come to its end.
        """
        self._batches, self._answers, self._steps = batches, answers, steps_per_epoch
        passes = batches.count_batches() if steps_per_epoch is None else batches.num_batches
        self._inside = passes if steps_per_epoch is None else steps_per_epoch
        if steps_per_epoch and isinstance(passes, int) and passes % steps_per_epoch:
            raise ValueError(
                "`steps_per_epoch` must divide the batches of the data where a training is to be "
                f"resumed, or the data must not end. Received: steps_per_epoch={steps_per_epoch} "
                f"for {passes} batches"
            )
        # A generator that is read on from epoch to epoch cannot be opened within one, and Keras
        # puts averaged weights (EMA) into the model at the end of each of its calls.
        averages = self.model.optimizer.inner_optimizer.use_ema
        self._within = not averages and not (batches.one_shot and steps_per_epoch)
        if self.state is None:
            return [Phase(initial_epoch, epochs, steps_per_epoch)]
        self._check_run()
        self._restore()
        batches.go_on(self.state["data"])
        if answers is not None:
            answers.restore(self.state["own_answers"])
        epoch, batch = self.state["epoch"], self.state["batch"]
        left = batches.left_of_pass()
        return _plan(epoch, batch, epochs, steps_per_epoch, self._inside, left)

    def fit(self, phases, fit, callbacks, epochs, verbose="auto", **kwargs):
        """Train what is left.

        Args:
            phases: what `go_on` gave.
            fit: Keras' own `fit` of the model.
            callbacks: a list, with what counts steps before what reads them.
            epochs: int, of the whole training.
            verbose: as in `keras.Model.fit`.
            **kwargs: of `fit`.

        Returns:
            A `keras.callbacks.History` of the whole training.
        """
        model, history = self.model, keras.callbacks.History()
        if not phases:  # as `fit` ends: with averaged weights, where the optimizer has them
            model.optimizer.finalize_variable_values(model.trainable_weights)
        run = OneRun(
            [*callbacks, self],
            add_history=True,
            add_progbar=verbose != 0,
            model=model,
            verbose=verbose,
            epochs=epochs,
            steps=self._inside,
        )
        try:
            for number, phase in enumerate(phases):
                is_last = number + 1 == len(phases)
                run.begin(phase, is_first=not number, is_last=is_last)
                self._batches.go_on_here()
                data = as_keras_data(
                    self._batches, phase.steps, phase.end - phase.first, phase.batches
                )
                history = fit(
                    data,
                    initial_epoch=phase.first,
                    epochs=phase.end,
                    steps_per_epoch=phase.steps,
                    callbacks=run,
                    verbose=verbose,
                    **kwargs,
                )
                if model.stop_training and not is_last:
                    run.stop()
                    break
        finally:
            self.checkpoints.close()
        return self._whole(history)

    def _check_run(self):
        for name, here in self._run().items():
            there = self.state["run"].get(name)
            if here != there:
                raise ValueError(
                    f"`{name}` must be {there!r}, as in the training that {self._folder} holds "
                    "(remove the folder to begin another, or name another one). "
                    f"Received: {name}={here!r}"
                )

    def _run(self):
        """What must be the same for the rows of a training to come as they would have."""
        backend = {"KERAS_BACKEND": keras.backend.backend()}  # random states are its own
        return {**backend, **self._batches.arguments(), "steps_per_epoch": self._steps}

    # ---------------------------------------------------------------- while training

    def on_train_begin(self, logs=None):
        self._epoch, self._saved_step = 0, self._batches.step
        self._saved_time = time.monotonic()
        state = self.state or {}
        self._history = copy.deepcopy(state.get("history", {}))
        self._epochs = list(state.get("epochs", ()))

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch
        for variable, value in self._metrics:  # of the epoch that goes on; Keras has reset them
            variable.assign(value)
        self._metrics = []

    def on_train_batch_begin(self, batch, logs=None):
        # Not at the end of one: the last of an epoch is for `on_epoch_end`, after validation.
        if batch and self._within and self._is_due():
            self._save(self._epoch, batch)

    def on_epoch_end(self, epoch, logs=None):
        self._epochs.append(epoch)
        for name, value in (logs or {}).items():
            self._history.setdefault(name, []).append(float(value))
        self._save(epoch + 1, 0)

    def on_train_end(self, logs=None):
        self.checkpoints.wait()

    def _is_due(self):
        kept, step = self.checkpoints, self._batches.step
        by_step = kept.steps is not None and step - self._saved_step >= kept.steps
        passed = time.monotonic() - self._saved_time
        return by_step or (kept.minutes is not None and passed >= 60 * kept.minutes)

    def _save(self, epoch, batch):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # JAX keeps the state outside the model while it trains
        variables, frozen = _variables(self.model)
        if self._frozen_digest is None:
            self._frozen_digest = _digest(frozen)
        state = {
            "epoch": epoch,
            "batch": batch,
            "data": self._batches.position(),
            "own_answers": None if self._answers is None else self._answers.state(),
            "run": self._run(),
            "epochs": list(self._epochs),
            "history": copy.deepcopy(self._history),
            "variables": _facts(variables, self.model.optimizer),
            "frozen": self._frozen_digest,
        }
        arrays = [_copied(variable) for variable in variables]
        self.checkpoints.write(self._batches.step, state, arrays)
        self._saved_step, self._saved_time = self._batches.step, time.monotonic()

    def _whole(self, history):
        """A history with what came before in front."""
        before = self.state or {"epochs": [], "history": {}}
        names = dict.fromkeys([*before["history"], *history.history])
        history.history = {
            name: [*before["history"].get(name, ()), *history.history.get(name, ())]
            for name in names
        }
        history.epoch = [*before["epochs"], *(getattr(history, "epoch", None) or ())]
        return history


def _plan(epoch, batch, epochs, steps, inside, left):
    """The phases from a batch of an epoch on.

    Args:
        epoch, batch: int, the next ones.
        epochs: int, how many there are to be.
        steps: int or None, `steps_per_epoch`.
        inside: int, infinity or None, the batches of an epoch.
        left: int or None, the batches that are left of the pass over the data, if it ends.
    """
    if epoch >= epochs:
        return []
    phases = []
    if batch:
        rest = None if inside is None else inside - batch
        phases.append(Phase(epoch, epoch + 1, steps and rest, left if steps else rest, batch))
        epoch += 1
        left = None if left is None else left - (rest or 0)
    if steps and left:  # a pass of several epochs
        end = min(epochs, epoch + left // steps)
        if end > epoch:
            phases.append(Phase(epoch, end, steps, left))
        epoch = end
    if epoch < epochs:
        phases.append(Phase(epoch, epochs, steps))
    return phases


def _variables(model):
    """`(those that a training changes, those that are frozen)`, in an order of their own."""
    trains = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    trains = {id(variable): variable for variable in [*trains, *surgery.seeds(model)]}
    frozen = [v for v in model.causal_lm.backbone.weights if not v.trainable]
    for variable in frozen:
        trains.pop(id(variable), None)
    return [*trains.values()], frozen


def _facts(variables, optimizer):
    """What is compared of each. A path begins with how many models there were before it."""
    of_optimizer = {id(variable) for variable in optimizer.variables}
    return [
        [
            "optimizer" if id(v) in of_optimizer else v.name,
            list(v.shape),
            keras.backend.standardize_dtype(v.dtype),
        ]
        for v in variables
    ]


def _copied(variable):
    value = np.array(ops.convert_to_numpy(variable))
    # NumPy cannot save types that are not its own.
    return value.astype("float32") if value.dtype.kind == "V" else value


def _digest(variables):
    digest = hashlib.sha256()
    for variable in variables:
        digest.update(np.ascontiguousarray(ops.convert_to_numpy(variable)).tobytes())
    return digest.hexdigest()
