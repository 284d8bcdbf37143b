"""The weights in shards over the ranks (FSDP2): which modules are gathered together, in which types, on which mesh.

Knows layers through the family; nothing of optimizers, data or what the shards are filled with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from vistune import ranks
from vistune.models.families import Family
from vistune.recipe import Parallel


def shard(
    root: nn.Module,
    model: nn.Module,
    family: Family,
    settings: Parallel,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Lay the parameters of `root`, a model in outline and what is around it, out over the ranks as DTensors.

    Every layer of vision and language is gathered by itself just before it runs, in the type of the products `dtype`;
    all that is in no layer (embedding, head, connector, last norms) with `root`, for the whole of forward and backward.
    Gradients are summed in fp32 and come out in shards. Names stay as they are. Raises ValueError as `lay_mesh` does.
    """
    mesh = lay_mesh(settings, device)
    offload = CPUOffloadPolicy(pin_memory=device.type != "cpu") if settings.offload else OffloadPolicy()
    kept: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
    for unit in units(model, family):
        fully_shard(unit, reshard_after_forward=settings.shard == "zero3", mp_policy=policy(unit, dtype), **kept)
    fully_shard(root, reshard_after_forward=False, mp_policy=policy(root, dtype), **kept)
    for one in _wrapped(root):
        # Plain sums: the loss is divided by the tokens of all ranks already, and every backend can sum.
        one.set_force_sum_reduction_for_comms(True)
        one.set_gradient_divide_factor(1.0)
    register_fsdp_forward_method(root, "lend")
    root.register_forward_hook(_let_go)


def lay_mesh(settings: Parallel, device: torch.device) -> DeviceMesh:
    """All ranks in a row, or `settings.replicas` rows of neighbours (the ranks of a node are neighbours), each with a
    whole copy of the weights. ValueError when the ranks cannot be dealt so."""
    world, replicas = ranks.world(), settings.replicas
    if replicas == 1 or world == 1:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % replicas or replicas == world:
        said = f"{world} ranks cannot be dealt to {replicas} copies of two ranks and more"
        raise ValueError(f'parallel.replicas = {replicas}: {said}; give a divisor, or parallel.shard = "none"')
    return init_device_mesh(device.type, (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))


def units(model: nn.Module, family: Family) -> list[nn.Module]:
    """The modules that are gathered each by itself: the layers of vision and language.

    Vision's go with the rest where a rank's own data decides how often they run: with `legacy_images`, once a sample.
    """
    vision: Any = getattr(model.config, "vision_config", None)
    parts = ("language",) if getattr(vision, "legacy_images", False) else ("vision", "language")
    return [layer for part in parts for layer in family.layers(model, part)]


def policy(unit: nn.Module, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """In which types the weights of a unit are gathered and its gradients summed.

    Those of a quantised layer (a module with `pieces`) are bytes and their scales: all of its unit stay as they are.
    What goes in and comes out of a unit is autocast's business.
    """
    plain = dtype == torch.float32 or any(hasattr(one, "pieces") for one in unit.modules())
    gathered = None if plain else dtype
    return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _let_go(root: nn.Module, given: Any, loss: Tensor) -> None:
    """Backward lets go of what forward gathered. After a forward without one it is done here: else the next forward
    would find weights from before the update."""
    if not loss.requires_grad:
        let_go(root)


def let_go(root: nn.Module) -> None:
    """Hold shards alone again."""
    for one in _wrapped(root):
        one.reshard()


def _wrapped(root: nn.Module) -> list[FSDPModule]:
    return [one for one in root.modules() if isinstance(one, FSDPModule)]
