"""LLaVA with what the stock class cannot hold: other connectors, several scales (S2), MPT, a head with bias.

Saved with our own class, whose one file is written into the folder; the rest is the llava family's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, LlavaProcessor, PretrainedConfig, PreTrainedModel

from vistune.models import language as lm
from vistune.models import mpt
from vistune.models.families.llava import Llava
from vistune.models.folders import quiet
from vistune.models.shipped import modeling_llava_variant
from vistune.models.shipped.modeling_llava_variant import LlavaVariantConfig, LlavaVariantForConditionalGeneration
from vistune.models.towers import clip

_SOURCE = Path(modeling_llava_variant.__file__)
_CLASSES = {"AutoConfig": LlavaVariantConfig, "AutoModelForImageTextToText": LlavaVariantForConditionalGeneration}


class LlavaVariant(Llava):
    """See `vistune.models.families.Family`. The connector's layers are `model.multi_modal_projector.0`, `.2`, `.4`, ...
    with weight and bias each; on disk, tensors have the names that they have in the model."""

    name = "llava_variant"
    config_class: type[PretrainedConfig] = LlavaVariantConfig
    model_class: type[PreTrainedModel] = LlavaVariantForConditionalGeneration

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llava_variant"

    def processor(self, config: Any, tokenizer: Any, layout: Any, chat_template: str | None) -> LlavaProcessor:
        """Stock: told the side of what one token stands for, and of the tokens beside the patches those that stay."""
        return LlavaProcessor(
            image_processor=clip.image_processor(layout),
            tokenizer=tokenizer,
            patch_size=layout.patch,
            num_additional_image_tokens=layout.extra_tokens,
            vision_feature_select_strategy="full",
            chat_template=chat_template,
        )

    def complete(self, folder: Path, config: dict[str, Any]) -> None:
        shutil.copyfile(_SOURCE, folder / _SOURCE.name)
        config["auto_map"] = {auto: f"{_SOURCE.stem}.{one.__name__}" for auto, one in _CLASSES.items()}

    def read(self, language: nn.Module, embeds: Tensor, positions: Tensor, lengths: Sequence[int]) -> Tensor:
        if language.config.model_type == "mpt":  # type: ignore[union-attr]
            return mpt.hidden(language, embeds, lengths)
        return lm.hidden(language, embeds, positions, lengths)

    def attend_packed(self, inner: Any) -> None:
        with quiet():  # MPT's attention cannot be replaced in the stock way, of which `transformers` would warn
            super().attend_packed(inner)

    def stored_name(self, name: str) -> str:
        tower = "model.vision_tower."
        return tower + clip.published_name(name.removeprefix(tower)) if name.startswith(tower) else name


AutoConfig.register("llava_variant", LlavaVariantConfig, exist_ok=True)

FAMILY = LlavaVariant()
