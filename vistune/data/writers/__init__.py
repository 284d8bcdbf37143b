"""The formats that can be written, found by exact name: one file of this package each, mirror of the formats.

Knows what a writer is; how a file is laid out only the format's own module knows.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

from vistune.samples import FaultCode, Sample


class NotHeld(ValueError):
    """A sample that the format cannot hold without losing something of it. Nothing of it has been written."""

    def __init__(self, reason: str, code: FaultCode | str = "not_held"):
        self.code = code
        self.reason = reason
        super().__init__(reason)


class Writer(Protocol):
    """Takes samples one at a time. A context manager: what is written takes its name on leaving, unless by an error."""

    report: dict[str, Any]  # counts; whole after leaving

    def add(self, sample: Sample) -> None:
        """Raises NotHeld, ImageError when a picture's bytes cannot be had; then the sample is left out."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


WRITERS: dict[str, Callable[..., Writer]] = {}


def register(name: str) -> Callable[[Callable[..., Writer]], Callable[..., Writer]]:
    """Decorator: what opens a writer of the format `name`. Raises ValueError for a name that is taken."""

    def add(opener: Callable[..., Writer]) -> Callable[..., Writer]:
        if name in WRITERS:
            raise ValueError(f"writer {name!r} is registered twice. Registered: {', '.join(sorted(WRITERS))}")
        WRITERS[name] = opener
        return opener

    return add


def open_writer(format: str, out: str | Path, **options: Any) -> Writer:
    """A writer of `format` to `out`. Raises ValueError for an unknown format or option, or an `out` that is there."""
    if format not in WRITERS:
        raise ValueError(f"{out}: format {format!r} cannot be written. Formats: {', '.join(sorted(WRITERS))}")
    try:
        return WRITERS[format](Path(out) if "://" not in str(out) else out, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"{out}: writing {format!r}: {str(error).split(')')[-1].strip()}") from None


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
