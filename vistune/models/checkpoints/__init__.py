"""The checkpoint formats, found by what lies in a folder: one file of this package each, with `FORMAT`.

Every format gives the same thing: the model's tensors, not yet read, by the names that its family's folder has, and
what else such a folder says. Whatever opens a model begins here.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vistune.models import hub
from vistune.models.folders import Described, read_config
from vistune.models.weights import Entry


@dataclass(kw_only=True)
class Checkpoint:
    """A model as one format holds it; no tensor has been read yet."""

    format: str
    why: str
    """What it was recognised by, in words."""
    said: Described
    """What a model folder of its family would say; `said.origin` is what writing this format again needs."""
    tensors: dict[str, Entry]
    """By the names that the family publishes (`Family.stored_name`); tied weights once."""
    kept: dict[str, Entry] = field(default_factory=dict)
    """What the family's folder has no place for, by the format's own names; a model folder keeps it in a file beside
    its weights, so that the way back gives the same file."""


class Format(Protocol):
    """One way in which models lie on disk."""

    name: str
    holds: str
    """What it holds, in a few words, for --help and for errors."""

    def recognises(self, folder: Path) -> str:
        """What says that `folder` (or file) is of this format; empty when nothing does. By contents, never by name."""

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        """Open `folder`. `base`: the other half of what is only an adapter, or a folder with what the format lacks.
        `said` are template, image and options of `vistune.models.folders.describe`. ValueError for what is not whole.
        """

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write `checkpoint` into `folder`, which exists and is empty. ValueError, before anything is written, for a
        model that the format cannot hold."""


@functools.cache
def formats() -> dict[str, Format]:
    """Every format by its name."""
    found: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        format: Format | None = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FORMAT", None)
        if format is not None:
            found[format.name] = format
    return found


def named(name: str) -> Format:
    """The format of this name. ValueError lists them."""
    try:
        return formats()[name]
    except KeyError:
        raise ValueError(f"checkpoint format {name!r}, {_known()}") from None


def recognise(folder: Path | str) -> tuple[Format, str]:
    """The format of a folder (or of a single file), and what says so. ValueError for none and for several."""
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder")
    claims = [(format, why) for format in formats().values() if (why := format.recognises(folder))]
    if len(claims) == 1:
        return claims[0]
    if claims:
        raise ValueError(f"{folder}: could be {' or '.join(f'{format.name} ({why})' for format, why in claims)}")
    if (folder / "config.json").is_file():
        raise ValueError(f"{folder}: config.json says model_type {read_config(folder).get('model_type')!r}, {_known()}")
    files = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else [folder.name]
    raise ValueError(f"{folder}: holds {', '.join(files) or 'nothing'}, {_known()}")


def _known() -> str:
    known = "\n  ".join(f"{each.name}: {each.holds}" for each in formats().values())
    return f"which no checkpoint format takes; there are\n  {known}"


def read(
    folder: Path | str,
    *,
    base: Path | str | None = None,
    template: str | None = None,
    image: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open a checkpoint in whatever format it is: its folder or file, a finished run's folder, or a hub id.

    ValueError for what is not whole or fits no format.
    """
    found = hub.resolve(folder, "model")
    other = None if base is None else hub.resolve(base, "base")
    format, _ = recognise(found)
    return format.read(found, base=other, template=template, image=image, options=options)
