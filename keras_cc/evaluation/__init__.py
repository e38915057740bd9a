"""Does it help? Benchmarks, their scores, and the intervals around them.

Needs the extra: `pip install "keras-cc[evaluation]"`.
"""

import importlib

from keras_cc.calibration.atlas import GateAtlas as GateAtlas
from keras_cc.calibration.atlas import gate_atlas as gate_atlas
from keras_cc.evaluation import metrics as metrics
from keras_cc.evaluation import statistics as statistics
from keras_cc.evaluation import tasks as tasks
from keras_cc.evaluation.choice import choose as choose
from keras_cc.evaluation.connection_maps import ConnectionMap as ConnectionMap
from keras_cc.evaluation.connection_maps import connection_map as connection_map
from keras_cc.evaluation.nats import answer_nats as answer_nats
from keras_cc.evaluation.scorer import LogLikelihood as LogLikelihood
from keras_cc.evaluation.scorer import Scorer as Scorer
from keras_cc.evaluation.task_scores import TaskResult as TaskResult
from keras_cc.evaluation.task_scores import evaluate as evaluate
from keras_cc.evaluation.tasks import Task as Task

# What needs packages of the extra, by the module that it is in.
_ON_USE: dict[str, str] = {"KerasLM": "keras_cc.evaluation.harness"}


def __getattr__(name):
    if name in _ON_USE:
        return getattr(importlib.import_module(_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
