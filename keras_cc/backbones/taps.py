"""Taps: let the pass under way read, and change, what the decoder blocks compute.

A tap shadows the `call` method of one layer instance. The layer stays what it is, in the
functional graph, in cached generation and in saved files; outside a pass the tap only calls it.
Nothing is kept: what passes a tap goes to the pass of `keras_cc.passes.pairing`, where the sites
are named.
"""

import functools
import inspect

from keras_cc.backbones.families import family_of, owner_of
from keras_cc.passes import pairing, rematerialization

# Keras calls the second one where a layer is quantised.
_METHODS = ("call", "quantized_call")


def tap(causal_lm):
    """Tap every site of a model. Tapping a model again changes nothing.

    Args:
        causal_lm: a KerasHub causal language model of a supported family.
    """
    for site, layer in _tapped_layers(causal_lm):
        entry = ("embedding", 0) if site == ("hidden", 0) else None
        for name in _METHODS:
            if name not in vars(layer):
                method = getattr(layer, name)
                if site[0] == "hidden":
                    method = _rematerialized(method, _connectable(causal_lm, layer))
                object.__setattr__(layer, name, _through_pass(method, site, entry))


def untap(causal_lm):
    """Take every tap off a model, tapped or not; returns whether it was."""
    taken = [
        vars(layer).pop(name, None) for _, layer in _tapped_layers(causal_lm) for name in _METHODS
    ]
    return any(method is not None for method in taken)


def _tapped_layers(causal_lm):
    family = family_of(causal_lm.backbone)
    for number, block in enumerate(causal_lm.backbone.transformer_layers):
        yield ("hidden", number), block
        for kind, path in (("attention", family.attention), ("ffn", family.projection)):
            owner, attribute = owner_of(block, path)
            yield (kind, number), getattr(owner, attribute)


def _connectable(causal_lm, block):
    """Ids of the layers of a block that a connection may have wrapped."""
    owners = [owner_of(block, path) for path in family_of(causal_lm.backbone).connectable]
    return {id(getattr(owner, attribute)) for owner, attribute in owners}


def _rematerialized(method, layers):
    """`method` of a decoder block, run again for the gradient in a pass that says so."""

    @functools.wraps(method)
    def twice(*args, **kwargs):
        scope = pairing.current()
        if scope is None or not scope.rematerialized:
            return method(*args, **kwargs)
        return rematerialization.call(method, args, kwargs, scope, layers)

    return twice


def _through_pass(method, site, entry):
    """`method`, its output (and at `entry` its first argument) led through the pass."""
    first = next(iter(inspect.signature(method).parameters))

    @functools.wraps(method)
    def tapped(*args, **kwargs):
        scope = pairing.current()
        if scope is None:
            return method(*args, **kwargs)
        if entry is not None and args:
            args = (scope.visit(entry, args[0]), *args[1:])
        elif entry is not None:  # Falcon's backbone gives it by name
            kwargs = {**kwargs, first: scope.visit(entry, kwargs[first])}
        if site[0] == "attention" and scope.segments is not None:
            mask = scope.attended(kwargs["attention_mask"])
            kwargs = {**kwargs, "attention_mask": mask}
        outputs = method(*args, **kwargs)
        if isinstance(outputs, (tuple, list)):  # with a cache beside
            return type(outputs)((scope.visit(site, outputs[0]), *outputs[1:]))
        return scope.visit(site, outputs)

    return tapped
