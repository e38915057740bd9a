"""What tables are made of: entries, and how numbers are written in them."""

import dataclasses

MISSING = "–"
_MINUS = "\N{MINUS SIGN}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One place in a table: its text, a detail such as an interval, and whether it is bold."""

    text: str
    detail: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: its title, the header's strings, and rows of as many entries."""

    title: str
    header: list[str]
    rows: list[list[Entry]]


def points(value, signed=False):
    """A share in points of 100."""
    if value is None:
        return MISSING
    text = f"{100 * value:{'+' if signed else ''}.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text.replace("-", _MINUS)


def nats(value, signed=False):
    """Nats, to three places."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if signed else ''}.3f}"
    return "0.000" if text in ("-0.000", "+0.000") else text.replace("-", _MINUS)


def number(value, digits=1):
    """Any number."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def bracketed(value, write, signed=False):
    """An interval, `value["low"]` to `value["high"]`; empty where there is none."""
    if value["low"] is None or value["high"] is None:
        return ""
    return f"[{write(value['low'], signed)}, {write(value['high'], signed)}]"
