"""A decoder block whose activations are computed once more in the backward pass. Not public.

What a block reads of a pass and leaves there goes in and out of the function that is run twice:
left behind in it, it would be lost to the gradient (TensorFlow) or to the trace (JAX).
"""

import copy

import keras
from keras import ops

from keras_cc.passes import pairing

# What layers leave in a pass, by attribute.
_LEFT = ("states", "activations", "alignment_errors", "gate_sums")


def call(method, args, kwargs, scope, layers):
    """`method(*args, **kwargs)` of a block in a pass, run again when gradients are asked for.

    Args:
        method: the block's `call`.
        args, kwargs: its arguments.
        scope: the `pairing.Pass` under way.
        layers: ids of the connection's layers in the block.

    Returns:
        What `method` returns, a tensor. The pass holds what the block left.
    """
    leaves = keras.tree.flatten((args, kwargs))
    # Gradients go through what is given; TensorFlow takes real numbers alone.
    places = [n for n, leaf in enumerate(leaves) if _is_real(leaf)]
    pivot = getattr(scope, "pivot", None)  # of a `TargetPass`
    read = [] if pivot is None else [layer for layer in pivot.activations if layer in layers]
    found = {}

    def block(*values):
        given = list(leaves)
        for place, value in zip(places, values, strict=False):
            given[place] = value
        branch = _branch(scope)
        if pivot is not None:
            branch.pivot = copy.copy(pivot)
            branch.pivot.activations = dict(zip(read, values[len(places) :], strict=True))
        own_args, own_kwargs = keras.tree.pack_sequence_as((args, kwargs), given)
        with pairing.enter(branch):
            outputs = method(*own_args, **own_kwargs)
        left = _left(branch)
        found["left"] = [(name, key) for name, key, _ in left]
        return outputs, *(value for _, _, value in left)

    values = [leaves[place] for place in places]
    values += [pivot.activations[layer] for layer in read]
    outputs, *left = keras.remat(block)(*values)
    for (name, key), value in zip(found["left"], left, strict=True):
        held = getattr(scope, name)
        if isinstance(held, dict):
            held[key] = value
        else:
            held.append(value)
    return outputs


def _is_real(leaf):
    return ops.is_tensor(leaf) and keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(leaf.dtype)
    )


def _branch(scope):
    """A pass as `scope` is, in which nothing has been left yet."""
    branch = copy.copy(scope)
    for name in _LEFT:
        if isinstance(getattr(branch, name, None), (dict, list)):
            setattr(branch, name, type(getattr(branch, name))())
    return branch


def _left(branch):
    """`(attribute, key or None, tensor)` of all that was left in a pass."""
    left = []
    for name in _LEFT:
        held = getattr(branch, name, None)
        if isinstance(held, dict):
            left += [(name, key, value) for key, value in held.items()]
        elif isinstance(held, list):
            left += [(name, None, value) for value in held]
    return left
