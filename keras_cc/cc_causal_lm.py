import keras
from keras import ops

from keras_cc import cc_weights, connections, generation, pairing, surgery
from keras_cc.paired_trainer import PairedTrainer, gather
from keras_cc.preprocessing import CCPreprocessor


@keras.saving.register_keras_serializable(package="keras_cc")
class CCCausalLM(PairedTrainer):
    """A KerasHub causal language model, connected to the pivot language while it trains.

    Training sees pairs: the target-language prompt and answer, and the pivot (English)
    version of the prompt alone. The pivot's feed-forward activations are connected into
    the target's pass; a transform learns to stand in for them, so that inference needs
    the target language alone and `merge()` gives the stock model back:

        loss = SFT(answer tokens, connected pass) + lambda * alignment error

    The model that is passed in is connected in place and stays usable (its own
    `generate` and call are the monolingual path).

    Args:
        causal_lm: a `keras_hub.models.CausalLM` with a backbone from
            `keras_cc.supported_backbones()`.
        connection: `"fused"`, a `keras_cc.FusedConnection`, or None: plain supervised
            fine-tuning on the target rows.
        objectives: extra losses on the pair; this version has none, so an empty sequence.
        preprocessor: a `keras_cc.CCPreprocessor`, or `"auto"`: one with default options
            around `causal_lm.preprocessor`, if that is there. None: only preprocessed
            batches are taken. It can be replaced later, `model.preprocessor = ...`.

    Call arguments:
        inputs: a dict of int tensors, `token_ids` and `padding_mask` `(B, T)`; with
            `pivot_token_ids` and `pivot_padding_mask` `(B, S)` it is a connected pass,
            without them a monolingual one. `answer_mask` `(B, T)` says where the prompt
            ends (without it, at the last real token). `answer_positions` `(B, K)` asks for
            logits at those positions only.

    Returns:
        A dict: `logits` `(B, T, vocabulary)`, or `(B, K, vocabulary)`. A connected pass
        adds `alignment_error` and `gate` (sums over a row's tokens) with the token
        counts `alignment_tokens` and `gate_tokens`, each `(B,)` float32.

    Raises:
        TypeError: if `causal_lm` is no KerasHub causal language model.
        ValueError: if its backbone cannot be connected or is connected already, or an
            option has no such value.

    Example:

    ```python
    causal_lm = keras_hub.models.Gemma3CausalLM.from_preset("gemma3_270m")
    model = keras_cc.CCCausalLM(causal_lm)
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
        self, causal_lm, connection="fused", objectives=(), *, preprocessor="auto", **kwargs
    ):
        super().__init__(**kwargs)
        _check_causal_lm(causal_lm)
        if not isinstance(objectives, (list, tuple)) or objectives:
            raise ValueError(
                "`objectives` must be empty: this version of keras_cc has no extra objectives. "
                f"Received: objectives={objectives!r}"
            )
        self.connection = connections.get(connection)
        self.objectives = ()
        if self.connection is None and surgery.is_connected(causal_lm):
            raise ValueError(
                "`causal_lm` is connected already. Received: a connected model with connection=None"
            )
        # Untracked, as everything that belongs to the causal LM: it is tracked there.
        self._layers_by_block = _Untracked({})
        if self.connection is not None:
            self._layers_by_block.value = surgery.connect(causal_lm, self.connection)
        self.causal_lm = causal_lm
        self._head = _Untracked(surgery.language_model_head(causal_lm))
        self._generate_function = _Untracked(None)
        self._preprocessor = _Untracked(None)
        if preprocessor == "auto":
            inner = causal_lm.preprocessor
            preprocessor = None if inner is None else CCPreprocessor(inner)
        self.preprocessor = preprocessor
        self.seed_generator = keras.random.SeedGenerator()
        # Nothing is left to build, and Keras asks (backups, weights, stateless calls).
        self.built = True

    # ---------------------------------------------------------------- the two passes

    def call(self, inputs, training=False):
        if self.connection is None or "pivot_token_ids" not in inputs:
            return {"logits": self._logits(self._hidden(inputs, training), inputs)}
        if not pairing.is_scoring():
            return self._connected(inputs, training)
        # Scored is what a user gets, the monolingual path; the connected one stands beside.
        outputs = self._connected(inputs, training)
        outputs["connected_logits"] = outputs["logits"]
        outputs["logits"] = self._logits(self._hidden(inputs, training), inputs)
        return outputs

    def _connected(self, inputs, training):
        pivot_ids, pivot_mask = inputs["pivot_token_ids"], inputs["pivot_padding_mask"]
        _check_batch(inputs["token_ids"], pivot_ids)
        scope = self.open_target(inputs, pivot_ids, pivot_mask, training)
        if training and self.connection.dropout > 0:
            sample = keras.random.uniform(ops.shape(pivot_ids)[:1], seed=self.seed_generator)
            has_pivot = ops.any(scope.mask, axis=1)
            scope.through_transform = ops.logical_and(has_pivot, sample < self.connection.dropout)
        with pairing.enter(scope):
            hidden = self._hidden(inputs, training)
        errors = scope.alignment_errors or [ops.zeros_like(scope.gate_sums[0])]
        return {
            "logits": self._logits(hidden, inputs),
            "alignment_error": sum(errors) / len(errors),
            "alignment_tokens": _count(scope.mask),
            "gate": sum(scope.gate_sums) / len(scope.gate_sums),
            "gate_tokens": _count(scope.fused),
        }

    def open_target(self, inputs, pivot_token_ids, pivot_padding_mask, training=False):
        """Run the pivot's pass and open the target's.

        Args:
            inputs: the dict of a call.
            pivot_token_ids, pivot_padding_mask: int tensors `(B, S)`.
            training: bool.

        Returns:
            A `keras_cc.pairing.TargetPass`, to be entered for the target's pass.
        """
        sink_tokens = self.connection.sink_tokens
        pivot = pairing.PivotPass(_beyond(ops.cast(pivot_padding_mask, "bool"), sink_tokens))
        with pairing.enter(pivot):
            # The backbone alone: nobody needs the pivot's logits.
            self._hidden(
                {"token_ids": pivot_token_ids, "padding_mask": pivot_padding_mask}, training
            )
        real = ops.cast(inputs["padding_mask"], "bool")
        fused = _beyond(real, sink_tokens)
        if self.connection.alignment == "last":
            fused = ops.logical_and(fused, _last_prompt(real, inputs.get("answer_mask")))
        has_pivot = ops.any(pivot.mask, axis=1)[:, None]
        return pairing.TargetPass(
            pivot, mask=ops.logical_and(real, has_pivot), fused=ops.logical_and(fused, has_pivot)
        )

    def _hidden(self, inputs, training):
        backbone = self.causal_lm.backbone
        return backbone({name: inputs[name] for name in backbone.input}, training=training)

    def _logits(self, hidden, inputs):
        positions = inputs.get("answer_positions")
        if positions is not None:
            hidden = gather(hidden, positions)
        return self._head.value(hidden)

    # ---------------------------------------------------------------- training

    def enable_lora(self, rank, target_layer_names=None):
        """Train LoRA on the backbone together with the connection.

        KerasHub's `enable_lora` freezes everything else, the connection too where it is
        there already; this one leaves the connection trainable. A model that is compiled
        gets a new optimizer of the same options, since what it trains is not the same.

        Args:
            rank: int, the rank of the LoRA matrices.
            target_layer_names: names of the layers that get them, or None: KerasHub's
                default, the attention's query and value.
        """
        self.causal_lm.backbone.enable_lora(rank, target_layer_names)
        surgery.unfreeze(self._layers_by_block.value.values())
        self._compile_anew()

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

    def merge(self):
        """Fold the transforms into the projections and give the stock model back.

            kernel <- kernel @ W,    bias <- bias @ W

        Folded in float32 and rounded once. It is the model that was passed in, disconnected:
        no extra parameter, no extra time, nothing of keras_cc in it. This `CCCausalLM`
        stays usable as a plain fine-tuner of it (`connection` is None from then on), with an
        optimizer that starts anew.

        Returns:
            The KerasHub causal language model, of the class that was passed in.

        Raises:
            ValueError: if the transform is no matrix (`"mlp"`), or a connected projection is
                quantised or carries LoRA weights. Nothing has changed then.
        """
        return self._disconnect(fold=True)

    def disconnect(self):
        """Take the connection out without folding, and give the stock model back.

        Returns:
            The KerasHub causal language model that was passed in, as it was trained. As
            after `merge()`, a compiled model's optimizer starts anew.
        """
        return self._disconnect(fold=False)

    def _disconnect(self, fold):
        if self.connection is not None:
            surgery.disconnect(self.causal_lm, fold=fold)
            self.connection = None
            self._layers_by_block.value = {}
            self._compile_anew()
        return self.causal_lm

    def _compile_anew(self):
        # What was compiled, and the optimizer's state, are of other variables.
        self._generate_function.value = self.causal_lm.generate_function = None
        if self.compiled:
            self.compile_from_config(self.get_compile_config())

    # ---------------------------------------------------------------- saving

    def connection_layers(self):
        """The connection's own layers, gates and transforms, by a path that is stable.

        Returns:
            A dict from `"block_3/decision_gate"` to the layer.
        """
        found = {}
        for number, layer in self._layers_by_block.value.items():
            for name in ("decision_gate", "transform_matrix"):
                if getattr(layer, name) is not None:
                    found[f"block_{number}/{name}"] = getattr(layer, name)
        return found

    def save_cc_weights(self, path):
        """Save the connection's weights alone, with its options beside them.

        Args:
            path: a file name that ends in `.safetensors` or `.weights.h5`. The options are
                written to the same name with `.json` added.

        Raises:
            ValueError: for another ending, or a model without a connection.
        """
        cc_weights.save(self, path)

    def load_cc_weights(self, path):
        """Load what `save_cc_weights` wrote, into a model with the same connection.

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
            preprocessor=preprocessor,
        )
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("causal_lm", "connection", "preprocessor"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        inner = config["causal_lm"].preprocessor
        preprocessor = config["preprocessor"]
        if preprocessor is not None and preprocessor.preprocessor is None:
            preprocessor.preprocessor = inner
        return cls(**config)


class _Untracked:
    """Holds a value that Keras and torch must not track as a part of the model."""

    def __init__(self, value):
        self.value = value


def _beyond(mask, count):
    """`mask` without the first `count` True positions of each row."""
    return ops.logical_and(mask, ops.cumsum(ops.cast(mask, "int32"), axis=1) > count)


def _count(mask):
    return ops.sum(ops.cast(mask, "float32"), axis=1)


def _last_prompt(mask, answer_mask):
    """True at each row's last prompt token: the first answer position, or the last real one."""
    count = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    last_real = ops.logical_and(mask, count == count[:, -1:])
    if answer_mask is None:
        return last_real
    answers = ops.cast(answer_mask, "bool")
    first = ops.logical_and(answers, ops.cumsum(ops.cast(answers, "int32"), axis=1) == 1)
    return ops.where(ops.any(answers, axis=1, keepdims=True), first, last_real)


def _check_batch(token_ids, pivot_token_ids):
    rows, pivot_rows = token_ids.shape[0], pivot_token_ids.shape[0]
    if rows is not None and pivot_rows is not None and rows != pivot_rows:
        raise ValueError(
            "`token_ids` and `pivot_token_ids` must have the same batch size, one pivot a row. "
            f"Received: token_ids.shape={tuple(token_ids.shape)}, "
            f"pivot_token_ids.shape={tuple(pivot_token_ids.shape)}"
        )


def _check_causal_lm(causal_lm):
    import keras_hub  # here and not above: it imports TensorFlow wherever that is installed

    if not isinstance(causal_lm, keras_hub.models.CausalLM):
        raise TypeError(
            "`causal_lm` must be a keras_hub.models.CausalLM, for example "
            '`keras_hub.models.CausalLM.from_preset("gemma3_270m")`. '
            f"Received: causal_lm={causal_lm!r} of type {type(causal_lm).__name__}"
        )
