"""What a run has learned so far, laid into the model it started from: a model folder, also of a run that was cut short.

Knows checkpoints of runs; the arithmetic is `vistune.models.merge`'s.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vistune import console
from vistune import recipe as recipes
from vistune.models import hub
from vistune.models import merge as room
from vistune.models.weights import Entry
from vistune.train import adapters, checkpoint


def merge(
    run: Path | str, out: Path | str | None = None, *, base: Path | str | None = None, step: int | None = None
) -> Path:
    """Write the model folder `out` (by default `run/merged`) and return it.

    `run`: a run's folder, of which the last checkpoint (or that of `step`) is taken, or its adapter when no checkpoint
    is left; or an adapter folder in peft's layout. `base`: what it started from, where that has moved. ValueError for a
    base that does not fit, naming the tensors, and for a folder with nothing to merge.
    """
    run = Path(run)
    target = Path(out) if out is not None else run / "merged"
    if room.is_adapter(run):
        if step is not None:
            raise ValueError(f"{run}: an adapter has no steps; give the run's folder")
        learned, what = room.read_adapter(run), f"the adapter `{run.name}`"
        start, said = learned.config.base_model_name_or_path or "", dict[str, Any]()
    else:
        learned, start, said, what = _of_run(run, step)
    if not (base or start):
        raise ValueError(f"{run}: does not say what it started from; say it with base")
    folder = hub.resolve(base or start, "base")
    room.merge(folder, target, learned, f"Merged by vistune: {what} in `{Path(base or start).name}`.", **said)
    console.say(f"model folder: {target}")
    return target


def _of_run(run: Path, step: int | None) -> tuple[room.Learned, str, dict[str, Any], str]:
    """What a run's folder holds: what learned, its start folder, what the recipe says of it, and words for a card."""
    saved = checkpoint.folders(run)
    if step is not None:
        chosen = [folder for folder in saved if checkpoint.step_of(folder) == step]
        if not chosen:
            known = ", ".join(str(checkpoint.step_of(folder)) for folder in saved) or "none"
            raise ValueError(f"{run}: has no checkpoint of step {step}; there are {known}")
    else:
        chosen = saved[-1:]
    if chosen:
        recipe = recipes.build(checkpoint.read_state(chosen[0])["recipe"], str(chosen[0]))
        learned = read_checkpoint(chosen[0], recipe)
        what = f"step {checkpoint.step_of(chosen[0])} of `{recipe.name}`"
    elif (run / "recipe.toml").exists() and room.is_adapter(run / "adapter"):
        recipe = recipes.read(run / "recipe.toml", [])
        learned, what = room.read_adapter(run / "adapter"), f"the adapter of `{recipe.name}`"
    else:
        raise ValueError(f"{run}: holds neither checkpoints nor an adapter; is this the folder of a run?")
    said = {"template": recipe.model.template, "image": recipe.model.image, "options": recipe.model.options}
    return learned, recipe.model.start, said, what


def read_checkpoint(folder: Path, recipe: recipes.Recipe) -> room.Learned:
    """What learned, as a checkpoint holds it; tensors are read when asked for."""
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name.removeprefix("model/"): _entry(folder, name, one)
        for name, one in held.items()
        if name.startswith("model/") and isinstance(one, TensorStorageMetadata)
    }
    return room.sort(tensors, adapters.lora_config(recipe.lora, []) if recipe.lora.r else None)


def _entry(folder: Path, name: str, one: TensorStorageMetadata) -> Entry:
    def read() -> Tensor:
        tensors = {name: torch.empty(one.size, dtype=one.properties.dtype)}
        with warnings.catch_warnings():  # one process without a process group, and meant
            warnings.simplefilter("ignore", UserWarning)
            checkpoint.load(folder, tensors)
        return tensors[name]

    return Entry(one.properties.dtype, tuple(one.size), read)
