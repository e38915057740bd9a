"""Adapters in a model, and out of it again.

Projections are wrapped, as `surgery.connect` wraps them. The token embedding stays what it is, in
the functional graph and in cached generation: its `call` is shadowed on the one instance.
"""

from keras_cc.backbones import surgery, taps
from keras_cc.backbones.families import family_of, owner_of
from keras_cc.layers import AdaptedFeedForward, InvertibleAdapter

# The attribute of a token embedding that holds its invertible adapter.
_INVERTIBLE = "cc_invertible_adapter"


def adapt(causal_lm, reduction_factor, task_reduction_factor, invertible):
    """Give a model adapters, in place; they change nothing until they are trained.

    Every block's feed-forward projection is wrapped. With `invertible`, the token embedding
    leads what it looks up through an `InvertibleAdapter`, and what it turns into logits
    through the inverse.

    Args:
        causal_lm: a KerasHub causal language model.
        reduction_factor, task_reduction_factor: ints, of `AdaptedFeedForward`.
        invertible: bool.

    Returns:
        A dict: `"block_3"` to the `AdaptedFeedForward` there, `"embedding"` to the
        `InvertibleAdapter`.

    Raises:
        ValueError: for a backbone of no supported family, and one that is connected or has
            adapters already. Nothing has changed then.
    """
    backbone = causal_lm.backbone
    family = family_of(backbone)
    if surgery.is_connected(causal_lm):
        raise ValueError(
            "`causal_lm` is connected: call `merge()` or `disconnect()` of its `CCCausalLM` first. "
            f"Received: causal_lm={causal_lm.name!r} with the layers of a connection"
        )
    surgery.check_no_adapters(causal_lm)
    embedding = backbone.token_embedding
    layers = {}
    if invertible:
        adapter = InvertibleAdapter(
            dtype=surgery.POLICIES[embedding.compute_dtype], name="invertible_adapter"
        )
        adapter.build((None, None, backbone.hidden_dim))
        layers["embedding"] = adapter
    was_tapped = taps.untap(causal_lm)
    for number, block in enumerate(backbone.transformer_layers):
        owner, attribute = owner_of(block, family.projection)
        inner = getattr(owner, attribute)
        layer = AdaptedFeedForward(
            inner,
            reduction_factor,
            task_reduction_factor,
            name=f"adapted_feed_forward_{number}",
            dtype=surgery.POLICIES[inner.compute_dtype],
        )
        layer.build(surgery.input_shape(inner))
        surgery.replace(owner, attribute, layer)
        layers[f"block_{number}"] = layer
    if invertible:
        surgery.attach_to(embedding, _INVERTIBLE, layers["embedding"])
        for name in ("call", "quantized_call"):
            method = _between(getattr(embedding, name), layers["embedding"])
            object.__setattr__(embedding, name, method)
    if was_tapped:
        taps.tap(causal_lm)
    surgery.number_lora_layers(backbone)
    _forbid_saving(causal_lm)
    causal_lm.generate_function = None
    return layers


def remove(causal_lm):
    """Take the adapters out of a model."""
    backbone = causal_lm.backbone
    family = family_of(backbone)
    was_tapped = taps.untap(causal_lm)
    for block in backbone.transformer_layers:
        owner, attribute = owner_of(block, family.projection)
        surgery.replace(owner, attribute, getattr(owner, attribute).inner)
    embedding = backbone.token_embedding
    if hasattr(embedding, _INVERTIBLE):
        for name in ("call", "quantized_call"):
            vars(embedding).pop(name, None)
        surgery.detach_from(embedding, _INVERTIBLE)
    if was_tapped:
        taps.tap(causal_lm)
    surgery.number_lora_layers(backbone)
    surgery.allow_presets(causal_lm)
    vars(backbone).pop("get_config", None)
    causal_lm.generate_function = None


def _between(method, adapter):
    """A token embedding's `method` between an invertible adapter and its inverse."""

    def adapted(inputs, reverse=False):
        if reverse:
            return method(adapter(inputs, inverse=True), reverse=True)
        return adapter(method(inputs))

    return adapted


def _forbid_saving(causal_lm):
    def refuse(*args, **kwargs):
        raise ValueError(
            "A model with adapters cannot be saved whole, since nothing could load it: save the "
            "adapters, `adapters.save(path)`, and the model as it is after `adapters.remove()`. "
            f"Received: {causal_lm.name!r}, which has adapters"
        )

    for model in (causal_lm, causal_lm.backbone):
        object.__setattr__(model, "save_to_preset", refuse)
    object.__setattr__(causal_lm.backbone, "get_config", refuse)
