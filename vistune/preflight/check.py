"""The check before a run, top to bottom: its model, its data, memory of each GPU at the worst micro-batch, time, and
what would fit where it does not. Nothing is loaded and no GPU is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vistune.preflight import parts, presets, remedies, steps, timing
from vistune.preflight.counting import Micro
from vistune.preflight.parts import Memory
from vistune.preflight.presets import Subject
from vistune.preflight.remedies import Remedy
from vistune.preflight.sizes import GB, GIB, Card, both, card
from vistune.preflight.steps import Instead, Run
from vistune.preflight.timing import Time
from vistune.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run takes, and whether it fits the card. `micro` is the micro-batch that takes most."""

    subject: Subject
    recipe: Recipe
    card: Card
    gpus: int
    nodes: int
    run: Run
    micro: Micro
    memory: Memory
    time: Time | None
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory.needed <= self.card.memory

    @property
    def missing(self) -> int:
        """Bytes by which it does not fit; below zero what is left."""
        return self.memory.needed - self.card.memory

    def as_dict(self) -> dict[str, Any]:
        return {
            "fits": self.fits,
            "missing_gb": max(0, self.missing) / GB,
            "missing_gib": max(0, self.missing) / GIB,
            "card": {"name": self.card.name, "gb": self.card.memory / GB, "gib": self.card.memory / GIB},
            "gpus": self.gpus,
            "nodes": self.nodes,
            "model": {"name": self.subject.name, "family": self.subject.family.name, "found": self.subject.found},
            **self.memory.as_dict(),
            "worst": {
                "tokens": self.micro.tokens,
                "samples": len(self.micro.lengths),
                "images": self.micro.images,
                "supervised": self.micro.supervised,
            },
            "run": self.run.facts,
            "micro_batches_per_step": self.run.micro_batches,
            "assumed": self.run.assumed,
            "time": None if self.time is None else self.time.as_dict(),
            "remedies": [remedy.as_dict() for remedy in self.remedies],
        }


def check(
    recipe: Recipe,
    *,
    gpu: str = "80GB",
    gpus: int = 1,
    nodes: int = 1,
    model: str = "",
    instead: Instead | None = None,
    mfu: float = 0.0,
    peak_tflops: float = 0.0,
    look: bool = True,
) -> Report:
    """Check a recipe for `gpus` cards on each of `nodes` machines.

    `model` is counted instead of the recipe's start: a folder, a hub id in the cache, a preset. `instead` stands for
    data. `look`: for what would fit, where it does not. Raises ValueError for what the user can mend.
    """
    if gpus < 1 or nodes < 1:
        raise ValueError(f"--gpus {gpus} --nodes {nodes}: at least one of each")
    bought, world = card(gpu), gpus * nodes
    said = recipe.model
    subject = presets.find(model or said.start, template=said.template, image=said.image, options=said.options)
    run = steps.look(subject, recipe, world, instead or Instead())
    more = run.micro_batches > 1
    seen = [(parts.memory(subject, recipe, one, gpus=world, accumulates=more), one) for one in run.worst]
    most, micro = max(seen, key=lambda pair: pair[0].needed)
    found: list[Remedy] = []
    if look and most.needed > bought.memory:
        found = remedies.find(subject, recipe, micro, world, bought.memory, more)
    return Report(
        subject=subject,
        recipe=recipe,
        card=bought,
        gpus=gpus,
        nodes=nodes,
        run=run,
        micro=micro,
        memory=most,
        time=timing.time(recipe, run, bought, world, mfu, peak_tflops),
        remedies=found,
    )


def figure(recipe: Recipe, lengths: Sequence[int], images: int, gpus: int = 1) -> str:
    """One sentence: what preflight counts for a micro-batch of samples of `lengths` with so many images."""
    said = recipe.model
    subject = presets.find(said.start, template=said.template, image=said.image, options=said.options)
    each = steps.typical_tokens(subject.layout, max(lengths))
    pictures = [each] * images
    supervised = max(0, sum(lengths) - sum(pictures))
    one = steps.micro(subject.layout, recipe, lengths, supervised, pictures)
    seen = parts.memory(subject, recipe, one, gpus=gpus)
    return f"It counts {both(seen.peak)} of tensors for such a micro-batch, {both(seen.needed)} of the card."
