"""The on-disk formats, found by exact name: one file of this package each.

Knows what a reader is; what is inside a file only the format's own module knows.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vistune.samples import Sample


class Reader(Protocol):
    """Random access to the samples of one source. Cheap to send to another process."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Sample:
        """The sample of `row`. Raises `SampleError` when the row cannot be used."""
        ...

    def fingerprint(self) -> str:
        """Changes when the source may have changed; the same on every call otherwise."""
        ...


class Opener(Protocol):
    """How a format's module opens a source. `cache`: a folder where it may keep what is slow to find again; `options`:
    what only this format takes (`refuse_unknown` names what it does not)."""

    def __call__(
        self, path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
    ) -> Reader: ...


FORMATS: dict[str, Opener] = {}


def register(name: str) -> Callable[[Opener], Opener]:
    """Decorator: the opener of the format `name`. Raises ValueError for a name that is taken."""

    def add(opener: Opener) -> Opener:
        if name in FORMATS:
            raise ValueError(f"data format {name!r} is registered twice. Registered: {', '.join(sorted(FORMATS))}")
        FORMATS[name] = opener
        return opener

    return add


def open_source(
    path: str,
    format: str = "llava_json",
    images: str | Sequence[str] = "",
    name: str = "",
    cache: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Reader:
    """Open one source. `images`: the folder or folders its picture paths are relative to; `name`: how faults call it.

    Raises ValueError for an unknown format or option, and for a file that cannot be read at all.
    """
    if format not in FORMATS:
        raise ValueError(f"{path}: there is no data format {format!r}. Formats: {', '.join(sorted(FORMATS))}")
    folders = [images] if isinstance(images, str) else list(images)
    return FORMATS[format](
        path, [folder for folder in folders if folder], name or Path(path).name, cache, options or {}
    )


def refuse_unknown(path: str, format: str, options: Mapping[str, Any], known: Sequence[str] = ()) -> None:
    """Raises ValueError for an option that `format` does not take."""
    for key in options:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"{path}: format {format!r} has no option {key!r} (= {options[key]!r}); {takes}")


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
