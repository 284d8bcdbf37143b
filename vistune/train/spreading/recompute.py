"""Activations that are computed a second time in backward instead of being held, layer by layer.

A layer's forward is wrapped in place: names of weights, hooks and `state_dict` stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from vistune.models import attention as _attention  # defines the operator of packed attention
from vistune.models.families import Family
from vistune.recipe import Train

assert _attention
_ops: Any = torch.ops

PRODUCTS: dict[Any, Callable[..., tuple[int, int]]] = {
    # operator: (length of the sums, width of the result) of its arguments
    _ops.aten.mm.default: lambda a, b: (b.shape[0], b.shape[1]),
    _ops.aten.addmm.default: lambda bias, a, b: (b.shape[0], b.shape[1]),
    _ops.aten.bmm.default: lambda a, b: (b.shape[1], b.shape[2]),
    _ops.aten.convolution.default: lambda x, weight, *_: (weight[0].numel(), weight.shape[0]),
}
ATTENTION = {
    _ops.vistune.packed_attention.default,
    _ops.aten._scaled_dot_product_flash_attention.default,
    _ops.aten._scaled_dot_product_efficient_attention.default,
    _ops.aten._scaled_dot_product_cudnn_attention.default,
    _ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    _ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    _ops.aten._flash_attention_forward.default,
}
CHEAP = 8
"""A product whose sums are this many times shorter than its result is wide costs less to repeat than to hold: an
adapter's second one, whose inner length is the adapter's rank."""


def wrap(model: nn.Module, family: Family, settings: Train) -> None:
    """Wrap the layers of vision and language as `settings` says."""
    for part, kind in (
        ("vision", settings.checkpointing_vision or settings.checkpointing),
        ("language", settings.checkpointing),
    ):
        if kind == "none":
            continue
        for layer in pieces(family.layers(model, part)):
            how = {"context_fn": _selective(_width(layer))} if kind == "selective" else {}
            again: Any = functools.partial(_again, layer, layer.forward, how)
            layer.forward = again


def pieces(layers: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """What is computed again, or compiled, at once: a layer, or each block of one that is several (a stage of
    FastViTHD has up to 24)."""
    for layer in layers:
        blocks = getattr(layer, "blocks", None)
        yield from blocks if isinstance(blocks, nn.ModuleList) else [layer]


def _again(layer: nn.Module, forward: Any, how: dict[str, Any], *given: Any, **named: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **how, **named)


@functools.cache
def _selective(width: int) -> Any:
    """Hold what is dear to compute. Of a Llama layer as wide as its heads (D, feed-forward 2.7 D) that is q, k, v,
    attention, its product, gate and up: 10.4 D of about 23 D values a token, and next to no product runs twice."""
    return functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, width))


def _policy(width: int, context: Any, op: Any, *given: Any, **named: Any) -> CheckpointPolicy:
    held = op in ATTENTION or (op in PRODUCTS and _dear(op, given, width)) or op.namespace == "_c10d_functional"
    return CheckpointPolicy.MUST_SAVE if held else CheckpointPolicy.PREFER_RECOMPUTE


def _dear(op: Any, given: tuple[Any, ...], width: int) -> bool:
    """Whether a product's result is held. The one that ends a layer, from wider rows, no backward asks for."""
    inner, wide = PRODUCTS[op](*given)
    grouped = op is _ops.aten.convolution.default and given[8] > 1
    ends = inner > wide == width and op is not _ops.aten.convolution.default
    return inner * CHEAP >= wide and not grouped and not ends


def _width(layer: nn.Module) -> int:
    """Values of a row between layers: what the last linear layer in one gives. 0 where there is none."""
    found = [each.out_features for each in layer.modules() if isinstance(each, nn.Linear)]
    return found[-1] if found else 0
