import pathlib
from typing import Any

import keras
from keras import ops

from keras_cc import cc_weights, connections, generation, interventions
from keras_cc.backbones import surgery, taps
from keras_cc.backbones.families import family_of
from keras_cc.calibration import closed_form
from keras_cc.options import flag
from keras_cc.passes import pairing, runs
from keras_cc.passes.positions import gather
from keras_cc.preprocessing import CCPreprocessor
from keras_cc.training.paired_trainer import PairedTrainer
from keras_cc.training.training_state import TrainingState
from keras_cc.training.untrained_weights import UntrainedWeights
from keras_cc.whole_files import whole_file


@keras.saving.register_keras_serializable(package="keras_cc")
class CCCausalLM(PairedTrainer):
    """A KerasHub causal language model, connected to the pivot language while it trains.

    Training sees pairs: the target-language prompt and answer, and the pivot (English)
    version of the prompt alone. The pivot's feed-forward activations are connected into
    the target's pass; a transform learns to stand in for them, so that inference needs
    the target language alone and `merge()` gives the stock model back:

        loss = SFT(answer tokens, connected pass) + lambda * alignment error + objectives

    The model that is passed in is connected in place and stays usable (its own
    `generate` and call are the monolingual path).

    Args:
        causal_lm: a `keras_hub.models.CausalLM` with a backbone from
            `keras_cc.supported_backbones()`.
        connection: what training changes in the forward pass: `"fused"`, `"selected"`, `"flare"`,
            an object such as `keras_cc.FusedConnection()`, or None: plain supervised fine-tuning
            on the target rows.
        objectives: extra losses on the pair, beside a connection or alone: names or objects of
            `keras_cc.objectives`, such as `"dft"` or `keras_cc.Contrastive(temperature=0.05)`.
        intervention: a transform at inference, on a tuned or an untuned model: a
            `keras_cc.XTransplant`, `keras_cc.Incline` or `keras_cc.Shift`, or None. It can be
            set later, `model.intervention = ...`.
        preprocessor: a `keras_cc.CCPreprocessor`, or `"auto"`: one with default options
            around `causal_lm.preprocessor`, if that is there. None: only preprocessed
            batches are taken. It can be replaced later, `model.preprocessor = ...`.
        rematerialize: bool, whether training computes each decoder block's activations once more
            in the backward pass instead of keeping them: less memory for more time. Losses
            and gradients stay the same.

    Call arguments:
        inputs: a dict of int tensors, `token_ids` and `padding_mask` `(B, T)`; with
            `pivot_token_ids` and `pivot_padding_mask` `(B, S)` it is a connected pass,
            without them a monolingual one. `answer_mask` `(B, T)` says where the prompt
            ends (without it, at the last real token). `answer_positions` `(B, K)` asks for
            logits at those positions only.

    Returns:
        A dict: `logits` `(B, T, vocabulary)`, or `(B, K, vocabulary)`. A fused connection
        adds `alignment_error` and `gate` (sums over a row's tokens) with the token
        counts `alignment_tokens` and `gate_tokens`, each `(B,)` float32; a selected one
        `selection` `(B, L)`, one-hot; an objective its `<name>_loss` and `<name>_count`, `(B,)`.

    Raises:
        TypeError: if `causal_lm` is no KerasHub causal language model.
        ValueError: if its backbone cannot be connected or is connected already, or an
            option has no such value.

    Example:

    ```python
    causal_lm, tokenizer = keras_cc.load_preset("demo:gemma3_270m")
    preprocessor = keras_cc.CCPreprocessor(tokenizer, max_length=64)
    model = keras_cc.CCCausalLM(causal_lm, preprocessor=preprocessor)
    model.compile(keras.optimizers.AdamW(1e-5))
    model.fit(
        [{"instruction": "Kenya'nın para birimi nedir?", "output": "Kenya şilini",
          "instruction_en": "What is the currency of Kenya?"}],
        batch_size=1,
    )
    stock = model.merge()
    ```

    Source: CC-Tuning (Ye et al., ACL 2025, arXiv 2506.00875).
    """

    def __init__(
        self,
        causal_lm,
        connection="fused",
        objectives=(),
        *,
        intervention=None,
        preprocessor="auto",
        rematerialize=False,
        **kwargs,
    ):
        super().__init__(objectives=objectives, **kwargs)
        _check_causal_lm(causal_lm)
        surgery.check_no_remat(self, causal_lm)
        self.rematerialize = flag("rematerialize", rematerialize)
        if rematerialize:
            family_of(causal_lm.backbone)
            surgery.check_no_dropout(causal_lm)
        self.connection = connections.get(connection)
        if self.connection is None and surgery.is_connected(causal_lm):
            raise ValueError(
                "`causal_lm` is connected already. Received: a connected model with connection=None"
            )
        # What can be refused is refused here: from `connect` on, the causal LM is another.
        for objective in self.objectives:
            objective.check(self.connection)
        if self.objectives:
            family_of(causal_lm.backbone)
            runs.objective_sites(self.objectives, len(causal_lm.backbone.transformer_layers))
        intervention = _checked_intervention(intervention, self.connection, causal_lm)
        if preprocessor == "auto":
            inner = causal_lm.preprocessor
            preprocessor = None if inner is None else CCPreprocessor(inner)
        # Untracked, as everything that belongs to the causal LM: it is tracked there.
        self._preprocessor = Untracked(None)
        self.preprocessor = preprocessor
        # For a model card: after `merge()` there is neither connection nor objective to be asked.
        parts = [repr(part) for part in (self.connection, *self.objectives) if part is not None]
        self.method = ", ".join(parts) or "plain fine-tuning"
        surgery.let_gradients_through(causal_lm)
        self._head = Untracked(surgery.language_model_head(causal_lm))
        self._max_positions = Untracked(surgery.max_positions(causal_lm.backbone))
        # What the connection put in: "block_3" and the `CCFeedForward` there, and others by name.
        self._attached = Untracked({})
        if self.connection is not None:
            self._attached.value = surgery.connect(causal_lm, self.connection)
        self.causal_lm = causal_lm
        self.training_state = TrainingState(self)
        blocks = runs.untrained_blocks(self.objectives, self.num_blocks)
        self.untrained_weights = UntrainedWeights(max(blocks) + 1) if blocks else None
        self._lens = Untracked(None)
        self._generate_function = Untracked(None)
        self._is_tapped = Untracked(False)
        self._intervention = Untracked(None)
        self.intervention = intervention
        self.seed_generator = keras.random.SeedGenerator()
        # Nothing is left to build, and Keras asks (backups, weights, stateless calls).
        self.built = True

    # ---------------------------------------------------------------- the passes

    def call(self, inputs, training=False):
        has_pivot = "pivot_token_ids" in inputs
        if "segment_ids" in inputs:
            self._tap()
        if has_pivot:
            _check_batch(inputs["token_ids"], inputs["pivot_token_ids"])
        scoring = pairing.is_scoring()
        has_objectives = bool(self.objectives) and (training or scoring)
        if not has_pivot or (self.connection is None and not has_objectives):
            return {"logits": self._user_logits(inputs, training)}
        outputs = self._connected(inputs, training)
        if scoring and not (self.connection is None and self.intervention is None):
            # Scored is what a user gets; the pass that was trained stands beside.
            outputs["connected_logits"] = outputs["logits"]
            outputs["logits"] = self._user_logits(inputs, training)
        return outputs

    def _connected(self, inputs, training):
        of_target, of_pivot = runs.objective_sites(self.objectives, self.num_blocks)
        pivot = runs.pivot(
            self, inputs, training, of_pivot, is_read=self.connection is not None or bool(of_pivot)
        )
        scope = runs.connected(self, inputs, pivot, training)
        scope.observed |= of_target
        logits = self.logits(runs.run(self, inputs, scope, training), inputs)
        outputs = {"logits": logits}
        if self.connection is not None:
            outputs.update(self.connection.outputs(scope))
        if self.objectives:
            outputs.update(runs.objective_outputs(self, inputs, pivot, scope, logits, training))
        return outputs

    def _user_logits(self, inputs, training):
        # An intervention is one at inference: training does not see it.
        scope = pairing.Pass() if training else runs.user(self, inputs)
        return self.logits(runs.run(self, inputs, scope, training), inputs)

    def logits(self, hidden, inputs):
        """Logits of hidden states `(B, T, d)`, at `answer_positions` where the inputs have them."""
        positions = inputs.get("answer_positions")
        if positions is not None:
            hidden = gather(hidden, positions)
        return self._head.value(hidden)

    @property
    def max_positions(self):
        """Tokens of a row that the model has positions for, or None: they have no end."""
        return self._max_positions.value

    @property
    def num_blocks(self):
        """The number of the backbone's decoder blocks."""
        return len(self.causal_lm.backbone.transformer_layers)

    @property
    def lens(self):
        """The logit lens: a decoder block's output `(B, K, d)` to logits, weights frozen."""
        if self._lens.value is None:
            self._lens.value = surgery.logit_lens(self.causal_lm)
        return self._lens.value

    @property
    def intervention(self) -> Any:
        """The transform at inference, a `keras_cc.interventions.Intervention` or None."""
        return self._intervention.value

    @intervention.setter
    def intervention(self, value):
        value = _checked_intervention(value, self.connection, self.causal_lm)
        if self.intervention is not None:
            surgery.detach(self.causal_lm, "intervention")
        self._intervention.value = value
        if value is not None:
            for number, layer in value.matrices.items():
                surgery.attach(self.causal_lm, number, "intervention", layer)
        self._tap_if_needed()
        self.forget_compiled()

    def _tap_if_needed(self):
        connected = self.connection is not None and self.connection.needs_taps
        read = connected or self.objectives or self.intervention is not None
        if read or self.rematerialize:
            self._tap()
        elif self._is_tapped.value:
            taps.untap(self.causal_lm)
            self._is_tapped.value = False

    def _tap(self):
        taps.tap(self.causal_lm)
        self._is_tapped.value = True

    def forget_compiled(self):
        """Have everything that was compiled for inference compiled anew when it is next used."""
        self.test_function = self.predict_function = None
        self._generate_function.value = self.causal_lm.generate_function = None

    # ---------------------------------------------------------------- training

    def enable_lora(self, rank, target_layer_names=None):
        """Train LoRA on the backbone together with the connection.

        KerasHub's `enable_lora` freezes everything else, the connection too where it is
        there already; this one leaves the connection trainable. The optimizer of a model that
        is compiled starts anew, since what it trains is not the same.

        Args:
            rank: int, the rank of the LoRA matrices.
            target_layer_names: names of the layers that get them, or None: KerasHub's
                default, the attention's query and value.

        Raises:
            ValueError: for a rank that is none, names that no layer has which can carry LoRA,
                and a model that carries LoRA already. Nothing has changed then.
        """
        layers = [layer for layer in self._attached.value.values() if layer.trainable]
        surgery.enable_lora(self.causal_lm.backbone, rank, target_layer_names)
        surgery.unfreeze(layers)
        self._compile_anew()

    def fit_transform(
        self,
        x,
        y=None,
        batch_size=None,
        *,
        sample_weight=None,
        ridge="auto",
        positions=None,
        verbose="auto",
    ):
        """Solve the transforms exactly, by ridge regression over one pass of paired rows.

            W = argmin_W  sum_n w_n || f_n W - g_n ||^2  +  penalty || W - W0 ||^2

        Fused connection: one `W_l` a layer, from `F_l(x)` to the fusion in the connected pass,
        weighted as the connection's alignment error is, and `W0` the transform as it is, so that
        the alignment loss on these rows is never higher afterwards. Selected connection: one `X`
        for all layers, from the target's feed-forward activations to the pivot's at their last
        prompt tokens. `Incline` intervention (where one is set, that is what is fitted): one `W_l`
        a layer, with `W0 = 0`. `Shift` (likewise): no matrix, but each language's means, from a
        list of rows or a dict of columns with their `lang`. Sums are kept in float64,
        O(layers d^2) in memory, whatever the number of rows; a batch's activations are held at
        once, so lower `batch_size` for large models. Call it after training.

        Args:
            x, y, sample_weight: paired rows, as in `fit`. Rows without a pivot are passed over.
            batch_size: int, rows a batch. Default 8.
            ridge: float >= 0, the penalty in units of the mean squared activation, so that it has
                no scale; 0 is plain least squares. `"auto"`: a power of ten, chosen for each
                matrix by the error on every fifth pair, then all pairs are used.
            positions: `"all"` tokens of the target (the fused connection's default) or the
                `"last"` prompt token (the only one that the others have).
            verbose: 0 for no progress bar.

        Returns:
            A dict from a matrix's name to its `keras_cc.calibration.ridge.RidgeFit`: the errors
            before and after, the ridge, the rank. Of a `Shift`, from a block's name to its
            `keras_cc.calibration.language_means.ShiftFit`.

        Raises:
            ValueError: if there is nothing to fit, or no row has a pivot; for a `Shift`, a row
                without a `lang`.

        Example:

        ```python
        fits = model.fit_transform(rows, batch_size=8)
        fits["block_0"].error_after <= fits["block_0"].error_before  # True
        ```

        Source: the Transform Matrix of CC-Tuning (arXiv 2506.00875, `get_matrix.py` of its
        code), INCLINE (arXiv 2410.12462) and LRP2 (arXiv 2311.03788).
        """
        source = x if y is None and sample_weight is None else (x, y, sample_weight)
        return closed_form.fit_transform(
            self,
            source,
            batch_size=batch_size,
            ridge=ridge,
            positions=positions,
            verbose=verbose,
        )

    # ---------------------------------------------------------------- inference

    def generate(self, prompts, max_length=None, *, pivot_prompts=None, **kwargs):
        """Continue prompts, in the user's language alone or with the pivot's at hand.

        Args:
            prompts: a string or a list of strings, put into the preprocessor's template.
            max_length: int, tokens of prompt and answer together. Default: the
                preprocessor's `max_length`.
            pivot_prompts: None (monolingual), or the pivot's version of each prompt: then
                the real connection is used. An empty string leaves its row monolingual
                and untransformed, as an English row in training.
            **kwargs: `stop_token_ids` (`"auto"`, None or a sequence of ids) and
                `strip_prompt` (bool), as in KerasHub.

        Returns:
            A string for a string, else a list of strings.

        Raises:
            ValueError: without a preprocessor, for numbers of prompts that differ, and
                for a connected model's `pivot_prompts` where there is no connection.
        """
        return generation.generate(self, prompts, max_length, pivot_prompts, **kwargs)

    @property
    def is_mergeable(self):
        """Whether `merge()` can give a stock model that does what a user of this one gets."""
        if surgery.is_adapted(self.causal_lm):
            return False
        if self.intervention is not None and self._added() is None:
            return False
        return self.connection is None or self.connection.obstacle is None

    def _added(self):
        """What `merge()` adds to biases for the intervention, as pairs of a bias and a vector;
        None where that is not all there is to it, or there are no biases."""
        constants = self.intervention.constants(self.num_blocks)
        biases = None if constants is None else surgery.biases(self.causal_lm, constants)
        if biases is None:
            return None
        return [(biases[number], vector) for number, vector in constants.items()]

    def merge(self):
        """Fold the transforms into the projections and give the stock model back.

            kernel <- kernel @ W,    bias <- bias @ W

        Folded in float32 and rounded once. A `Shift` of one named language is added to the biases
        that it falls on, behind the transforms. It is the model that was passed in, disconnected:
        no extra parameter, no extra time, nothing of keras_cc in it. This `CCCausalLM`
        stays usable as a plain fine-tuner of it (`connection` is None and `objectives` is empty
        from then on), with an optimizer that starts anew.

        Returns:
            The KerasHub causal language model, of the class that was passed in.

        Raises:
            ValueError: if the transform is no matrix (`"mlp"`), a connected projection is
                quantised or carries LoRA weights, the connection is the selected one, or the
                intervention cannot be folded, or there are adapters. Nothing has changed then.
        """
        if surgery.is_adapted(self.causal_lm):
            raise ValueError(
                "`merge()` cannot fold adapters, which are not linear: keep this model for "
                "inference, or call the adapters' `remove()` to have the model without them. "
                f"Received: causal_lm={self.causal_lm.name!r} with adapters"
            )
        added = []
        if self.intervention is not None:
            added = self._added()
            if added is None:
                raise ValueError(
                    "`merge()` cannot fold an intervention that depends on the prompt, nor a "
                    "vector where the feed-forward projection has no bias: set "
                    "`model.intervention = None` to leave it out, or keep this model for "
                    "inference. "
                    f"Received: intervention={self.intervention!r}"
                )
        if not self.is_mergeable:
            raise ValueError(
                f"`merge()` cannot fold this connection: {self.connection.obstacle}. Keep this "
                "model for inference (`generate`, `save`, `keras_cc.export_saved_model`), or call "
                "`disconnect()` to have the tuned model without it. "
                f"Received: connection={self.connection!r}"
            )
        stock = self._disconnect(fold=True)  # or it raises, and nothing has changed
        for bias, vector in added:
            bias.assign_add(ops.cast(vector, bias.dtype))
        return stock

    def disconnect(self):
        """Take the connection out without folding, and give the stock model back.

        Returns:
            The KerasHub causal language model that was passed in, as it was trained. As
            after `merge()`, a compiled model's optimizer starts anew.
        """
        return self._disconnect(fold=False)

    def _disconnect(self, fold):
        if self.connection is not None:
            surgery.disconnect(self.causal_lm, fold=fold)  # or it raises, and nothing has changed
        was_more = self.connection is not None or bool(self.objectives)
        self.connection, self.objectives = None, ()
        if self.untrained_weights is not None:
            surgery.detach_from(self, "untrained_weights")
            self.untrained_weights = None
        self._attached.value = {}
        # What was attached for it is off already where there was a connection.
        self.intervention = None
        if was_more:
            self._compile_anew()
        return self.causal_lm

    def _compile_anew(self):
        # What was compiled, and the optimizer's state, are of other variables. The optimizer stays
        # the same object: what it holds (a schedule, a lambda) need not have a configuration.
        self.forget_compiled()
        if self.compiled:
            self.start_training_anew()

    # ---------------------------------------------------------------- saving

    def connection_layers(self):
        """Decision Makers, transforms, an intervention's matrices, by a path that is stable.

        Returns:
            A dict from `"block_3/decision_gate"`, `"layer_selector"` or
            `"block_3/intervention"` to the layer.
        """
        found = {}
        for path, layer in self._attached.value.items():
            parts = getattr(layer, "parts", None)
            found |= (
                {path: layer} if parts is None else {f"{path}/{k}": v for k, v in parts.items()}
            )
        if self.intervention is not None:
            for number, layer in self.intervention.matrices.items():
                found[f"block_{number}/intervention"] = layer
        return found

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Save the whole model, as `keras.Model.save` does.

        A `.keras` file takes the place of one that is there when it is whole: where it cannot be
        written, on a full disk for one, that one is as it was.

        Args:
            filepath: path, which ends in `.keras`, or a folder with `zipped=False`.
            overwrite: whether to replace what is there, or ask.
            zipped: as `keras.Model.save` takes.

        Raises:
            OSError: where it cannot be written.
            ValueError: for another ending.
        """
        path = pathlib.Path(str(filepath))
        whole = path.suffix == ".keras" and zipped is not False and overwrite
        if not (whole and path.parent.is_dir()):  # Keras asks, or names what is wrong
            return super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
        with whole_file(path) as unfinished:
            super().save(unfinished, zipped=zipped, **kwargs)

    def save_cc_weights(self, path):
        """Save the weights of connection and intervention alone, with their options beside.

        Args:
            path: a file name that ends in `.safetensors` or `.weights.h5`. The options are
                written to the same name with `.json` added.

        Raises:
            ValueError: for another ending, or a model with neither.
        """
        cc_weights.save(self, path)

    def load_cc_weights(self, path):
        """Load what `save_cc_weights` wrote into a model of the same options.

        Args:
            path: the file that was saved.

        Raises:
            ValueError: if it was saved from another backbone or with other options, or its
                weights do not fit. Nothing has changed then.
        """
        cc_weights.load(self, path)

    @property
    def preprocessor(self):
        """The `CCPreprocessor` that `fit`, `evaluate` and `generate` use, or None."""
        return self._preprocessor.value

    @preprocessor.setter
    def preprocessor(self, value):
        if value is not None and not isinstance(value, CCPreprocessor):
            raise TypeError(
                f"`preprocessor` must be a keras_cc.CCPreprocessor or None. Received: {value!r}"
            )
        self._preprocessor.value = value

    @property
    def tokenizer(self):
        """The preprocessor's tokenizer, or None. Keras saves its vocabulary as this attribute's."""
        return None if self.preprocessor is None else self.preprocessor.tokenizer

    def __setattr__(self, name, value):
        # torch's Module.__setattr__ would register a property's value under its name.
        if isinstance(getattr(type(self), name, None), property):
            return object.__setattr__(self, name, value)
        return super().__setattr__(name, value)

    def get_config(self):
        config = super().get_config()
        causal_lm = keras.saving.serialize_keras_object(self.causal_lm)
        causal_lm.pop("compile_config", None)  # its sampler is in this model's
        causal_lm["config"]["backbone"]["config"] = surgery.backbone_config(self.causal_lm.backbone)
        preprocessor = keras.saving.serialize_keras_object(self.preprocessor)
        inner = self.causal_lm.preprocessor
        if inner is not None and self.tokenizer is inner.tokenizer:
            preprocessor["config"]["preprocessor"] = None  # saved with the causal LM
        config.update(
            causal_lm=causal_lm,
            connection=keras.saving.serialize_keras_object(self.connection),
            objectives=[keras.saving.serialize_keras_object(o) for o in self.objectives],
            intervention=keras.saving.serialize_keras_object(self.intervention),
            preprocessor=preprocessor,
            rematerialize=self.rematerialize,
            trains=surgery.what_trains(self.causal_lm),
        )
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("causal_lm", "connection", "intervention", "preprocessor"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        inner = config["causal_lm"].preprocessor
        preprocessor = config["preprocessor"]
        if preprocessor is not None and preprocessor.preprocessor is None:
            preprocessor.preprocessor = inner
        trains = config.pop("trains", None)
        model = cls(**config)
        if trains is not None:
            surgery.restore_what_trains(model.causal_lm, trains)
        return model


class Untracked:
    """Holds a value that Keras, torch or a SavedModel must not track as a part of the model."""

    def __init__(self, value):
        self.value = value


def _check_batch(token_ids, pivot_token_ids):
    rows, pivot_rows = token_ids.shape[0], pivot_token_ids.shape[0]
    if rows is not None and pivot_rows is not None and rows != pivot_rows:
        raise ValueError(
            "`token_ids` and `pivot_token_ids` must have the same batch size, one pivot a row. "
            f"Received: token_ids.shape={tuple(token_ids.shape)}, "
            f"pivot_token_ids.shape={tuple(pivot_token_ids.shape)}"
        )


def _checked_intervention(value, connection, causal_lm):
    """The intervention that `value` stands for, built, or None; it fits the model."""
    value = interventions.get(value)
    if value is None:
        return None
    if value.needs_pivot and connection is not None:
        raise ValueError(
            f"`intervention` {value!r} reads the pivot's plain pass, and cannot stand beside a "
            "connection: call `merge()` or `disconnect()` first, or make the model with "
            f"`connection=None`. Received: connection={connection!r}"
        )
    family_of(causal_lm.backbone)
    num_blocks = len(causal_lm.backbone.transformer_layers)
    value.check(num_blocks)
    value.build(num_blocks, causal_lm.backbone.hidden_dim)
    return value


def _check_causal_lm(causal_lm):
    import keras_hub  # here and not above: it imports TensorFlow wherever that is installed

    if not isinstance(causal_lm, keras_hub.models.CausalLM):
        raise TypeError(
            "`causal_lm` must be a keras_hub.models.CausalLM, for example "
            '`keras_hub.models.CausalLM.from_preset("gemma3_270m")`. '
            f"Received: causal_lm={causal_lm!r} of type {type(causal_lm).__name__}"
        )
