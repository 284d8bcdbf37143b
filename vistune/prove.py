"""The proof, on a recipe's own data and model, that packing changes nothing and that ranks share the same steps.

Knows how a pack is made and how a loss is computed; trains nothing and writes nothing but the index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistune import console, inputs, ranks
from vistune.data.batch import Batch, Item, collate, read_planned
from vistune.inputs import Data
from vistune.models import load as models
from vistune.recipe import Recipe
from vistune.train import learn, stage
from vistune.train.spreading import precision
from vistune.train.step import StepModule

# Largest relative difference of the losses, and of the gradients, that rounding explains: fp32 sums in another order;
# tf32 and bf16 have 10 and 7 bits of mantissa, and what they round differs with the shape of the row.
TOLERANCE = {"fp32": (1e-5, 1e-4), "tf32": (2e-3, 2e-2), "fp16": (2e-3, 2e-2), "bf16": (1e-2, 6e-2)}
GRADIENTS = 100_000_000  # numbers; of larger models the first learned parameters are compared, up to so many
_STEPS = 5


def prove(recipe: Recipe, packs: int = 8, world: Sequence[int] = (1, 2, 4, 8)) -> dict[str, Any]:
    """Compute `packs` packs of the recipe's data packed and sample by sample; lay several steps for each `world`.

    Packs come from steps spread evenly over the run, on the recipe's device and in its precision, as training makes
    them; without `data.pack` they are those it would have with. `ok` says whether losses and gradients agree within
    the tolerance of the precision and all numbers of ranks see the same steps; `crossing_difference` is what the loss
    would change by if the samples of a pack saw each other. Raises ValueError when it cannot be told.
    """
    if packs < 1:
        raise ValueError(f"packs = {packs}: at least one pack is needed for a proof")
    whole = recipe.parallel.model_copy(update={"shard": "none", "offload": False})  # gradients are compared whole
    recipe = recipe.model_copy(update={"parallel": whole})
    device = ranks.start(recipe.train.device, recipe.parallel.timeout)
    try:
        precision.allow_tf32(recipe.train.tf32, device)
        loaded = stage.load_model(recipe)
        data = inputs.read(recipe, loaded, Path(recipe.run) / "index")
        steps = spread(data.plan.steps, _STEPS)
        equal = [k for k in steps if same_for_ranks(recipe, data, k, world)]
        sums = _Proof(recipe, loaded, device).sums(_packs(recipe, data, packs))
        ok = sums.agree and equal == steps
        return {"ok": ok, **sums.as_dict(), "steps": steps, "steps_equal": equal, "ranks": list(world)}
    finally:
        ranks.stop()


def same_for_ranks(recipe: Recipe, data: Data, k: int, world: Sequence[int]) -> bool:
    """Whether a plan of its own for each number of ranks gives step k the same packs, and every rank as many turns."""
    expected = sorted(data.plan.step(k))
    for size in world:
        plan = inputs.plan_of(recipe, data.index)
        shares = [plan.micro_batches(k, rank, size, recipe.train.micro_batch) for rank in range(size)]
        if sorted(pack for share in shares for micro in share for pack in micro) != expected:
            return False
        if len({len(share) for share in shares}) > 1:
            return False
    return True


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, the first and the last among them."""
    most = min(most, count)
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def show(result: dict[str, Any]) -> None:
    """The result as people read it."""
    rows = [(key.replace("_", " "), _text(value)) for key, value in result.items() if key != "ok"]
    console.table("packed against unpacked, and ranks", ("what", "value"), rows)
    if result["crossing_difference"] <= 2 * result["loss_tolerance"]:
        console.warn("this model hardly notices its neighbours in a pack: the losses alone would not tell")
    if result["steps"] != result["steps_equal"]:
        console.say("NO: the steps depend on the number of ranks")
    verdict = "packing changes nothing" if result["ok"] else "NO: what is computed depends on packing or on ranks"
    console.say(verdict)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value


def _packs(recipe: Recipe, data: Data, count: int) -> Iterator[list[Item]]:
    """`count` packs of two samples and more, read. Raises ValueError if there are none."""
    section = recipe.data.model_copy(update={"pack": True, "group": "none"})
    plan = data.plan if recipe.data.pack else inputs.plan_of(recipe.model_copy(update={"data": section}), data.index)
    first = spread(plan.steps, count)
    more = [k for k in spread(plan.steps, 4 * count) if k not in first]  # where some steps have no such pack
    found = 0
    for k in [*first, *more]:
        shared = [pack for pack in plan.step(k) if len(pack) > 1]
        for pack in shared[: min(count - found, math.ceil(count / len(first)))]:
            yield [read_planned(plan.index, data.readers, position, data.language) for position in pack]
            found += 1
    if not found:
        raise ValueError(
            f"no pack of steps {', '.join(map(str, first))} has two samples: there is nothing to prove. "
            f"data.length = {data.plan.length} has no room for two, or train.batch = {recipe.train.batch} is too small."
        )


@dataclass
class _Sums:
    """What was computed so far. Losses are sums over supervised tokens."""

    precision: str
    device: str
    packs: int = 0
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    faults: int = 0
    packed: float = 0.0
    unpacked: float = 0.0
    apart: float = 0.0  # sum over the packs of the absolute difference of both
    crossing: float = 0.0  # the same, against samples that see each other
    gradients: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # packed, unpacked

    @property
    def loss_difference(self) -> float:
        return self.apart / max(abs(self.unpacked), 1e-12)

    @property
    def gradient_difference(self) -> float | None:
        """Norm of the difference over the norm; None without gradients."""
        if not self.gradients:
            return None
        norms = [(float((one - other).norm()), float(other.norm())) for one, other in self.gradients]
        return math.hypot(*(a for a, _ in norms)) / max(math.hypot(*(b for _, b in norms)), 1e-12)

    @property
    def agree(self) -> bool:
        loss, gradient = TOLERANCE[self.precision]
        found = self.gradient_difference
        # Written so that a NaN does not agree.
        return self.loss_difference <= loss and (found is None or found <= gradient)

    def as_dict(self) -> dict[str, Any]:
        """Losses as means over supervised tokens, differences relative."""
        loss, gradient = TOLERANCE[self.precision]
        found = self.gradient_difference
        return {
            "device": self.device,
            "precision": self.precision,
            "packs": self.packs,
            "samples": self.samples,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "faults": self.faults,
            "loss_packed": self.packed / self.supervised,
            "loss_unpacked": self.unpacked / self.supervised,
            "loss_difference": self.loss_difference,
            "loss_tolerance": loss,
            "crossing_difference": self.crossing / max(abs(self.unpacked), 1e-12),
            "gradient_difference": "not computed: no memory for them" if found is None else found,
            "gradient_tolerance": gradient,
            "gradients_compared": sum(one.numel() for one, _ in self.gradients),
        }


class _Proof:
    """The recipe's model on its device, and its loss of packs laid out in one way or another."""

    def __init__(self, recipe: Recipe, loaded: models.Loaded, device: torch.device):
        self.recipe, self.device = recipe, device
        learned = learn.apply(loaded.model, loaded.family, recipe)
        self.dtype = precision.compute_dtype(recipe.train.precision, device)
        self.module = StepModule(loaded.model, loaded.family, loaded.layout, self.dtype)
        stage.lay_out(_plain(recipe), device, loaded, learned, self.module)
        loaded.model.eval()  # without dropout, which would differ by itself
        self.parameters = _first([one.parameter for one in learned], GRADIENTS)

    @property
    def precision(self) -> str:
        if self.dtype == torch.float32:
            return "tf32" if self.device.type == "cuda" and self.recipe.train.tf32 else "fp32"
        return "bf16" if self.dtype == torch.bfloat16 else "fp16"

    def sums(self, packs: Iterator[list[Item]]) -> _Sums:
        found = _Sums(self.precision, str(self.device))
        found.gradients = [(torch.zeros_like(p, dtype=torch.float32),) * 2 for p in self.parameters]
        for items in packs:
            self._add(found, items)
        if not found.supervised:
            raise ValueError(f"none of the {found.samples} samples of {found.packs} packs has a supervised token")
        return found

    def _add(self, found: _Sums, items: list[Item]) -> None:
        together = collate(items, inputs.pad_to(self.recipe, self.device.type, 1))
        alone = [collate([item]) for item in items]
        packed, unpacked = self._loss([together]), self._loss(alone)
        crossing = self._loss([replace(together, lengths=[len(together.ids)])])
        found.packs += 1
        found.samples += len(items)
        found.tokens += together.tokens
        found.supervised += len(together.targets)
        found.faults += len(together.faults)
        found.packed += packed
        found.unpacked += unpacked
        found.apart += abs(packed - unpacked)
        found.crossing += abs(crossing - unpacked)
        self._add_gradients(found, together, alone)

    def _add_gradients(self, found: _Sums, together: Batch, alone: list[Batch]) -> None:
        """Where the device has memory for them; the losses are proof enough where not."""
        if not found.gradients:
            return
        packed, unpacked = ([pair[side] for pair in found.gradients] for side in (0, 1))
        try:
            packed = self._with_gradients(packed, [together])
            unpacked = self._with_gradients(unpacked, alone)
        except torch.OutOfMemoryError:
            found.gradients = []
            return
        found.gradients = list(zip(packed, unpacked, strict=True))

    @torch.no_grad()
    def _loss(self, batches: list[Batch]) -> float:
        """Summed over the supervised tokens of the batches."""
        return sum(float(self._forward(batch)) for batch in batches if len(batch.targets))

    def _with_gradients(self, sums: list[Tensor], batches: list[Batch]) -> list[Tensor]:
        """fp32: `sums` and the gradients of the summed loss of the batches."""
        for batch in batches:
            if not len(batch.targets) or not (loss := self._forward(batch)).requires_grad:
                continue  # text alone leaves a lone connector untouched
            parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            sums = [one if part is None else one + part.float() for one, part in zip(sums, parts, strict=True)]
        return sums

    def _forward(self, batch: Batch) -> Tensor:
        with precision.autocast(self.recipe.train.precision, self.dtype, self.device):
            loss: Tensor = self.module(batch.to(self.device))
        return loss


def _plain(recipe: Recipe) -> Recipe:
    """As a model is laid out where only what it computes is asked for: rows of many lengths, each once or twice."""
    train = recipe.train.model_copy(update={"compile": False, "checkpointing": "none", "checkpointing_vision": None})
    parallel = recipe.parallel.model_copy(update={"shard": "none", "offload": False})
    return recipe.model_copy(update={"train": train, "parallel": parallel})


def _first(parameters: list[nn.Parameter], most: int) -> list[nn.Parameter]:
    """The first parameters that together have no more than `most` numbers."""
    taken: list[nn.Parameter] = []
    for parameter in parameters:
        if sum(p.numel() for p in taken) + parameter.numel() <= most:
            taken.append(parameter)
    return taken
