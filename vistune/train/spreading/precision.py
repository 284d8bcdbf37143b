"""The types that a run computes in, and what a device can of them."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from vistune import console

HALF_WEIGHTS = ("bf16_true", "bf16_stochastic")
"""Precisions whose weights are half precision themselves."""


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the products. Where a device has no bf16 another type serves, and that is said: fp16 with loss
    scaling on a GPU (V100, T4), fp32 on a CPU, which would only imitate bf16, several times slower than fp32."""
    if precision == "fp32":
        return torch.float32
    if precision == "fp16":
        return torch.float16
    if has_bf16(device):
        return torch.bfloat16
    instead, name = (torch.float32, "fp32") if device.type == "cpu" else (torch.float16, "fp16 with loss scaling")
    console.warn(f"train.precision = {precision}: {device} has no bf16 instructions; computing in {name}")
    return instead


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 by itself; asked of the hardware, so that a resumed run decides alike."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def lay(model: nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Give each parameter of a model in outline the type that it is held in, products being of `dtype`.

    What learns is fp32; frozen matrices are `dtype`, half the memory and no cast at every step; frozen vectors (norms,
    biases) fp32. With half-precision weights all are `dtype`. Quantised layers keep their own types.
    """
    half = precision in HALF_WEIGHTS
    for module in model.modules():
        for parameter in () if hasattr(module, "pieces") else module.parameters(recurse=False):
            if parameter.is_floating_point():
                frozen = dtype if parameter.ndim > 1 else torch.float32
                held = dtype if half else torch.float32 if parameter.requires_grad else frozen
                parameter.data = parameter.data.to(held)


def autocast(precision: str, dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Autocast for mixed precision; nothing for fp32 and for weights that are half precision themselves.

    Casts of weights are not kept for a second use, of which there is none: beside activations that are computed again
    they would be the whole model in half precision once more, at the end of forward.
    """
    if dtype == torch.float32 or precision in HALF_WEIGHTS:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def allow_tf32(wanted: bool, device: torch.device) -> None:
    """tf32 products for fp32 work, only where the device has them (compute capability 8 on)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        torch.set_float32_matmul_precision("high" if wanted else "highest")
