"""The names that LLaVA's original checkpoints give to tensors, to a family's names and back.

Knows names alone: no file, no value.
"""

from __future__ import annotations

import re

from vistune.models.assembling import connectors
from vistune.models.families import Family

CONNECTOR, VISION, NEWLINE = "mm_projector.", "vision_tower.vision_tower.", "image_newline"

_INDEX = {layer: index for index, layer in connectors.STOCK.items()}


def published(name: str, family: Family) -> str:
    """The name in a family's folder of what the original calls `name` (`model.mm_projector.0.weight`)."""
    return family.stored_name(in_model(name, family))


def in_model(name: str, family: Family) -> str:
    """The same, in the family's model in memory. MPT's names begin with `transformer.` where others have `model.`."""
    if name.startswith("lm_head."):
        return name
    inner = re.sub(r"^(model|transformer)\.", "", name)
    if inner.startswith(CONNECTOR):
        return f"model.multi_modal_projector.{_layer(inner.removeprefix(CONNECTOR), family)}"
    if inner.startswith(VISION):
        return f"model.vision_tower.{inner.removeprefix(VISION).removeprefix('vision_model.')}"
    return f"model.{inner}" if inner == NEWLINE else f"model.language_model.{inner}"


def _layer(rest: str, family: Family) -> str:
    index, _, kind = rest.rpartition(".")
    if family.name == "llava_variant":
        return f"{index or 0}.{kind}"
    return f"{connectors.STOCK.get(index, index)}.{kind}"


def original(name: str, *, connector: str, root: str = "model") -> str:
    """The original's name of what is called `name` in a folder, or in the model in memory, of one of our families.

    `connector`: the original's word for its kind. `root`: "transformer" for MPT. The tower has a level `vision_model`,
    as CLIP and SigLIP had when these checkpoints were made.
    """
    if name.rpartition(".")[0].endswith("lm_head"):
        return f"lm_head.{name.rpartition('.')[2]}"
    if "multi_modal_projector." in name:
        layer, _, kind = name.rpartition("multi_modal_projector.")[2].rpartition(".")
        return f"{root}.{CONNECTOR}" + (kind if connector == "linear" else f"{_INDEX.get(layer, layer)}.{kind}")
    if "vision_tower." in name:
        return f"{root}.{VISION}vision_model.{name.partition('vision_tower.')[2].removeprefix('vision_model.')}"
    if name.endswith(NEWLINE):
        return f"{root}.{NEWLINE}"
    return f"{root}.{re.sub(r'^(model[.])?(language_model[.])?(model[.])?', '', name)}"


def is_connector(name: str) -> bool:
    """Whether the original's `name` is the connector's, whatever stands before it."""
    return CONNECTOR in name


def is_vision(name: str) -> bool:
    return VISION in name
