"""One row a model family: where in a decoder block its sublayers' outputs come from.

Families are known by the name of their KerasHub backbone class, so that nothing here
imports KerasHub (which imports TensorFlow wherever that is installed).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """Where the connection attaches in one family.

    Attributes:
        backbone: name of the KerasHub backbone class.
        projection: dotted attribute path, from a decoder block, of the layer whose
            output is the feed-forward activation F.
        attention: the same, of the block's self-attention.
        models: model names that people look for.
        query, value: the attention's own attributes of those projections, or None where query,
            key and value are one.
        positions: the backbone's attribute that says how many positions have an embedding, or
            None where positions are rotated and there is no end.
    """

    backbone: str
    projection: str
    attention: str
    models: str
    positions: str | None = None
    query: str | None = "_query_dense"
    value: str | None = "_value_dense"

    @property
    def connectable(self):
        """The paths of all layers that a connection may wrap."""
        own = (self.query, self.value)
        of_attention = [f"{self.attention}.{name}" for name in own if name is not None]
        return [self.projection, *of_attention]


_PUBLIC = {"query": "query_dense", "value": "value_dense"}
# Most KerasHub decoders name them so.
_DENSE, _ATTENTION = "_feedforward_output_dense", "_self_attention_layer"

FAMILIES = (
    Family("GemmaBackbone", "ffw_linear", "attention", "Gemma, Gemma 2", **_PUBLIC),
    Family("Gemma3Backbone", "ffw_linear", "attention", "Gemma 3 (text)", **_PUBLIC),
    Family("LlamaBackbone", _DENSE, _ATTENTION, "Llama 1, Llama 2, TinyLlama, Vicuna"),
    Family("Llama3Backbone", _DENSE, _ATTENTION, "Llama 3, SmolLM2"),
    Family("MistralBackbone", _DENSE, _ATTENTION, "Mistral"),
    Family("QwenBackbone", _DENSE, _ATTENTION, "Qwen 2, Qwen 2.5"),
    Family("Qwen3Backbone", _DENSE, _ATTENTION, "Qwen 3"),
    Family("Phi3Backbone", "feedforward_output_dense", "attention", "Phi-3", **_PUBLIC),
    Family(
        "SmolLM3Backbone", "mlp.down_proj", "self_attn", "SmolLM3", query="q_proj", value="v_proj"
    ),
    Family("GPTNeoXBackbone", _DENSE, _ATTENTION, "GPT-NeoX, Pythia", query=None, value=None),
    Family("FalconBackbone", "dense_4h_to_h", "attention_layer", "Falcon", **_PUBLIC),
    Family("GPT2Backbone", _DENSE, _ATTENTION, "GPT-2", positions="max_sequence_length"),
    Family("OPTBackbone", _DENSE, _ATTENTION, "OPT", positions="max_sequence_length"),
    Family("BloomBackbone", "_mlp_output_dense", _ATTENTION, "BLOOM, BLOOMZ"),
)

REFUSED = {
    "MixtralBackbone": "a mixture of experts has no single feed-forward output to connect",
    "QwenMoeBackbone": "a mixture of experts has no single feed-forward output to connect",
    "Qwen3MoeBackbone": "a mixture of experts has no single feed-forward output to connect",
    "Qwen3_5MoeBackbone": "a mixture of experts has no single feed-forward output to connect",
    "GptOssBackbone": "a mixture of experts has no single feed-forward output to connect",
    "T5Backbone": "an encoder-decoder has two stacks and no prompt prefix to pair",
    "T5GemmaBackbone": "an encoder-decoder has two stacks and no prompt prefix to pair",
    "T5Gemma2Backbone": "an encoder-decoder has two stacks and no prompt prefix to pair",
    "BartBackbone": "an encoder-decoder has two stacks and no prompt prefix to pair",
    "WhisperBackbone": "an encoder-decoder has two stacks and no prompt prefix to pair",
    "MoonshineBackbone": "an encoder-decoder has two stacks and no prompt prefix to pair",
    "Gemma4Backbone": "its blocks read the projection's kernel and never call the layer",
    "Gemma3nBackbone": "its blocks run several residual streams around one feed-forward",
    "PaliGemmaBackbone": "it takes images beside the text",
    "RWKV7Backbone": "it has no transformer feed-forward block",
}


def supported_backbones():
    """Names of the KerasHub backbone classes that `CCCausalLM` connects.

    Returns:
        A list of class names, one a family.

    Example:

    ```python
    "Gemma3Backbone" in keras_cc.supported_backbones()  # True
    ```
    """
    return [family.backbone for family in FAMILIES]


def family_of(backbone):
    """The row of `FAMILIES` that fits a backbone, or a subclass of a fitting one.

    Args:
        backbone: a KerasHub backbone.

    Returns:
        A `Family`.

    Raises:
        ValueError: if there is none, with the reason where there is one, and the list of
            backbones that can be connected.

    Example:

    ```python
    keras_cc.backbones.families.family_of(causal_lm.backbone).projection  # "ffw_linear"
    ```
    """
    by_name = {family.backbone: family for family in FAMILIES}
    for cls in type(backbone).__mro__:
        if cls.__name__ in REFUSED:
            reason = REFUSED[cls.__name__]
            break
        if cls.__name__ in by_name:
            return by_name[cls.__name__]
    else:
        reason = "it is not in the table of families"
    raise ValueError(
        f"{type(backbone).__name__} cannot be connected: {reason}. "
        f"`causal_lm` must have one of these backbones: {', '.join(supported_backbones())}. "
        f"Received: causal_lm.backbone={type(backbone).__name__}"
    )


def owner_of(block, path):
    """The object that holds a sublayer of a decoder block, and the attribute it is held under.

    Args:
        block: a decoder block.
        path: dotted attribute path of a `Family`, from the block.

    Returns:
        `(owner, attribute)`: `getattr(owner, attribute)` is the sublayer.
    """
    *names, attribute = path.split(".")
    for name in names:
        block = getattr(block, name)
    return block, attribute
