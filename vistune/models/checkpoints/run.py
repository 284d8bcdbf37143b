"""A checkpoint of a run, opened as a model: what learned, laid into the model that the run started from.

Beside `run.json`, which holds the recipe, lie the files of `torch.distributed.checkpoint`; of them tensors are read one
at a time. Knows nothing of optimizers and steps.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from vistune import recipe as recipes
from vistune.models import checkpoints, hub, merge
from vistune.models.checkpoints import Checkpoint
from vistune.models.weights import Entry

STATE, INDEX = "run.json", ".metadata"
_MODEL = "model/"  # what a checkpoint's names of the model's tensors begin with


class RunCheckpoint:
    """See `vistune.models.checkpoints.Format`."""

    name = "run"
    holds = f"a checkpoint of a run of vistune's ({STATE}, {INDEX}), or a run that has not ended (its last checkpoint)"

    def recognises(self, folder: Path) -> str:
        place = _newest(folder)
        return "" if place is None else f"{STATE} and {INDEX}" + ("" if place == folder else f" in {place.name}")

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        """`base`: what the run started from, where that has moved. Template, image and options are the recipe's unless
        they are given."""
        place = _newest(folder)
        assert place is not None
        recipe = recipe_of(place)
        start = hub.resolve(base or recipe.model.start, f"{place}: what it started from (--base where that has moved)")
        told = {"template": recipe.model.template, "image": recipe.model.image, "options": recipe.model.options}
        found = checkpoints.read(start, **told | {key: value for key, value in said.items() if value})
        found.tensors = merge.merged(found, read_learned(place, recipe.lora), start)
        return replace(found, format=self.name, why=f"{self.recognises(folder)}, on {start}")

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        raise ValueError(f"{folder}: {self.name}: checkpoints are written by `vistune train` alone; use --to hf")


def is_checkpoint(folder: Path) -> bool:
    """Whether this is one checkpoint of a run, whole."""
    return (folder / STATE).is_file() and (folder / INDEX).is_file()


def _newest(folder: Path) -> Path | None:
    """The checkpoint that `folder` is, or the last one of the run that it is."""
    if is_checkpoint(folder):
        return folder
    if not (folder / "recipe.toml").is_file():
        return None
    steps = [one for one in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", one.name)]
    return max((one for one in steps if is_checkpoint(one)), default=None)


def recipe_of(folder: Path) -> recipes.Recipe:
    """The recipe of the run that wrote a checkpoint. ValueError when it cannot be read."""
    try:
        tree = json.loads((folder / STATE).read_text(encoding="utf-8"))["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: {STATE} is not of a run of vistune's ({error})") from error
    return recipes.build(tree, str(folder))


def read_learned(folder: Path, lora: recipes.Lora) -> merge.Learned:
    """What learned, as a checkpoint holds it; tensors are read when asked for, by this process alone."""
    known = _metadata(folder)
    tensors = {
        name.removeprefix(_MODEL): _entry(folder, name, one, known)
        for name, one in known.state_dict_metadata.items()
        if name.startswith(_MODEL) and isinstance(one, TensorStorageMetadata)
    }
    return merge.sort(tensors, merge.lora_config(lora, []) if lora.r else None)


def _metadata(folder: Path) -> Any:
    try:
        return dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever a cut pickle raises
        raise ValueError(f"{folder}: {INDEX} cannot be read ({error}); take another checkpoint of the run") from error


class _Reader(dcp.FileSystemReader):
    """Reads tensors of a checkpoint whose metadata is known: reading that anew takes longer than a tensor does."""

    def __init__(self, folder: Path, known: Any):
        super().__init__(folder)
        self.known = known

    def read_metadata(self, *given: Any, **named: Any) -> Any:
        return self.known


def _entry(folder: Path, name: str, one: TensorStorageMetadata, known: Any) -> Entry:
    def read() -> Tensor:
        tensors = {name: torch.empty(one.size, dtype=one.properties.dtype)}
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # of this process alone: meant
        try:
            dcp.load(tensors, storage_reader=_Reader(folder, known), no_dist=True)
        except (Exception, CheckpointException) as error:  # the last is no Exception to DCP
            raise ValueError(f"{folder}: {name} cannot be read; take another checkpoint of the run") from error
        return tensors[name]

    return Entry(one.properties.dtype, tuple(one.size), read)


FORMAT = RunCheckpoint()
