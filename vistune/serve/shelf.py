"""The models that a server has, by name: one engine for each, and adapters on them that are chosen by name too.

Knows nothing of HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vistune import console
from vistune.generate import open_model
from vistune.models import adapted
from vistune.models.adapted import Adapters
from vistune.models.load import Loaded
from vistune.models.quantize import size, weighed
from vistune.serve import naming
from vistune.serve.answering.engine import Engine
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused
from vistune.serve.watched import Watched

ASIDE = 0.1
"""Share of a GPU's free memory that is set aside for adapters that come later, where a folder is watched."""
SPARE = 60.0
"""Seconds beyond a request's deadline for which an adapter that is gone is kept: whoever had begun may end."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What can be asked for by `name`: a model, or with `adapter` one of its adapters (by the engine's own word for
    it); `base` is then the model's name. `created`: seconds since 1970."""

    name: str
    engine: Engine
    adapter: str = ""
    created: int = 0
    base: str = ""


@dataclass(kw_only=True)
class Model:
    """A model in memory. `folder`: what it was opened from, with links resolved; `asked`: whether it is served under
    its own name, and not for its adapters' sake alone. Its `engine` comes when all that takes memory is there."""

    name: str
    folder: str
    loaded: Loaded
    adapters: Adapters | None
    asked: bool = True
    engine: Engine = field(init=False)


@dataclass(frozen=True)
class Placed:
    """An adapter on a model; `key` is what it is called there."""

    name: str
    model: Model
    key: str
    created: int
    nbytes: int

    @property
    def served(self) -> Served:
        model = self.model
        return Served(name=self.name, engine=model.engine, adapter=self.key, created=self.created, base=model.name)

    def remove(self) -> None:
        """Let go of it, and of what was seen and read for it."""
        assert self.model.adapters is not None
        self.model.adapters.remove(self.key)
        self.model.engine.forget(self.key)


class Shelf:
    """See the module. `served` and `find` never wait; `look` does."""

    def __init__(self, models: Sequence[Model], limits: Limits):
        self.models, self.limits = tuple(models), limits
        self._created = int(time.time())
        self._lock = threading.Lock()
        self._count = 0
        self._given: list[Placed] = []
        self._watched: Watched[Placed] | None = None
        self._gone: list[tuple[float, Placed]] = []
        self._aside = math.inf

    @property
    def engines(self) -> list[Engine]:
        return [one.engine for one in self.models]

    def start(self) -> None:
        for engine in self.engines:
            engine.start()

    def stop(self) -> None:
        """End every engine; whoever still runs hears an error."""
        for engine in self.engines:
            engine.stop()

    def served(self) -> list[Served]:
        """Models first, then adapters. From any thread, at once."""
        own = [Served(name=one.name, engine=one.engine, created=self._created) for one in self.models if one.asked]
        found = [*self._given, *(self._watched.made() if self._watched else ())]
        return [*own, *(one.served for one in found)]

    def find(self, name: str) -> Served:
        """What is called `name`; the only one where none is named. Refused: 404, with the names that there are."""
        known = {one.name: one for one in self.served()}
        if not name and len(known) == 1:
            return next(iter(known.values()))
        if name not in known:
            said = f"no such model; there are {', '.join(known) or 'none at the moment'}"
            raise Refused(404, said, param="model", code="model_not_found")
        return known[name]

    def look(self) -> None:
        """See what adapters have come and gone in the watched folder; at most once a second. Reads files: call it in a
        thread (`asyncio.to_thread(shelf.look)`), before the list is shown and when a name is not known."""
        if self._watched is not None:
            self._watched.look()
        with self._lock:
            now = time.monotonic()
            late = [one for when, one in self._gone if when <= now]
            self._gone = [(when, one) for when, one in self._gone if when > now]
        for one in late:
            one.remove()
            self._aside += one.nbytes

    def put(self, name: str, folder: Path, where: str = "", on: Model | None = None) -> Placed:
        """An adapter laid on the model that it is for, not yet listed. ValueError as `Adapters.add`, and when that
        model cannot be told."""
        where = where or str(folder)
        try:
            model = on or self._model_of(folder)
            assert model.adapters is not None
            with self._lock:
                self._count += 1
                key = f"{name}#{self._count}"
            made = model.adapters.add(key, folder)
            if made.nbytes > self._aside:
                model.adapters.remove(key)
                left = f"{size(max(self._aside, 0))} are left of what was set aside for new adapters"
                raise ValueError(f"{folder}: takes {size(made.nbytes)}, {left}; start again, which makes room")
            self._aside -= made.nbytes
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), where)) from error
        console.say(f"adapter {name} on {model.name}: {size(made.nbytes)}, from {where}")
        return Placed(name, model, key, int(time.time()), made.nbytes)

    def give(self, placed: Placed) -> None:
        """List an adapter for as long as the server runs."""
        self._given.append(placed)

    def watch(self, folder: Path) -> None:
        """List the adapters in the subfolders of `folder`, as they come and go. ValueError when it is not there."""
        self._watched = Watched(folder, self._arrived, self._left)
        self._watched.look()

    def set_aside(self) -> None:
        """From here on adapters that come have a share of what is free now, and no more."""
        device = self.models[0].loaded.model.device
        if device.type == "cuda":
            self._aside = ASIDE * torch.cuda.mem_get_info(device)[0]

    def _arrived(self, name: str, copy: Path, where: str) -> Placed:
        if name in {*(one.name for one in self.models if one.asked), *(one.name for one in self._given)}:
            raise ValueError(f"{where}: there is another {name!r} already; rename one of them")
        return self.put(name, copy, where)

    def _left(self, placed: Placed) -> None:
        """Nobody finds it any more; it is let go when whoever found it before must have ended."""
        console.say(f"adapter {placed.name} on {placed.model.name}: gone")
        with self._lock:
            self._gone.append((time.monotonic() + self.limits.deadline + SPARE, placed))

    def _model_of(self, folder: Path) -> Model:
        """The model that an adapter is for: the only one, the one that it names, or the only one that it fits."""
        if len(self.models) == 1:
            return self.models[0]
        base = adapted.base_of(folder)
        named = [one for one in self.models if base and one.folder == naming.resolved(base)]
        if len(named) == 1:
            return named[0]
        fit, wrong = [], ""
        for one in self.models:
            assert one.adapters is not None
            try:
                one.adapters.check(folder)
                fit.append(one)
            except ValueError as error:
                wrong = wrong or str(error)
        if len(fit) == 1:
            return fit[0]
        if not fit:
            raise ValueError(wrong)
        names = " and ".join(one.name for one in fit)
        raise ValueError(
            f"{folder}: fits {names}, and adapter_config.json names neither (base_model_name_or_path is {base!r}); "
            "correct it, or serve one of the models alone"
        )


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
    """Every model on its device, not yet started.

    `models`: FOLDER or NAME=FOLDER each, anything that `open_model` takes; and adapters in peft's layout, whose model
    is `base` or what they name, opened once for all. `adapters`: the same words, for adapters of these models (LLaVA's
    LoRA pairs too, and runs). `adapter_folder`: its subfolders are adapters. ValueError for what cannot be opened, and
    for a name that two things have.
    """
    limits = limits or Limits()
    wanted, on_top = naming.named(models), naming.named(adapters)
    naming.refuse_twice([*wanted, *on_top])
    planned = naming.plan(wanted, base)
    adapting = bool(on_top or adapter_folder or any(one.adapters for one in planned))
    opened = []
    for one in planned:
        loaded = open_model(one.folder, device, quantize, one.base or None, template=template, precision=precision)
        say_weights(one.name, loaded)
        loaded.encoder.make_ready(whole=loaded.template.own)  # or the first request would wait for it
        opened.append(_model(one, loaded, adapting))
    shelf = Shelf(opened, limits)
    for one, model in zip(planned, opened, strict=True):
        for name, folder in one.adapters:
            shelf.give(shelf.put(name, naming.local(folder), on=model))
    for name, folder in on_top:
        shelf.give(shelf.put(name, naming.local(folder)))
    if adapter_folder is not None:
        shelf.watch(Path(adapter_folder))
        shelf.set_aside()
    share = (1 - ASIDE if adapter_folder else 1) / len(opened)
    for model in opened:  # what is free is known now, and shared out
        model.engine = Engine(model.loaded, limits, model.name, model.adapters, share=share)
    return shelf


def _model(planned: naming.Planned, loaded: Loaded, adapting: bool) -> Model:
    return Model(
        name=planned.name,
        folder=naming.resolved(planned.folder),
        loaded=loaded,
        adapters=Adapters(loaded) if adapting else None,
        asked=planned.asked,
    )


def say_weights(name: str, loaded: Loaded) -> None:
    """What a model's weights take, part by part, and what they would where they are quantised."""
    parts = weighed(loaded.model, loaded.family)
    held, plain = (sum(both[i] for both in parts.values()) for i in range(2))
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    each = ", ".join(f"{part} {_instead(*both)}" for part, both in parts.items())
    console.say(f"{name}: weights {_instead(held, plain)} in {dtype}: {each}")


def _instead(held: int, plain: int) -> str:
    return size(held) if held == plain else f"{size(held)} instead of {size(plain)}"
