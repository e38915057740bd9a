import warnings
from typing import Any

import keras
from keras import ops

from keras_cc import losses
from keras_cc.backbones import surgery
from keras_cc.data.batches import PreparedBatches
from keras_cc.data.feeding import StepCounter, as_keras_data, as_scored_data
from keras_cc.data.packing import Packing
from keras_cc.data.sources import make_source, read_once
from keras_cc.data.widths import MAX_SHAPES, shapes_for
from keras_cc.objectives import get_all as get_objectives
from keras_cc.options import count
from keras_cc.passes import pairing
from keras_cc.passes.positions import gather
from keras_cc.training import own_answers, replicas
from keras_cc.training.guards import failing_well, listed, reporting_truncation
from keras_cc.training.non_finite import LastRows, StopOnNonFiniteLoss
from keras_cc.training.resuming import Resuming
from keras_cc.training.watching import WatchNumbers

# What an objective counts, to its column of `loss_scale`.
_SCALES = {"rows": 2, "answer_tokens": 3, "own_answer_tokens": 4}

# A `LossScaleOptimizer` that leaves out what is not finite, and scales nothing.
_NO_SCALE = {"initial_scale": 1.0, "dynamic_growth_steps": 2**31 - 1}


class PairedTrainer(keras.Model):
    """The training half of `CCCausalLM`: loss, metrics, `compile`, `fit` and `evaluate`.

    One implementation for the three backends, whose train steps differ: what a pair needs
    happens before Keras' step (`PreparedBatches`), inside `call`, and in `compute_loss`.

        loss = sum_answer -log p(token) / answer tokens
             + alignment_loss_weight * sum_tokens error / tokens
             + objective.weight * sum_rows value / count        for each objective

    Where an objective alternates, steps take turns: one trains the first two terms and the
    objectives that do not alternate, the next the objectives that do.

    Args:
        objectives: anything that `keras_cc.objectives.get_all` takes.

    A subclass gives `call`, which returns the dict that `CCCausalLM` documents, and the
    attributes `connection`, `causal_lm`, `preprocessor` and `untrained_weights`, and
    `forget_compiled`.
    """

    def __init__(self, objectives=(), **kwargs):
        super().__init__(**kwargs)
        self.objectives = get_objectives(objectives)
        self.objective_trackers = [
            keras.metrics.Mean(name=f"{objective.name}_loss") for objective in self.objectives
        ]
        self.sft_loss_tracker = keras.metrics.Mean(name="sft_loss")
        self.alignment_loss_tracker = keras.metrics.Mean(name="alignment_loss")
        self.gate_tracker = keras.metrics.Mean(name="mean_gate")
        self.accuracy_tracker = keras.metrics.Mean(name="token_accuracy")
        self.connected_loss_tracker = keras.metrics.Mean(name="connected_sft_loss")
        self.last_rows = LastRows(name="last_rows")
        self._fitted = None  # what `fit` trains since the model was compiled

    # ---------------------------------------------------------------- loss and metrics

    def compute_loss(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True
    ):
        """The loss of a batch, and its parts into the metrics.

        Args:
            x: the input dict. `answer_positions` `(B, K)` says which positions `y_pred`
                has logits for; `loss_scale` `(B, 5)` weights this micro-batch's means over
                answer tokens, aligned tokens, rows with a pivot, their answer tokens and
                those of the model's own answers, so that gradient accumulation gives the
                mean of the whole; `objective_turn` `(B,)`
                is 1 in a step of the alternating objectives.
            y: int `(B, T)`, next tokens.
            y_pred: what `call` returned.
            sample_weight: float `(B, T)`, 1 at answer tokens. None: 1 everywhere.
            training: bool; unused, as the loss is the same.

        Returns:
            A float32 scalar.
        """
        weights = ops.ones_like(y) if sample_weight is None else sample_weight
        weights = ops.cast(weights, "float32")
        positions = x.get("answer_positions")
        if positions is not None:
            y, weights = gather(y, positions), gather(weights, positions)
        scale = x["loss_scale"][0] if "loss_scale" in x else (1.0,) * 5

        logits = y_pred["logits"]
        sft_loss, count = _sft_loss(logits, y, weights)
        self.sft_loss_tracker.update_state(sft_loss, count)
        hits = ops.equal(ops.cast(ops.argmax(logits, axis=-1), "int32"), ops.cast(y, "int32"))
        accuracy, _ = losses.masked_mean(ops.cast(hits, "float32"), weights)
        self.accuracy_tracker.update_state(accuracy, count)
        if "row_ids" in x:
            self.last_rows.update_state(x["row_ids"])
        loss = task_loss = sft_loss * scale[0]
        if "connected_logits" in y_pred:
            connected_loss, _ = _sft_loss(y_pred["connected_logits"], y, weights)
            self.connected_loss_tracker.update_state(connected_loss, count)
        if "alignment_error" in y_pred:
            error = self._track_connection(y_pred)
            task_loss = task_loss + self.connection.alignment_loss_weight * error * scale[1]
        task_loss = self._add_objectives(task_loss, x, y_pred, scale)
        if not pairing.is_scoring():  # scored is the path that a user gets, by its own loss
            loss = task_loss
        return surgery.add_to_loss(self, loss)

    def _add_objectives(self, loss, x, y_pred, scale):
        """The training loss with the objectives in it, each also into its metric."""
        apart = 0.0
        # After `merge()` there are trackers left, of no objective.
        for objective, tracker in zip(self.objectives, self.objective_trackers, strict=False):
            if f"{objective.name}_loss" not in y_pred:
                continue
            count = ops.sum(y_pred[f"{objective.name}_count"])
            value = ops.sum(y_pred[f"{objective.name}_loss"]) / ops.maximum(count, 1.0)
            tracker.update_state(value, count)
            by = scale[_SCALES[objective.counts]]
            term = objective.weight * value * by
            if objective.alternating:
                apart = apart + term
            else:
                loss = loss + term
        if "objective_turn" not in x:
            return loss + apart
        turn = ops.cast(x["objective_turn"][0], "float32")
        return loss * (1.0 - turn) + apart * turn

    def _track_connection(self, y_pred):
        """Update the connection's metrics; returns the batch's mean alignment error."""
        tokens = ops.sum(y_pred["alignment_tokens"])
        error = ops.sum(y_pred["alignment_error"]) / ops.maximum(tokens, 1.0)
        self.alignment_loss_tracker.update_state(error, tokens)
        fused = ops.sum(y_pred["gate_tokens"])
        self.gate_tracker.update_state(ops.sum(y_pred["gate"]) / ops.maximum(fused, 1.0), fused)
        return error

    def get_metrics_result(self):
        hidden = {"last_rows"}
        if self.connection is None or not self.connection.has_gates:
            hidden |= {"alignment_loss", "mean_gate"}
        if self.connection is None or not pairing.is_scoring():
            hidden.add("connected_sft_loss")
        shown = {f"{objective.name}_loss" for objective in self.objectives}
        hidden |= {tracker.name for tracker in self.objective_trackers} - shown
        return replicas.means([m for m in self.metrics if m.name not in hidden])

    def test_step(self, *args):
        # The backends pass different arguments; what differs for a pair is the scope alone.
        with pairing.scoring():
            return super().test_step(*args)

    # ---------------------------------------------------------------- compile, fit, evaluate

    def compile(self, optimizer="auto", *, sampler=None, **kwargs):
        """Configure training. The loss is the connection's own and is not an argument.

        An update whose gradients are not finite is left out (through Keras'
        `LossScaleOptimizer`, which `model.optimizer` therefore is), so that a batch that
        breaks never reaches the weights; `fit` then stops and names it. With a float16
        backbone the same optimizer scales the loss.

        Args:
            optimizer: a Keras optimizer, its name, or `"auto"`: Adam at 2e-5, as in
                KerasHub. Its `gradient_accumulation_steps` are taken into account: the
                micro-batches' losses are weighted by their answer tokens.
            sampler: a `keras_hub.samplers` object or name for `generate`, or None: the
                causal LM's own.
            **kwargs: `run_eagerly`, `jit_compile` and `steps_per_execution`, as in
                `keras.Model.compile`.

        Raises:
            ValueError: for `loss`, `metrics` and their weights.

        Example:

        ```python
        model.compile(keras.optimizers.AdamW(1e-4), sampler="greedy")
        ```
        """
        for name in ("loss", "loss_weights", "metrics", "weighted_metrics"):
            value = kwargs.pop(name, None)
            if value is not None:
                raise ValueError(
                    f"`{name}` cannot be chosen, the loss and its parts are the connection's own: "
                    f"leave it out. Received: {name}={value!r}"
                )
        optimizer = keras.optimizers.Adam(2e-5) if optimizer == "auto" else optimizer
        optimizer = keras.optimizers.get(optimizer)
        surgery.let_gradients_through(self.causal_lm)  # it may have been quantised since
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            is_half = self.causal_lm.backbone.compute_dtype == "float16"
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, **({} if is_half else _NO_SCALE)
            )
        scales = any(getattr(optimizer, name) != value for name, value in _NO_SCALE.items())
        surgery.quicken(optimizer, scales)
        self._fitted = None
        kwargs["auto_scale_loss"] = False
        super().compile(optimizer=optimizer, **kwargs)
        if sampler is not None:
            self.causal_lm.compile(sampler=sampler)
        self._warn_of_pure_bfloat16()

    def start_training_anew(self):
        """Have the optimizer begin at its first step, whatever is trainable by then."""
        surgery.reset_optimizer(self.optimizer)
        self.optimizer.build(self.trainable_variables)  # a saved file has all of its variables
        self.train_function = self._fitted = None

    def get_compile_config(self):
        # As `compile_from_config` does, or a file would have fewer variables than what loads it.
        if self.compiled and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        config = super().get_compile_config()
        if config and self.causal_lm.compiled:
            config["sampler"] = keras.saving.serialize_keras_object(self.causal_lm.sampler)
        return surgery.for_all_backends(config)

    def compile_from_config(self, config):
        # Keras leaves this to a model with a `compile` of its own, and forgets the optimizer.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def _warn_of_pure_bfloat16(self):
        stuck = [v for v in self.causal_lm.backbone.trainable_variables if v.dtype == "bfloat16"]
        if stuck:
            warnings.warn(
                f"{len(stuck)} trainable variables of the backbone are bfloat16, which Adam and "
                "AdamW do not move (beta_2 rounds to 1): load the model with "
                '`dtype="mixed_bfloat16"`, or freeze them (`causal_lm.backbone.trainable = False` '
                "before it is connected).",
                stacklevel=3,
            )

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        sample_weight=None,
        validation_data=None,
        shuffle=True,
        seed=None,
        steps_per_epoch=None,
        callbacks=None,
        resume=None,
        pack=None,
        **kwargs,
    ):
        """Train on pairs: raw string rows, or batches that `CCPreprocessor` made.

        Args:
            x: rows (a list of dicts, or a dict of columns), preprocessed arrays (with `y`
                and `sample_weight`), `keras_cc.data.TokenizedRows`, or any source of rows or
                batches: a `tf.data.Dataset`, a grain dataset, a generator, a
                `keras.utils.PyDataset`, a torch `DataLoader`; see
                `keras_cc.data.batches.PreparedBatches`.
            y: int array `(N, T)`, next tokens, where `x` is a dict of arrays.
            batch_size: int, for lists, arrays and sources of single rows. Default 32.
            epochs: int.
            sample_weight: float array `(N, T)`, 1 at answer tokens, beside `y`.
            validation_data: like `x`, or a tuple `(x, y, sample_weight)`. It is scored on
                the *monolingual* path; `val_connected_sft_loss` stands beside. Each evaluation
                begins at its first row, with `validation_steps` too; a generator is read once
                and kept in memory.
            shuffle: bool, whether lists and arrays are shuffled every epoch. Rows of text come
                in batches of like length then, unless the preprocessor pads to `max_length`.
            seed: int, for the shuffling; None draws one (`keras.utils.set_random_seed` decides
                which).
            steps_per_epoch: int, where the source never ends.
            callbacks: Keras callbacks, as `keras.Model.fit` takes them.
            resume: a folder, or `keras_cc.Checkpoints`: what the training goes on from is kept
                there, and where it was ended (by a signal, a full disk, a lost machine), the
                same call goes on from the newest checkpoint as if it had not been: weights,
                optimizer, accumulation, random states, metrics, own answers and the place in the
                data. State that other callbacks keep begins anew, such as the patience of
                `EarlyStopping`. A training that has come to its end there trains nothing more.
                Rows that come as a generator are read anew, without those that were trained on;
                with `steps_per_epoch`, it is kept at the ends of epochs alone, and so is one with
                `use_ema`.
            pack: int, or None. Puts the pairs of a batch into few rows of so many tokens, each
                pair whole and by itself: a token attends to its own pair, and is connected to its
                own pivot. The batch has the same pairs, and the losses are the same; only the
                epoch's mean `loss` weights batches by their rows. It pays where lengths differ and
                rows of like length do not come together (a stream, `shuffle=False`).
            **kwargs: `verbose`, `validation_steps` and the rest of `keras.Model.fit`.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: for rows that cannot be used, naming the row, and where other variables
                are trainable than in the last `fit` since the model was compiled.
            FloatingPointError: if the loss is not finite, naming the step and its rows;
                the weights are those before that step.

        Example:

        ```python
        model.fit(keras_cc.data.load_jsonl("train.jsonl"), batch_size=8, epochs=3)
        ```
        """
        self._check_fitted()
        split = replicas.split_of(self)
        if resume is not None and (split.processes > 1 or split.parts > 1):
            raise ValueError(
                "`resume` is for one process, and on TensorFlow for one replica: save with "
                "`keras.callbacks.ModelCheckpoint` (in the first process), and load that. "
                f"Received: resume={resume!r} in {split.processes} processes, {split.parts} parts"
            )
        replicas.check(self, split, batch_size, self._accumulation_steps())
        packing = None if pack is None else self._packing(pack, split)
        self._keep_untrained()
        resuming = None if resume is None or not self.compiled else Resuming(self, resume)
        source = make_source(_source(x, y, sample_weight), batch_size)
        answers = own_answers.of(self)
        steps = source.num_batches() if steps_per_epoch is None else steps_per_epoch
        steps = None if steps is None else epochs * steps
        batches = PreparedBatches(
            source,
            self.preprocessor,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            group=shuffle and packing is None,
            most_shapes=shapes_for(steps) if self.jit_compile else None,
            accumulate=self._accumulation_steps(),
            alternate=any(objective.alternating for objective in self.objectives),
            align_all=self.connection is not None and self.connection.aligns_all,
            least_rows=max((objective.least_rows for objective in self.objectives), default=1),
            answers="some" if self.learns_from_prompts else "all",
            method=self.method,
            own_answers=answers,
            step=surgery.micro_steps(self.optimizer) if self.compiled else 0,
            split=split,
            packing=packing,
        )
        unanswered, says = batches.known_unanswered, kwargs.get("verbose", "auto")
        if unanswered and says:
            print(f"{unanswered} of {source.size} rows have no answer: pairs of prompts to align")
        sources = [batches]
        if validation_data is not None:
            most = kwargs.pop("validation_steps", None)
            most = None if most is None else count("validation_steps", most, least=1)
            scored = make_source(validation_data, batch_size)
            scored = read_once(scored, most) if scored.one_shot else scored
            sources.append(self._scored(scored, batch_size))
            validation_data = as_scored_data(sources[1], most)
        with (
            reporting_truncation(self.preprocessor),
            replicas.averaging(self, split),
            failing_well(*sources) as keep,
        ):
            callbacks = [
                *listed(callbacks),
                StepCounter(batches),
                *([] if answers is None else [own_answers.Refresh(answers, batches)]),
                StopOnNonFiniteLoss(batches),
                WatchNumbers(),
                keep,
            ]
            # `shuffle` is done already, where the source is one that can be shuffled.
            kwargs |= {"validation_data": validation_data, "shuffle": False}
            if resuming is None:
                data = as_keras_data(batches, steps_per_epoch, epochs)
                options = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, **kwargs}
                history = super().fit(data, callbacks=callbacks, **options)
            else:
                first = kwargs.pop("initial_epoch", 0)
                phases = resuming.go_on(batches, answers, epochs, steps_per_epoch, first)
                if not phases and says:
                    print(f"{resuming.checkpoints.folder} holds this training to its end")
                history = resuming.fit(phases, super().fit, callbacks, epochs, **kwargs)
        if says:
            print(batches.padding_share())
            if answers is not None and answers.refreshes:
                print(answers.summary())
            if batches.unanswered_count and not unanswered:  # of a stream, which could not be asked
                print(
                    f"{batches.unanswered_count} of the {batches.row_count} rows so far had no "
                    "answer: pairs of prompts"
                )
        return history

    def evaluate(self, x=None, y=None, batch_size=None, sample_weight=None, **kwargs):
        """Score rows on the monolingual path: what a user of the merged model gets.

        Args:
            x, y, batch_size, sample_weight: as in `fit`.
            **kwargs: `verbose`, `steps`, `return_dict` and the rest of
                `keras.Model.evaluate`.

        Returns:
            `loss` and the metrics. Of the monolingual path: `sft_loss`, nats an answer
            token, and `token_accuracy`. Of the connected pass: `connected_sft_loss` (all
            rows, those without a pivot included), `alignment_loss` and `mean_gate`.

        Example:

        ```python
        model.evaluate(rows, batch_size=8, return_dict=True)["sft_loss"]
        ```
        """
        if kwargs.get("_use_cached_eval_dataset", False):  # fit's, prepared already
            return self._evaluate(x, y, sample_weight=sample_weight, **kwargs)
        batches = self._scored(_source(x, y, sample_weight), batch_size)
        with reporting_truncation(self.preprocessor), failing_well(batches) as keep:
            kwargs["callbacks"] = [*listed(kwargs.get("callbacks")), keep]
            return self._evaluate(as_keras_data(batches, kwargs.get("steps")), **kwargs)

    def _evaluate(self, *args, return_dict=False, **kwargs):
        found = super().evaluate(*args, return_dict=True, **kwargs)
        if replicas.split_of(self, training=False).parts > 1:
            # Keras takes a mean of the replicas' means, whatever each has counted.
            with pairing.scoring():
                found = {name: float(value) for name, value in self.get_metrics_result().items()}
        return found if return_dict else surgery.in_order(self, found)

    @property
    def learns_from_prompts(self):
        """Whether training learns something from a pair of prompts without an answer."""
        parts = (self.connection, *self.objectives)
        return any(part is not None and part.learns_from_prompts for part in parts)

    def _check_fitted(self):
        # Keras would go on with what it had compiled, or fail in terms of its own.
        fitted = frozenset(variable.path for variable in self.trainable_variables)
        if self._fitted is not None and fitted != self._fitted:
            raise ValueError(
                "`fit` would train other variables than it did since the model was compiled: "
                f"compile it anew. Received: {len(fitted - self._fitted)} variables more and "
                f"{len(self._fitted - fitted)} less"
            )
        self._fitted = fitted

    def _packing(self, pack, split):
        """The `Packing` of `fit`'s `pack`, or an error: what cannot share a row."""
        pack = count("pack", pack, least=2)
        reason = None
        if self.connection is not None and not self.connection.packs:
            reason = f"{self.connection!r} works on one pair a row"
        elif self.objectives:
            reason = "objectives compare the pairs of a batch row by row"
        elif self.max_positions is not None:
            reason = "the model has learnt a vector for each place in a row, and knows no other"
        elif split.parts > 1:
            reason = "rows are shared out among replicas by their number of pairs"
        if reason is not None:
            raise ValueError(
                f"`pack` must be None here, {reason}: leave it out, rows of like length come "
                f"together without it. Received: pack={pack}"
            )
        return Packing(pack, split.multiple)

    def _keep_untrained(self):
        kept = self.untrained_weights
        if kept is not None and kept.keep(self.causal_lm.backbone):
            self.forget_compiled()  # an evaluation was compiled without them

    def _scored(self, source, batch_size):
        """Batches whose answers are scored, each row's."""
        return PreparedBatches(
            source,
            self.preprocessor,
            batch_size,
            most_shapes=MAX_SHAPES if self.jit_compile else None,
            answers="all",
            method="an evaluation",
            split=replicas.split_of(self, training=False),
        )

    def _accumulation_steps(self):
        optimizer = getattr(self, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        return getattr(optimizer, "gradient_accumulation_steps", None) or 1


def _sft_loss(logits, labels, weights):
    return losses.masked_mean(losses.token_cross_entropy(logits, labels), weights)


def _source(x, y, sample_weight):
    return x if y is None and sample_weight is None else (x, y, sample_weight)
