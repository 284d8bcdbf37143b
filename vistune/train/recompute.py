"""Activations that are computed a second time in backward instead of being held, layer by layer.

A layer's forward is wrapped in place: names of weights, hooks and `state_dict` stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from vistune.models.families import Family
from vistune.recipe import Train


def wrap(model: nn.Module, family: Family, settings: Train) -> None:
    """Wrap the layers of vision and language as `settings` says."""
    for part, kind in (
        ("vision", settings.checkpointing_vision or settings.checkpointing),
        ("language", settings.checkpointing),
    ):
        if kind == "none":
            continue
        for layer in family.layers(model, part):
            again: Any = functools.partial(_again, layer, layer.forward)
            layer.forward = again


def _again(layer: nn.Module, forward: Any, *given: Any, **named: Any) -> Any:
    if not layer.training:
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **named)
