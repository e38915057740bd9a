"""Connections: what training changes in the forward pass."""

import keras

from keras_cc.connections.connection import Connection as Connection
from keras_cc.connections.flare import FlareConnection as FlareConnection
from keras_cc.connections.fused import FusedConnection as FusedConnection
from keras_cc.connections.selected import SelectedConnection as SelectedConnection

CONNECTIONS = {
    "fused": FusedConnection,
    "selected": SelectedConnection,
    "flare": FlareConnection,
}


def get(identifier):
    """A connection from its name, its configuration, an object, or None (plain fine-tuning).

    Args:
        identifier: `"fused"`, `"selected"`, `"flare"`, a `Connection`, the dict that
            `keras.saving` made of one, or None.

    Returns:
        A connection object, or None.

    Raises:
        ValueError: for anything else.

    Example:

    ```python
    keras_cc.connections.get("fused").gate  # "dimension"
    ```
    """
    if isinstance(identifier, dict):
        identifier = keras.saving.deserialize_keras_object(identifier)
    if identifier is None or isinstance(identifier, Connection):
        return identifier
    if isinstance(identifier, str) and identifier in CONNECTIONS:
        return CONNECTIONS[identifier]()
    raise ValueError(
        f"`connection` must be one of {sorted(CONNECTIONS)}, a connection object such as "
        f"`keras_cc.FusedConnection()`, or None. Received: connection={identifier!r}"
    )
