"""A LLaVA-1.5-like model becomes a LLaVA-NeXT one: the same tower, connector and language model, and an end of line.

So began LLaVA-1.6, with the connector that LLaVA-1.5 had trained. Knows tensors by name; none is held in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaNextConfig

from vistune.anyres import AnyresLayout
from vistune.models import checkpoints, weights
from vistune.models.assembling.llava import assemble_llava
from vistune.models.checkpoints import Checkpoint
from vistune.models.families import family
from vistune.models.families.llava_next import NEWLINE
from vistune.models.folders import Described, beside, write_described
from vistune.models.load import commonest_type

_SAME = (
    "vision_config",
    "text_config",
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
    "image_seq_length",
    "tie_word_embeddings",
)
"""What the two stock configs call by the same name and mean alike."""


def assemble(vision: str | Path, language: str | Path, out: Path | str, **said: Any) -> Described:
    """Write the stage-0 folder `out` of a LLaVA-NeXT model. `said`: as `vistune.models.assemble.assemble` takes it
    without `image`; `connector` may be the model folder of a first stage. Raises ValueError as that does."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as parts:
        assemble_llava(vision, language, Path(parts) / out.name, image="square", **said)
        return _cut(checkpoints.read(Path(parts) / out.name), "what these parts make", out, None, said.get("seed", 0))


def cut_into_tiles(
    source: Path | str, out: Path | str, *, pinpoints: Sequence[Sequence[int]] | None = None, seed: int = 0
) -> Described:
    """Write the model of `source`, a checkpoint of a llava model, as a LLaVA-NeXT folder `out`.

    `pinpoints` are [height, width] of whole tiles, LLaVA-1.6's where there are none. The end of line is drawn from
    `seed` as the original draws it: normal, of unit length in all. Raises ValueError for another kind of model.
    """
    return _cut(checkpoints.read(source), str(source), Path(out), pinpoints, seed)


def _cut(found: Checkpoint, what: str, out: Path, pinpoints: Sequence[Sequence[int]] | None, seed: int) -> Described:
    if (kind := found.said.family.name) != "llava":
        raise ValueError(f"{what}: a {kind} model; pictures of one that is LLaVA-1.5's class can be cut into tiles")
    said = _described(found.said, out, pinpoints)
    width = said.config.text_config.hidden_size
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed)) * width**-0.5
    like = next(entry for name, entry in found.tensors.items() if "multi_modal_projector" in name)
    tensors = {NEWLINE: weights.held(drawn).cast(like.dtype)} | found.tensors
    with beside(out) as new:
        weights.write(new, tensors)
        write_described(said, new, _card(found.said), commonest_type(tensors))
    return said


def _card(before: Described) -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        "# A LLaVA-NeXT model, before training\n\n"
        f"The parts are those of `{before.folder.name}`; the end of line is fresh.\n"
    )


def _described(before: Described, out: Path, pinpoints: Sequence[Sequence[int]] | None) -> Described:
    next_family, config = family("llava_next"), before.config
    layout = AnyresLayout.from_processor(
        before.family.processor(config, before.tokenizer, before.layout, None).image_processor,
        patch=config.vision_config.patch_size,
        pinpoints=pinpoints,
    )
    made: Any = LlavaNextConfig(
        **{key: getattr(config, key) for key in _SAME},
        image_grid_pinpoints=[list(each) for each in layout.pinpoints],
    )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(made, key, getattr(config, key, None))
    processor = next_family.processor(made, before.tokenizer, layout, None).image_processor
    next_family.layout(made, processor, "anyres", {})  # refuses a tower whose class tokens are kept
    return replace(before, folder=out, family=next_family, config=made, layout=layout, origin={})
