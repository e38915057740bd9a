"""Objects of options, and the checks that options go through when they are made.

A check takes the option's name and the value received, and gives the value to keep, or raises a
`ValueError` that names the option, what it takes and what was received.
"""

import abc
import math
from numbers import Integral, Real
from typing import Any


class Options(abc.ABC):
    """An object of options: made from keyword arguments, saved and shown by them."""

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Every option by name; `from_config` takes it back."""

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        options = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({options})"


# ---------------------------------------------------------------- one of several


def choice(name, value, choices):
    """`value`, if it is one of `choices`."""
    if not any(value is one or value == one for one in choices):
        raise ValueError(f"`{name}` must be one of {tuple(choices)}. Received: {name}={value!r}")
    return value


def flag(name, value):
    """`value`, if it is True or False; 1 and 0 are neither."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be one of {(True, False)}. Received: {name}={value!r}")
    return value


def choice_or_share(name, value, choices):
    """`value`, if it is one of `choices` or a number in [0, 1]."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value in choices or (is_number and 0 <= value <= 1):
        return value
    raise ValueError(
        f"`{name}` must be one of {choices} or a number in [0, 1]. Received: {name}={value!r}"
    )


# ---------------------------------------------------------------- numbers


def number(name, value, most=math.inf, positive=False):
    """`value` as a float, if it is finite, >= 0 (or > 0), and <= `most`."""
    in_range = _is_number(value) and 0 <= value <= most and value < math.inf
    if not in_range or (positive and value == 0):
        limit = "> 0" if positive else ">= 0"
        limit += "" if most == math.inf else f" and <= {most}"
        raise ValueError(f"`{name}` must be a number {limit}. Received: {name}={value!r}")
    return float(value)


def integer(name, value):
    """`value` as an int, if it is an integer."""
    if not _is_integer(value):
        raise ValueError(f"`{name}` must be an integer. Received: {name}={value!r}")
    return int(value)


def count(name, value, least=0):
    """`value` as an int, if it is an integer >= `least`."""
    if not _is_integer(value) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}. Received: {name}={value!r}")
    return int(value)


def choice_or_count(name, value, choices, least=1):
    """`value`, if it is one of `choices`, or as an int, if it is an integer >= `least`."""
    if value in choices:
        return value
    if _is_integer(value) and value >= least:
        return int(value)
    raise ValueError(
        f"`{name}` must be one of {choices} or an integer >= {least}. Received: {name}={value!r}"
    )


# ---------------------------------------------------------------- blocks of a model

_PARTS = ("all", "upper")


def block(name, value):
    """`value` as an int, if it is an integer: a block number, negative ones from the end."""
    if not _is_integer(value):
        raise ValueError(f"`{name}` must be an integer, a block number. Received: {name}={value!r}")
    return int(value)


def block_or_share(name, value):
    """`value`, if it can name a block: an integer, or a float in (0, 1)."""
    if _is_integer(value):
        return int(value)
    if isinstance(value, Real) and 0 < float(value) < 1:
        return float(value)
    raise ValueError(
        f"`{name}` must be an integer, a block number (negative: from the end), or a float in "
        f"(0, 1), a share of the model's depth. Received: {name}={value!r}"
    )


def blocks(name, value):
    """`value`, if it is one of `_PARTS`, or as a list, if it is a sequence of block numbers."""
    if isinstance(value, str):
        if value not in _PARTS:
            raise ValueError(
                f"`{name}` must be one of {_PARTS} or a sequence of block numbers. "
                f"Received: {name}={value!r}"
            )
        return value
    wanted = list(value) if hasattr(value, "__iter__") else None
    if not wanted or not all(_is_integer(one) for one in wanted):
        raise ValueError(
            f"`{name}` must be one of {_PARTS} or a non-empty sequence of integers (block "
            "numbers). "
            f"Received: {name}={value!r}"
        )
    return [int(one) for one in wanted]


def block_number(name, value, num_blocks):
    """The block, from 0, that an option names in a model of `num_blocks`.

    A share of the depth names the block at whose output that share of the blocks has run,
    rounded: 0.5 is block 15 of 32, the sixteenth.
    """
    if isinstance(value, float):
        return max(round(value * num_blocks), 1) - 1
    if not -num_blocks <= value < num_blocks:
        raise ValueError(
            f"`{name}` must be a block number from 0 to {num_blocks - 1} (or a negative one from "
            f"the end) for this model of {num_blocks} blocks. Received: {name}={value!r}"
        )
    return value % num_blocks


def block_numbers(name, value, num_blocks):
    """The blocks, sorted and from 0, that an option names in a model of `num_blocks`."""
    if value == "all":
        return list(range(num_blocks))
    if value == "upper":
        return list(range(num_blocks - -(-num_blocks // 3), num_blocks))
    if any(not -num_blocks <= one < num_blocks for one in value):
        raise ValueError(
            f"`{name}` must hold block numbers from 0 to {num_blocks - 1} (or negative ones "
            f"from the end) for this model of {num_blocks} blocks. Received: {name}={value}"
        )
    return sorted({one % num_blocks for one in value})


def _is_integer(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)
