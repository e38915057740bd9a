"""Files that say when they are damaged. Not public.

It is against accidents, and not against an enemy, who can write the checksum too.
"""

import hashlib
import json
import os
from typing import Any

_OWN = "sha256"


def file_digest(path: "str | os.PathLike[str]") -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sealed(values: dict[str, Any]) -> bytes:
    """A JSON file of these values and of their checksum."""
    return _as_bytes({**values, _OWN: _digest(values)})


def unsealed(content: bytes) -> dict[str, Any]:
    """The values that `sealed` made this file of.

    Raises:
        ValueError: where a byte is another one.
    """
    try:
        values = json.loads(content)
        is_whole = content == _as_bytes(values)
        found = values.pop(_OWN, None)
    except (ValueError, AttributeError, RecursionError):  # not UTF-8, JSON, or a dict
        values, is_whole, found = {}, False, None
    if not is_whole or found != _digest(values):
        raise ValueError("damaged, or changed by hand")
    return values


def _as_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
