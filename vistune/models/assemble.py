"""A vision tower and a language model become one model folder, in the way of the family that they make.

Knows which tower makes which family; how each is joined stands in its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vistune.models.assembling import fastvlm as assemble_fastvlm
from vistune.models.assembling import llava_next as assemble_next
from vistune.models.assembling import onevision15 as assemble_onevision15
from vistune.models.assembling.llava import STOCK_TYPE, assemble_llava
from vistune.models.folders import Described, read_config
from vistune.models.hub import resolve

# model_type of a folder that holds a FastViTHD: Apple's checkpoints, the stock class's folders, the tower alone.
_FASTVITHD = ("llava_qwen2", "fast_vlm", "timm_wrapper")


def assemble(
    vision: str | Path,
    language: str | Path,
    out: Path | str,
    *,
    connector: str | Path | None = None,
    connector_type: str = STOCK_TYPE,
    template: str | None = None,
    image: str | None = None,
    select_layer: int = -2,
    select: str = "patch",
    start_end: bool = False,
    s2_scales: str | Sequence[int] | None = None,
    resolution: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tie: bool | None = None,
) -> Described:
    """Write the stage-0 folder `out` and return what is in it.

    `vision`, `language`: a folder or a hub id. `connector`: a model folder, an original `mm_projector.bin` (or its
    folder), or any checkpoint that holds one, whose type is then taken; None: fresh, from `seed`. `connector_type`:
    "linear", "mlpNx_gelu", "identity". `template`, `image` None: the family's. `select`: "patch" or "cls_patch" (with
    the class token). `start_end`: tokens `<im_start>`, `<im_end>` around every image. `s2_scales`: sides in pixels,
    such as "336,672,1008". `resolution`: side of a picture for FastViTHD. `dtype` None: each part keeps its own. `tie`
    None: the head is tied to the embedding as the language model says. Raises ValueError, also for what a family has
    not.
    """
    given: dict[str, Any] = {"connector": connector, "template": template, "image": image, "seed": seed}
    given |= {"dtype": dtype, "tie": tie, "resolution": resolution, "connector_type": connector_type}
    given |= {"select_layer": select_layer, "select": select, "start_end": start_end, "s2_scales": s2_scales}
    said = {key: value for key, value in given.items() if value != _DEFAULTS.get(key)}
    family, join, takes = _way(vision, image)
    if unknown := [key for key in said if key not in takes]:
        raise ValueError(f"{unknown[0]}: {family} has no such choice; it takes {', '.join(sorted(takes))}")
    return join(vision, language, out, **said)


_DEFAULTS = {"connector_type": STOCK_TYPE, "select_layer": -2, "select": "patch", "start_end": False, "seed": 0}
_EVERY = frozenset(["connector", "template", "seed", "dtype"])
_LLAVA = _EVERY | {"connector_type", "image", "select_layer", "select", "start_end", "s2_scales", "tie"}


def _way(vision: str | Path, image: str | None) -> tuple[str, Any, frozenset[str]]:
    """Which family a tower makes, what joins it, and the arguments that this takes."""
    kind = _kind(vision)
    if kind == assemble_onevision15.VISION:
        return "LLaVA-OneVision-1.5", _onevision15, _EVERY | {"tie"}
    if kind in _FASTVITHD:
        return "FastVLM", assemble_fastvlm.assemble, _EVERY | {"image", "resolution"}
    if image == "anyres":
        return "LLaVA-NeXT", _next, _LLAVA - {"s2_scales"}
    return "LLaVA", assemble_llava, _LLAVA


def _kind(vision: str | Path) -> str:
    """model_type of the tower's folder. A file, or a folder without config.json, can be a FastViTHD alone."""
    if Path(vision).is_file():
        return "timm_wrapper"
    folder = resolve(vision, "vision")
    if not (folder / "config.json").exists():
        return "timm_wrapper"
    config = read_config(folder)
    return str(config.get("model_type") or ("timm_wrapper" if "architecture" in config else ""))


def _onevision15(vision: str | Path, language: str | Path, out: Path | str, **said: Any) -> Described:
    parts = resolve(vision, "vision"), resolve(language, "language")
    return assemble_onevision15.assemble_onevision15(*parts, out, **said)


def _next(vision: str | Path, language: str | Path, out: Path | str, *, image: str, **said: Any) -> Described:
    return assemble_next.assemble(vision, language, out, **said)
