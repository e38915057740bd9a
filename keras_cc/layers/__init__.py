"""The connection's layers and the adapters', in pure Keras."""

from keras_cc.layers.adapted_feed_forward import AdaptedFeedForward as AdaptedFeedForward
from keras_cc.layers.alignment import align as align
from keras_cc.layers.bottleneck_adapter import BottleneckAdapter as BottleneckAdapter
from keras_cc.layers.cc_feed_forward import CCFeedForward as CCFeedForward
from keras_cc.layers.decision_gate import DecisionGate as DecisionGate
from keras_cc.layers.flare_projection import FlareProjection as FlareProjection
from keras_cc.layers.invertible_adapter import InvertibleAdapter as InvertibleAdapter
from keras_cc.layers.layer_selector import LayerSelector as LayerSelector
from keras_cc.layers.transform_matrix import TransformMatrix as TransformMatrix
