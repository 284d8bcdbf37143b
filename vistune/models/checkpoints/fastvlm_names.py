"""The names that Apple's code gives to FastViTHD's tensors, to those of timm, which model folders have, and back.

Knows names and shapes alone: no file, no value. Names are relative to the tower unless said otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vistune.models.towers.fastvithd import ARCHITECTURE, Sizes

APPLE, TIMM = "model.vision_tower.vision_tower.model.", "model.vision_tower.timm_model."
"""What stands before a tower's names in Apple's checkpoint, and in a model folder."""

# Apple counts everything between stem and last map in one list.
_NETWORK = {
    "0": "stages.0.blocks",
    "1": "stages.1.downsample",
    "2": "stages.1.blocks",
    "3": "stages.2.downsample",
    "4": "stages.2.blocks",
    "5": "stages.3.downsample",
    "6": "stages.3.pos_emb",
    "7": "stages.3.blocks",
    "8": "stages.4.downsample",
    "9": "stages.4.pos_emb",
    "10": "stages.4.blocks",
}
_PLACE = {path: number for number, path in _NETWORK.items()}
_WORDS = {
    "patch_embed.": "stem.",
    "conv_exp.se.reduce.": "final_conv.se.fc1.",
    "conv_exp.se.expand.": "final_conv.se.fc2.",
    "conv_exp.": "final_conv.",
}
_INSIDE = ((".convffn.", ".mlp."), (".lkb_reparam.", ".reparam_conv."))
_BRANCH = re.compile(r"(^|\.)(rbr_|conv_kxk|conv_scale|large_conv|small_conv|lkb_origin|identity\.)|\.pe\.")


def to_timm(name: str) -> str | None:
    """timm's name of what Apple calls `name`; None for the head, which no FastVLM uses. ValueError for others."""
    if name.startswith("head."):
        return None
    for apple, timm in _WORDS.items():
        if name.startswith(apple):
            return timm + name.removeprefix(apple)
    match = re.fullmatch(r"network\.(\d+)\.(.+)", name)
    if not match or match[1] not in _NETWORK:
        raise ValueError(f"{name}: not a tensor of FastViTHD")
    rest = re.sub(r"\.(layer_scale(_[12])?)$", r".\1.gamma", match[2])
    found = f"{_NETWORK[match[1]]}.{rest}"
    for apple, timm in _INSIDE:
        found = found.replace(apple, timm)
    return found


def to_apple(name: str) -> str:
    """Apple's name of what timm calls `name`."""
    for apple, timm in _WORDS.items():
        if name.startswith(timm):
            return apple + name.removeprefix(timm)
    match = re.fullmatch(r"(stages\.\d\.(?:blocks|downsample|pos_emb))\.(.+)", name)
    assert match, name
    rest = match[2].removesuffix(".gamma").replace(".mlp.", ".convffn.")
    if match[1].endswith(".downsample"):
        rest = rest.replace("proj.0.reparam_conv.", "proj.0.lkb_reparam.")
    return f"network.{_PLACE[match[1]]}.{rest}"


def refuse_branches(names: Any, where: str) -> None:
    """ValueError for a tower whose branches are not folded: it computes the same, by other tensors."""
    if found := sorted(name for name in names if _BRANCH.search(name)):
        raise ValueError(
            f"{where}: a tower in its training form ({len(found)} tensors of branches, such as {found[0]}); fold it "
            "where timm is: timm.utils.reparameterize_model(timm.create_model('fastvit_mci3', checkpoint_path=...))"
        )


def sizes(tensors: Mapping[str, Any], where: str) -> Sizes:
    """Blocks and channels of a tower, from its tensors by timm's names. ValueError when some are not there."""
    depths, widths = [], []
    for stage in range(5):
        blocks = {name.split(".")[3] for name in tensors if name.startswith(f"stages.{stage}.blocks.")}
        first = f"stages.{stage}.downsample.proj.1.reparam_conv.weight" if stage else "stem.0.reparam_conv.weight"
        if not blocks or first not in tensors:
            raise ValueError(
                f"{where}: {first} is missing: the vision tower is not in it, or not whole. Apple's own code would "
                "put a random one in its place; here that is an error"
            )
        depths.append(len(blocks))
        widths.append(tensors[first].shape[0])
    return Sizes(tuple(depths), tuple(widths))


def vision_config(sizes: Sizes) -> dict[str, Any]:
    """The `timm_wrapper` section of config.json, as `transformers` writes it; sizes only where they are not usual."""
    unusual = {"layers": list(sizes.depths), "embed_dims": list(sizes.widths)} if sizes != Sizes() else {}
    return {
        "model_type": "timm_wrapper",
        "architecture": ARCHITECTURE,
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": sizes.features,
        "initializer_range": 0.02,
        "model_args": {**unusual, "inference_mode": True},
    }
