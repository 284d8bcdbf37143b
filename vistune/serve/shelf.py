"""The models that a server has, by name: one engine for each, and adapters on them that are chosen by name too.

Knows nothing of HTTP.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vistune.generate import open_model
from vistune.serve.engine import Engine
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused


@dataclass(frozen=True, kw_only=True)
class Served:
    """What can be asked for by `name`: a model, or with `adapter` one of its adapters; `base` is then the model's name.

    `created`: seconds since 1970.
    """

    name: str
    engine: Engine
    adapter: str = ""
    created: int = 0
    base: str = ""


class Shelf:
    """See the module. `served` never waits; `look` does."""

    def __init__(self, models: Sequence[Served]):
        self._models = tuple(models)

    @property
    def engines(self) -> list[Engine]:
        return [one.engine for one in self._models]

    def start(self) -> None:
        for engine in self.engines:
            engine.start()

    def stop(self) -> None:
        """End every engine; whoever still runs hears an error."""
        for engine in self.engines:
            engine.stop()

    def look(self) -> None:
        """See what adapters have come and gone in the watched folder; at most once a second. Reads files: call it in a
        thread (`asyncio.to_thread(shelf.look)`), before the list is shown and when a name is not known."""

    def served(self) -> list[Served]:
        """Models first, then adapters. From any thread, at once."""
        return list(self._models)

    def find(self, name: str) -> Served:
        """What is called `name`; the only one where none is named. Refused: 404, with the names that there are."""
        known = {one.name: one for one in self.served()}
        if not name and len(known) == 1:
            return next(iter(known.values()))
        if name not in known:
            raise Refused(404, f"no such model; there are {', '.join(known)}", param="model", code="model_not_found")
        return known[name]


def open_shelf(
    models: Sequence[str],
    *,
    adapters: Sequence[str] = (),
    adapter_folder: str | Path | None = None,
    base: str = "",
    device: str = "auto",
    precision: str = "",
    quantize: str = "",
    template: str = "",
    limits: Limits | None = None,
) -> Shelf:
    """Every model on its device, not yet started. `models`: FOLDER or NAME=FOLDER each. ValueError for what cannot be
    opened and for names that are not one thing's alone."""
    limits, served = limits or Limits(), []
    for name, folder in _named(models):
        loaded = open_model(folder, device, quantize, base or None, template=template, precision=precision)
        served.append(Served(name=name, engine=Engine(loaded, limits, name), created=int(time.time())))
    return Shelf(served)


def _named(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    sources: dict[str, str] = {}
    for argument in arguments:
        name, folder = split(argument)
        if name in sources:
            raise ValueError(f"{sources[name]} and {folder} are both called {name!r}; say NAME=FOLDER for one of them")
        sources[name] = folder
        yield name, folder


def split(argument: str) -> tuple[str, str]:
    """NAME=FOLDER, or FOLDER, whose name is its own: for `model`, `merged` and `adapter` of a run, the run's."""
    said, _, rest = argument.partition("=")
    if rest and re.fullmatch(r"[\w.:-]+", said) and not Path(argument).exists():
        return said, rest
    folder = Path(argument).resolve() if Path(argument).exists() else Path(argument)
    inside = folder.name in ("model", "merged", "adapter") and (folder.parent / "recipe.toml").is_file()
    return (folder.parent if inside else folder).name, argument
