"""Callbacks: samples and gates to watch while training, and the guards that `fit` adds."""

from keras_cc.callbacks.gate_statistics import GateStatistics as GateStatistics
from keras_cc.callbacks.sample_generations import SampleGenerations as SampleGenerations
from keras_cc.training.guards import KeepWeights as KeepWeights
from keras_cc.training.non_finite import StopOnNonFiniteLoss as StopOnNonFiniteLoss
from keras_cc.training.watching import WatchNumbers as WatchNumbers
