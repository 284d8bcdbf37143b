"""One AdamW update of many fp32 tensors in as few kernels as the device has; clipping, loss scale and the skipping of a
step are tensors, so that nothing is read on the host. Knows no names and no schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from vistune import console


def update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    count: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    divisor: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """Update `weights` and their moments in place. All are fp32 on one device and, pair by pair, of one layout.

    count: updates done, this one included (fp32 scalar). divisor: the gradients are divided by it (fp32 scalar; they
    may change). skip: 1 leaves everything as it is, 0 does not (fp32 scalar).
    """
    if not weights:
        return
    if not fused(weights[0].device.type):
        _read_first(weights, gradients, firsts, seconds, count, lr, betas, eps, decay, divisor, skip)
        return
    torch._fused_adamw_(
        list(weights),
        list(gradients),
        list(firsts),
        list(seconds),
        [],
        [count] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=skip,
    )


@cache
def fused(kind: str) -> bool:
    """Whether torch has the fused kernel for this kind of device; says so once where it has not."""
    if kind in _get_fused_kernels_supported_devices():
        return True
    console.warn(f"torch has no fused AdamW for {kind}: the host waits for the device at every step")
    return False


def _read_first(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    count: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    divisor: Tensor | None,
    skip: Tensor | None,
) -> None:
    """The same for a device without the kernel: what decides is read on the host first."""
    if skip is not None and float(skip):
        return
    if divisor is not None:
        torch._foreach_div_(list(gradients), divisor)
    adamw(
        list(weights),
        list(gradients),
        list(firsts),
        list(seconds),
        [],
        [count - 1 for _ in weights],
        foreach=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=decay,
        eps=eps,
        maximize=False,
    )
