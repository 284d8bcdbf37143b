"""Model families, found by exact name or by what a folder's config.json says. One is one file here with `FAMILY`.

Knows the words every family answers to, and none of them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from vistune.images import Layout


class Family(Protocol):
    """One kind of vision-language model. Shapes: T tokens of a pack, N images, D the language model's width."""

    name: str
    model_class: type[PreTrainedModel]
    """The class that trains and whose `from_pretrained` opens the folder."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether this config.json is the family's."""

    def parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """ "vision", "connector", "language" (with the head): together every parameter exactly once."""

    def layers(self, model: nn.Module, part: str) -> nn.ModuleList:
        """The layers of "vision" or "language", as `learn` counts them. ValueError for a part without layers."""

    def layout(self, config: PretrainedConfig, processor: ProcessorMixin | None, image: str | None) -> Layout:
        """How an image becomes pixels and how many tokens; `image` None: as the folder says."""

    def processor(
        self, config: PretrainedConfig, tokenizer: Any, layout: Layout, chat_template: str | None
    ) -> ProcessorMixin:
        """The stock processor that gives the layout's pixels and the chat template's ids."""

    def hidden(
        self, model: nn.Module, ids: Tensor, positions: Tensor, lengths: Sequence[int], pixels: Tensor | None
    ) -> Tensor:
        """Packed forward up to (not including) the head: ids, positions [T], pixels [N,3,H,W] -> [T, D]."""

    def head(self, model: nn.Module) -> nn.Linear:
        """Hidden states to logits."""

    def stored_name(self, name: str) -> str:
        """The name on disk of a parameter or buffer that is called `name` in the model."""

    def flops(
        self,
        config: PretrainedConfig,
        *,
        lengths: Sequence[int],
        images: int,
        supervised: int,
        learn: Collection[str] = ("vision", "connector", "language"),
    ) -> int:
        """Floating point operations of one forward and backward of one pack."""


@functools.cache
def _families() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        if family.name in found:
            raise ValueError(f"model family {family.name!r} is registered twice; there are {', '.join(sorted(found))}")
        found[family.name] = family
    return found


def names() -> list[str]:
    """Every family's name."""
    return sorted(_families())


def family(name: str) -> Family:
    """The family of this name. ValueError lists the names."""
    try:
        return _families()[name]
    except KeyError:
        raise ValueError(f"no model family {name!r}; there are {', '.join(names())}") from None


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a folder, by its config.json alone. ValueError when none or several claim it."""
    claims = [one for one in _families().values() if one.matches(config)]
    if len(claims) == 1:
        return claims[0]
    said = f"{where}: model_type is {config.get('model_type')!r}"
    if "mm_vision_tower" in config or "mm_projector_type" in config:
        said += ", a checkpoint in LLaVA's original format, which is not a Hugging Face Llava folder"
    if not claims:
        raise ValueError(f"{said}; no model family takes it, there are {', '.join(names())}")
    raise ValueError(f"{said}; several families claim it: {', '.join(one.name for one in claims)}")
