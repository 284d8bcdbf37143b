"""What a recipe takes of each GPU, part by part: weights, gradients, optimizer, activations, loss, communication, and
what the driver and the allocator take beside. Knows recipes and models, no data and no cards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from vistune.preflight import counting
from vistune.preflight.counting import (
    GRADIENTS,
    OPTIMIZER,
    REDUCED,
    ROOM,
    WEIGHTS,
    Bytes,
    Micro,
    Moments,
    Spread,
    held_bytes,
)
from vistune.preflight.presets import Subject
from vistune.preflight.pretend import rounded
from vistune.preflight.sizes import GB, GIB
from vistune.recipe import Recipe
from vistune.train.spreading.parallel import BUCKET_BYTES
from vistune.train.updating import moments, optimizer

WORKSPACE = 32 << 20
"""What cuBLAS takes of the allocator on Hopper (at::cuda::getChosenWorkspaceSize); elsewhere 8 MiB."""
CONTEXT = 600 << 20
"""A stated constant: CUDA's context and the code of its kernels, on a recent card with a recent driver."""
NCCL = 500 << 20
"""A stated constant: channels of two communicators."""
FRAGMENTS, SETTLED = 0.10, 0.01
"""Stated shares of what comes and goes in a step, and of what stays: what the allocator holds and cannot give."""
PARTS = (
    *(WEIGHTS, GRADIENTS, OPTIMIZER, counting.VISION, counting.LANGUAGE, counting.LOSS, ROOM),
    *(counting.GATHERED, REDUCED),
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU: `parts` at the moment of the most, whose sum is what `torch.cuda.max_memory_allocated` would
    say; `beside` what is taken apart from that; `host` what lies in the host's memory, a rank."""

    parts: Bytes
    beside: Bytes
    moment: str
    host: int = 0

    @property
    def peak(self) -> int:
        return self.parts.total()

    @property
    def needed(self) -> int:
        """What the card must have."""
        return self.peak + self.beside.total()

    def as_dict(self) -> dict[str, Any]:
        return {
            "peak_gb": self.peak / GB,
            "peak_gib": self.peak / GIB,
            "needed_gb": self.needed / GB,
            "needed_gib": self.needed / GIB,
            "parts_gb": {name: self.parts[name] / GB for name in PARTS},
            "beside_gb": {name: size / GB for name, size in self.beside.items()},
            "at": self.moment,
            "host_gb": self.host / GB,
        }


def spread_of(recipe: Recipe, gpus: int, accumulates: bool) -> Spread:
    """How the recipe divides tensors over so many GPUs. ValueError for replicas that do not come out even."""
    said = recipe.parallel
    if said.shard == "none" or (gpus == 1 and not said.offload):
        return Spread(accumulates=accumulates)
    if gpus > 1 and gpus % said.replicas:
        raise ValueError(f"parallel.replicas = {said.replicas}: {gpus} GPUs cannot be dealt to so many copies")
    return Spread(max(1, gpus // said.replicas), said.shard == "zero3", not said.offload, accumulates)


def memory(
    subject: Subject, recipe: Recipe, micro: Micro, *, gpus: int = 1, accumulates: bool = True, full: bool = False
) -> Memory:
    """What a step of the recipe takes of each of `gpus` GPUs with such micro-batches.

    `accumulates`: a step has more than one of them on a GPU. `full` runs every layer instead of a few.
    """
    spread = spread_of(recipe, gpus, accumulates)
    held, host = standing(subject, recipe, spread)
    seen = counting.moments(subject, recipe, micro, spread, full=full)
    seen.most["update"] = seen.most.get("after backward", Counter()) + update_room(subject, recipe, spread)
    moment, parts = _most(seen)
    if gpus > 1 and not spread.gathers and parts[GRADIENTS]:
        parts[REDUCED] += BUCKET_BYTES
    parts = parts + held
    parts[ROOM] += WORKSPACE
    stays = parts[WEIGHTS] + parts[GRADIENTS] + parts[OPTIMIZER]
    allowance = round(FRAGMENTS * (parts.total() - stays) + SETTLED * stays)
    beside = Counter({"CUDA context": CONTEXT, "fragmentation": allowance})
    if gpus > 1:
        beside["NCCL"] = NCCL
    return Memory(parts, beside, moment, host)


def _most(seen: Moments) -> tuple[str, Bytes]:
    moment = max(seen.most, key=lambda one: seen.most[one].total())
    return moment, seen.most[moment].copy()


def standing(subject: Subject, recipe: Recipe, spread: Spread) -> tuple[Bytes, int]:
    """Bytes that are there all the time: weights and optimizer on the GPU; and those in the host's memory."""
    model, learned = counting.outline(subject, recipe)
    parameters = {id(one): one for one in model.parameters()}
    weights = held_bytes(list(parameters.values()), spread.shards)
    buffers = sum(rounded(one.nbytes) for one in model.buffers())
    named = dict(model.named_parameters())
    states = sum(state(recipe, named[one.name], spread.shards) for one in learned)
    if spread.held:
        return Counter({WEIGHTS: weights + buffers, OPTIMIZER: states}), 0
    gradients = held_bytes([named[one.name] for one in learned], spread.shards)
    return Counter({WEIGHTS: buffers}), weights + states + gradients


def state(recipe: Recipe, weight: torch.Tensor, shards: int) -> int:
    """Bytes of the optimizer for one learned parameter: two moments, and an fp32 master where the weight is bf16."""
    values = counting.cut(weight.shape, shards)
    master = 4 * values if recipe.train.precision == "bf16_true" else 0
    if recipe.optimizer.name != "adamw8bit" or not moments.eight(weight):
        return 2 * rounded(4 * values) + rounded(master)
    width = weight.shape[1:].numel()
    blocks = -(-width // moments.block_of(width)) * (values // width)
    return 2 * (rounded(values) + rounded(4 * blocks)) + rounded(master)


def update_room(subject: Subject, recipe: Recipe, spread: Spread) -> Bytes:
    """What an update takes beside: fp32 copies of so many values as are updated at once, where any are needed.

    Of `vistune.train.updating.optimizer`: gradients; without masters also weights, noise and what is rounded; with
    8 bits both moments, and what they are quantised into.
    """
    copies = {"bf16_true": 1, "bf16_stochastic": 6}.get(recipe.train.precision, 0)
    copies += 5 if recipe.optimizer.name == "adamw8bit" else 0
    if not copies:
        return Counter()
    model, learned = counting.outline(subject, recipe)
    named = dict(model.named_parameters())
    values = sum(counting.cut(named[one.name].shape, spread.shards) for one in learned)
    return Counter({ROOM: 4 * copies * min(values, optimizer.PIECE) * spread.held})
