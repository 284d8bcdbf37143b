"""LLaVA-1.5 and its like, on stock `LlavaForConditionalGeneration`: one grid of patches, two linear layers, any causal
language model whose head has no bias.

Shapes: T tokens of a pack, N images, P tokens of an image, D the language model's width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PretrainedConfig, PreTrainedModel

from vistune.images import Layout
from vistune.models import attention
from vistune.models import language as lm
from vistune.models.families import family
from vistune.models.flops import remembered, total
from vistune.models.towers import clip
from vistune.samples import IMAGE_MARK

# The names of the published llava-hf folders, which every version of `transformers` and vLLM reads.
_PUBLISHED = {
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


class Llava:
    """See `vistune.models.families.Family`."""

    name = "llava"
    config_class: type[PretrainedConfig] = LlavaConfig
    model_class: type[PreTrainedModel] = LlavaForConditionalGeneration
    image_token = IMAGE_MARK
    embedding = "model.language_model.embed_tokens.weight"
    template = "tokenizer"
    options: Mapping[str, str] = {}

    def matches(self, config: Mapping[str, Any]) -> bool:
        # The original format's older files call themselves "llava" too, but have no vision_config.
        return config.get("model_type") == "llava" and "vision_config" in config

    def configure(self, config: PretrainedConfig, options: Mapping[str, Any]) -> None:
        assert not options

    def options_of(self, config: PretrainedConfig, layout: Layout) -> dict[str, Any]:
        return {}

    def parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        inner: Any = model.model
        return {
            "vision": [inner.vision_tower],
            "connector": [inner.multi_modal_projector],
            "language": [inner.language_model, self.head(model)],
        }

    def layers(self, model: nn.Module, part: str) -> nn.ModuleList:
        inner: Any = model.model
        if part == "vision":
            return clip.layers(inner.vision_tower)
        if part == "language":
            return lm.layers(inner.language_model)
        raise ValueError(f"part {part!r} of a llava model has no layers; vision and language have")

    def head(self, model: nn.Module) -> nn.Linear:
        head: Any = model.lm_head
        return head

    def read_processor(self, folder: Path) -> Any:
        return clip.read_image_processor(folder)

    def layout(self, config: PretrainedConfig, processor: Any, image: str | None, options: Mapping[str, Any]) -> Layout:
        return clip.layout(processor, config, image)

    def processor(self, config: Any, tokenizer: Any, layout: Any, chat_template: str | None) -> LlavaProcessor:
        return LlavaProcessor(
            image_processor=clip.image_processor(layout),
            tokenizer=tokenizer,
            patch_size=config.vision_config.patch_size,
            num_additional_image_tokens=clip.class_tokens(config),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=chat_template,
        )

    def complete(self, folder: Path, config: dict[str, Any]) -> None:
        """Stock files are all it needs."""

    def inputs(self, pixels: list[Tensor], grids: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack(pixels)}

    def hidden(
        self,
        model: nn.Module,
        ids: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        pixels: Tensor | None,
        grids: Tensor | None = None,
    ) -> Tensor:
        """See `Family.hidden`. Raises ValueError when the placeholders in `ids` are not those of the images."""
        inner: Any = model.model
        self.attend_packed(inner)
        images, side = (0, None) if pixels is None else (len(pixels), pixels.shape[-1])
        each = self.tokens(inner.config, side)
        where = lm.placeholders(ids, inner.config.image_token_id, images * each, f"{images} images of {each} tokens")
        embeds = inner.get_input_embeddings()(ids)
        if pixels is not None and where is not None:
            embeds = lm.splice(embeds, where, self.features(model, pixels, grids))
        return self.read(inner.language_model, embeds, positions, lengths)

    def features(self, model: nn.Module, pixels: Tensor, grids: Tensor | None, each: Sequence[int] = ()) -> Tensor:
        inner: Any = model.model
        return inner.multi_modal_projector(self.see(inner, pixels)).flatten(0, 1)

    def language(self, model: nn.Module) -> nn.Module:
        inner: Any = model.model
        return inner.language_model

    def tokens(self, config: Any, side: int | None) -> int:
        """How many tokens an image of `side` pixels gives; None: of the side that config.json says."""
        return clip.tokens(config, side)

    def see(self, inner: Any, pixels: Tensor) -> Tensor:
        """Images [N, 3, H, W] to features [N, P, D_vision]."""
        return clip.see(inner.vision_tower, pixels, inner.config)

    def attend_packed(self, inner: Any) -> None:
        """Make the model attend inside the samples of a pack."""
        attention.use(inner)

    def read(self, language: nn.Module, embeds: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        """The language model over a pack: [T, D] -> [T, D]."""
        return lm.hidden(language, embeds, positions, lengths)

    def stored_name(self, name: str) -> str:
        for ours, published in _PUBLISHED.items():
            if name.startswith(ours):
                inner = name.removeprefix(ours)
                return published + (clip.published_name(inner) if ours == "model.vision_tower." else inner)
        raise AssertionError(name)

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
        """See `Family.flops`. Unused last vision layers are not run and not counted."""
        weights = remembered(config, lambda: _weights(self.name, config.to_json_string(use_diff=False)))
        pieces = clip.pieces(config, weights, images, learn) if images else []
        return total([*pieces, *lm.pieces(config.text_config, weights, lengths, supervised, learn)])


@functools.lru_cache(maxsize=8)
def _weights(name: str, config_json: str) -> dict[str, Any]:
    """Weights of the linear layers, counted on the meta device: exact for whatever language model is composed."""
    one: Any = family(name)
    with torch.device("meta"):
        model: Any = one.model_class(one.config_class.from_dict(json.loads(config_json)))
    inner = model.model
    return clip.weights(inner.vision_tower, inner.multi_modal_projector) | lm.weights(
        inner.language_model, model.lm_head
    )


FAMILY = Llava()
