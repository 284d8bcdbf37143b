"""LLaVA-NeXT (LLaVA-1.6) on stock `LlavaNextForConditionalGeneration`: pictures in tiles, a learned end of line.

Shapes: T tokens of a pack, N images, K tiles of all of them, P tokens of a tile, D the language model's width.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PretrainedConfig,
    PreTrainedModel,
)

from vistune.anyres import AnyresLayout, check_pinpoints
from vistune.images import Layout, settings
from vistune.models import language as lm
from vistune.models.families.llava import Llava
from vistune.models.towers import clip

NEWLINE = "image_newline"


class LlavaNext(Llava):
    """See `vistune.models.families.Family`. What is not here is LLaVA-1.5's."""

    name = "llava_next"
    config_class: type[PretrainedConfig] = LlavaNextConfig
    model_class: type[PreTrainedModel] = LlavaNextForConditionalGeneration
    options: Mapping[str, str] = {"pinpoints": "the canvases, a list of [height, width] of whole tiles"}

    def matches(self, config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "llava_next"

    def configure(self, config: Any, options: Mapping[str, Any]) -> None:
        if (points := options.get("pinpoints")) is not None:
            if not isinstance(points, list) or not all(isinstance(each, list) for each in points):
                raise ValueError(f"model.options.pinpoints = {points!r}: a list of [height, width] is needed")
            check_pinpoints(points, config.vision_config.image_size)
            config.image_grid_pinpoints = points

    def options_of(self, config: PretrainedConfig, layout: Layout) -> dict[str, Any]:
        return {}  # config.json and the processor carry the pinpoints themselves

    def parts(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        inner: Any = model.model
        found = super().parts(model)
        # A parameter of the model itself: a module around it, so that it is found with the connector.
        found["connector"].append(nn.ParameterDict({NEWLINE: inner.image_newline}))
        return found

    def layout(self, config: Any, processor: Any, image: str | None, options: Mapping[str, Any]) -> AnyresLayout:
        if image not in (None, "anyres"):
            raise ValueError(f'image: {image!r}; a llava_next model takes pictures in tiles, say "anyres" or nothing')
        vision = config.vision_config
        points = options.get("pinpoints") or settings(processor).get("image_grid_pinpoints")
        points = points or config.image_grid_pinpoints  # a tower's own processor knows none
        found = AnyresLayout.from_processor(processor, patch=vision.patch_size, pinpoints=points)
        if found.size != vision.image_size:
            raise ValueError(
                f"the image processor makes tiles of {found.size} pixels, but config.json says "
                f"vision_config.image_size = {vision.image_size}; one of them is not this tower's"
            )
        if [list(each) for each in found.pinpoints] != [list(each) for each in config.image_grid_pinpoints]:
            raise ValueError(
                f"image_grid_pinpoints are {config.image_grid_pinpoints} in config.json and {list(found.pinpoints)} "
                "in the image processor; the model and its pictures must have the same"
            )
        if clip.extra_tokens(config):
            raise ValueError(
                "config.json: vision_feature_select_strategy is 'full', which keeps the class token of every tile; "
                "tiles are laid side by side, so set it to 'default'"
            )
        return found

    def processor(self, config: Any, tokenizer: Any, layout: Any, chat_template: str | None) -> Any:
        edge = {"height": layout.size, "width": layout.size}
        pictures = LlavaNextImageProcessorPil(
            size={"shortest_edge": layout.size},
            crop_size=edge,
            image_grid_pinpoints=[list(each) for each in layout.pinpoints],
            image_mean=list(layout.mean),
            image_std=list(layout.std),
            resample=layout.resample,
        )
        return LlavaNextProcessor(
            image_processor=pictures,
            tokenizer=tokenizer,
            patch_size=config.vision_config.patch_size,
            num_additional_image_tokens=clip.class_tokens(config),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=chat_template,
        )

    def inputs(self, pixels: list[Tensor], grids: list[tuple[int, int, int]]) -> dict[str, Tensor]:
        """Tiles of every image up to the most that one has, the rest zeros, as the stock forward takes them."""
        return {
            "pixel_values": nn.utils.rnn.pad_sequence(pixels, batch_first=True),
            "image_sizes": torch.tensor([grid[1:] for grid in grids]),
        }

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
        rows = torch.empty(0, dtype=torch.int64) if grids is None else feature_rows(grids, inner.config)
        said = f"{0 if grids is None else len(grids)} images of {len(rows)} tokens in all"
        where = lm.placeholders(ids, inner.config.image_token_id, len(rows), said)
        embeds = inner.get_input_embeddings()(ids)
        if pixels is not None and where is not None:
            embeds = lm.splice(embeds, where, _laid(inner, pixels, grids, rows))
        return self.read(inner.language_model, embeds, positions, lengths)

    def features(self, model: nn.Module, pixels: Tensor, grids: Tensor | None, each: Sequence[int] = ()) -> Tensor:
        assert grids is not None
        inner: Any = model.model
        return _laid(inner, pixels, grids, feature_rows(grids, inner.config))

    def stored_name(self, name: str) -> str:
        return NEWLINE if name == f"model.{NEWLINE}" else super().stored_name(name)

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
        """See `Family.flops`. Every tile goes through tower and connector, also what black it holds."""
        tiles = 0 if grids is None else int(grids[:, 0].sum())
        assert tiles or not images
        return super().flops(config, lengths=lengths, images=tiles, supervised=supervised, learn=learn)


def _laid(inner: Any, pixels: Tensor, grids: Tensor | None, rows: Tensor) -> Tensor:
    """Features of all tiles, laid as `rows` (of `feature_rows`) says."""
    assert grids is not None and int(grids[:, 0].sum()) == len(pixels), "tiles of other images than the grids'"
    tiles = inner.multi_modal_projector(clip.see(inner.vision_tower, pixels, inner.config))
    table = torch.cat([tiles.flatten(0, 1), inner.image_newline[None].to(tiles.dtype)])
    return table.index_select(0, _moved(rows, pixels.device))


def feature_rows(grids: Tensor, config: Any) -> Tensor:
    """Which rows of [K * P + 1, D] (every tile's features, then the end of line) the images' placeholders take, in
    order: int64, on the host. `grids` [N, 3] as `AnyresLayout.grid` says them."""
    vision = config.vision_config
    layout = AnyresLayout(
        size=vision.image_size,
        patch=vision.patch_size,
        pinpoints=tuple((high, wide) for high, wide in config.image_grid_pinpoints),
    )
    each, end = layout.side**2, int(grids[:, 0].sum()) * layout.side**2
    found, first = [], 0
    for tiles, height, width in grids.tolist():
        one = _rows_of_one(layout, width, height)
        found.append(np.where(one < 0, end, one + first))
        first += tiles * each
    return torch.from_numpy(np.concatenate(found)) if found else torch.empty(0, dtype=torch.int64)


def _moved(rows: Tensor, device: torch.device) -> Tensor:
    """The host does not wait for an accelerator."""
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


@functools.lru_cache(maxsize=4096)
def _rows_of_one(layout: AnyresLayout, width: int, height: int) -> np.ndarray:
    """The same of one image alone, the end of line as -1: the whole view, then line by line what the image covers."""
    side = layout.side
    rows, columns = (np.asarray(taken, np.int64) for taken in layout.covered(width, height))
    across = layout.canvas(width, height)[1] // layout.size
    tile = 1 + (rows // side)[:, None] * across + columns // side
    inside = (rows % side)[:, None] * side + columns % side
    lines = np.pad(tile * side**2 + inside, ((0, 0), (0, 1)), constant_values=-1)
    return np.concatenate([np.arange(side**2), lines.ravel()])


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether the config.json of an original LLaVA checkpoint describes a model of this family, held or refused."""
    merge = str(raw.get("mm_patch_merge_type") or "flat")
    return "anyres" in str(raw.get("image_aspect_ratio")) or merge.startswith("spatial")


def config_from_original(
    raw: Mapping[str, Any], *, vision_config: Any, text_config: Any, image_token_id: int
) -> LlavaNextConfig:
    """The stock config of an original LLaVA-1.6 checkpoint, from its config.json and its parts' configs.

    ValueError says what the stock class cannot hold: it has one way to lay tiles out (`spatial_unpad`), and no class
    tokens in them.
    """
    wanted = {
        "image_aspect_ratio": ("anyres", "pictures are not cut into tiles of `image_grid_pinpoints`"),
        "mm_patch_merge_type": ("spatial_unpad", "tiles are laid side by side with an end of line, nothing else"),
        "mm_projector_type": ("mlp2x_gelu", "the connector is two linear layers"),
        "mm_vision_select_feature": ("patch", "a class token in every tile has no place among rows"),
    }
    absent = {"mm_patch_merge_type": "flat", "mm_projector_type": "linear", "mm_vision_select_feature": "patch"}
    for key, (value, why) in wanted.items():
        if (found := raw.get(key) or absent.get(key)) != value:
            raise ValueError(f"config.json: {key} is {found!r}; LlavaNextForConditionalGeneration has {value!r}: {why}")
    has_class = vision_config.model_type.startswith("clip")
    config = LlavaNextConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default" if has_class else "full",
        image_grid_pinpoints=_pinpoints(raw.get("image_grid_pinpoints")),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )
    check_pinpoints(config.image_grid_pinpoints or [], vision_config.image_size)
    return config


def to_original(config: Any) -> dict[str, Any]:
    """What the config.json of an original checkpoint says of tiles; canvases are (width, height) there."""
    return {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[wide, high] for high, wide in config.image_grid_pinpoints],
        "mm_patch_merge_type": "spatial_unpad",
    }


def _pinpoints(said: Any) -> list[list[int]]:
    """(width, height) of the original, as a list or as the text of one, become [height, width]."""
    try:
        read = ast.literal_eval(said) if isinstance(said, str) else said
        return [[int(high), int(wide)] for wide, high in read]
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"config.json: image_grid_pinpoints is {said!r}, not a list of (width, height)") from None


FAMILY = LlavaNext()
