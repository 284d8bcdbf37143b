"""The loss on samples that are not learned: read, packed and summed as in training, source by source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vistune import console, inputs, ranks
from vistune.data.loader import load as load_batches
from vistune.inputs import Data
from vistune.models.load import Loaded
from vistune.recipe import Recipe, Source
from vistune.train.measuring.rounds import Rounds
from vistune.train.upload import upload

STEP = 64
"""Packs that are dealt to the ranks at once."""


@dataclass(frozen=True)
class HeldOut:
    """One source, with the recipe under which it is read."""

    name: str
    recipe: Recipe
    data: Data


def read(recipe: Recipe, loaded: Loaded, folder: Path) -> list[HeldOut]:
    """The sources of [[evaluate.held_out]], indexed beside the run's own. ValueError for what the user can mend."""
    found = []
    for name, source in _names(recipe.evaluate.held_out).items():
        one = _recipe_of(recipe, source)
        data = inputs.read(one, loaded, folder / "index")
        if data.index.faults:
            said = f"{len(data.index.faults)} of {len(data.index)} rows cannot be used, the first: "
            console.warn(f"evaluate.held_out {name}: {said}{data.index.faults[0].reason}")
        found.append(HeldOut(name, one, data))
    return found


def _names(sources: list[Source]) -> dict[str, Source]:
    """By their names; of several with one name the later ones are numbered."""
    found: dict[str, Source] = {}
    for source in sources:
        name = plain = source.name or Path(source.path).name
        number = 2
        while name in found:
            name, number = f"{plain} {number}", number + 1
        found[name] = source
    return found


def _recipe_of(recipe: Recipe, source: Source) -> Recipe:
    """The recipe of one pass over one source, in packs of the same length."""
    once = source.model_copy(update={"epochs": 1.0, "weight": 0.0})
    data = recipe.data.model_copy(update={"sources": [once], "group": "none"})
    train = recipe.train.model_copy(update={"batch": STEP, "unit": "packs", "epochs": 1.0, "steps": None})
    return recipe.model_copy(update={"data": data, "train": train})


def losses(held: list[HeldOut], rounds: Rounds) -> dict[str, tuple[float, int]]:
    """Mean loss and supervised tokens of each source, over all ranks; the same for any number of them. A source that
    fails is a warning and left out."""
    found = {}
    for one in held:
        sums = rounds.together(f"held_out {one.name}", lambda one=one: _sums(one, rounds))  # type: ignore[misc]
        if sums is None:
            continue
        loss, tokens = sum(each[0] for each in sums), sum(each[1] for each in sums)
        if faults := [fault for each in sums for fault in each[2]]:
            rounds.warnings.append(f"held_out {one.name}: {len(faults)} sample(s) left out, the first: {faults[0]}")
        if tokens:
            found[one.name] = (loss / tokens, tokens)
    return found


def mean(found: dict[str, tuple[float, int]]) -> float | None:
    """Over the supervised tokens of all sources."""
    tokens = sum(count for _, count in found.values())
    return sum(loss * count for loss, count in found.values()) / tokens if tokens else None


def _sums(one: HeldOut, rounds: Rounds) -> tuple[float, int, list[str]]:
    """This rank's part: summed loss, supervised tokens, and faults that were met."""
    device, micro = rounds.device, one.recipe.train.micro_batch
    total, tokens, faults = torch.zeros((), dtype=torch.float64, device=device), 0, list[str]()
    steps = load_batches(
        one.data.plan,
        one.data.readers,
        one.data.language,
        rank=ranks.rank(),
        world=ranks.world(),
        packs_per_micro=micro,
        pad_to=inputs.pad_to(one.recipe, device.type, micro),
        workers=one.recipe.data.workers,
        alike=rounds.sharded,
    )
    for step in steps:
        rounds.leave_if_asked()
        taken = [batch for batch in step if rounds.sharded or len(batch.targets)]
        faults += [f"{fault.reason} ({fault.path or fault.row})" for batch in step for fault in batch.faults]
        for batch in upload(taken, device):
            rounds.beat(f"held out {one.name}")
            with rounds.autocast():
                total += rounds.module(batch)
            tokens += len(batch.targets)
    return total.item(), tokens, faults
