"""LLaVA-1.5 and its like, on stock `LlavaForConditionalGeneration`: CLIP or SigLIP, two linear layers, any causal LM.

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
from vistune.models import attention, clip
from vistune.models.flops import Piece, causal_pairs, learns, linear_weights, total
from vistune.samples import IMAGE_MARK

# The names of the published llava-hf folders, which every version of `transformers` and vLLM reads.
_PUBLISHED = {
    "model.vision_tower.": "vision_tower.vision_model.",
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
            return clip.inside(inner.vision_tower).encoder.layers
        if part == "language":
            return inner.language_model.layers
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
        attention.use(inner)
        where = _placeholders(ids, pixels, inner.config)
        embeds = inner.get_input_embeddings()(ids)
        if pixels is not None and where is not None:
            features = inner.multi_modal_projector(clip.see(inner.vision_tower, pixels, inner.config))
            embeds = embeds.index_copy(0, where, features.flatten(0, 1).to(embeds.dtype))
        out = inner.language_model(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=attention.no_mask(embeds),
            use_cache=False,
            segments=attention.segments(lengths, ids.device),
        )
        return out.last_hidden_state.squeeze(0)

    def stored_name(self, name: str) -> str:
        for ours, published in _PUBLISHED.items():
            if name.startswith(ours):
                inner = name.removeprefix(ours)
                return published + (
                    inner.removeprefix("vision_model.") if published.endswith("vision_model.") else inner
                )
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
        pieces = _vision_pieces(config, images, learn) if images else []
        return total([*pieces, *_language_pieces(config, lengths, supervised, learn)])


def _placeholders(ids: Tensor, pixels: Tensor | None, config: Any) -> Tensor | None:
    """Positions of the image tokens in `ids`, or None without images. The host does not wait for an accelerator."""
    per_image = clip.tokens(config)
    images = 0 if pixels is None else len(pixels)
    mask = ids == config.image_token_id
    if ids.device.type == "cpu":
        where = mask.nonzero().squeeze(1)
        if len(where) != images * per_image:
            raise ValueError(
                f"{len(where)} image placeholders (id {config.image_token_id}) in the pack, but {images} images "
                f"of {per_image} tokens; the data must lay {images * per_image}"
            )
        return where if images else None
    if images == 0:
        return None
    torch._assert_async(mask.sum() == images * per_image)
    return torch.nonzero_static(mask, size=images * per_image).squeeze(1)


def _vision_pieces(config: Any, images: int, learn: Collection[str]) -> list[Piece]:
    sizes, vision = _sizes(config.to_json_string(use_diff=False)), config.vision_config
    used, rows = clip.used_layers(config), images * clip.positions(config)
    rest, layers = learns(learn, "vision", vision.num_hidden_layers)
    scores = 4 * rows * clip.positions(config) * vision.hidden_size
    pieces = [Piece(2 * images * (vision.image_size // vision.patch_size) ** 2 * sizes["patch"], learns=rest)]
    for (inputs, others), learning in list(zip(sizes["vision"], layers, strict=True))[:used]:
        pieces += _layer_pieces(2 * rows * inputs, scores, 2 * rows * others, learning)
    connected = images * clip.tokens(config)
    return [*pieces, Piece(2 * connected * sizes["connector"], learns="connector" in learn)]


def _language_pieces(config: Any, lengths: Sequence[int], supervised: int, learn: Collection[str]) -> list[Piece]:
    sizes, text, tokens = _sizes(config.to_json_string(use_diff=False)), config.text_config, sum(lengths)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    scores = 4 * causal_pairs(lengths, window) * text.num_attention_heads * width
    rest, layers = learns(learn, "language", text.num_hidden_layers)
    pieces = [Piece(learns=rest)]  # the embedding: a look-up
    for (inputs, others), learning in zip(sizes["language"], layers, strict=True):
        pieces += _layer_pieces(2 * tokens * inputs, scores, 2 * tokens * others, learning)
    return [*pieces, Piece(2 * supervised * sizes["head"], learns=rest)]


def _layer_pieces(inputs: int, scores: int, others: int, learning: bool) -> list[Piece]:
    """A layer begins with a norm, whose weights learn with it."""
    return [Piece(learns=learning), Piece(inputs, scores, learning), Piece(others, learns=learning)]


@functools.lru_cache(maxsize=8)
def _sizes(config_json: str) -> dict[str, Any]:
    """Weights of the linear layers, counted on the meta device: exact for whatever language model is composed."""
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(LlavaConfig.from_dict(json.loads(config_json)))
    return {
        "patch": clip.inside(model.model.vision_tower).embeddings.patch_embedding.weight.numel(),
        "vision": [_layer(layer) for layer in FAMILY.layers(model, "vision")],
        "connector": linear_weights(model.model.multi_modal_projector),
        "language": [_layer(layer) for layer in FAMILY.layers(model, "language")],
        "head": model.lm_head.weight.numel(),
    }


def _layer(layer: nn.Module) -> tuple[int, int]:
    """Weights before the attention of a layer, and after it."""
    before = linear_weights(layer, only="self_attn", but="o_proj") - linear_weights(layer, only="self_attn.out_proj")
    return before, linear_weights(layer) - before


FAMILY = Llava()
