"""Numbers as people read them: figures, counts, bytes, durations. The templates' filters of the same names."""

from __future__ import annotations

import math
from typing import Any

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def figure(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits (and a tenth) and thousands apart; nothing as a dash, else as it is."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if value and (abs(value) < 1e-4 or abs(value) >= 1e9):
        return _exponent(f"{value:.{max(1, digits - 2)}e}")
    whole = math.floor(math.log10(abs(value))) + 1 if value else 1
    text = f"{value:,.{max(1 if abs(value) < 1e5 else 0, digits - whole)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _exponent(text: str) -> str:
    """`1.50e-05` -> `1.5e-5`."""
    number, _, power = text.partition("e")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}e{int(power)}"


def count(value: float) -> str:
    """A whole number, thousands apart."""
    return f"{round(value):,}"


def short(value: float, largest: float = 0.0, digits: int = 4) -> str:
    """For an axis: 12,500 -> 12.5k, in the unit that its `largest` has."""
    for least, unit, name in ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if max(abs(value), largest) >= least:
            return f"{value / unit:.{digits}g}{name}" if value else "0"
    if value and abs(value) < 1e-4:
        return _exponent(f"{value:.{digits - 1}e}")
    return f"{value:,.{digits}g}"


def size(value: float) -> str:
    """Bytes."""
    place = min(len(_SIZES) - 1, int(math.log(value, 1024))) if value >= 1 else 0
    return f"{value / 1024**place:.{1 if place else 0}f} {_SIZES[place]}"


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 5 s`, `4 h 10 min`, `2 d 3 h`."""
    for whole, part, big, small in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= whole:
            rest = int(seconds % whole / part)
            return f"{int(seconds // whole)} {big}" + (f" {rest} {small}" if rest else "")
    return f"{seconds:.3g} s"
