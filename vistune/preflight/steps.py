"""What a recipe's run consists of, and its worst micro-batches: from its data's index and plan, or from what is said
instead where no data is there yet. Knows no memory and no cards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vistune import files, inputs
from vistune.anyres import AnyresLayout
from vistune.data.plan import Pack, Plan
from vistune.images import Layout
from vistune.native import NativeLayout
from vistune.preflight.counting import Micro
from vistune.preflight.presets import Subject
from vistune.prove import spread
from vistune.recipe import Recipe

LOOKED_AT = 100
"""Steps, spread evenly over a run, in which the worst micro-batches are looked for."""
TEXT = 64
"""Tokens of text beside a picture, where no data says how many: short, so that a pack is full of pictures."""
WORST = 2


@dataclass
class Run:
    """A run in numbers. `facts`: what is known of its data; `worst`: micro-batches, one of which needs most memory;
    `micro_batches`: of a step on one GPU; `flops`: of a step, all GPUs together; `assumed`: what stands for data."""

    facts: dict[str, Any]
    worst: list[Micro]
    micro_batches: int
    flops: float
    assumed: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Instead:
    """What stands for data that is not there: tokens of a pack, images in it, samples in all; 0: not said."""

    length: int = 0
    images: int = -1
    samples: int = 0

    @property
    def said(self) -> bool:
        return bool(self.length or self.images >= 0 or self.samples)


def look(subject: Subject, recipe: Recipe, gpus: int, instead: Instead) -> Run:
    """From the recipe's data where it is there and a whole model folder reads it, else from what is said instead."""
    missing = [source.path for source in recipe.data.sources if not _there(source.path)]
    if subject.described is None or missing or instead.said:
        why = [f"no data at {missing[0]}"] if missing else []
        why += ["without a tokenizer no data can be counted"] if subject.described is None and not missing else []
        return assumed(subject, recipe, gpus, instead, why)
    data = inputs.read(recipe, subject.described, Path(recipe.run) / "index")
    return planned(subject, recipe, gpus, data.plan)


def _there(path: str) -> bool:
    return files.is_remote(path) or files.exists(path)


# -- with data


def planned(subject: Subject, recipe: Recipe, gpus: int, plan: Plan) -> Run:
    """The run as its plan lays it out."""
    room = _packs_a_micro(recipe)
    steps = spread(plan.steps, LOOKED_AT)
    turns = [plan.micro_batches(k, rank, gpus, room) for k in steps for rank in range(min(gpus, 8))]
    micros = [micro for turn in turns for micro in turn if micro]
    seen = [_micro(subject.layout, recipe, plan, micro) for micro in micros]
    flops = [
        sum(_flops(subject, recipe, _micro(subject.layout, recipe, plan, [pack])) for pack in plan.step(k))
        for k in steps[:: max(1, len(steps) // 8)]
    ]
    return Run(
        facts=plan.describe() | {"epochs": plan.steps / plan.steps_per_epoch, "steps_looked_at": len(steps)},
        worst=_worst(seen),
        micro_batches=max(len(turn) for turn in turns),
        flops=float(np.mean(flops)),
    )


def _micro(layout: Layout, recipe: Recipe, plan: Plan, packs: Sequence[Pack]) -> Micro:
    flat = np.concatenate([np.asarray(pack, np.int64) for pack in packs])
    columns = plan.index.columns
    lengths = plan.index.tokens(flat).astype(np.int64).tolist()
    images, tokens = (columns[name][flat].astype(np.int64).tolist() for name in ("images", "image"))
    each = [total // count for count, total in zip(images, tokens, strict=True) for _ in range(count)]
    return micro(layout, recipe, lengths, int(columns["supervised"][flat].sum()), each)


def _worst(seen: list[Micro]) -> list[Micro]:
    """The longest and the one with most pixels, which together hold whatever is most."""
    longest = max(seen, key=lambda one: (one.tokens, _pixels(one)))
    fullest = max(seen, key=lambda one: (_pixels(one), one.tokens))
    return [longest] if longest == fullest else [longest, fullest]


def _pixels(one: Micro) -> int:
    return math.prod(one.pixels) if one.pixels else 0


# -- without


def assumed(subject: Subject, recipe: Recipe, gpus: int, instead: Instead, why: list[str]) -> Run:
    """A run whose packs are full and hold as many pictures as would fit with a few words to each."""
    length = instead.length or recipe.data.length
    each = typical_tokens(subject.layout, length)
    most = max(1, length // (each + TEXT)) if recipe.data.pack else 1
    limit = recipe.data.images_per_pack or most
    images = instead.images if instead.images >= 0 else min(most, limit)
    packs = _packs_a_micro(recipe)
    row, pictures = _samples(length, images, each) * packs, [each] * images * packs
    one = micro(subject.layout, recipe, row, max(0, sum(row) - sum(pictures)) // 2, pictures)
    packs_a_step = (
        recipe.train.batch if recipe.train.unit == "packs" or not recipe.data.pack else _packs(recipe, images)
    )
    turns = max(1, math.ceil(packs_a_step / (packs * gpus)))
    facts: dict[str, Any] = {
        "tokens_per_pack": length,
        "images_per_pack": images,
        "tokens_per_image": each,
        "packs_per_step": packs_a_step,
    }
    if steps := _steps(recipe, instead):
        facts["steps"] = steps
    said = [*why, f"packs of {length:,} tokens with {images} pictures of {each} tokens stand for data"]
    flops = _flops(subject, recipe, one) * packs_a_step / packs
    return Run(facts, [one], turns, flops, said)


def _samples(length: int, images: int, each: int) -> list[int]:
    """Tokens of the samples of a full pack: one picture each, or one of text alone."""
    if images * each > length:
        raise ValueError(f"--images {images}: pictures of {each} tokens leave no room in packs of {length}")
    count = max(1, images)
    return [length // count + (number < length % count) for number in range(count)]


def _packs(recipe: Recipe, images: int) -> int:
    """Packs of a step that is counted in samples."""
    return max(1, math.ceil(recipe.train.batch / max(1, images)))


def _steps(recipe: Recipe, instead: Instead) -> int | None:
    if recipe.train.steps:
        return recipe.train.steps
    if instead.samples and (recipe.train.unit == "samples" or not recipe.data.pack):
        return max(1, math.ceil(recipe.train.epochs * math.ceil(instead.samples / recipe.train.batch)))
    return None


def _packs_a_micro(recipe: Recipe) -> int:
    return recipe.train.micro_batch


def typical_tokens(layout: Layout, length: int) -> int:
    """Placeholders of a picture of 1,024 x 768 pixels, or of what has room in the pack."""
    return min(layout.tokens(1024, 768), max(1, length - 1))


# -- both


def micro(layout: Layout, recipe: Recipe, lengths: Sequence[int], supervised: int, pictures: Sequence[int]) -> Micro:
    """A micro-batch of samples of `lengths`, padded as a GPU's are, with pictures of so many tokens each."""
    tokens = sum(lengths)
    to = inputs.pad_to(recipe, "cuda", recipe.train.micro_batch)
    padding = -tokens % to
    grids, pixels = _pictures(layout, pictures)
    row = (*lengths, padding) if padding else tuple(lengths)
    return Micro(lengths=row, supervised=supervised, pixels=pixels, grids=grids)


def _pictures(layout: Layout, tokens: Sequence[int]) -> tuple[tuple[tuple[int, int, int], ...], tuple[int, ...] | None]:
    """Grids and the shape of the pixels of pictures of so many tokens each."""
    if not tokens:
        return (), None
    if isinstance(layout, NativeLayout):
        grids = tuple((1, layout.merge, layout.merge * count) for count in tokens)
        return grids, (sum(math.prod(grid) for grid in grids), 3 * layout.patch**2)
    if isinstance(layout, AnyresLayout):
        sized = tuple(layout.grid(*_size_of(layout, count)) for count in tokens)
        return sized, (sum(tiles for tiles, _, _ in sized), 3, layout.size, layout.size)
    return (), (len(tokens), *layout.blank(0, 0).shape)


def _size_of(layout: AnyresLayout, tokens: int) -> tuple[int, int]:
    """A picture's width and height that give so many tokens, or nearly."""
    sizes = [
        (wide, round(wide * share)) for wide in (336, 672, 1008) for share in (1.0, 0.75, 0.5, 1.33, 2.0, 0.6, 1.6)
    ]
    return min(sizes, key=lambda size: abs(layout.tokens(*size) - tokens))


def _flops(subject: Subject, recipe: Recipe, one: Micro) -> float:
    """Forward and backward, recomputation apart."""
    adapted = recipe.lora.parts if recipe.lora.r else []  # their own weights are frozen
    return subject.family.flops(
        subject.config,
        lengths=one.lengths,
        images=one.images,
        supervised=one.supervised,
        learn=[key for key in recipe.learn.root if key.split(".")[0] not in adapted],
        grids=torch.tensor(one.grids) if one.grids else None,
    )
