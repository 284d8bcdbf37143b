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
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from vistune import console, ranks
from vistune.models import attention
from vistune.models.families import Family
from vistune.recipe import Recipe
from vistune.train.spreading import compiling, recompute, sharding
from vistune.train.step import StepModule
from vistune.train.step import followed as followed

BUCKET_BYTES = 64 << 20


def sharded(recipe: Recipe) -> bool:
    """Whether the weights lie in shards: the recipe says so, and there is more than one rank, or what is offloaded is
    one rank's shard, which is all of it."""
    return recipe.parallel.shard != "none" and (ranks.world() > 1 or recipe.parallel.offload)


def prepare(
    module: StepModule, model: nn.Module, family: Family, recipe: Recipe, device: torch.device | None = None
) -> None:
    """Wrap the step `module` and the `model` in it, still in outline, as the recipe says; says so where it is done
    otherwise. `device` (the host if None) is where steps run. Raises ValueError for replicas that the ranks do not
    give."""
    said = recipe.parallel
    if said.shard != "none" and not sharded(recipe):
        console.say(
            f"parallel.shard = {said.shard}: one rank, nothing is sharded; "
            f"steps are the same {recipe.train.batch} {recipe.train.unit}, by accumulation"
        )
    config: Any = model.config
    attention.settle(recipe.train.attention, config, device or torch.device("cpu"), module.dtype)
    recompute.wrap(model, family, recipe.train)
    compiling.wrap(model, family, recipe)
    if sharded(recipe):
        sharding.shard(module, model, family, said, module.dtype, device or torch.device("cpu"))


def home(recipe: Recipe, device: torch.device) -> torch.device:
    """Where the weights lie between their uses: on the device, or offloaded to the host."""
    return torch.device("cpu") if recipe.parallel.offload and sharded(recipe) else device


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard (a view), or the tensor itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    held: DTensor = tensor.detach()  # type: ignore[assignment]
    return held.to_local()


def spread(held: Tensor, like: Tensor, columns: int | None = None) -> Tensor:
    """The tensor laid out over the ranks as `like` is, of which this rank holds `held`; no copy. With `columns` it has
    as many to each row of `like`."""
    if not isinstance(like, DTensor):
        return held
    shape, stride = (like.shape, like.stride()) if columns is None else ((like.shape[0], columns), (columns, 1))
    said = TensorMeta(torch.Size(shape), stride, held.dtype)
    # Not DTensor.from_local: it would copy what is offloaded to the host onto the mesh's kind of device.
    return DTensor(held, DTensorSpec(like.device_mesh, like.placements, said), requires_grad=False)


def reduce(gradients: Sequence[Tensor]) -> None:
    """Sum over the ranks, in place, the gradients that sharding has not summed already."""
    sum_gradients([one for one in gradients if not isinstance(one, DTensor)])


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients and all their shards: fp32 scalar on their device. The host does not wait."""
    shards = [one for one in gradients if isinstance(one, DTensor)]
    squares = _squares([one for one in gradients if not isinstance(one, DTensor)], gradients[0].device)
    if shards:
        mesh = shards[0].device_mesh
        mine = _squares([local(one) for one in shards], gradients[0].device)
        dist.all_reduce(mine, group=mesh.get_group(mesh.ndim - 1))  # copies of the whole have the same shards
        squares = squares + mine
    return squares.sqrt()


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)).square().sum()


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
