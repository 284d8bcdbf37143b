"""FastVLM: FastViTHD, two linear layers, Qwen2; the stock class with our own vision tower in it.

`FastVlmForConditionalGeneration` of `transformers` opens the folders and needs timm for that; nothing here does.
Shapes: T tokens of a pack, N images, P tokens of an image, D the language model's width.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.fast_vlm.modeling_fast_vlm import (
    FastVlmModel,
    FastVlmMultiModalProjector,
    FastVlmPreTrainedModel,
)

from vistune.images import FixedLayout, Layout
from vistune.models import language as lm
from vistune.models.families.llava import Llava
from vistune.models.flops import Piece, learns, linear_weights, remembered, total
from vistune.models.towers import clip, fastvithd

RESOLUTIONS = range(256, 1536 + 1, fastvithd.STRIDE)
"""Sides in pixels that an image may be given; 1,024 of the published models (256 tokens)."""


class _Inner(FastVlmModel):
    def __init__(self, config: Any):
        FastVlmPreTrainedModel.__init__(self, config)  # not FastVlmModel's, which asks timm for the tower
        self.vision_tower = fastvithd.Tower(config.vision_config)
        self.multi_modal_projector = FastVlmMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class FastVlm(FastVlmForConditionalGeneration):
    """The stock class with our FastViTHD as its tower: same tensors, same forward, same `generate`."""

    def __init__(self, config: Any):
        FastVlmPreTrainedModel.__init__(self, config)
        self.model = _Inner(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class FastVlmFamily(Llava):
    """See `vistune.models.families.Family`. What is not here is LLaVA-1.5's."""

    name = "fastvlm"
    config_class: type[PretrainedConfig] = FastVlmConfig
    model_class: type[PreTrainedModel] = FastVlm
    template = "qwen_2"
    options: Mapping[str, str] = {
        "resolution": f"the side of the square that an image becomes: {RESOLUTIONS[0]} to {RESOLUTIONS[-1]} in steps "
        f"of {fastvithd.STRIDE}; (resolution / {fastvithd.STRIDE}) squared tokens"
    }

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "fast_vlm"

    def configure(self, config: PretrainedConfig, options: Mapping[str, Any]) -> None:
        """The image processor that is written says the resolution, so a folder need not remember the option."""
        fastvithd.Sizes.of(config.vision_config)
        if "resolution" in options:
            config.image_seq_length = _tokens(options["resolution"], "model.options.resolution")

    def layers(self, model: nn.Module, part: str) -> nn.ModuleList:
        """Of vision: the five stages; stem and last map are in none."""
        inner: Any = model.model
        if part == "vision":
            return inner.vision_tower.timm_model.stages
        if part == "language":
            return inner.language_model.layers
        raise ValueError(f"part {part!r} of a fastvlm model has no layers; vision (its five stages) and language have")

    def layout(self, config: PretrainedConfig, processor: Any, image: str | None, options: Mapping[str, Any]) -> Layout:
        """Pad unless something says otherwise, as these models were trained: published processors do not tell. How
        many tokens an image gives is then written into `config`, whose own default is another."""
        mode: Any = image or ("square" if processor.get("do_pad") is False else "pad")
        read = FixedLayout.from_processor(processor, patch=fastvithd.STRIDE, mode=mode)
        side = options.get("resolution", read.size)
        config.image_seq_length = _tokens(side, "the image processor's crop_size")
        return replace(read, size=side, resize=None if read.resize is None else side)

    def processor(self, config: Any, tokenizer: Any, layout: Any, chat_template: str | None) -> LlavaProcessor:
        return LlavaProcessor(
            image_processor=clip.image_processor(layout),
            tokenizer=tokenizer,
            patch_size=fastvithd.STRIDE,
            num_additional_image_tokens=0,
            vision_feature_select_strategy="full",
            chat_template=chat_template,
        )

    def complete(self, folder: Path, config: dict[str, Any]) -> None:
        """The stock class opens it."""
        config["architectures"] = [FastVlmForConditionalGeneration.__name__]

    def tokens(self, config: Any, side: int | None) -> int:
        return config.image_seq_length if side is None else (side // fastvithd.STRIDE) ** 2

    def see(self, inner: Any, pixels: Tensor) -> Tensor:
        return fastvithd.see(inner.vision_tower, pixels)

    def stored_name(self, name: str) -> str:
        return name

    def flops(
        self,
        config: PretrainedConfig,
        *,
        lengths: Sequence[int],
        images: int,
        supervised: int,
        learn: Collection[str] = ("vision", "connector", "language"),
        grids: Tensor | None = None,
    ) -> int:
        """See `Family.flops`. An image's share is that of `config.image_seq_length`, which `layout` sets."""
        weights = remembered(config, lambda: _weights(config.to_json_string(use_diff=False)))
        pieces = _vision_pieces(config, weights, images, learn) if images else []
        return total([*pieces, *lm.pieces(config.text_config, weights, lengths, supervised, learn)])


def _tokens(side: Any, what: str) -> int:
    """Tokens of an image of this side. ValueError for one that FastVLM does not take."""
    if type(side) is not int or side not in RESOLUTIONS:
        raise ValueError(
            f"{what}: {side!r}; FastVLM takes {RESOLUTIONS[0]} to {RESOLUTIONS[-1]} pixels in steps of "
            f"{fastvithd.STRIDE}, such as 512, 1024"
        )
    return (side // fastvithd.STRIDE) ** 2


def _vision_pieces(config: Any, weights: dict[str, Any], images: int, learn: Collection[str]) -> list[Piece]:
    rest, stages = learns(learn, "vision", len(weights["stages"]))
    parts = [(weights["stem"], rest), *zip(weights["stages"], stages, strict=True), (weights["last"], rest)]
    pieces = [Piece(images * products, images * attends, flag) for part, flag in parts for products, attends in part]
    connected = 2 * images * config.image_seq_length * weights["connector"]
    return [*pieces, Piece(connected, learns="connector" in learn)]


@functools.lru_cache(maxsize=8)
def _weights(config_json: str) -> dict[str, Any]:
    """What `flops` multiplies, counted on the meta device: of the tower, whose work depends on the map, operations of
    an image; of the others weights."""
    with torch.device("meta"):
        model: Any = FastVlm(FastVlmConfig.from_dict(json.loads(config_json)))
    side = fastvithd.STRIDE * math.isqrt(model.config.image_seq_length)
    return {
        **fastvithd.operations(model.model.vision_tower.timm_model, side),
        "connector": linear_weights(model.model.multi_modal_projector),
        **lm.weights(model.model.language_model, model.lm_head),
    }


FAMILY = FastVlmFamily()
