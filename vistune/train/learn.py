"""What learns: the recipe's `learn` and `lora` tables become trainable parameters with a rate each.

Knows parts and layers through the family, nothing of optimizers or data.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vistune.models import merge
from vistune.models.families import Family
from vistune.models.flops import chosen
from vistune.recipe import Lora, Rate, Recipe

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

    A longer key wins over a shorter one (`vision.layers.-4:` over `vision`). Raises ValueError for a key that names
    nothing.
    """
    model.requires_grad_(False)
    adapted = set(_inject(model, family, recipe.lora)) if recipe.lora.r else set()
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


def _inject(model: nn.Module, family: Family, lora: Lora) -> list[str]:
    """Put low-rank adapters beside the linear layers of `lora.parts`, by full path, the head left alone.

    Returns the adapters' parameter names. Matching by leaf name would also hit the vision tower (q_proj).
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(lora, lora_targets(model, family, lora)), model)
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


def lora_targets(model: nn.Module, family: Family, lora: Lora) -> list[str]:
    """Full paths of the layers that get adapters. ValueError when there are none."""
    paths = {id(module): path for path, module in model.named_modules()}
    head, linear = family.head(model), []
    for part in lora.parts:
        for root in family.parts(model)[part]:
            inside = (one for one in root.modules() if isinstance(one, nn.Linear) and one is not head)
            linear += [paths[id(one)] for one in inside]
    targets = sorted({path for path in linear if re.search(lora.targets, path)})
    if not targets:
        raise ValueError(f"lora.targets = {lora.targets!r}: matches no linear layer of {', '.join(lora.parts)}")
    return targets


def lora_config(lora: Lora, targets: list[str]) -> Any:
    """The recipe's `lora` table as peft says it."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write the adapters in peft's layout, beside and then renamed: adapter_config.json, adapter_model.safetensors;
    and what else learned (a connector, say), which peft has no place for, in a file beside."""
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    config: Any = model.peft_config["default"]  # type: ignore[index]
    config.base_model_name_or_path = base
    config.save_pretrained(str(beside))
    assert any(isinstance(module, LoraLayer) for module in model.modules())
    state = get_peft_model_state_dict(model)
    save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, beside / "adapter_model.safetensors")
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    if learned:
        save_file({name: value.contiguous() for name, value in learned.items()}, beside / merge.LEARNED)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def merge_adapters(model: nn.Module, stored: Callable[[str], Tensor]) -> None:
    """Fold every adapter into its layer's weight and take it out, so that the model is plain again.

    `stored(name)` gives a weight as the start folder holds it: training may have held it in half precision.
    """
    from peft.tuners.lora import LoraLayer

    config: Any = getattr(model, "peft_config", {}).get("default")
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            layer: Any = module.get_base_layer()
            folded = merge.fold(stored(f"{path}.weight"), _adapter(module), config, path)
            layer.weight = nn.Parameter(folded.to(layer.weight.device))  # no longer what the start folder holds
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)


def _adapter(layer: Any) -> dict[str, Tensor]:
    """The tensors of one layer's adapter, by the names that `merge.fold` takes."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    return {name: held["default"].weight for name in names if "default" in (held := getattr(layer, name))}


def lower_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold frozen matrices in the compute type: half the memory, and autocast need not cast them at every step.

    Vectors (norms, biases) stay as they are. What is exported of frozen parts comes from the start folder, untouched.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.to(dtype)


def describe(model: nn.Module, family: Family, learned: list[Learned]) -> list[tuple[str, int, int, str]]:
    """Rows for the table at the start: part, parameters, of these learning, and their rates."""
    rows = []
    for part, modules in family.parts(model).items():
        inside: dict[int, Any] = {id(p): p for module in modules for p in module.parameters()}
        learning = [one for one in learned if id(one.parameter) in inside]
        rates = ", ".join(dict.fromkeys(f"{one.key} {one.rate.lr:g}" for one in learning)) or "frozen"
        total = sum(p.numel() for p in inside.values())
        rows.append((part, total, sum(one.parameter.numel() for one in learning), rates))
    return rows
