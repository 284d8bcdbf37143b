"""What learns: the recipe's `learn` and `lora` tables become trainable parameters with a rate each.

Knows parts and layers through the family, nothing of optimizers or data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vistune.models import quantize
from vistune.models.families import Family
from vistune.models.flops import chosen
from vistune.models.lowbit import Quantized
from vistune.recipe import Rate, Recipe
from vistune.train import adapters

PARTS = ("vision", "connector", "language")
EMBEDDING = "language.embedding"
"""The input embedding alone: what learns tokens that a folder was given, such as `<im_start>`. The head too where it is
tied to it."""


@dataclass(frozen=True)
class Learned:
    """One trainable parameter: its name in the model, the `learn` key that named it, its rate."""

    name: str
    parameter: nn.Parameter
    key: str
    rate: Rate


def apply(model: nn.Module, family: Family, recipe: Recipe) -> list[Learned]:
    """Freeze everything, add the adapters, then let what `recipe.learn` names learn.

    The language model's matrices are laid quantised first where `lora.quantize` says so. A longer key wins over a
    shorter one (`vision.layers.-4:` over `vision`). On the meta device nothing takes memory. Raises ValueError for a
    key that names nothing, and for adapters that cannot be had together.
    """
    if (kind := recipe.lora.quantize) != "none":
        _refuse_unquantised_products(recipe)
        quantize.lay(model, family, kind, recipe.lora.double_quant)
    model.requires_grad_(False)
    adapted = set(adapters.inject(model, family, recipe.lora)) if recipe.lora.r else set()
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    taken: dict[str, Learned] = {}
    for key in sorted(recipe.learn.root, key=lambda k: k.count(".")):
        part, rate = key.split(".")[0], recipe.learn.root[key]
        found = 0
        for module in _modules(model, family, key):
            for name in (names[id(parameter)] for parameter in module.parameters()):
                if part in recipe.lora.parts and recipe.lora.r and name not in adapted and key != EMBEDDING:
                    continue
                parameters[name].requires_grad_(True)
                taken[name] = Learned(name, parameters[name], key, rate)
                found += 1
        if not found:
            raise ValueError(f"learn.{key}: names no parameter of this model")
    return [taken[name] for name in names.values() if name in taken]


def _refuse_unquantised_products(recipe: Recipe) -> None:
    if recipe.lora.dora and recipe.lora.dropout:
        raise ValueError(
            f"lora.dora with lora.dropout = {recipe.lora.dropout} and lora.quantize = {recipe.lora.quantize}: DoRA "
            "then multiplies by every matrix unquantised and keeps it until backward; set lora.dropout = 0, or one of "
            "the others off"
        )


def again(model: nn.Module, learned: Iterable[Learned]) -> list[Learned]:
    """The same list of a model whose parameters were replaced (sharded, given memory): found again by name."""
    parameters = dict(model.named_parameters())
    return [replace(one, parameter=parameters[one.name]) for one in learned]


def _modules(model: nn.Module, family: Family, key: str) -> list[nn.Module]:
    """The modules that a `learn` key names: a part, a slice of a part's layers, or the input embedding."""
    if key == EMBEDDING:
        return [model.get_input_embeddings()]  # type: ignore[operator]
    part, _, rest = key.partition(".")
    if part not in PARTS:
        raise ValueError(f"learn.{key}: no part {part!r}; the parts are {', '.join(PARTS)}")
    if not rest:
        return family.parts(model)[part]
    if not rest.startswith("layers."):
        raise ValueError(
            f'learn.{key}: after the part may stand layers.N or layers.FROM:TO, as in "vision.layers.-4:", '
            f'and there is "{EMBEDDING}"'
        )
    layers = family.layers(model, part)
    try:
        return [layers[i] for i in chosen(rest.removeprefix("layers."), len(layers))]
    except ValueError as error:
        raise ValueError(f"learn.{key}: {error}") from None


def describe(model: nn.Module, family: Family, learned: list[Learned]) -> list[tuple[str, int, int, str]]:
    """Rows for the table at the start: part, parameters, of these learning, and their rates."""
    rows = []
    for part, modules in family.parts(model).items():
        inside: dict[int, Any] = {id(p): p for module in modules for p in module.parameters()}
        learning = [one for one in learned if id(one.parameter) in inside]
        rates = ", ".join(dict.fromkeys(f"{one.key} {one.rate.lr:g}" for one in learning)) or "frozen"
        total = sum(p.numel() for p in inside.values())
        total += sum(one.spared() for root in modules for one in root.modules() if isinstance(one, Quantized))
        rows.append((part, total, sum(one.parameter.numel() for one in learning), rates))
    return rows
