"""Vision towers with one grid of patches (CLIP, SigLIP, DINOv2): pixels to features, and the image processor for them.

Shapes: N images, P tokens of an image. Knows nothing of what the features are for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaImageProcessorPil

from vistune.images import FixedLayout, Layout
from vistune.models import language as lm
from vistune.models.flops import Piece, learns, linear_weights
from vistune.models.shipped.modeling_llava_variant import at_scales, leading_tokens


def see(tower: nn.Module, pixels: Tensor, config: Any) -> Tensor:
    """Features of images [N,3,H,W] -> [N,P,D_vision]: hidden states of the selected layers, without the tokens
    that the config leaves out.

    Layers above the last selected one are not run; without gradient when nothing in `tower` learns. With several
    scales (`s2_scales`) the features of each stand beside one another.
    """
    learning = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learning):
        if scales := s2_scales(config):
            return at_scales(lambda tiles: _see(tower, tiles, config), pixels, scales)
        return _see(tower, pixels, config)


def _see(tower: nn.Module, pixels: Tensor, config: Any) -> Tensor:
    states = _states(inside(tower), pixels, [depth(layer, config) for layer in _chosen(config)])
    picked = states[0] if len(states) == 1 else torch.cat(states, dim=-1)
    return picked[:, _dropped(config) :]


def _states(tower: Any, pixels: Tensor, depths: list[int]) -> list[Tensor]:
    """Hidden states after each of `depths` layers, as `output_hidden_states` would give them."""
    hidden = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    seen, mask = {0: hidden}, () if hasattr(tower.encoder, "layer") else (None,)  # DINOv2's layers know no mask
    for depth, layer in enumerate(layers(tower)[: max(depths)], start=1):
        hidden = layer(hidden, *mask)
        seen[depth] = hidden
    return [seen[depth] for depth in depths]


def inside(tower: Any) -> Any:
    """The module with `embeddings` and `encoder`: some towers wrap it once more."""
    return getattr(tower, "vision_model", tower)


def layers(tower: Any) -> nn.ModuleList:
    """The layers of a tower."""
    encoder = inside(tower).encoder
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


_DINO = re.compile(
    r"embeddings\.(cls_token|mask_token|register_tokens|position_embeddings|patch_embeddings)|encoder\.layer\.|layernorm\."
)
_DINO_PARTS = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
_DINO_PARTS |= {"o_proj": "output.dense"}


def published_name(name: str) -> str:
    """A tower's parameter as published folders name it inside the tower, whatever this `transformers` calls it."""
    name = name.removeprefix("vision_model.")
    if _DINO.match(name):
        return re.sub(r"(?<=\.attention\.)[qkvo]_proj(?=\.)", lambda found: _DINO_PARTS[found[0]], name)
    return f"vision_model.{name}"


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


def s2_scales(config: Any) -> list[int] | None:
    """The sides at which a picture is seen when there are several."""
    return getattr(config, "s2_scales", None)


def class_tokens(config: Any) -> int:
    """Tokens of the tower before an image's patches: its class token, and registers."""
    return leading_tokens(config.vision_config)


def _dropped(config: Any) -> int:
    """Of those, how many are left out. The stock class drops the first one alone, ours all of them."""
    if config.vision_feature_select_strategy != "default":
        return 0
    return class_tokens(config) if config.model_type == "llava_variant" else 1


def extra_tokens(config: Any) -> int:
    """Tokens of an image beside its patches that are kept. Dropping a class token that is not there is refused."""
    extra = class_tokens(config) - _dropped(config)
    if extra < 0:
        raise ValueError(
            f"config.json: vision_feature_select_strategy is 'default', which drops a class token, "
            f"but {config.vision_config.model_type} has none; set it to 'full'"
        )
    return extra


def any_size(config: Any) -> bool:
    """Whether the tower takes pictures of other sizes than it was made for (it interpolates its positions)."""
    return bool(config.vision_config.model_type.startswith("dinov2"))


def patches(config: Any, side: int | None = None) -> int:
    """Patches of one image (of one tile, with several scales) of `side` pixels; None: as the folder's are."""
    vision = config.vision_config
    if side is None and any_size(config):
        return config.image_seq_length - extra_tokens(config)
    side = vision.image_size if side is None or s2_scales(config) else side
    return (side // vision.patch_size) ** 2


def positions(config: Any) -> int:
    """Positions of one image inside the tower."""
    return patches(config) + class_tokens(config)


def tiles(config: Any) -> int:
    """How often the tower runs for one image."""
    scales = s2_scales(config) or [1]
    return sum((scale // scales[0]) ** 2 for scale in scales)


def tokens(config: Any, side: int | None = None) -> int:
    """Tokens one image (of `side` pixels) gives the language model (P)."""
    return patches(config, side) + extra_tokens(config)


def weights(tower: Any, connector: nn.Module) -> dict[str, Any]:
    """Weights of the linear layers of a tower and its connector, as `pieces` takes them."""
    embeddings = inside(tower).embeddings
    patch = getattr(embeddings, "patch_embedding", None) or embeddings.patch_embeddings.projection
    return {
        "patch": patch.weight.numel(),
        "vision": [lm.layer_weights(layer) for layer in layers(tower)],
        "connector": linear_weights(connector),
    }


def pieces(config: Any, weights: dict[str, Any], images: int, learn: Collection[str]) -> list[Piece]:
    """The part of a forward pass that sees `images` (or tiles), connector included; `weights` from `weights`."""
    vision, runs = config.vision_config, images * tiles(config)
    rows = runs * positions(config)
    rest, flags = learns(learn, "vision", vision.num_hidden_layers)
    scores = 4 * rows * positions(config) * vision.hidden_size
    found = [Piece(2 * runs * patches(config) * weights["patch"], learns=rest)]
    for (inputs, others), learning in list(zip(weights["vision"], flags, strict=True))[: used_layers(config)]:
        found += lm.layer_pieces(2 * rows * inputs, scores, 2 * rows * others, learning)
    return [*found, Piece(2 * images * tokens(config) * weights["connector"], learns="connector" in learn)]


def layout(processor: Any, config: Any, image: str | None) -> Layout:
    """The layout of a folder's image processor; `image` "square" or "pad" overrides what it says.

    `config` is told how many tokens an image has. ValueError for pictures that are not this tower's.
    """
    vision, mode, scales = config.vision_config, image, s2_scales(config)
    # One token stands for a patch of the smallest scale, which is that many pixels wide at the largest.
    patch = vision.patch_size * (scales[-1] // scales[0] if scales else 1)
    chosen: Any = mode
    found: Any = FixedLayout.from_processor(processor, patch=patch, extra_tokens=extra_tokens(config), mode=chosen)
    wanted = scales[-1] if scales else vision.image_size
    if found.size != wanted and (scales or not any_size(config)):
        said = f"s2_scales = {scales}" if scales else f"vision_config.image_size = {wanted}"
        raise ValueError(
            f"the image processor makes images of {found.size} pixels, but config.json says {said}; "
            "one of them is not this tower's"
        )
    config.image_seq_length = found.tokens()
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
