"""The exact loss: cross-entropy summed over supervised rows.

Logits exist for one chunk of supervised rows at a time, never for a sequence. Knows nothing of optimizers or ranks.
S supervised rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = {"cpu": 64 << 20}
"""Room for the fp32 logits of one chunk, by device: on a CPU they stay in its cache's reach."""
CHUNK_BYTES_ELSEWHERE = 512 << 20
"""880 rows of 152k: fewer would leave an accelerator waiting for the head's weight, which each chunk reads."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden_SD @ weight_VD.T`. The gradients are made in forward, chunk by chunk, while
    the chunk's logits are still warm, so backward only scales them (in place: it runs once)."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_S: Tensor) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        weight = weight_VD.to(hidden_SD.dtype)
        grad_hidden = torch.empty_like(hidden_SD) if wants_hidden else None
        # Chunks add up in fp32: a bf16 sum would lose the small ones.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and wants_bias else None
        total = hidden_SD.new_zeros((), dtype=torch.float32)
        for rows in _chunks(len(targets_S), weight):
            hidden, targets = hidden_SD[rows], targets_S[rows, None]
            logits = (hidden @ weight.T).float()
            if bias_V is not None:
                logits += bias_V
            highest = logits.amax(-1, keepdim=True)
            right = logits.gather(1, targets) - highest
            logits.sub_(highest).exp_()  # from here on in the logits' own memory
            whole = logits.sum(-1, keepdim=True)
            total += (whole.log() - right).sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            grad = logits.div_(whole)  # softmax
            grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad, hidden)
            del logits, grad  # before the next chunk's are made
        ctx.save_for_backward(
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        scale = outputs[0]
        hidden, weight, bias = ctx.saved_tensors
        scaled = [g.mul_(scale.to(g.dtype)) if g is not None else None for g in (hidden, weight, bias)]
        return scaled[0], scaled[1], scaled[2], None


def _add_product(total_VD: Tensor, grad_SV: Tensor, hidden_SD: Tensor) -> None:
    """`grad.T @ hidden` added to the fp32 total, in place where the types allow."""
    if grad_SV.dtype == total_VD.dtype:
        total_VD.addmm_(grad_SV.T, hidden_SD)
    else:
        total_VD += grad_SV.T @ hidden_SD


def _chunks(rows: int, weight_VD: Tensor) -> list[slice]:
    room = CHUNK_BYTES.get(weight_VD.device.type, CHUNK_BYTES_ELSEWHERE)
    each = max(1, room // (4 * weight_VD.shape[0]))
    return [slice(start, start + each) for start in range(0, rows, each)]


def cross_entropy_sum(hidden_SD: Tensor, head: nn.Module, targets_S: Tensor) -> Tensor:
    """Sum over S of the cross-entropy of `head(hidden_SD)` against `targets_S`, fp32 scalar, without whole logits.

    The products run in the autocast type where autocast is on; softmax and sum are fp32. A head that is more than a
    weight and a bias (adapters on it, quantised) is run chunk by chunk as it is, and again in backward.
    """
    if not _plain(head):
        return _by_calling(hidden_SD, head, targets_S)
    device = hidden_SD.device.type
    if torch.is_autocast_enabled(device):
        hidden_SD = hidden_SD.to(torch.get_autocast_dtype(device))
    held: tuple[Any, Any] = head.weight, head.bias
    if not torch.is_grad_enabled():  # a function of autograd asks its inputs what they want, not the mode
        held = held[0].detach(), None if held[1] is None else held[1].detach()
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden_SD, *held, targets_S)


def _plain(head: nn.Module) -> bool:
    return isinstance(head, nn.Linear) and not hasattr(head, "base_layer") and head.weight.is_floating_point()


def _by_calling(hidden_SD: Tensor, head: Any, targets_S: Tensor) -> Tensor:
    def chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="sum")

    base = getattr(head, "base_layer", head)
    parts = [
        checkpoint(chunk, hidden_SD[rows], targets_S[rows], use_reentrant=False)
        for rows in _chunks(len(targets_S), torch.empty(base.out_features, 0, device=hidden_SD.device))
    ]
    return torch.stack(parts).sum() if parts else hidden_SD.float().sum() * 0.0
