"""Connectors by themselves: what kind one is, and reading one from wherever it lies.

Tensors are called by the place of their layer, as the original does: 0.weight, 0.bias, 2.weight, ...
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor, nn

from vistune.models import checkpoints, weights

STOCK = {"0": "linear_1", "2": "linear_2"}
"""The layers of the stock class's connector, which is an mlp2x_gelu."""
_PLACES = {name: place for place, name in STOCK.items()}
_OURS, _ORIGINAL = "multi_modal_projector.", "mm_projector."


def read(source: Path | str) -> dict[str, Tensor]:
    """The connector in an original `mm_projector.bin` or `non_lora_trainables.bin` (or its folder), a model folder, or
    any checkpoint.

    ValueError when there is none, or it is none that is known.
    """
    source = Path(source)
    for name in ("mm_projector.bin", "non_lora_trainables.bin"):  # of a first stage; beside a LoRA adapter
        source = source / name if (source / name).exists() else source
    if not source.exists():
        raise ValueError(f"connector: {source}: no such file or folder")
    if source.is_file():
        held = weights.pickled(source)
        named = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        found = {_place(name): value for name, value in named.items() if _ORIGINAL in name}
    else:
        single = (source / weights.SINGLE).exists() or (source / weights.INDEX).exists()
        entries = weights.stored(source) if single else checkpoints.read(source).tensors
        found = {_place(name): entry.read() for name, entry in entries.items() if _OURS in name or _ORIGINAL in name}
        held = dict(entries)
    if not found:
        raise ValueError(f"connector: {source}: holds no connector, but {', '.join(sorted(held)[:5]) or 'nothing'}")
    kind(found, str(source))
    return found


def _place(name: str) -> str:
    rest = re.split(r"multi_modal_projector\.|mm_projector\.", name)[-1]
    layer, _, leaf = rest.rpartition(".")
    return f"{_PLACES.get(layer, layer) or '0'}.{leaf}"


def kind(tensors: dict[str, Tensor], where: str) -> str:
    """The type that a connector's tensors belong to. ValueError for tensors of none."""
    places = sorted({name.rpartition(".")[0] for name in tensors}, key=lambda place: (len(place), place))
    wanted = {f"{2 * number}.{leaf}" for number in range(len(places)) for leaf in ("weight", "bias")}
    if not places:
        return "identity"
    if set(tensors) != wanted:
        raise ValueError(
            f"connector: {where}: holds {sorted(tensors)}, which is neither linear nor an mlpNx_gelu "
            f"(of {len(places)} layers that would be {sorted(wanted)})"
        )
    return "linear" if len(places) == 1 else f"mlp{len(places)}x_gelu"


def fill(connector: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Put tensors that were read into a connector of the stock class or of ours. ValueError for other shapes."""
    empty = connector.state_dict()
    stock = "linear_1.weight" in empty
    named = {_renamed(name) if stock else name: value for name, value in tensors.items()}
    for name, value in empty.items():
        if name not in named or named[name].shape != value.shape:
            found = list(named[name].shape) if name in named else "not there"
            raise ValueError(f"connector: {where}: {name} is {found}; these parts need {list(value.shape)}")
    connector.load_state_dict(named)


def _renamed(name: str) -> str:
    place, _, leaf = name.partition(".")
    return f"{STOCK.get(place, place)}.{leaf}"
