"""The exact loss: cross-entropy summed over supervised rows.

Logits exist for one chunk of supervised rows at a time, never for a sequence. Knows nothing of optimizers or ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 << 20
"""Room for the fp32 logits of one chunk."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `hidden_SD @ weight_VD.T`. The gradients are made in forward, chunk by chunk, while
    the chunk's logits are still warm, so backward only scales them.
    S supervised rows, D hidden size, V vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_S: Tensor) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        weight = weight_VD.to(hidden_SD.dtype)
        grad_hidden = torch.empty_like(hidden_SD) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VD) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V) if bias_V is not None and wants_bias else None
        total = hidden_SD.new_zeros((), dtype=torch.float32)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for start in range(0, len(targets_S), rows):
            hidden, targets = hidden_SD[start : start + rows], targets_S[start : start + rows, None]
            logits = (hidden @ weight.T).float()
            if bias_V is not None:
                logits += bias_V
            normalizer = logits.logsumexp(-1, keepdim=True)
            total += (normalizer - logits.gather(1, targets)).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = logits.sub_(normalizer).exp_()  # softmax, in the logits' own memory
            grad.scatter_add_(1, targets, grad.new_full((1, 1), -1.0).expand_as(targets))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        scale = outputs[0]
        hidden, weight, bias = ctx.saved_tensors
        scaled = [g * scale.to(g.dtype) if g is not None else None for g in (hidden, weight, bias)]
        return scaled[0], scaled[1], scaled[2], None


def cross_entropy_sum(hidden_SD: Tensor, head: nn.Linear, targets_S: Tensor) -> Tensor:
    """Sum over S of the cross-entropy of `head(hidden_SD)` against `targets_S`, fp32 scalar, without whole logits.

    The products run in the autocast type where autocast is on; softmax and sum are fp32.
    """
    device = hidden_SD.device.type
    if torch.is_autocast_enabled(device):
        hidden_SD = hidden_SD.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden_SD, head.weight, head.bias, targets_S)
