"""The language model's matrices in 8 or 4 bits, through bitsandbytes, as they are read: never all of them unquantised.

Vision, connector, embedding and head stay as they are. Knows parts through the family, nothing of formats.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistune import console
from vistune.models import lowbit
from vistune.models.families import Family
from vistune.models.load import Loaded, as_read, load


def load_quantized(
    folder: Path | str,
    kind: str,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str = "cpu",
    double: bool = False,
    **said: Any,
) -> Loaded:
    """`vistune.models.load.load` with every linear layer of the language model but its head in `kind`.

    "8bit" is LLM.int8(), "4bit" NF4 in blocks of 64 values; `double` quantises the blocks' scales too. Each matrix is
    quantised on `device` as soon as it is read. `dtype` is of everything else, and what is computed in. ValueError for
    another kind, without bitsandbytes, and as `load` raises it.
    """
    place = Quantizer(kind, torch.device(device), double)
    loaded = load(folder, dtype=dtype, place=place, **said)
    loaded.model.to(device)  # type: ignore[arg-type]  # buffers that are computed, not read
    after = sum(footprint(loaded.model, loaded.family).values())
    before = after + place.before - place.after
    console.say(f"loaded in {kind}: {size(after)} instead of {size(before)}")
    return loaded


def size(count: float) -> str:
    """Bytes for people, in decimal and in binary units."""
    return f"{count / 1e9:.3g} GB ({count / 2**30:.3g} GiB)" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def linear_paths(model: nn.Module, family: Family) -> list[str]:
    """The full paths of what is quantised: every linear layer of the language model but its head."""
    head = family.head(model)
    roots = family.parts(model)["language"]
    inside = {id(one) for root in roots for one in root.modules() if isinstance(one, nn.Linear) and one is not head}
    return [path for path, module in model.named_modules() if id(module) in inside]


@dataclass
class Quantizer:
    """See `vistune.models.load.Place`. `before`, `after`: bytes of the quantised matrices as they were and as they are.

    ValueError for another kind than 8bit and 4bit, and when bitsandbytes is not there.
    """

    kind: str
    device: torch.device
    double: bool = False
    before: int = 0
    after: int = 0
    paths: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        lowbit.layer(nn.Linear(1, 1, device="meta"), self.kind)

    def __call__(self, family: Family, model: nn.Module, name: str, value: Tensor) -> None:
        self.paths = self.paths or set(linear_paths(model, family))
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in self.paths:
            as_read(family, model, name, value.to(self.device))
            return
        parent, _, last = path.rpartition(".")
        made = quantized(model.get_submodule(path), value, self.kind, self.device, self.double)
        setattr(model.get_submodule(parent), last, made)
        self.before += value.nbytes
        self.after += sum(tensor.nbytes for tensor in (*made.leaves().values(), *made.buffers()))


def quantized(linear: Any, weight: Tensor, kind: str, device: torch.device | str = "cpu", double: bool = False) -> Any:
    """A quantised layer in place of `linear` (its own weight is not looked at) with `weight` [out, in], on `device`."""
    return lowbit.layer(linear, kind, double).fill(weight.to(device)).eval()


def lay(model: nn.Module, family: Family, kind: str, double: bool = False) -> None:
    """Put quantised layers in place of every linear layer of the language model but its head: with its weight, or where
    that is on the meta device without memory yet. ValueError for another kind than 8bit and 4bit, and without
    bitsandbytes."""
    for path in linear_paths(model, family):
        parent, _, last = path.rpartition(".")
        linear: Any = model.get_submodule(path)
        made = lowbit.layer(linear, kind, double)
        setattr(model.get_submodule(parent), last, made if linear.weight.is_meta else made.fill(linear.weight.detach()))


def footprint(model: nn.Module, family: Family) -> dict[str, int]:
    """Bytes of each part's weights as they are held, tied ones once, with what quantised ones need to be read again."""
    seen: set[int] = set()
    return {
        part: sum(_bytes(module, seen) for root in roots for module in root.modules())
        for part, roots in family.parts(model).items()
    }


def weighed(model: nn.Module, family: Family) -> dict[str, tuple[int, int]]:
    """For each part the bytes of its weights as they are held, and as they would be without quantising: in the type
    that the rest of the model has."""
    dtype = next(one.dtype for one in model.parameters() if one.is_floating_point())
    found = {}
    for part, held in footprint(model, family).items():
        inside = {id(one): one for root in family.parts(model)[part] for one in root.modules()}
        layers = [one for one in inside.values() if isinstance(one, lowbit.Quantized)]
        spared = sum(
            one.in_features * one.out_features * dtype.itemsize
            - sum(tensor.nbytes for tensor in (*one.leaves().values(), *one.buffers()))
            for one in layers
        )
        found[part] = (held, held + spared)
    return found


def _bytes(module: nn.Module, seen: set[int]) -> int:
    total = 0
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        place = id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            total += tensor.nbytes
    return total
