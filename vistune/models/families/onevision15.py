"""LLaVA-OneVision-1.5: a RICE tower at native resolution, a patch merger, Qwen3.

Shapes: T tokens of a pack, N images, P patches of all of them, D the language model's width.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, ProcessorMixin

from vistune.images import Layout
from vistune.models import attention
from vistune.models import language as lm
from vistune.models.flops import remembered, total
from vistune.models.shipped import (
    configuration_llavaonevision1_5,
    modeling_llavaonevision1_5,
    processing_llavaonevision1_5,
)
from vistune.models.shipped.configuration_llavaonevision1_5 import Llavaonevision1_5Config
from vistune.models.shipped.modeling_llavaonevision1_5 import LLaVAOneVision1_5_ForConditionalGeneration
from vistune.models.shipped.processing_llavaonevision1_5 import (
    LLaVAOneVision1_5_ImageProcessor,
    LLaVAOneVision1_5_Processor,
)
from vistune.models.towers import clip, rice
from vistune.native import NativeLayout

EPSILONS = {"hf": (None, None), "training": (1e-4, 1e-6)}
"""Epsilon of the norm before the blocks, and of the merger's: None as the blocks' (1e-5). "hf" is what the published
folders are used with, "training" what the original training code computed with."""

_CODE = (configuration_llavaonevision1_5, modeling_llavaonevision1_5, processing_llavaonevision1_5)
_AUTO_MAP = {
    "AutoConfig": "configuration_llavaonevision1_5.Llavaonevision1_5Config",
    "AutoModel": "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration",
    "AutoProcessor": "processing_llavaonevision1_5.LLaVAOneVision1_5_Processor",
}
_LIMITS = ("min_pixels", "max_pixels", "image_resolution")
# What every release writes into a section though it says nothing of the model.
_NOISE = (
    *("chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions"),
    *("output_hidden_states", "problem_type", "return_dict", "transformers_version"),
)


class OneVision15:
    """See `vistune.models.families.Family`. The class token and its angles belong to no part: they never learn, as in
    the original training code."""

    name = "onevision15"
    config_class: type[PretrainedConfig] = Llavaonevision1_5Config
    model_class: type[PreTrainedModel] = LLaVAOneVision1_5_ForConditionalGeneration
    image_token = "<|image_pad|>"
    embedding = "model.embed_tokens.weight"
    template = "qwen2-vl"
    options: Mapping[str, str] = {
        "norm_eps": '"hf" (as published folders are used) or "training" (as the original training code computes)',
        "legacy_images": "true: pictures after a sample's first are shifted, as the published code does",
        "image_resolution": "longest side in pixels, as the original cuts pictures of conversations",
        "min_pixels": "smaller pictures are made larger",
        "max_pixels": "larger pictures are made smaller",
    }

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llavaonevision1_5"

    def configure(self, config: Any, options: Mapping[str, Any]) -> None:
        vision = config.vision_config
        if (eps := options.get("norm_eps")) is not None:
            if eps not in EPSILONS:
                raise ValueError(f'model.options.norm_eps = {eps!r}: choose "hf" or "training"')
            vision.pre_norm_eps, vision.merger_norm_eps = EPSILONS[eps]
        if (legacy := options.get("legacy_images")) is not None:
            if not isinstance(legacy, bool):
                raise ValueError(f"model.options.legacy_images = {legacy!r}: true or false")
            vision.legacy_images = legacy

    def options_of(self, config: Any, layout: Any) -> dict[str, Any]:
        vision = config.vision_config
        found: dict[str, Any] = {}
        if (vision.pre_norm_eps, vision.merger_norm_eps) == EPSILONS["training"]:
            found["norm_eps"] = "training"
        if vision.legacy_images:
            found["legacy_images"] = True
        return found | ({"image_resolution": layout.image_resolution} if layout.image_resolution else {})

    def parts(self, model: Any) -> dict[str, list[nn.Module]]:
        visual = model.visual
        return {
            "vision": [visual.patch_embed, visual.pre_layernorm, visual.blocks],
            "connector": [visual.merger],
            "language": [model.model, self.head(model)],
        }

    def layers(self, model: nn.Module, part: str) -> nn.ModuleList:
        inner: Any = model
        if part == "vision":
            return inner.visual.blocks
        if part == "language":
            return inner.model.layers
        raise ValueError(f"part {part!r} of a onevision15 model has no layers; vision and language have")

    def head(self, model: nn.Module) -> nn.Linear:
        head: Any = model.lm_head
        return head

    def read_processor(self, folder: Path) -> Any:
        return clip.read_image_processor(folder)

    def layout(self, config: Any, processor: Any, image: str | None, options: Mapping[str, Any]) -> Layout:
        if image is not None:
            raise ValueError(f"model.image = {image!r}: onevision15 keeps every picture's own shape; leave it out")
        given = {key: options[key] for key in _LIMITS if options.get(key) is not None}
        for key, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.options.{key} = {value!r}: a number of pixels")
        found = dataclasses.replace(NativeLayout.from_processor(processor), **given)
        vision = config.vision_config
        if (found.patch, found.merge) != (vision.patch_size, vision.spatial_merge_size):
            raise ValueError(
                f"the image processor cuts patches of {found.patch} and joins {found.merge} x {found.merge}, but "
                f"config.json says {vision.patch_size} and {vision.spatial_merge_size}; one of them is not this tower's"
            )
        return found

    def processor(self, config: Any, tokenizer: Any, layout: Any, chat_template: str | None) -> ProcessorMixin:
        images = LLaVAOneVision1_5_ImageProcessor(
            min_pixels=layout.min_pixels,
            max_pixels=layout.max_pixels,
            patch_size=layout.patch,
            merge_size=layout.merge,
            image_mean=layout.mean,
            image_std=layout.std,
            resample=layout.resample,
            image_resolution=layout.image_resolution,
        )
        return LLaVAOneVision1_5_Processor(images, tokenizer, chat_template=chat_template)

    def complete(self, folder: Path, config: dict[str, Any]) -> None:
        """The code, and the keys by which `transformers` finds it; settings where every release looks for them."""
        for module in _CODE:
            code = Path(str(module.__file__)).read_text(encoding="utf-8")
            (folder / Path(str(module.__file__)).name).write_text(
                code.replace("from vistune.models.shipped.", "from .")
            )
        config["auto_map"] = _AUTO_MAP
        for section in (config["text_config"], config["vision_config"]):
            for key in _NOISE:
                section.pop(key, None)
        config["vision_config"] = {k: v for k, v in config["vision_config"].items() if v is not None and v is not False}
        (folder / "processor_config.json").unlink(missing_ok=True)  # where it is, the other files are not looked at
        _name_processor(folder / "tokenizer_config.json")
        video = {**json.loads((folder / "preprocessor_config.json").read_text()), **_VIDEO}
        del video["image_processor_type"], video["auto_map"]
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")

    def inputs(self, pixels: list[Tensor], grids: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids, dtype=torch.int64)}

    def hidden(
        self,
        model: Any,
        ids: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        pixels: Tensor | None,
        grids: Tensor | None = None,
    ) -> Tensor:
        """See `Family.hidden`. Raises ValueError when the placeholders in `ids` are not those of the images."""
        attention.use(model)
        merged = model.config.vision_config.spatial_merge_size**2
        tokens = 0 if grids is None or pixels is None else sum(rice.frames(grids)) // merged
        what = f"{0 if grids is None else len(grids)} images of {tokens} tokens in all"
        where = lm.placeholders(ids, model.config.image_token_id, tokens, what)
        embeds = model.get_input_embeddings()(ids)
        if pixels is not None and grids is not None and where is not None:
            legacy = model.config.vision_config.legacy_images
            each = (
                [int((one == model.config.image_token_id).sum()) for one in ids.split(list(lengths))] if legacy else []
            )
            embeds = lm.splice(embeds, where, self.features(model, pixels, grids, each))
        return lm.hidden(model.model, embeds, positions, lengths)

    def features(self, model: Any, pixels: Tensor, grids: Tensor | None, each: Sequence[int] = ()) -> Tensor:
        assert grids is not None
        return model.visual.merger(rice.see(model.visual, pixels, grids, each))

    def language(self, model: nn.Module) -> nn.Module:
        inner: Any = model
        return inner.model

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
        """See `Family.flops`."""
        said: Any = config
        text = said.text_config
        weights = remembered(text, lambda: _weights(text.to_json_string(use_diff=False)))
        seen = rice.pieces(said.vision_config, grids, learn) if images and grids is not None else []
        return total([*seen, *lm.pieces(said.text_config, weights, lengths, supervised, learn)])


_VIDEO = {
    "video_processor_type": "Qwen2VLVideoProcessor",
    "do_sample_frames": False,
    "min_frames": 4,
    "max_frames": 768,
}


def _name_processor(file: Path) -> None:
    """By the published one's class, which older readers look for in the tokenizer's settings."""
    said = json.loads(file.read_text(encoding="utf-8"))
    said["processor_class"] = "Qwen2_5_VLProcessor"
    file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@functools.lru_cache(maxsize=8)
def _weights(text_json: str) -> dict[str, Any]:
    """Weights of the language model's linear layers, counted on the meta device."""
    config = Llavaonevision1_5Config(text_config=json.loads(text_json))
    with torch.device("meta"):
        model: Any = LLaVAOneVision1_5_ForConditionalGeneration(config)
    return lm.weights(model.model, model.lm_head)


# Folders of this family name code of their own; ours is that code, so nothing has to be trusted to open them.
AutoConfig.register("llavaonevision1_5", Llavaonevision1_5Config, exist_ok=True)

FAMILY = OneVision15()
