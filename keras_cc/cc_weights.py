"""The weights of connection and intervention in a file of their own, options beside them.

The options hold a checksum of the weights' file and one of themselves: one damaged byte anywhere is
found before anything is read into a model. It is against accidents, and not against an enemy, who
can write both; what such a file can do is to be refused, or to be other weights of the same shapes.
An HDF5 file is held to what `write` makes of it: arrays that lie in the file itself, each as long
as it says.
"""

import io
import json
import os

import keras
import numpy as np
from keras import ops

from keras_cc.checksums import file_digest, sealed, unsealed
from keras_cc.whole_files import whole_file

FORMAT = 3
# Options that other weights, or another use of them, come from.
_OPTIONS = {
    *("gate", "transform", "rank", "alpha", "layers", "alignment", "sink_tokens", "site"),
    "languages",
}
_BACKBONE_FACTS = ("num_layers", "hidden_dim", "intermediate_dim", "vocabulary_size")


def save(model, path):
    """What `CCCausalLM.save_cc_weights` does, see there."""
    if model.connection is None and model.intervention is None:
        raise ValueError(
            "There is no connection and no intervention to save. "
            "Received: connection=None, intervention=None"
        )
    weights = {key: to_numpy(variable) for key, variable in _variables(model).items()}
    options = {
        "connection": keras.saving.serialize_keras_object(model.connection),
        "intervention": keras.saving.serialize_keras_object(model.intervention),
    }
    write(path, weights, options, model.causal_lm.backbone)


def write(path, weights, options, backbone):
    """Write weights, and options beside them.

    Args:
        path: a file name that ends in `.safetensors` or `.weights.h5`.
        weights: a dict of NumPy arrays.
        options: a dict that JSON can hold.
        backbone: the backbone that the weights are for.
    """
    path = os.fspath(path)
    write_weights = _by_ending(path, {".safetensors": _write_safetensors, ".weights.h5": _write_h5})
    options = {"format": FORMAT, **options, "backbone": backbone_facts(backbone)}
    options["shapes"] = {key: list(value.shape) for key, value in weights.items()}
    with whole_file(path) as unfinished, whole_file(_options_path(path)) as unfinished_options:
        write_weights(unfinished, weights)
        options["weights_sha256"] = file_digest(unfinished)
        unfinished_options.write_bytes(sealed(options))


def load(model, path):
    """What `CCCausalLM.load_cc_weights` does, see there."""
    weights, options = read(path, model.causal_lm.backbone)
    path = os.fspath(path)
    _check_options(path, options, model)
    variables = _variables(model)
    if set(weights) != set(variables):
        raise ValueError(
            f"`path` must hold exactly the weights {sorted(variables)}. Received: {sorted(weights)}"
        )
    check_shapes(path, weights, variables)
    for key, value in weights.items():
        variables[key].assign(value)


def read(path, backbone):
    """What `write` wrote for this backbone: `(weights, options)`.

    Raises:
        ValueError: if there is no such file, or it is of another format or backbone.
    """
    path = os.fspath(path)
    read_weights = _by_ending(path, {".safetensors": _read_safetensors, ".weights.h5": _read_h5})
    for needed in (path, _options_path(path)):
        if not os.path.exists(needed):
            raise ValueError(
                f"`path` must be what `save_cc_weights` wrote. Received: no {needed!r}"
            )
    options = _read_options(_options_path(path))
    _check_kinds(_options_path(path), options)
    if options.get("weights_sha256") != file_digest(path):
        raise ValueError(
            f"`path` must hold the weights that {_options_path(path)!r} was written with: it is "
            f"damaged, or another file. Copy both again, or save anew. Received: path={path!r}"
        )
    here = backbone_facts(backbone)
    if options["backbone"] != here:
        raise ValueError(
            f"`path` holds weights of another backbone: this model's is {here}. "
            f"Received: weights for {options['backbone']}"
        )
    try:
        weights = read_weights(path)
        wrong = {key: str(one.dtype) for key, one in weights.items() if one.dtype != np.float32}
        if wrong:
            raise ValueError(f"arrays that are not of float32: {wrong}")
    except Exception as error:  # the libraries that read know errors of any kind
        raise ValueError(
            f"`path` must hold the arrays that `save_cc_weights` writes. Received: {error} "
            f"in {path!r}"
        ) from error
    return weights, options


def _read_options(path):
    with open(path, "rb") as file:
        content = file.read()
    try:
        options = unsealed(content)
    except ValueError:
        found = _format_of(content)
        if found == FORMAT:
            raise ValueError(
                "`path` has options that are damaged, or were changed by hand: copy them again, "
                f"or save anew. Received: {path!r}"
            ) from None
    else:
        found = options.get("format")
    if found != FORMAT:
        raise ValueError(
            f"`path` must be of format {FORMAT}, which this version of keras_cc reads. "
            f"Received: format={found!r} in {path!r}"
        )
    return options


def _check_kinds(path, options):
    """Refuse options that are sealed, and not what `write` seals."""
    parts = [options.get(part) for part in ("connection", "intervention", "madx")]
    if not isinstance(options.get("backbone"), dict) or not all(
        one is None or isinstance(one, dict) for one in parts
    ):
        raise ValueError(
            "`path` must have options that `save_cc_weights` wrote. "
            f"Received: {sorted(options)} in {path!r}"
        )


def _format_of(content):
    """The format that an unsealed file has, or this one's where that cannot be told."""
    try:
        return json.loads(content).get("format", FORMAT)
    except (ValueError, AttributeError, RecursionError):  # not UTF-8, JSON, or a dict
        return FORMAT


def check_shapes(path, weights, variables):
    """Refuse weights, of a subset of the keys of `variables`, that do not fit."""
    for key, value in weights.items():
        if tuple(value.shape) != tuple(variables[key].shape):
            raise ValueError(
                f"{key} must have the shape {tuple(variables[key].shape)}. "
                f"Received: shape {tuple(value.shape)} in {path!r}"
            )


def _check_options(path, options, model):
    """The options that decide what the weights mean must agree with the model's."""
    for part in ("connection", "intervention"):
        saved, mine = options.get(part), getattr(model, part)
        if (saved or {}).get("class_name") != (None if mine is None else type(mine).__name__):
            raise ValueError(
                f"`path` was saved with another {part}: make the model with `{part}={saved}`. "
                f"Received: path={path!r} for a model with {part}={mine!r}"
            )
        config = {} if mine is None else mine.get_config()
        saved_config = (saved or {}).get("config")
        if not isinstance(saved_config, dict):
            saved_config = {}
        for name in _OPTIONS & set(config):
            if _jsonable(config[name]) != saved_config.get(name):
                raise ValueError(
                    f"`path` was saved from a model whose {part} has "
                    f"{name}={saved_config.get(name)!r}, this one has {name}={config[name]!r}: "
                    f"make the model with `{part}={saved}`. Received: path={path!r}"
                )


def _variables(model):
    return {
        f"{path}/{variable.name}": variable
        for path, layer in model.connection_layers().items()
        for variable in layer.weights
    }


def backbone_facts(backbone):
    facts = {name: getattr(backbone, name, None) for name in _BACKBONE_FACTS}
    return {"class": type(backbone).__name__, **facts}


def _options_path(path):
    return path + ".json"


def _by_ending(path, choices):
    for ending, choice in choices.items():
        if path.endswith(ending):
            return choice
    raise ValueError(f"`path` must end in one of {sorted(choices)}. Received: path={path!r}")


def _write_safetensors(path, weights):
    from safetensors.numpy import save_file

    save_file(weights, path)


def _read_safetensors(path):
    from safetensors.numpy import load_file

    return load_file(path)


def _write_h5(path, weights):
    import h5py

    # In memory first: where a disk is full, HDF5's own writing ends the process, not the call.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for key, value in weights.items():
            file[key] = value
    path.write_bytes(content.getbuffer())


def _read_h5(path):
    import h5py

    found = {}
    with h5py.File(path, "r") as file:

        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                stored = item.id.get_storage_size()
                lies = (item.chunks, item.external, item.is_virtual, stored)
                if lies != (None, None, False, item.nbytes):
                    raise ValueError(f"{name}, which is not a plain array")
                found[name] = np.asarray(item)

        file.visititems(visit)
    return found


def to_numpy(variable):
    return np.ascontiguousarray(ops.convert_to_numpy(ops.cast(variable, "float32")))


def _jsonable(value):
    return list(value) if isinstance(value, (list, tuple, range)) else value
