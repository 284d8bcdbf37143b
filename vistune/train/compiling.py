"""`torch.compile`, layer by layer: a layer is compiled once and serves for all its like."""

from __future__ import annotations

from torch import nn

from vistune.models.families import Family
from vistune.recipe import Recipe


def wrap(model: nn.Module, family: Family, recipe: Recipe) -> None:
    """Compile each layer's forward in place where `train.compile` says so."""
    if not recipe.train.compile:
        return
    for part in ("vision", "language"):
        for layer in family.layers(model, part):
            layer.compile()
