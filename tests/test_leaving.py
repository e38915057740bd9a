"""What stays behind: nothing, where a model is refused, disconnected or loses its intervention."""

import connected
import pytest
import tiny

from keras_cc import CCCausalLM, Incline, XTransplant


def tapped(causal_lm):
    return [layer.name for layer in causal_lm.backbone._flatten_layers() if "call" in vars(layer)]


@pytest.mark.parametrize(
    "options",
    [
        {"intervention": XTransplant(0, 0)},
        {"intervention": Incline, "connection": "fused"},
        {"preprocessor": 3},
    ],
)
def test_a_model_that_is_refused_leaves_the_causal_lm_as_it_was(options):
    causal_lm = tiny.causal_lm()
    paths = [v.path for v in causal_lm.weights]
    with pytest.raises((ValueError, TypeError)):
        CCCausalLM(causal_lm, **{"connection": "fused", **options})
    assert [v.path for v in causal_lm.weights] == paths
    CCCausalLM(causal_lm, "fused")


@pytest.mark.parametrize("connection", [None])
def test_disconnect_leaves_no_taps_of_an_intervention(connection):
    model = CCCausalLM(tiny.causal_lm(), connection, intervention=XTransplant(0, 1))
    assert tapped(model.disconnect()) == []


def test_no_taps_of_an_intervention_that_was_taken_off():
    model = CCCausalLM(tiny.causal_lm(), None, intervention=XTransplant(0, 1))
    model.intervention = None
    assert tapped(model.merge()) == []


def test_thawing_the_backbone_leaves_the_matrices_frozen():
    model = CCCausalLM(tiny.causal_lm(), None, intervention=Incline())
    model.causal_lm.backbone.trainable = False
    model.causal_lm.backbone.trainable = True
    assert not [v.path for v in model.trainable_variables if "incline" in v.path]


def test_thawing_the_backbone_leaves_the_pooled_transform_frozen():
    model = CCCausalLM(tiny.causal_lm(), "selected")
    model.causal_lm.trainable = False
    model.causal_lm.trainable = True
    trainable = [v.path for v in model.trainable_variables]
    assert any("layer_selector" in path for path in trainable)
    assert not any("pooled_transform" in path for path in trainable)


@pytest.mark.thorough("fused")
@pytest.mark.parametrize("connection", ["fused", "selected"])
def test_lora_weights_are_saved_by_their_own_layers(connection, tmp_path):
    path = str(tmp_path / "adapter.lora.h5")
    model = CCCausalLM(tiny.causal_lm(), connection)
    model.enable_lora(2)
    causal_lm = model.disconnect()
    drawn = [layer for layer in causal_lm.backbone._flatten_layers() if is_lora(layer)]
    for seed, layer in enumerate(drawn):
        layer.lora_kernel_a.assign(layer.lora_kernel_a + seed)
    causal_lm.backbone.save_lora_weights(path)
    fresh = tiny.causal_lm()
    fresh.backbone.enable_lora(2)
    fresh.backbone.load_lora_weights(path)
    loaded = [layer for layer in fresh.backbone._flatten_layers() if is_lora(layer)]
    assert len(loaded) == len(drawn) > 0
    for one, other in zip(drawn, loaded, strict=True):
        difference = connected.to_numpy(one.lora_kernel_a - other.lora_kernel_a)
        assert abs(difference).max() == 0


def is_lora(layer):
    return getattr(layer, "lora_enabled", False)
