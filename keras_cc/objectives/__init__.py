"""Objectives: extra losses on a pair, beside the task loss and the connection's."""

import keras

from keras_cc.objectives.consistency import Consistency as Consistency
from keras_cc.objectives.contrastive import Contrastive as Contrastive
from keras_cc.objectives.dft import DFT as DFT
from keras_cc.objectives.objective import Objective as Objective
from keras_cc.objectives.objective import PairStates as PairStates
from keras_cc.objectives.self_distillation import SelfDistillation as SelfDistillation
from keras_cc.objectives.treplina import TRepLiNa as TRepLiNa

OBJECTIVES = {
    "consistency": Consistency,
    "contrastive": Contrastive,
    "dft": DFT,
    "self_distillation": SelfDistillation,
    "treplina": TRepLiNa,
}


def get(identifier):
    """An objective from its name, its configuration, or an object.

    Args:
        identifier: a name in `OBJECTIVES`, such as `"dft"`, an `Objective`, or the dict that
            `keras.saving` made of one.

    Returns:
        An `Objective`.

    Raises:
        ValueError: for anything else.

    Example:

    ```python
    keras_cc.objectives.get("contrastive").temperature  # 0.1
    ```
    """
    return _get(identifier, "objective")


def get_all(objectives):
    """A tuple of objectives from one, or from a list or tuple of them.

    Args:
        objectives: anything that `get` takes, or a list or tuple of such. Empty: none.

    Returns:
        A tuple of `Objective`s in the order given.

    Raises:
        ValueError: for anything else, and for two objectives of the same name.

    Example:

    ```python
    keras_cc.objectives.get_all(["dft", keras_cc.objectives.Contrastive(layer=0)])
    keras_cc.objectives.get_all("dft")  # a tuple of one
    ```
    """
    several = objectives if isinstance(objectives, (list, tuple)) else [objectives]
    found = tuple(_get(identifier, "objectives") for identifier in several)
    names = [objective.name for objective in found]
    if len(set(names)) < len(names):
        raise ValueError(
            "`objectives` must have different names, since each loss is reported under its "
            "objective's name: leave one out, or give a subclass its own `name`. "
            f"Received: objectives={objectives!r}"
        )
    return found


def _get(identifier, argument):
    wanted = identifier
    if isinstance(wanted, dict):
        wanted = keras.saving.deserialize_keras_object(wanted)
    if isinstance(wanted, str) and wanted in OBJECTIVES:
        wanted = OBJECTIVES[wanted]()
    if isinstance(wanted, Objective):
        return wanted
    raise ValueError(
        f"`{argument}` must be one of {sorted(OBJECTIVES)} or an objective object such as "
        f"`keras_cc.objectives.DFT()`. Received: {argument}={identifier!r}"
    )
