"""What would make a run fit that does not: the nearest changes to its recipe, each with its own figure. Ordered by how
little they change: first what computes the same, then other roundings, then other data, then another training.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vistune import console, inputs
from vistune import recipe as recipes
from vistune.preflight import parts
from vistune.preflight.counting import Micro
from vistune.preflight.parts import Memory
from vistune.preflight.presets import Subject
from vistune.recipe import Recipe

MOST = 8
"""Remedies of one change that are shown; of pairs the first few that fit are enough."""
PAIRS = 4


@dataclass(frozen=True)
class Change:
    """Words that lie over the recipe; `kind` is what they change, `cost` what that is worth (the lower the less)."""

    words: tuple[str, ...]
    kind: str
    cost: float
    note: str


@dataclass(frozen=True)
class Remedy:
    """A change, or two, and what the run then takes."""

    words: tuple[str, ...]
    note: str
    memory: Memory
    fits: bool

    def as_dict(self) -> dict[str, Any]:
        return {"words": list(self.words), "note": self.note, "fits": self.fits, **self.memory.as_dict()}


def changes(recipe: Recipe, gpus: int) -> list[Change]:
    """All that could be changed, the least first."""
    return sorted((one for each in (_same, _rounded, _other) for one in each(recipe, gpus)), key=lambda one: one.cost)


def _same(recipe: Recipe, gpus: int) -> Iterator[Change]:
    """The same numbers, up to the order of sums."""
    train, said = recipe.train, recipe.parallel
    if train.checkpointing == "none":
        yield Change(("train.checkpointing=selective",), "again", 1, "the same step, a little slower")
    if train.checkpointing != "full":
        yield Change(("train.checkpointing=full",), "again", 2, "the same step, a third slower at most")
    if train.checkpointing == "full" and train.checkpointing_vision == "none":
        yield Change(("train.checkpointing_vision=full",), "again", 1, "the same step, a little slower")
    smaller = {size for size in (train.micro_batch // 2, 1) if 0 < size < train.micro_batch}
    for size in sorted(smaller, reverse=True):
        yield Change((f"train.micro_batch={size}",), "micro", 1.5 + 1 / size, "the same step, in more pieces")
    if gpus > 1 and said.shard == "none":
        yield Change(("parallel.shard=zero2",), "shard", 3, "the same step, more traffic")
    if gpus > 1 and said.shard != "zero3":
        yield Change(("parallel.shard=zero3",), "shard", 4, "the same step, half as much traffic again")
    if not said.offload:
        shard = () if said.shard != "none" else ("parallel.shard=zero3",)
        yield Change((*shard, "parallel.offload=true"), "shard", 8, "the same step, much slower: the host updates")


def _rounded(recipe: Recipe, gpus: int) -> Iterator[Change]:
    if recipe.optimizer.name == "adamw":
        yield Change(("optimizer.name=adamw8bit",), "optimizer", 9, "moments in 8 bits")
    if recipe.train.precision == "bf16":
        yield Change(("train.precision=bf16_true",), "precision", 7, "bf16 weights and gradients, fp32 masters")
        yield Change(
            ("train.precision=bf16_stochastic",), "precision", 10, "bf16 weights alone, updates rounded stochastically"
        )


def _other(recipe: Recipe, gpus: int) -> Iterator[Change]:
    if recipe.data.length >= 1024 and recipe.data.pack:
        half = recipe.data.length // 2
        yield Change((f"data.length={half}",), "length", 12, "longer samples are shortened at a turn")
    if not any(key.split(".")[0] == "language" for key in recipe.learn.root):
        return
    lora = ("lora.r=128", "lora.alpha=256", "learn.language=2e-4")
    if not recipe.lora.r:
        yield Change(lora, "lora", 20, "adapters instead of the language model; another training")
        yield Change((*lora, "lora.quantize=4bit"), "lora", 24, "QLoRA; another training")
    elif recipe.lora.quantize == "none":
        yield Change(("lora.quantize=8bit",), "lora", 20, "frozen matrices in 8 bits")
        yield Change(("lora.quantize=4bit",), "lora", 22, "frozen matrices in 4 bits (QLoRA)")


def find(subject: Subject, recipe: Recipe, one: Micro, gpus: int, room: int, accumulates: bool) -> list[Remedy]:
    """Single changes with their figures, and pairs of them where none fits alone. `room`: bytes of the card."""
    singles = changes(recipe, gpus)
    found: list[Remedy] = []
    with console.progress("{task.fields[words]}") as bar:
        task = bar.add_task("what would fit", total=len(singles), words="")
        for change in singles:
            bar.update(task, advance=1, words=" ".join(change.words))
            found.append(_tried(subject, recipe, one, gpus, room, accumulates, change))
        pairs = [] if any(remedy.fits for remedy in found) else _pairs(singles, found)
        bar.update(task, total=len(singles) + len(pairs))
        for first, second in pairs:
            if sum(remedy.fits for remedy in found) >= PAIRS:
                break
            bar.update(task, advance=1, words=" ".join((*first.words, *second.words)))
            both = _tried(subject, recipe, one, gpus, room, accumulates, first, second)
            found += [both] if both.fits else []
    fitting = [remedy for remedy in found if remedy.fits]
    return [*fitting, *(remedy for remedy in found if not remedy.fits)]


def _pairs(singles: list[Change], found: list[Remedy]) -> list[tuple[Change, Change]]:
    """Two changes of different kinds, the cheapest first; each must help by itself."""
    least = max(remedy.memory.needed for remedy in found) if found else 0
    helps = [change for change, remedy in zip(singles, found, strict=True) if remedy.memory.needed < least] or singles
    pairs = [pair for pair in itertools.combinations(helps, 2) if pair[0].kind != pair[1].kind]
    return sorted(pairs, key=lambda pair: pair[0].cost + pair[1].cost)[: 3 * MOST]


def _tried(
    subject: Subject, recipe: Recipe, one: Micro, gpus: int, room: int, accumulates: bool, *tried: Change
) -> Remedy:
    words = tuple(word for change in tried for word in change.words)
    changed = laid(recipe, words)
    smaller = shrunk(one, recipe, changed)
    more = accumulates or (smaller != one and gpus * changed.train.micro_batch < changed.train.batch)
    seen = parts.memory(subject, changed, smaller, gpus=gpus, accumulates=more)
    return Remedy(words, "; ".join(change.note for change in tried), seen, seen.needed <= room)


def laid(recipe: Recipe, words: tuple[str, ...]) -> Recipe:
    """The recipe with words over it, as the command line lays them. Raises ValueError as reading does."""
    tree = recipe.model_dump(exclude_none=True)
    for word in words:
        key, _, text = word.partition("=")
        section, name = key.split(".", 1)
        tree[section][name] = _value(text)
    return recipes.build(tree, recipe.name)


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def shrunk(one: Micro, before: Recipe, after: Recipe) -> Micro:
    """A micro-batch of fewer or shorter packs, in which all is less by as much."""
    was, now = (each.data.length * each.train.micro_batch for each in (before, after))
    if now >= was:
        return one
    tokens = max(1, math.ceil(one.tokens * now / was))
    to = inputs.pad_to(after, "cuda", after.train.micro_batch)
    tokens = -(-tokens // to) * to
    share, lengths = tokens / one.tokens, list[int]()
    for length in one.lengths:
        if sum(lengths) >= tokens:
            break
        lengths.append(min(length, after.data.length, tokens - sum(lengths)))
    while sum(lengths) < tokens:
        lengths.append(min(after.data.length, tokens - sum(lengths)))
    count = math.ceil(len(one.grids) * share)
    pixels = None
    if one.pixels is not None:
        many = math.ceil(one.pixels[0] * share)
        if one.grids:
            tiles = sum(math.prod(grid) if len(one.pixels) == 2 else grid[0] for grid in one.grids[:count])
            many = tiles
        pixels = (many, *one.pixels[1:])
    return Micro(
        lengths=tuple(lengths),
        supervised=math.ceil(one.supervised * share),
        pixels=pixels,
        grids=one.grids[:count],
    )
