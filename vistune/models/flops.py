"""Floating point operations of a forward and backward pass, from sizes alone; a multiply-add counts 2.

What is frozen costs its forward, and the gradient of its input where something before it learns. Recomputation is not
counted. Knows no family: a family lists its pieces in the order of the forward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the forward pass: `products` with weights, then `attention` without; `learns`: its weights do."""

    products: int = 0
    attention: int = 0
    learns: bool = False


def total(pieces: Iterable[Piece]) -> int:
    """Forward and backward of the pieces, given in forward order."""
    count, before = 0, False
    for piece in pieces:
        count += piece.products * (1 + before + piece.learns)
        before = before or piece.learns
        count += piece.attention * (3 if before else 1)
    return count


def linear_weights(module: nn.Module, *, but: str = "", only: str = "") -> int:
    """Weights of the linear layers below `module` whose path does not contain `but` and does contain `only`."""
    return sum(
        layer.weight.numel()
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and only in path and not (but and but in path)
    )


def causal_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Pairs of positions that attend, summed over segments; `window` is a sliding window's width."""
    return sum(_pairs(length, min(length, window) if window else length) for length in lengths)


def _pairs(length: int, window: int) -> int:
    return window * length - window * (window - 1) // 2


def learns(learn: Collection[str], part: str, layers: int) -> tuple[bool, list[bool]]:
    """From keys like "vision" and "vision.layers.-4:": whether what is outside the layers learns, and each layer."""
    if part in learn:
        return True, [True] * layers
    flags, start = [False] * layers, f"{part}.layers."
    for key in learn:
        if key.startswith(start):
            for i in chosen(key.removeprefix(start), layers):
                flags[i] = True
    return False, flags


def chosen(text: str, layers: int) -> list[int]:
    """Indices that "3", "-4:" or "2:8" names among `layers`. ValueError says what was meant to stand there."""
    try:
        bounds = [int(bound) if bound else None for bound in text.split(":")]
        if len(bounds) > 2 or (len(bounds) == 1 and bounds[0] is None):
            raise ValueError
        if len(bounds) == 1:
            return [range(layers)[bounds[0]]]  # type: ignore[index]
    except (ValueError, IndexError):
        raise ValueError(f"layers.{text}: give an index or a slice of {layers} layers, like 3, -4: or 0:8") from None
    return list(range(layers))[slice(*bounds)]


_KNOWN: dict[int, tuple[weakref.ref[Any], Any]] = {}


def remembered(config: Any, count: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `count` gives for this config, asked once for each object: every micro-batch wants it, and the JSON by which
    equal configs are told takes milliseconds to write."""
    known = _KNOWN.get(id(config))
    if known is None or known[0]() is not config:
        _KNOWN[id(config)] = known = (weakref.ref(config), count())
    return known[1]
