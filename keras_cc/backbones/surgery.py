"""Connecting, disconnecting and folding: the only file that touches private Keras names.

Why each is needed:

- `layer._tracker.replace_tracked_value`: swaps one tracked sublayer for another at the
  same place. Plain assignment appends a second one (and is refused on a built layer),
  which would change the order of the weights, and with it every saved file. Its `unlock`,
  `lock` and `untrack` give a built block a sublayer more, and take it away again: there it
  is saved, trained and compiled with the model, as the rest of it is.
- `operation._inbound_nodes` and `model._nodes_by_depth`: where the backbone's hidden
  states enter the language-model head, and the last block's the final norm. KerasHub has no
  layer for either, so each is the part of the functional graph behind that tensor.
- `model._aggregate_additional_loss`: divides a loss that is already a mean by the
  number of replicas on TensorFlow, where gradients are summed over the replicas.
- `variable._value`: on JAX, None while a trainer holds the value; reading `value` then fails.
- `layer._remat_mode`: whether a layer was made under `keras.RematScope`.
- `model._flatten_metrics_in_order`: what `evaluate` returns as a list, of a dict.
- `model._flatten_layers`: all sublayers; `Model.layers` lists the top only. Loaded int4 layers
  are repaired among them: Keras 3.15 forgets that their inputs are not quantised.
- `optimizer._variables`, `_iterations`, `_trainable_variables`, `_trainable_variables_indices`,
  `_inner_optimizers`: an optimizer's state, which Keras can make once. A copy goes through its
  configuration, which schedules, lambdas and classes of a user's own need not have.
- `optimizer._parallel_update_step`, `_stateful_handle_finite_grads`, `_momentums`, `_velocities`,
  `_get_variable_index`: Keras' update on PyTorch makes five copies of all weights, see `quicken`.
- `keras.src.backend.torch.optimizers`, as a string in saved files: no other backend loads it.
- `backbone._lora_enabled_layers`, `_lora_rank`: KerasHub's `save_lora_weights` knows the layers
  that carry LoRA by their place in the list of all, which connecting changes.
"""

import types

import keras
from keras import ops

from keras_cc.backbones import taps
from keras_cc.backbones.families import family_of, owner_of
from keras_cc.layers import AdaptedFeedForward, CCFeedForward, FlareProjection
from keras_cc.options import count

#: What a connection wraps layers in.
WRAPPERS = (CCFeedForward, FlareProjection)
# Attributes of a decoder block that hold what was attached to it.
_PREFIX = "cc_"

# The variables of the connection stay float32, whatever the backbone's: in bfloat16, Adam's
# second moment never moves (beta_2 rounds to 1).
POLICIES = {
    "float32": "float32",
    "bfloat16": "mixed_bfloat16",
    "float16": "mixed_float16",
    "float64": "float64",
}


def is_connected(causal_lm):
    """Whether some `CCCausalLM` has connected this model already."""
    return bool(_attached(causal_lm)) or any(
        isinstance(layer, WRAPPERS) for layer in all_layers(causal_lm.backbone)
    )


def connect(causal_lm, connection):
    """Give a model the layers of a connection, in place.

    The layers that the connection names of its blocks are wrapped, and the layers that
    it has once a model are attached to the first block.

    Args:
        causal_lm: a KerasHub causal language model.
        connection: a `keras_cc.connections.Connection`.

    Returns:
        A dict: `"block_3"` to the `CCFeedForward` there (or `"block_3/query"` to a
        `FlareProjection`), and the attached layers by name.

    Raises:
        ValueError: for a backbone of no supported family, one that is connected already,
            and block numbers that it does not have. Nothing has changed then.
    """
    backbone = causal_lm.backbone
    family = family_of(backbone)
    if is_connected(causal_lm):
        raise ValueError(
            "`causal_lm` is connected already: use the `CCCausalLM` that connected it, or call its "
            "`merge()` or `disconnect()` first. "
            f"Received: causal_lm={causal_lm.name!r} with the layers of a connection"
        )
    check_no_adapters(causal_lm)
    blocks = backbone.transformer_layers
    numbers = connection.block_numbers(len(blocks))
    paths = connection.paths(family)
    own = connection.own_layers(len(blocks), backbone.hidden_dim)
    taps.untap(causal_lm)  # a tap belongs on the wrapper, not inside it
    layers = {}
    for number in numbers:
        for name, path in paths.items():
            owner, attribute = owner_of(blocks[number], path)
            inner, is_ffn = getattr(owner, attribute), name == "feed_forward"
            layer = connection.wrap(
                inner, name=f"cc_{name}_{number}", dtype=POLICIES[inner.compute_dtype]
            )
            layer.build(input_shape(inner) if is_ffn else (None, None, backbone.hidden_dim))
            replace(owner, attribute, layer)
            layers[f"block_{number}" if is_ffn else f"block_{number}/{name}"] = layer
    for name, layer in own.items():
        attach(causal_lm, 0, name, layer)
        layers[name] = layer
    number_lora_layers(backbone)
    _forbid_presets(causal_lm)
    causal_lm.generate_function = None  # it was compiled around the old layers
    return layers


def is_adapted(causal_lm):
    """Whether the model has adapters in it."""
    return any(isinstance(layer, AdaptedFeedForward) for layer in all_layers(causal_lm.backbone))


def trainable_flags(causal_lm):
    """`(layer or variable, its `trainable`)` of all there are, in an order to set them again."""
    owners = [causal_lm, *all_layers(causal_lm), *causal_lm.variables]
    return [(owner, owner.trainable) for owner in owners]


def train_only(causal_lm, variables):
    """Have training change `variables` of the model, and no others."""
    causal_lm.trainable = True  # frozen as a whole, it hides every variable
    chosen = {id(variable) for variable in variables}
    for variable in causal_lm.variables:
        variable.trainable = id(variable) in chosen
    # Compiled for others.
    causal_lm.generate_function = causal_lm.train_function = None


def enable_lora(backbone, rank, target_layer_names=None):
    """KerasHub's `enable_lora`, or an error before anything has changed.

    Args:
        backbone: a KerasHub backbone.
        rank: int.
        target_layer_names: names of layers, or None.

    Raises:
        ValueError: for a rank that is none, names of which no layer can carry LoRA, and a layer
            that carries it already.
    """
    rank = count("rank", rank, least=1)
    able = {layer.name for layer in all_layers(backbone) if hasattr(layer, "enable_lora")}
    wrong = not target_layer_names or set(target_layer_names) - able
    if target_layer_names is not None and wrong:
        raise ValueError(
            "`target_layer_names` must be names of layers that can carry LoRA, some of "
            f"{sorted(able)}. Received: target_layer_names={target_layer_names!r}"
        )
    if any(layer.lora_enabled for layer in all_layers(backbone) if hasattr(layer, "lora_enabled")):
        raise ValueError(
            "LoRA is enabled already, and Keras has no second one a layer: train on, or load the "
            f"model again for another rank. Received: rank={rank} for a model that carries LoRA"
        )
    flags = [(owner, owner.trainable) for owner in (*all_layers(backbone), *backbone.variables)]
    try:
        backbone.enable_lora(rank, target_layer_names)
    except BaseException:
        for owner, trainable in flags:
            owner.trainable = trainable
        raise


def max_positions(backbone):
    """Tokens that a backbone has positions for, or None where its positions have no end."""
    # GPT-NeoX has the number too, and rotary positions, which have no end.
    is_table = any("position_embedding" in weight.path for weight in backbone.weights)
    return getattr(backbone, "max_sequence_length", None) if is_table else None


def micro_steps(optimizer):
    """How many micro-batches an optimizer has seen, those that loss scaling left out not counted.

    It is where its next accumulation group begins, and a part of what is saved of it.
    """
    counter = getattr(optimizer, "inner_optimizer", optimizer)._iterations
    return int(ops.convert_to_numpy(counter))


def lora_layers(causal_lm):
    """The layers that carry LoRA, by their place among all."""
    return {
        number: layer
        for number, layer in enumerate(all_layers(causal_lm))
        if getattr(layer, "lora_enabled", False)
    }


def seeds(model):
    """Where each generator of random numbers stands: the layers', the model's, the sampler's."""
    sampler = getattr(model.causal_lm, "sampler", None)
    found = [*model.variables, *(() if sampler is None else sampler.variables)]
    return [variable for variable in found if variable.name == "seed_generator_state"]


def what_trains(causal_lm):
    """What of a model trains, as JSON holds it; None where that is what a new one trains.

    Args:
        causal_lm: a KerasHub causal language model, connected or not.

    Returns:
        A dict for `restore_what_trains`: `lora`, from a layer's place to its rank and alpha, and
        `frozen`, the places of `trainable_flags` that are not trainable.
    """
    lora = {str(n): [x.lora_rank, x.lora_alpha] for n, x in lora_layers(causal_lm).items()}
    flags = trainable_flags(causal_lm)
    frozen = [place for place, (_, trainable) in enumerate(flags) if not trainable]
    return {"lora": lora, "frozen": frozen, "of": len(flags)} if lora or frozen else None


def restore_what_trains(causal_lm, trains):
    """Have a model of the same layers train what `what_trains` said.

    Raises:
        ValueError: for a model of another number of layers and weights.
    """
    layers = all_layers(causal_lm)
    backbone = causal_lm.backbone
    for number, (rank, alpha) in trains["lora"].items():
        layers[int(number)].enable_lora(rank, lora_alpha=alpha)
        backbone._lora_enabled_layers, backbone._lora_rank = [], rank
    number_lora_layers(backbone)
    flags = trainable_flags(causal_lm)
    if len(flags) != trains["of"]:
        raise ValueError(
            f"The saved model had {trains['of']} layers and weights whose training is known. "
            f"Received: a model with {len(flags)}"
        )
    frozen = set(trains["frozen"])
    for place, (owner, _) in enumerate(flags):
        owner.trainable = place not in frozen


def for_all_backends(config):
    """A configuration whose optimizers are Keras' own, which each backend has.

    On torch they are classes of that backend, under the same names.
    """
    if isinstance(config, list):
        return [for_all_backends(value) for value in config]
    if not isinstance(config, dict):
        return config
    config = {name: for_all_backends(value) for name, value in config.items()}
    is_torch = str(config.get("module")).startswith("keras.src.backend.torch.optimizers.")
    if is_torch and hasattr(keras.optimizers, config["class_name"]):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config


def quicken(optimizer, scales):
    """Have a `LossScaleOptimizer` update in few passes over the weights on PyTorch.

    What is updated, and to what, stays the same. Other optimizers than Adam and AdamW keep Keras'
    own update.

    Args:
        optimizer: a `keras.optimizers.LossScaleOptimizer`.
        scales: bool, whether it scales the loss; else gradients need not be divided by 1.
    """
    if keras.backend.backend() != "torch":
        return
    from keras_cc import torch_updates

    inner = optimizer.inner_optimizer
    optimizer.check_finite = torch_updates.are_finite
    if not scales:
        optimizer._stateful_handle_finite_grads = types.MethodType(_apply_unscaled, optimizer)
    is_keras = type(inner).__module__.startswith("keras.src.backend.torch.optimizers.")
    if is_keras and type(inner).__name__ in ("Adam", "AdamW") and not inner.amsgrad:
        inner._parallel_update_step = types.MethodType(_fused_adam, inner)


def _apply_unscaled(self, gradients, trainable_variables):
    self.inner_optimizer.apply(gradients, trainable_variables=trainable_variables)
    self.step_counter.assign_add(1)


def _fused_adam(self, gradients, variables, learning_rate):
    from keras_cc import torch_updates

    if any(variable.dtype != "float32" for variable in variables):
        return type(self)._parallel_update_step(self, gradients, variables, learning_rate)
    places = [self._get_variable_index(variable) for variable in variables]
    torch_updates.adam(
        [variable.value for variable in variables],
        gradients,
        [self._momentums[place].value for place in places],
        [self._velocities[place].value for place in places],
        step=int(self.iterations) + 1,
        learning_rate=float(learning_rate),
        betas=(self.beta_1, self.beta_2),
        epsilon=self.epsilon,
    )


def reset_optimizer(optimizer):
    """Have an optimizer start anew: its options and learning rate stay, what it has summed goes."""
    inner = getattr(optimizer, "inner_optimizer", None)
    others = getattr(optimizer, "_inner_optimizers", [])
    for one in others if inner is None else [inner]:
        reset_optimizer(one)
    kept = (optimizer._iterations, getattr(optimizer, "_learning_rate", None))
    optimizer._variables[:] = [v for v in optimizer._variables if any(v is k for k in kept)]
    optimizer._iterations.assign(0)
    optimizer._trainable_variables, optimizer._trainable_variables_indices = [], {}
    optimizer.built = False


def disconnect(causal_lm, fold):
    """Put the projections back, with the transforms folded into them or left out.

    Args:
        causal_lm: a KerasHub causal language model, connected or not.
        fold: bool, whether to multiply each transform into its projection.

    Raises:
        ValueError: if `fold` and a transform is no matrix, or a projection is quantised
            or carries LoRA weights. Nothing has changed then.
    """
    places = [
        (owner, attribute, layer, _folded(layer) if fold else {})
        for owner, attribute, layer in _wrapped(causal_lm)
    ]
    taps.untap(causal_lm)
    for owner, attribute, layer, weights in places:
        for variable, value in weights.items():
            getattr(layer.inner, variable).assign(value)
        replace(owner, attribute, layer.inner)
    for block, name in _attached(causal_lm):
        detach_from(block, name)
    number_lora_layers(causal_lm.backbone)
    allow_presets(causal_lm)
    causal_lm.generate_function = None


def biases(causal_lm, numbers):
    """The biases that what is added to the outputs of these blocks can be folded into.

    Behind a projection that has a bias no family has a norm, so its output goes on to the block's
    as it is.

    Args:
        causal_lm: a KerasHub causal language model, connected or not.
        numbers: block numbers.

    Returns:
        A dict from block number to variable, or None where one of the projections has no bias.
    """
    path = family_of(causal_lm.backbone).projection
    found = {}
    for number in numbers:
        owner, attribute = owner_of(causal_lm.backbone.transformer_layers[number], path)
        layer = getattr(owner, attribute)
        layer = layer.inner if isinstance(layer, CCFeedForward) else layer
        found[number] = getattr(layer, "bias", None)
    return None if any(bias is None for bias in found.values()) else found


def attach(causal_lm, number, name, layer):
    """Make `layer` a sublayer of the model's decoder block `number`, under `cc_<name>`."""
    attach_to(causal_lm.backbone.transformer_layers[number], _PREFIX + name, layer)


def detach(causal_lm, name):
    """Take the sublayers that were attached under `name` out of every block."""
    for block, attribute in _attached(causal_lm):
        if attribute == _PREFIX + name:
            detach_from(block, attribute)


def language_model_head(causal_lm):
    """The model's head: from the backbone's hidden states `(B, K, d)` to logits.

    Cut from the functional graph, so that soft caps and tied embeddings are those of the
    model, and applied to whatever positions are wanted.
    """
    node = _node_in(causal_lm, causal_lm.backbone)
    if node is None:
        raise ValueError(
            "`causal_lm` must be a functional KerasHub model whose output is computed from its "
            f"backbone's. Received: causal_lm={type(causal_lm).__name__}"
        )
    return keras.Model(node.output_tensors[0], causal_lm.output)


def logit_lens(causal_lm):
    """The logit lens: from a decoder block's output `(B, K, d)` to logits, weights frozen.

    The final norm and the head, as the model applies them to its last block's output; no
    gradient reaches their weights, only what they read.
    """
    backbone = causal_lm.backbone
    node = _node_in(backbone, backbone.transformer_layers[-1])
    final_norm = keras.Model(node.output_tensors[0], backbone.output)
    head = language_model_head(causal_lm)
    variables = [*final_norm.variables, *head.variables]

    def lens(hidden):
        frozen = [(variable, ops.stop_gradient(variable.value)) for variable in variables]
        with keras.StatelessScope(state_mapping=frozen):
            return head(final_norm(hidden))

    return lens


def add_to_loss(model, loss):
    """`loss`, a mean over this replica's batch, scaled as Keras scales an added loss."""
    return model._aggregate_additional_loss(loss)


def in_order(model, scores):
    """A dict of scores as the list that `evaluate` returns."""
    return model._flatten_metrics_in_order(scores)


def attached_values(model):
    """On JAX, `(variable, value)` of every variable that has its value; else nothing.

    Elsewhere a trainer leaves the values where they are.
    """
    if not hasattr(model, "jax_state_sync"):
        return []
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return [(v, v._value) for v in variables if v._value is not None]


def reattach(model, values):
    """After a failed step on JAX: the last step's state, or where there was none, `values`."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
    for variable, value in values:
        if variable._value is None:
            variable.assign(value)


def unfreeze(layers):
    """Make a connection's layers trainable again, and leave the projections as they are.

    KerasHub's `enable_lora` freezes every layer that it does not give LoRA weights. A
    frozen layer hides its sublayers' trainable weights, so the wrapper itself thaws too.

    Args:
        layers: layers that `connect` returned and that training changes.
    """
    for layer in layers:
        if not isinstance(layer, WRAPPERS):
            layer.trainable = True
            continue
        inner = layer.inner.trainable
        layer.trainable = True  # sets it on everything inside
        layer.inner.trainable = inner


def mark_built(model):
    """Say of sublayers without weights, such as a tokenizer, that they are built: nothing builds
    those, and before each batch on JAX Keras runs a model eagerly that has a layer to build."""
    for layer in all_layers(model):
        if not layer.built and not layer.weights:
            layer.built = True


def backbone_config(backbone):
    """`backbone.get_config()`, complete.

    `LlamaBackbone.get_config` (KerasHub 0.32) leaves out `tie_word_embeddings`, so a tied
    model would come back untied, with weights that no longer fit.
    """
    config = dict(backbone.get_config())
    embedding = getattr(backbone, "token_embedding", None)
    if "tie_word_embeddings" not in config and _takes(backbone, "tie_word_embeddings"):
        config["tie_word_embeddings"] = bool(getattr(embedding, "tie_weights", False))
    return config


def quantise_weights_only(backbone):
    """Have int4 layers take their inputs as they are, as `quantize("int4")` made them do.

    A saved policy, `"int4/128"`, does not say so, and a loaded layer rounds its inputs to int8.
    """
    for layer in all_layers(backbone):
        if getattr(layer, "quantization_mode", None) == "int4":
            layer.inputs_quantizer = None


def let_gradients_through(causal_lm):
    """Have a quantised head take hidden states as they are: rounded, they have no gradient.

    Keras gives quantised `Dense` and `EinsumDense` layers a gradient around the rounding of their
    inputs, and forgets the embedding that is the head too (3.15): nothing would be learnt.
    """
    for layer in all_layers(causal_lm.backbone):
        is_head = hasattr(layer, "tie_weights")
        if is_head and getattr(layer, "quantization_mode", None) is not None:
            layer.inputs_quantizer = None


def _takes(backbone, argument):
    import inspect

    return argument in inspect.signature(type(backbone).__init__).parameters


def all_layers(model):
    return model._flatten_layers(include_self=False)


def _node_in(model, operation):
    """The node of a functional model's graph at which `operation` is called."""
    nodes = {id(node) for depth in model._nodes_by_depth.values() for node in depth}
    return next((node for node in operation._inbound_nodes if id(node) in nodes), None)


def _attached(causal_lm):
    """`(block, attribute)` of everything that `attach` put there."""
    return [
        (block, name)
        for block in causal_lm.backbone.transformer_layers
        for name in dir(block)
        if name.startswith(_PREFIX)
    ]


def attach_to(owner, attribute, layer):
    owner._tracker.unlock()
    try:
        setattr(owner, attribute, layer)
    finally:
        owner._tracker.lock()


def detach_from(owner, attribute):
    owner._tracker.untrack(getattr(owner, attribute))
    delattr(owner, attribute)


def check_no_adapters(causal_lm):
    if is_adapted(causal_lm):
        raise ValueError(
            "`causal_lm` has adapters already: call `remove()` of the `keras_cc.adapters.MADX` "
            f"that made them first. Received: causal_lm={causal_lm.name!r} with adapters"
        )


def check_no_remat(model, causal_lm):
    for layer in (model, causal_lm, *all_layers(causal_lm)):
        if layer._remat_mode is not None:
            raise ValueError(
                "`keras.RematScope` rematerialises layer by layer, and what passes leave for each "
                "other in a layer would be lost: make and connect the causal LM outside of it, "
                "and have `CCCausalLM(..., rematerialize=True)` do it block by block. "
                f"Received: {layer.name!r} with mode={layer._remat_mode.mode!r}"
            )


def check_no_dropout(causal_lm):
    """Refuse blocks that draw random numbers, which are to be run twice."""
    for block in causal_lm.backbone.transformer_layers:
        for layer in all_layers(block):
            if isinstance(layer, keras.layers.Dropout) and layer.rate > 0:
                raise ValueError(
                    "`rematerialize` runs a block twice, and its dropout would draw other numbers "
                    "the second time: load the model with `dropout=0`, or leave `rematerialize` "
                    f"out. Received: {layer.name!r} of {block.name!r} with rate={layer.rate}"
                )


def replace(owner, attribute, new):
    old = getattr(owner, attribute)
    owner._tracker.replace_tracked_value("layers", old, new)
    setattr(owner, attribute, new)


def input_shape(projection):
    """`(None, None, inner dim)`: the kernel of every family's projection is (inner, d)."""
    return (None, None, int(projection.kernel.shape[0]))


def _wrapped(causal_lm):
    """`(owner, attribute, wrapper)` of all that a connection wrapped."""
    family = family_of(causal_lm.backbone)
    ends = [f"{family.attention}.{name}" for name in (family.query, family.value) if name]
    for block in causal_lm.backbone.transformer_layers:
        for path in (family.projection, *ends):
            owner, attribute = owner_of(block, path)
            if isinstance(getattr(owner, attribute), WRAPPERS):
                yield owner, attribute, getattr(owner, attribute)


def _folded(layer):
    """The inner layer's weights with what the wrapper learnt in them; refused where it cannot be.

    Folded in float32 and rounded once, to the layer's own type, by `assign`.
    """
    inner = layer.inner
    if isinstance(layer, CCFeedForward) and layer.transform_matrix is None:
        return {}
    if getattr(inner, "quantization_mode", None) is not None:
        raise ValueError(
            "`merge()` folds into float weights only: merge first and quantise the merged model. "
            f"Received: {inner.name} quantised to {inner.quantization_mode!r}"
        )
    if getattr(inner, "lora_enabled", False):
        raise ValueError(
            "`merge()` cannot fold into a projection that carries LoRA weights: train LoRA on "
            "other layers (KerasHub's default is the attention's query and value). "
            f"Received: LoRA on {inner.name}"
        )
    return layer.folded()


def number_lora_layers(backbone):
    if hasattr(backbone, "_lora_enabled_layers"):
        layers = [layer for layer in all_layers(backbone) if layer.weights]
        backbone._lora_enabled_layers = [
            number for number, layer in enumerate(layers) if getattr(layer, "lora_enabled", False)
        ]


def _forbid_presets(causal_lm):
    def save_to_preset(*args, **kwargs):
        raise ValueError(
            "A connected model cannot be saved as a preset, since nothing could load it: call "
            "`merge()` (or `disconnect()`, where nothing can be merged) and save what it returns, "
            "or use `CCCausalLM.save` or `save_cc_weights`. "
            f"Received: save_to_preset on {causal_lm.name!r}, which is connected"
        )

    for model in (causal_lm, causal_lm.backbone):
        object.__setattr__(model, "save_to_preset", save_to_preset)


def allow_presets(causal_lm):
    for model in (causal_lm, causal_lm.backbone):
        vars(model).pop("save_to_preset", None)
