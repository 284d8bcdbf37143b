"""What a run leaves: the model folder that everything else opens, an adapter beside it, and checkpoints that are whole.

All of it is made of checkpoints and of the start folder, one tensor at a time, by one process: no matter how the model
lay on the ranks.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from vistune import ranks
from vistune.models import load as models
from vistune.models import merge
from vistune.models.checkpoints import Checkpoint
from vistune.models.checkpoints import run as run_format
from vistune.models.folders import write_described
from vistune.recipe import Recipe
from vistune.train.keeping import checkpoint


def write(recipe: Recipe, folder: Path, loaded: models.Loaded, card: str) -> Path:
    """Write `folder/model` (and `folder/adapter` when there are adapters) of the run's last checkpoint and return it.
    On every rank alike."""
    target = folder / "model"

    def export() -> None:
        learned = run_format.read_learned(checkpoint.folders(folder)[-1], recipe.lora)
        start = Path(recipe.model.start)
        found = Checkpoint(format="hf", why="", said=loaded, tensors=dict(loaded.source))
        with checkpoint.disk_errors(target):
            if recipe.lora.r:
                _write_adapter(folder / "adapter", learned, recipe.model.start)
            merge.write(found, target, learned, card, start)

    ranks.on_first(export)
    return target


def _write_adapter(folder: Path, learned: merge.Learned, start: str) -> None:
    """Beside, then renamed."""
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    merge.write_adapter(beside, learned, start)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def completing(recipe: Recipe, loaded: models.Loaded) -> Callable[[Path], None] | None:
    """What makes a LoRA run's checkpoint complete by itself, given its folder with all tensors in it: the adapter as
    peft has it, config.json, tokenizer, processor and chat template. None for other runs.

    It runs beside the steps, so what it takes of the tokenizer is read here.
    """
    if not recipe.lora.r:
        return None
    files = _described(loaded, f"# A checkpoint of `{recipe.name}`\n\nAn adapter on `{recipe.model.start}`.\n")

    def complete(folder: Path) -> None:
        merge.write_adapter(folder, run_format.read_learned(folder, recipe.lora), recipe.model.start)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    return complete


def _described(loaded: models.Loaded, card: str) -> dict[str, bytes]:
    """The files of a model folder but its weights, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_described(loaded, folder, card, models.commonest_type(loaded.source))
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
