"""How a step is spread over ranks. Today every rank holds the whole model and gradients are summed.

Activation checkpointing and the compute types live here too, since they wrap the model in this order:
checkpointing -> (compile) -> (sharding).
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vistune import console, ranks
from vistune.recipe import Recipe

BUCKET_BYTES = 64 << 20


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


def autocast(precision: str, dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Autocast for mixed precision; nothing for fp32 and for weights that are half precision themselves."""
    if dtype == torch.float32 or precision == "bf16_true":
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def allow_tf32(wanted: bool, device: torch.device) -> None:
    """tf32 products for fp32 work, only where the device has them (compute capability 8 on)."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        torch.set_float32_matmul_precision("high" if wanted else "highest")


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Wrap the model as the recipe says; says so where this machine or this version does it otherwise."""
    if recipe.parallel.shard != "none" and ranks.world() == 1:
        console.say(f"parallel.shard = {recipe.parallel.shard}: one rank, nothing to shard; same steps by accumulation")
    elif recipe.parallel.shard != "none":
        console.warn(
            f"parallel.shard = {recipe.parallel.shard}: weights are not sharded yet, every rank holds the whole model; "
            "the steps and their results are the same"
        )
    if recipe.train.checkpointing == "full":
        enable: Any = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.23 on
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def followed(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that move with the data: the statistics of batch norms that learn, by name."""
    norms = {path: one for path, one in model.named_modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)}
    learning = {path: one for path, one in norms.items() if any(p.requires_grad for p in one.parameters())}
    return {f"{path}.{name}": held for path, one in learning.items() for name, held in one.named_buffers(recurse=False)}


def average(buffers: Iterable[Tensor]) -> None:
    """The mean over the ranks, in place, of what is not a count: every rank ends a step with the same model."""
    floats = [one for one in buffers if one.is_floating_point()]
    sum_gradients(floats)
    for one in floats if ranks.world() > 1 else ():
        one.div_(ranks.world())


def sum_gradients(gradients: list[Tensor]) -> None:
    """Sum over the ranks, in place, in buckets."""
    if ranks.world() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        bucket.append(gradient)
        size += gradient.numel() * gradient.element_size()
        if size >= BUCKET_BYTES:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in bucket])
    dist.all_reduce(flat)
    start = 0
    for gradient in bucket:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
