"""What a server is told to serve: names and folders, which of them are models, and which are adapters on what.

Knows folders by what they say; opens no weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vistune.models import adapted, checkpoints, hub, merge
from vistune.models.checkpoints import run

Named = tuple[str, str]
"""A name and a folder."""


@dataclass
class Planned:
    """A model to be opened. `asked`: under its own name, and not for its `adapters`' sake alone; `base`: its other
    half, where it is only one."""

    name: str
    folder: str
    asked: bool = True
    base: str = ""
    adapters: list[Named] = field(default_factory=list)


def plan(models: Sequence[Named], base: str) -> list[Planned]:
    """Models, each once, with those of the arguments that are adapters on them. ValueError for an adapter that does not
    say on what it lies where `base` does not either."""
    adapters = [one for one in models if _lies_on_a_model(local(one[1], "model"), base)]
    found = [
        Planned(name, folder, base="" if adapters else base)
        for name, folder in models
        if (name, folder) not in adapters
    ]
    for name, folder in adapters:
        lies_on = base or adapted.base_of(local(folder))
        if not lies_on:
            raise ValueError(f"{folder}: is an adapter and does not say what it lies on; say it with --base")
        one = next((one for one in found if resolved(one.folder) == resolved(lies_on)), None)
        if one is None:
            found.append(one := Planned(f"{split(lies_on)[0]} (base)", lies_on, asked=False))
        one.adapters.append((name, folder))
    return found


def local(folder: str, what: str = "adapter") -> Path:
    """A folder as it is, a run's too, or that of a hub id. ValueError, which begins with `what`, for neither."""
    return Path(folder) if Path(folder).exists() else hub.resolve(folder, what)


def _lies_on_a_model(folder: Path, base: str) -> bool:
    """Whether it is an adapter for a model that is whole by itself. What LLaVA's training leaves lies on a language
    model otherwise, and is then opened with it as one model; so is a checkpoint of a run."""
    if not merge.is_adapter(folder) or run.is_checkpoint(folder):
        return False
    return not checkpoints.named("llava-lora").recognises(folder) or bool(base and _is_whole(base))


def _is_whole(base: str) -> bool:
    try:
        checkpoints.recognise(hub.resolve(base, "base"))
    except ValueError:
        return False
    return True


def resolved(folder: str) -> str:
    """By which two ways of naming a model are seen to be one."""
    path = Path(folder)
    return str(hub.resolve(path, "model").resolve()) if path.exists() else folder


def named(arguments: Sequence[str]) -> list[Named]:
    return [split(argument) for argument in arguments]


def split(argument: str) -> Named:
    """NAME=FOLDER, or FOLDER, whose name is its own: for `model`, `merged` and `adapter` of a run, the run's."""
    said, _, rest = argument.partition("=")
    if rest and re.fullmatch(r"[\w.:-]+", said) and not Path(argument).exists():
        return said, rest
    folder = Path(argument).resolve() if Path(argument).exists() else Path(argument)
    inside = folder.name in ("model", "merged", "adapter") and (folder.parent / "recipe.toml").is_file()
    return (folder.parent if inside else folder).name, argument


def refuse_twice(all_of_them: Sequence[Named]) -> None:
    """ValueError, with both folders, for a name that two things have."""
    sources: dict[str, str] = {}
    for name, folder in all_of_them:
        if name in sources:
            raise ValueError(f"{sources[name]} and {folder} are both called {name!r}; say NAME=FOLDER for one of them")
        sources[name] = folder
