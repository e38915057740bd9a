"""keras_cc: borrow a language model's English for its other languages (CC-Tuning)."""

from keras_cc import connections as connections
from keras_cc import data as data
from keras_cc import interventions as interventions
from keras_cc import layers as layers
from keras_cc import losses as losses
from keras_cc import objectives as objectives
from keras_cc import recipes as recipes
from keras_cc.cc_causal_lm import CCCausalLM as CCCausalLM
from keras_cc.connections import FusedConnection as FusedConnection
from keras_cc.connections import SelectedConnection as SelectedConnection
from keras_cc.distillation import distill as distill
from keras_cc.export import export_saved_model as export_saved_model
from keras_cc.families import supported_backbones as supported_backbones
from keras_cc.interventions import Incline as Incline
from keras_cc.interventions import XTransplant as XTransplant
from keras_cc.objectives import DFT as DFT
from keras_cc.objectives import Contrastive as Contrastive
from keras_cc.preprocessing import CCPreprocessor as CCPreprocessor
from keras_cc.search import SearchResult as SearchResult
from keras_cc.search import search as search
from keras_cc.templates import PromptTemplate as PromptTemplate
from keras_cc.version import __version__ as __version__
