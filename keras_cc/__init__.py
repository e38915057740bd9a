"""keras_cc: borrow a language model's English for its other languages (CC-Tuning).

This file is the table of contents. What is a folder here has a face of its own.
"""

import importlib
from typing import TYPE_CHECKING, Any

# The model, and what it is connected by.
from keras_cc import adapters as adapters
from keras_cc import connections as connections
from keras_cc import layers as layers
from keras_cc.cc_causal_lm import CCCausalLM as CCCausalLM
from keras_cc.connections import FlareConnection as FlareConnection
from keras_cc.connections import FusedConnection as FusedConnection
from keras_cc.connections import SelectedConnection as SelectedConnection
from keras_cc.backbones.families import supported_backbones as supported_backbones

# Data: rows of text, and the arrays they become.
from keras_cc import data as data
from keras_cc.preprocessing import templates as templates
from keras_cc.preprocessing import CCPreprocessor as CCPreprocessor
from keras_cc.preprocessing.templates import PromptTemplate as PromptTemplate

# Training: what is compared, extra losses, and what watches.
from keras_cc import callbacks as callbacks
from keras_cc import distribution as distribution
from keras_cc import losses as losses
from keras_cc import objectives as objectives
from keras_cc import recipes as recipes
from keras_cc.distillation import distill as distill
from keras_cc.objectives import DFT as DFT
from keras_cc.objectives import Consistency as Consistency
from keras_cc.objectives import Contrastive as Contrastive
from keras_cc.objectives import SelfDistillation as SelfDistillation
from keras_cc.objectives import TRepLiNa as TRepLiNa
from keras_cc.training.checkpoints import Checkpoints as Checkpoints

# Inference: transforms, and the search over their options.
from keras_cc import interventions as interventions
from keras_cc.interventions import Incline as Incline
from keras_cc.interventions import Shift as Shift
from keras_cc.interventions import XTransplant as XTransplant
from keras_cc.interventions.search import SearchResult as SearchResult
from keras_cc.interventions.search import search as search

# Models in and out: real weights to try it on, presets, SavedModels.
from keras_cc import export as export
from keras_cc.export import export_saved_model as export_saved_model
from keras_cc import demo as demo
from keras_cc.presets import load_preset as load_preset
from keras_cc.presets import save_preset as save_preset

from keras_cc.version import __version__ as __version__

# Does it help? Imported when they are first used.
if TYPE_CHECKING:
    from keras_cc import comparison as comparison
    from keras_cc import evaluation as evaluation
    from keras_cc import laboratory as laboratory
    from keras_cc import report as report

_ON_USE = ("comparison", "evaluation", "laboratory", "report")


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return importlib.import_module(f"keras_cc.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_USE} - {"TYPE_CHECKING", "Any", "importlib"})
