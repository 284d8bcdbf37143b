"""The end of a run: what learned becomes a model folder that everything else opens, and an adapter beside it."""

from __future__ import annotations

from pathlib import Path

from vistune import ranks
from vistune.models import load as models
from vistune.recipe import Recipe
from vistune.train import adapters, checkpoint


def write(recipe: Recipe, folder: Path, loaded: models.Loaded, card: str) -> Path:
    """Write `folder/model` (and `folder/adapter` when there are adapters) and return it; on every rank alike."""
    target = folder / "model"

    def export() -> None:
        if recipe.lora.r:
            adapters.save_adapter(loaded.model, folder / "adapter", recipe.model.start)
            adapters.merge_adapters(loaded.model, models.stored_tensors(loaded))
        with checkpoint.disk_errors(target):
            models.save(loaded, target, frozen_from=loaded.source, card=card)

    ranks.on_first(export)
    return target
