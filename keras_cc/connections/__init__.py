"""Connections: what training changes in the forward pass."""

import keras

from keras_cc.connections.fused import FusedConnection as FusedConnection

CONNECTIONS = {"fused": FusedConnection}


def get(identifier):
    """A connection from its name, its configuration, an object, or None (plain fine-tuning).

    Args:
        identifier: `"fused"`, a `FusedConnection`, the dict that `keras.saving` made of
            one, or None.

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
    if identifier is None or isinstance(identifier, tuple(CONNECTIONS.values())):
        return identifier
    if isinstance(identifier, str) and identifier in CONNECTIONS:
        return CONNECTIONS[identifier]()
    raise ValueError(
        f"`connection` must be one of {sorted(CONNECTIONS)}, a connection object such as "
        f"`keras_cc.FusedConnection()`, or None. Received: connection={identifier!r}"
    )
