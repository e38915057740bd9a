"""Where the weights of a connected model lie on a mesh of devices (JAX)."""

from typing import Any

import keras

from keras_cc.backbones.families import FAMILIES

# On which axis of the mesh each dimension of a matrix lies, by a pattern of its path. "in", what a
# matrix reads from or a vocabulary's vectors, is spread over the batch's axis, "out" over the
# model's, as in KerasHub's own maps.
_SHARED = {
    "token_embedding/reverse_embeddings": ("in", "out"),
    ".*/(query|key|value)(_dense)?/bias": ("out", None),
}
_BLOCKS = {
    "(embeddings/)?token_embedding/embeddings": ("out", "in"),
    "(embeddings/)?position_embedding/embeddings": (None, "out"),
    ".*/(query|key|value)(_dense)?/kernel": ("in", "out", None),
    ".*/query_key_value/kernel": ("in", "out", None),
    ".*/query_key_value/bias": ("out", None),
    ".*/self_attn/[qkv]_proj/kernel": ("in", "out"),
    "(.*/)?o_proj/kernel": ("out", None, "in"),
    ".*/output_dense/kernel": ("out", "in"),
    ".*/feedforward_(intermediate|gate)_dense/kernel": ("in", "out"),
    ".*/(gate_proj|up_proj|dense_h_to_4h|mlp_intermediate_dense)/kernel": ("in", "out"),
    ".*/(feedforward_output_dense|down_proj|dense_4h_to_h|mlp_output_dense)/kernel": ("out", "in"),
}
_OUTPUT = {".*/attention_output/kernel": ("out", None, "in")}
# Where a family's matrices are not as most families' are.
_OF_FAMILY = {
    "Gemma3Backbone": {
        "token_embedding/embeddings": ("out", "in"),
        ".*/(query|key|value)/kernel": ("out", "in", None),
        ".*/ffw_gating(_2)?/kernel": ("in", "out"),
        ".*/ffw_linear/kernel": ("out", "in"),
        **_OUTPUT,
    },
    "GPTNeoXBackbone": _BLOCKS | {".*/attention_output/kernel": ("out", "in")},
}
_FLARE_UP = "cc_(query|value).*/low_rank/up"
_CONNECTION = {
    ".*/decision_gate/kernel": ("in", "out"),
    ".*(transform_matrix|pooled_transform)/delta": ("in", "out"),
    ".*/(transform_matrix|pooled_transform)/down": ("in", None),
    ".*/(transform_matrix|pooled_transform)/up": (None, "out"),
    "layer_selector/kernel": ("in", None),
    "cc_(query|value).*/low_rank/down": ("in", None),
    _FLARE_UP: (None, "out", None),
}


def layout_map(
    backbone: Any,
    device_mesh: "keras.distribution.DeviceMesh",
    batch_dim_name: str = "batch",
    model_dim_name: str = "model",
) -> "keras.distribution.LayoutMap":
    """Where each matrix of a model and of its connection lies: KerasHub's map, and ours.

    For the families that KerasHub has a map for (Gemma, Llama, Qwen) it is that one, otherwise one
    of the same kind: what a matrix reads lies on the batch's axis of the mesh, what it writes, and
    an attention's heads, on the model's. To it come the matrices that `keras_cc` adds:
    gates, transforms, selectors, FLARE's. Vectors are whole on each device.

    Args:
        backbone: a KerasHub backbone or its class, or the class' name: `"Gemma3Backbone"`.
        device_mesh: a `keras.distribution.DeviceMesh` of two axes.
        batch_dim_name, model_dim_name: what they are called.

    Returns:
        A `keras.distribution.LayoutMap`, to which rules can be added.

    Raises:
        ValueError: for a backbone that is not supported, or a mesh without such an axis.

    Example:

    ```python
    if keras.backend.backend() == "jax":
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
        layouts = keras_cc.distribution.layout_map("Gemma3Backbone", mesh)
        layouts["decoder_block_0/ffw_linear/kernel"]
    ```

    Source: `get_layout_map` of KerasHub's Gemma, after the layout of its authors
    (arXiv 2403.08295).
    """
    name = backbone if isinstance(backbone, str) else _class_of(backbone).__name__
    known = [family.backbone for family in FAMILIES]
    if name not in known:
        raise ValueError(f"`backbone` must be one of {known}. Received: backbone={backbone!r}")
    axes = {"in": batch_dim_name, "out": model_dim_name, None: None}
    lacking = [axis for axis in axes.values() if axis and axis not in device_mesh.axis_names]
    if lacking:
        raise ValueError(
            f"`device_mesh` must have the axes {batch_dim_name!r} and {model_dim_name!r}. "
            f"Received: axis_names={device_mesh.axis_names}"
        )
    found = keras.distribution.LayoutMap(device_mesh)
    hub = getattr(_class_named(name), "get_layout_map", None)
    if hub is not None:
        found.update(hub(device_mesh, model_dim_name, batch_dim_name))
        rules: dict[str, tuple[str | None, ...]] = {}
    else:
        rules = _OF_FAMILY.get(name, _BLOCKS | _OUTPUT)
    rules = rules | _SHARED | _CONNECTION
    if name == "SmolLM3Backbone":  # whose heads are in one dimension
        rules[_FLARE_UP] = (None, "out")
    for pattern, dimensions in rules.items():
        found[pattern] = tuple(axes[one] for one in dimensions)
    return found


class ModelParallel(keras.distribution.ModelParallel):
    """`keras.distribution.ModelParallel` that leaves whole what the mesh does not divide.

    A model of one head for keys and values has nothing to share out there, and a vocabulary of
    50,257 words no even parts: JAX refuses both. Such a dimension is whole on each device, and
    `left_whole` says which.

    Args:
        layout_map: of `keras_cc.distribution.layout_map`.
        batch_dim_name, **kwargs: as `keras.distribution.ModelParallel` takes them.

    Example:

    ```python
    if keras.backend.backend() == "jax":
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
        layout = keras_cc.distribution.layout_map("Gemma3Backbone", mesh)
        parallel = keras_cc.distribution.ModelParallel(layout_map=layout)
        with parallel.scope():
            causal_lm, tokenizer = keras_cc.load_preset("demo:gemma3_270m")
        parallel.left_whole
    ```
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: From a variable's path to the dimensions that are whole though a rule would share them.
        self.left_whole: dict[str, list[int]] = {}

    def get_variable_layout(self, variable: Any) -> "keras.distribution.TensorLayout":
        """The layout of a variable, on the axes of the mesh that divide its dimensions."""
        layout = super().get_variable_layout(variable)
        sizes = dict(zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True))
        whole = [
            n
            for n, (axis, size) in enumerate(zip(layout.axes, variable.shape, strict=True))
            if axis is not None and size % sizes[axis]
        ]
        if not whole:
            return layout
        self.left_whole[variable.path] = whole
        axes = [None if n in whole else axis for n, axis in enumerate(layout.axes)]
        return keras.distribution.TensorLayout(axes, self.device_mesh)


def shared_out(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch whose rows lie on the devices that share it out, so that each computes its own.

    Args:
        inputs: dict of arrays `(B, ...)`.

    Returns:
        The same values, on the mesh of Keras' distribution. As they came where there is none, where
        its replicas do not divide `B`, and where several processes hold the mesh.
    """
    spread = keras.distribution.distribution()
    if spread is None or keras.backend.backend() != "jax" or spread.num_processes > 1:
        return inputs
    if any(len(value) % spread.num_model_replicas for value in inputs.values()):
        return inputs
    return {
        name: keras.distribution.distribute_tensor(value, spread.get_data_layout(value.shape))
        for name, value in inputs.items()
    }


def _class_of(backbone: Any) -> type:
    return backbone if isinstance(backbone, type) else type(backbone)


def _class_named(name: str) -> Any:
    import keras_hub

    return getattr(keras_hub.models, name, None)
