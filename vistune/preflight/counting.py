"""The memory of a step, counted by running it: the real step module, forward and backward, on a GPU that is not there.

Deep models are run with a few layers and with one more, and the rest follows exactly: every moment of a step holds so
many bytes a layer. Knows no data and no cards.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vistune.data.batch import Batch
from vistune.models import lowbit
from vistune.models.fit import skeleton
from vistune.preflight.presets import Subject
from vistune.preflight.pretend import CUDA, Ledger, pretended, rounded
from vistune.recipe import Recipe
from vistune.train import learn
from vistune.train.learn import Learned
from vistune.train.spreading import precision, recompute
from vistune.train.step import StepModule

FEW = 3
"""Layers of the smaller of two runs: the first, the last, and one that stands for all between."""
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
VISION, LANGUAGE, LOSS = "activations: vision", "activations: language", "logits and loss"
ROOM, GATHERED, REDUCED = "working room", "gathered weights", "communication"
Bytes = Counter[str]


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One micro-batch, as far as memory is concerned: tokens of its samples, padding among them; how many are
    supervised; the shape of its pixels and what the layout says of its images."""

    lengths: tuple[int, ...]
    supervised: int
    pixels: tuple[int, ...] | None = None
    grids: tuple[tuple[int, int, int], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def images(self) -> int:
        return len(self.grids) or (self.pixels[0] if self.pixels else 0)

    def batch(self, device: torch.device = CUDA) -> Batch:
        """It without values; grids stay on the host."""

        def numbers(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int64, device=device)

        return Batch(
            ids=numbers(self.tokens),
            positions=numbers(self.tokens),
            lengths=list(self.lengths),
            rows=numbers(self.supervised),
            targets=numbers(self.supervised),
            pixels=None if self.pixels is None else torch.empty(self.pixels, dtype=torch.uint8, device=device),
            samples=len(self.lengths),
            tokens=self.tokens,
            grids=torch.tensor(self.grids) if self.grids else None,
        )


@dataclass
class Spread:
    """How a step's tensors are divided: over `shards` ranks (1: not at all), gathered for the whole of a step or, with
    `zero3`, layer by layer; `held` False when shards lie in the host's memory. `accumulates`: a step has more than one
    micro-batch."""

    shards: int = 1
    zero3: bool = False
    held: bool = True
    accumulates: bool = True

    @property
    def gathers(self) -> bool:
        """Weights come to the device for their uses: from other ranks, or from the host."""
        return self.shards > 1 or not self.held


@dataclass
class Moments:
    """The most bytes at each moment of a step, weights and optimizer apart."""

    most: dict[str, Bytes] = field(default_factory=dict)

    def line(self, more: Moments, by: float) -> Moments:
        """What comes of going `by` times as far again as from here to `more`."""
        found = Moments()
        for moment, here in self.most.items():
            there = more.most.get(moment, here)
            found.most[moment] = Counter({k: round(here[k] + by * (there[k] - here[k])) for k in here | there})
        return found

    def add(self, other: Moments, without: Moments) -> Moments:
        """This with what `other` has beyond `without`."""
        found = Moments()
        for moment, here in self.most.items():
            up, down = (one.most.get(moment, Counter()) for one in (other, without))
            found.most[moment] = Counter({k: here[k] + up[k] - down[k] for k in here | up | down})
        return found


def moments(subject: Subject, recipe: Recipe, micro: Micro, spread: Spread, *, full: bool = False) -> Moments:
    """The most bytes at each moment of a step of the recipe with such micro-batches.

    `full` runs every layer. Raises ValueError as `learn.apply` does.
    """
    language, vision = depths(subject.config)
    sliced = any(".layers." in key for key in recipe.learn.root)
    if full or sliced or language <= FEW + 1:
        return _run(subject, recipe, micro, spread, language, vision)
    seen = min(FEW, vision) if vision else 0
    few = _run(subject, recipe, micro, spread, FEW, seen)
    more = _run(subject, recipe, micro, spread, FEW + 1, seen)
    found = few.line(more, language - FEW)
    learning = any(key.split(".")[0] == "vision" for key in recipe.learn.root)
    gathered = spread.gathers and not spread.zero3
    if vision <= FEW + 1 or micro.pixels is None or not (learning or gathered):  # layers that hold nothing
        return found
    deeper = few.line(_run(subject, recipe, micro, spread, FEW, FEW + 1), vision - FEW)
    return found.add(deeper, few)


def depths(config: Any) -> tuple[int, int]:
    """Layers of language and vision; 0 for a tower whose depth cannot be changed."""
    vision = config.vision_config
    many = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None)
    return config.text_config.num_hidden_layers, many if isinstance(many, int) else 0


def shallow(config: Any, language: int, vision: int) -> Any:
    """The config of the same model with so many layers."""
    config = copy.deepcopy(config)
    text, tower = config.text_config, config.vision_config
    if depths(config) == (language, vision):
        return config
    text.num_hidden_layers = language
    if isinstance(kinds := getattr(text, "layer_types", None), list):
        text.layer_types = kinds[:language]
    for name in ("num_hidden_layers", "depth"):
        if vision and isinstance(getattr(tower, name, None), int):
            setattr(tower, name, vision)
    return config


def outline(subject: Subject, recipe: Recipe, config: Any | None = None) -> tuple[Any, list[Learned]]:
    """The model without memory, in the types that training holds it in, and what of it learns."""
    with no_library():
        model = skeleton(subject.family, subject.config if config is None else config)
        with torch.device("meta"):
            learned = learn.apply(model, subject.family, recipe)
    precision.lay(model, recipe.train.precision, compute(recipe))
    return model, learned


def compute(recipe: Recipe) -> torch.dtype:
    """The type of the products on a GPU that has bf16."""
    return {"fp32": torch.float32, "fp16": torch.float16}.get(recipe.train.precision, torch.bfloat16)


def _run(subject: Subject, recipe: Recipe, micro: Micro, spread: Spread, language: int, vision: int) -> Moments:
    model, learned = outline(subject, recipe, shallow(subject.config, language, vision))
    recompute.wrap(model, subject.family, recipe.train)
    names = [one.name for one in learned]
    with pretended() as ledger, no_library():
        with ledger.doing(WEIGHTS):
            shards = cut_all(model, spread)
            place(model, gathered=compute(recipe) if spread.gathers else None)
        step = StepModule(model, subject.family, subject.layout, compute(recipe)).train()
        watched = _Watched(ledger, subject, model, names, spread, shards)
        watched.forward()
        with ledger.doing(LOSS):
            batch = micro.batch()
        with precision.autocast(recipe.train.precision, compute(recipe), CUDA):
            loss = step(batch)
        watched.backward(loss)
        del loss, batch
        found = watched.found
        del step, model, watched
    return found


def place(model: nn.Module, gathered: torch.dtype | None = None) -> None:
    """Give an outline's tensors their (pretended) memory on the device; in the type that shards are gathered in, but
    for layers beside quantised ones, which stay as they are."""
    made: dict[int, nn.Parameter] = {}
    quantised = any(hasattr(module, "pieces") for module in model.modules())
    for module in model.modules():
        for name, held in module._parameters.items():
            if held is None:
                continue
            if id(held) not in made:
                lower = gathered is not None and not quantised and held.is_floating_point()
                empty = torch.empty(held.shape, dtype=gathered if lower else held.dtype, device=CUDA)
                made[id(held)] = nn.Parameter(empty, requires_grad=held.requires_grad)
            module._parameters[name] = made[id(held)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)


def cut_all(model: nn.Module, spread: Spread) -> dict[str, int]:
    """Bytes of every parameter's gradient on the rank with the largest shards, by name; none in the host's memory."""
    named = model.named_parameters()
    return {name: held_bytes([one], spread.shards) * spread.held for name, one in named if one.requires_grad}


class _Watched:
    """A step's moments as they pass: forward, and in backward the last, a middle and the first layer of each part."""

    def __init__(
        self, ledger: Ledger, subject: Subject, model: Any, learned: list[str], spread: Spread, shards: dict[str, int]
    ):
        self.ledger, self.spread, self.found = ledger, spread, Moments()
        self.ground = ledger.now.copy()
        ledger.again()
        self.moment = "forward"
        parameters = dict(model.named_parameters())
        self.shards = {id(parameters[name]): shards[name] for name in learned}
        family = subject.family
        for part, label in (("vision", VISION), ("connector", LANGUAGE), ("language", LANGUAGE)):
            for module in family.parts(model)[part]:
                self._label(module, label)
        self._label(family.head(model), LOSS)
        self.units: list[_Unit] = []
        inside: set[int] = set()
        for part in ("vision", "language"):
            layers = family.layers(model, part)
            for number, layer in enumerate(layers):
                where = "last" if number + 1 == len(layers) else "first" if number == 0 else "middle"
                unit = _Unit(list(layer.parameters()))
                inside |= {id(one) for one in unit.parameters}
                self.units.append(unit)
                if spread.gathers:
                    layer.register_forward_pre_hook(partial(self._gather, unit))
                layer.register_forward_hook(partial(self._ran, f"backward: {where} {part} layer", unit))
        self.root = _Unit([one for one in parameters.values() if id(one) not in inside])
        self.current: _Unit | None = None
        if not spread.gathers:
            for name in learned:
                parameters[name].register_post_accumulate_grad_hook(self._whole)

    def forward(self) -> None:
        """Of the second micro-batch where there is one: the gradients of the first are there."""
        if self.spread.accumulates:
            for unit in [*self.units, self.root]:
                self._accumulated(unit)
        if self.spread.gathers:
            self._take(self.root)

    def _accumulated(self, unit: _Unit) -> None:
        learned = [one for one in unit.parameters if id(one) in self.shards]
        unit.reduced = True
        if self.spread.gathers:
            self.ledger.add(GRADIENTS, sum(self.shards[id(one)] for one in learned))
            return
        with self.ledger.doing(GRADIENTS):
            for one in learned:
                one.grad = torch.empty_like(one)

    def backward(self, loss: Tensor) -> None:
        self._next("backward: loss")
        with self.ledger.doing(ROOM):
            if loss.requires_grad:
                loss.backward()
            self._begin("backward: the rest", None)
            self._reduce(self.root)
        for unit in [*self.units, self.root]:
            self._free(unit)
        self.ledger.add(REDUCED, -self.ledger.now[REDUCED])
        self._next("after backward")

    def _label(self, module: nn.Module, label: str) -> None:
        """What is made between a module's beginning and end is of this label. Recomputation does not come by here."""
        before: list[str] = []

        def begin(*_: Any) -> None:
            before.append(self.ledger.label)
            self.ledger.label = label

        def end(*_: Any) -> None:
            self.ledger.label = before.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def _ran(self, moment: str, unit: _Unit, module: nn.Module, given: Any, out: Any) -> None:
        if self.spread.zero3:
            self._free(unit)
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(lambda _: self._begin(moment, unit))

    def _begin(self, moment: str, unit: _Unit | None) -> None:
        """The backward pass of a layer begins, and that of the one above it has ended."""
        if self.current is not None and self.spread.gathers:
            self._reduce(self.current)
            self._free(self.current)
        self.current = unit
        self._next(moment)
        if unit is not None and self.spread.gathers:
            self._take(unit)

    def _gather(self, unit: _Unit, *_: Any) -> None:
        self._take(unit)

    def _take(self, unit: _Unit) -> None:
        """A unit's weights are there: gathered into a row, which stays while the next one is, and laid out of it."""
        if unit.held:
            return
        twice = self.spread.zero3 and unit is not self.root
        unit.held = unit.size * (2 if twice else 1)
        self.ledger.add(GATHERED, unit.held)
        self.ledger.touch(unit.size)

    def _free(self, unit: _Unit) -> None:
        self.ledger.add(GATHERED, -unit.held)
        unit.held = 0

    def _reduce(self, unit: _Unit) -> None:
        """A unit's gradients are summed over the ranks in fp32, in a row that stays until the next one's; shards of
        them remain."""
        graded = [one for one in unit.parameters if one.grad is not None]
        if not self.spread.gathers or not graded:
            return
        self.ledger.add(REDUCED, 4 * sum(one.numel() for one in graded))
        self.ledger.add(REDUCED, -self.ledger.now[REDUCED] + 4 * sum(one.numel() for one in graded))
        shards = sum(self.shards[id(one)] for one in graded)
        if unit.reduced:
            self.ledger.touch(shards)
        else:
            self.ledger.add(GRADIENTS, shards)
        unit.reduced = True
        for one in graded:
            one.grad = None

    def _next(self, moment: str) -> None:
        """The moment before is over: keep its most, unless it came before with more."""
        held = self.ledger.at_peak.copy()
        held.subtract(self.ground)
        before = self.found.most.get(self.moment)
        if before is None or held.total() > before.total():
            self.found.most[self.moment] = Counter({label: size for label, size in held.items() if size})
        self.moment = moment
        self.ledger.again()

    def _whole(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.name(parameter.grad, GRADIENTS)


class _Unit:
    """What is gathered together where weights lie in shards: a layer, or all that is in none."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = parameters
        self.size = sum(rounded(one.nbytes) for one in parameters)
        self.held, self.reduced = 0, False


@contextmanager
def no_library() -> Iterator[None]:
    """Quantised layers are laid and turned back without bitsandbytes: only sizes matter."""
    functional = SimpleNamespace(
        get_4bit_type=lambda *_, **__: torch.zeros(16),
        create_dynamic_map=lambda *_, **__: torch.zeros(256),
        QuantState=lambda **said: SimpleNamespace(**said),
        dequantize_4bit=lambda packed, state: torch.empty(state.shape, dtype=state.dtype, device=packed.device),
    )
    with mock.patch.object(lowbit, "library", lambda: SimpleNamespace(functional=functional)):
        yield


def held_bytes(parameters: Sequence[Tensor], shards: int = 1) -> int:
    """Bytes of tensors, each cut by rows over `shards` ranks, as the allocator counts them on the fullest one."""
    return sum(rounded(cut(one.shape, shards) * one.element_size()) for one in parameters)


def cut(shape: Sequence[int], shards: int) -> int:
    """Values of the largest shard of a tensor that is cut by rows."""
    if not shape or shards == 1:
        return torch.Size(shape).numel()
    return -(-shape[0] // shards) * torch.Size(shape[1:]).numel()
