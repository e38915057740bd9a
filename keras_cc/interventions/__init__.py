"""Interventions: transforms at inference, on a tuned or an untuned model."""

import keras

from keras_cc.interventions.incline import Incline as Incline
from keras_cc.interventions.intervention import Intervention as Intervention
from keras_cc.interventions.shift import Shift as Shift
from keras_cc.interventions.xtransplant import XTransplant as XTransplant


def get(identifier):
    """An intervention from an object or its configuration, or None.

    Args:
        identifier: an `Intervention`, the dict that `keras.saving` made of one, or None.

    Returns:
        An intervention object, or None.

    Raises:
        ValueError: for anything else.

    Example:

    ```python
    keras_cc.interventions.get(keras_cc.Incline(sigma=0.2)).sigma  # 0.2
    ```
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if identifier is None or isinstance(identifier, Intervention):
        return identifier
    raise ValueError(
        "`intervention` must be an intervention object such as `keras_cc.Incline()` or "
        f"`keras_cc.XTransplant(12, 3)`, or None. Received: intervention={identifier!r}"
    )
