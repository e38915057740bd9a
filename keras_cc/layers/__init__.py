"""The connection's layers, in pure Keras."""

from keras_cc.layers.alignment import align as align
from keras_cc.layers.cc_feed_forward import CCFeedForward as CCFeedForward
from keras_cc.layers.decision_gate import DecisionGate as DecisionGate
from keras_cc.layers.layer_selector import LayerSelector as LayerSelector
from keras_cc.layers.transform_matrix import TransformMatrix as TransformMatrix
