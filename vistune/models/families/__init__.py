"""Model families, found by exact name or by what a folder's config.json says. One is one file here with `FAMILY`.

Knows the words every family answers to, and none of them.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from vistune.images import Layout


class Family(Protocol):
    """One kind of vision-language model. Shapes: T tokens of a pack, N images, D the language model's width."""

    name: str
    config_class: type[PretrainedConfig]
    model_class: type[PreTrainedModel]
    """The class that trains, and whose `from_pretrained` (the stock class's, where there is one) opens the folder."""
    image_token: str
    """The token that stands for a piece of a picture, as the tokenizer spells it."""
    embedding: str
    """The language model's embedding by its name in the model; the head is `lm_head.weight`."""
    template: str
    """The chat template of a folder that names none: "tokenizer" (its own), or a key of `vistune.chat.TEMPLATES`."""
    options: Mapping[str, str]
    """What `model.options` of a recipe may say, each with a line of explanation."""

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether this config.json is the family's."""

    def configure(self, config: PretrainedConfig, options: Mapping[str, Any]) -> None:
        """Lay `options` over the model's config, in place; keys are known ones. ValueError for a value."""

    def options_of(self, config: PretrainedConfig, layout: Layout) -> dict[str, Any]:
        """The options that a folder must remember to be opened as this one is; defaults left out."""

    def parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """ "vision", "connector", "language" (with the head): together every parameter exactly once, but for what the
        family never lets learn (a class token that was constant in the original)."""

    def layers(self, model: nn.Module, part: str) -> nn.ModuleList:
        """The layers of "vision" or "language", as `learn` counts them. ValueError for a part without layers."""

    def read_processor(self, folder: Path) -> Any:
        """What `layout` takes: the folder's image processor (or its processor). ValueError when it is not usable."""

    def layout(self, config: PretrainedConfig, processor: Any, image: str | None, options: Mapping[str, Any]) -> Layout:
        """How an image becomes pixels and how many tokens; `image` None: as the folder says."""

    def processor(
        self, config: PretrainedConfig, tokenizer: Any, layout: Layout, chat_template: str | None
    ) -> ProcessorMixin:
        """The processor that gives the layout's pixels and the chat template's ids; stock where there is one."""

    def complete(self, folder: Path, config: dict[str, Any]) -> None:
        """What a folder needs beside stock files: code written into it, keys laid into its config.json."""

    def hidden(
        self,
        model: nn.Module,
        ids: Tensor,
        positions: Tensor,
        lengths: Sequence[int],
        pixels: Tensor | None,
        grids: Tensor | None = None,
    ) -> Tensor:
        """Packed forward up to (not including) the head: ids, positions [T] -> [T, D]. `pixels` and `grids` (int64
        [N, 3], on the host) are those of `vistune.data.batch.Batch`, normalized."""

    def features(self, model: nn.Module, pixels: Tensor, grids: Tensor | None, each: Sequence[int]) -> Tensor:
        """What the language model is given in the places of pictures: `pixels` and `grids` as `hidden` takes them ->
        [tokens of all pictures, D]. `each`: how many of these every sample has, in order; its attention must be
        `attention.NAME`."""

    def language(self, model: nn.Module) -> nn.Module:
        """The stock text model, without the head."""

    def inputs(self, pixels: list[Tensor], grids: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        """The images of a call of the class's own forward or `generate`, each normalized, as keyword arguments."""

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
        grids: Tensor | None = None,
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


def families_of(config: Mapping[str, Any]) -> list[Family]:
    """The families that take this config.json."""
    return [one for one in _families().values() if one.matches(config)]


def family_of(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family of a folder, by its config.json alone. ValueError when none or several claim it."""
    claims = families_of(config)
    if len(claims) == 1:
        return claims[0]
    said = f"{where}: model_type is {config.get('model_type')!r}"
    if not claims:
        raise ValueError(f"{said}; no model family takes it, there are {', '.join(names())}")
    raise ValueError(f"{said}; several families claim it: {', '.join(one.name for one in claims)}")
