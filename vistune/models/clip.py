"""CLIP-like vision towers (CLIP, SigLIP): from pixels to features, and the image processor that gives those pixels.

Shapes: N images, P tokens of an image. Knows nothing of what the features are for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaImageProcessorPil

from vistune.images import FixedLayout, Layout


def see(tower: nn.Module, pixels: Tensor, config: Any) -> Tensor:
    """Features of images [N,3,H,W] -> [N,P,D_vision]: hidden states of the selected layers, class token as configured.

    Layers above the last selected one are not run; without gradient when nothing in `tower` learns.
    """
    learning = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learning):
        states = _states(inside(tower), pixels, [depth(layer, config) for layer in _chosen(config)])
        picked = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
        return picked[:, 1:] if config.vision_feature_select_strategy == "default" else picked


def _states(tower: Any, pixels: Tensor, depths: list[int]) -> list[Tensor]:
    """Hidden states after each of `depths` layers, as `output_hidden_states` would give them."""
    hidden = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    seen = {0: hidden}
    for depth, layer in enumerate(tower.encoder.layers[: max(depths)], start=1):
        hidden = layer(hidden, None)
        seen[depth] = hidden
    return [seen[depth] for depth in depths]


def inside(tower: Any) -> Any:
    """The module with `embeddings` and `encoder`: some towers wrap it once more."""
    return getattr(tower, "vision_model", tower)


def depth(layer: int, config: Any) -> int:
    """How many vision layers run for `hidden_states[layer]`; entry 0 is what goes into the first."""
    layers = config.vision_config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"vision_feature_layer is {layer}, the vision tower has {layers} layers")
    return range(layers + 1)[layer]


def _chosen(config: Any) -> list[int]:
    layer = config.vision_feature_layer
    return [layer] if isinstance(layer, int) else list(layer)


def used_layers(config: Any) -> int:
    """How many layers `see` runs."""
    return max(depth(layer, config) for layer in _chosen(config))


def class_tokens(config: Any) -> int:
    return 1 if config.vision_config.model_type.startswith("clip") else 0


def extra_tokens(config: Any) -> int:
    """Tokens of an image beside its patches: a class token that is kept. Dropping one that is not there is refused."""
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    extra = class_tokens(config) - dropped
    if extra < 0:
        raise ValueError(
            f"config.json: vision_feature_select_strategy is 'default', which drops a class token, "
            f"but {config.vision_config.model_type} has none; set it to 'full'"
        )
    return extra


def positions(config: Any) -> int:
    """Positions of one image inside the tower."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + class_tokens(config)


def tokens(config: Any) -> int:
    """Tokens one image gives the language model (P)."""
    return positions(config) - class_tokens(config) + extra_tokens(config)


def layout(processor: Any, config: Any, image: str | None) -> Layout:
    """The layout of a folder's image processor; `image` "square" or "pad" overrides what it says."""
    vision = config.vision_config
    mode: Any = image
    found: Any = FixedLayout.from_processor(
        processor, patch=vision.patch_size, extra_tokens=extra_tokens(config), mode=mode
    )
    if found.size != vision.image_size:
        raise ValueError(
            f"the image processor makes images of {found.size} pixels, but config.json says "
            f"vision_config.image_size = {vision.image_size}; one of them is not this tower's"
        )
    return found


def read_image_processor(folder: Path) -> dict[str, Any]:
    """The image processor that a folder describes, as the table its JSON is. ValueError when there is none."""
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if (file := folder / name).is_file():
            try:
                read = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}: not JSON ({error})") from error
            if found := read.get(key) if key else read:
                return found
    raise ValueError(f"{folder}: no preprocessor_config.json in it, which says how pictures become pixels")


def image_processor(layout: FixedLayout) -> LlavaImageProcessorPil:
    """The stock processor with the layout's pixels. It is the one on Pillow: torchvision's resizes differently."""
    stretched = layout.resize is None
    edge: dict[str, Any] = {"height": layout.size, "width": layout.size}
    return LlavaImageProcessorPil(
        do_pad=layout.mode == "pad",
        size=edge if layout.resize is None else {"shortest_edge": layout.resize},
        do_center_crop=not stretched,
        crop_size=edge,
        image_mean=list(layout.mean),
        image_std=list(layout.std),
        resample=layout.resample,
    )
