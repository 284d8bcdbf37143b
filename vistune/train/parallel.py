"""How a step is spread over ranks: the model wrapped as the recipe says (activations computed again, compiled,
sharded, in this order), and what the loop asks of gradients that may lie in shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vistune import console, ranks
from vistune.models.families import Family
from vistune.recipe import Recipe
from vistune.train import compiling, recompute

BUCKET_BYTES = 64 << 20


def sharded(recipe: Recipe) -> bool:
    """Whether the weights lie in shards: the recipe says so and there is more than one rank."""
    return recipe.parallel.shard != "none" and ranks.world() > 1


def prepare(module: nn.Module, model: nn.Module, family: Family, recipe: Recipe) -> None:
    """Wrap the step `module` and the `model` in it as the recipe says; says so where it is done otherwise."""
    if recipe.parallel.shard != "none" and ranks.world() == 1:
        console.say(f"parallel.shard = {recipe.parallel.shard}: one rank, nothing to shard; same steps by accumulation")
    elif recipe.parallel.shard != "none":
        console.warn(
            f"parallel.shard = {recipe.parallel.shard}: weights are not sharded yet, every rank holds the whole model; "
            "the steps and their results are the same"
        )
    recompute.wrap(model, family, recipe.train)
    compiling.wrap(model, family, recipe)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard (a view), or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(held: Tensor, like: Tensor) -> Tensor:
    """The tensor laid out over the ranks as `like` is, of which this rank holds `held`; no copy."""
    if not isinstance(like, DTensor):
        return held
    return DTensor.from_local(
        held, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def loss_factor() -> float:
    """What a micro-batch's loss is multiplied by so that the gradients that come out are sums over the ranks."""
    return 1.0


def reduce(gradients: Sequence[Tensor]) -> None:
    """Sum over the ranks, in place, the gradients that sharding has not summed already."""
    sum_gradients([one for one in gradients if not isinstance(one, DTensor)])


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients and all their shards: fp32 scalar on their device. The host does not wait."""
    found: Any = torch.nn.utils.get_total_norm(list(gradients))
    return found.full_tensor() if isinstance(found, DTensor) else found


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
