"""FastViTHD and a Qwen2 become a FastVLM folder, and the proof that the tower in it is the one it came from.

The tower may lie in a FastVLM checkpoint of either format, or by itself. Nothing is held but one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import CONFIG_MAPPING, FastVlmConfig, Qwen2Config
from transformers.models.fast_vlm.modeling_fast_vlm import FastVlmMultiModalProjector

from vistune.models import weights
from vistune.models.assembling import connectors
from vistune.models.checkpoints import fastvlm as original
from vistune.models.checkpoints import fastvlm_names, llava_parts
from vistune.models.families import family
from vistune.models.fit import COMPUTED
from vistune.models.folders import beside, quiet, read_config, write_described
from vistune.models.hub import resolve
from vistune.models.load import Loaded, commonest_type, load
from vistune.models.proving.report import TOLERANCE, Row, difference
from vistune.models.towers import clip
from vistune.models.towers.fastvithd import ARCHITECTURE, Sizes, Tower
from vistune.models.weights import Entry

# What may stand before a tower's names: FastVLM's two formats, MobileCLIP's own, open_clip's, timm's wrapper, nothing.
_PREFIXES = (
    fastvlm_names.APPLE,
    fastvlm_names.TIMM,
    "vision_tower.timm_model.",
    "image_encoder.model.",
    "visual.trunk.",
    "timm_model.",
    "",
)
_CONNECTOR = "model.multi_modal_projector."
RESOLUTION = 1024
"""Of the published models; taken where the tower's folder says none."""


def assemble(
    vision: str | Path,
    language: str | Path,
    out: Path | str,
    *,
    connector: str | Path | None = None,
    template: str | None = None,
    image: str | None = None,
    resolution: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """Write the stage-0 folder `out` and return what is in it.

    `vision`: a FastVLM folder in either format, or a folder or file with the tower alone (timm's fastvit_mci3 or
    MobileCLIP's names, branches folded). `language`: a Qwen2 folder or hub id. `connector`: as
    `connectors.read` takes it; None: fresh from `seed`. `resolution` None: as the tower's folder says, else 1,024.
    `template` None is qwen_2, `image` None "pad". `dtype` None: each part keeps its own. Raises ValueError.
    """
    out, text_folder = Path(out), resolve(language, "language")
    source = Path(vision) if Path(vision).is_file() else resolve(vision, "vision")
    sizes, tower = read_tower(source)
    text = read_text_config(text_folder)
    tensors = {fastvlm_names.TIMM + name: entry for name, entry in tower.items()} | _language(text_folder)
    tokenizer, image_token = llava_parts.tokenizer(text_folder, text)
    original.grow(tensors, text, tokenizer, str(text_folder))
    config = FastVlmConfig(
        vision_config=CONFIG_MAPPING["timm_wrapper"](**fastvlm_names.vision_config(sizes)),
        text_config=text,
        image_token_index=image_token,
        tie_word_embeddings="lm_head.weight" not in tensors,
    )
    like = tensors["model.language_model.embed_tokens.weight"].dtype
    tensors |= {_CONNECTOR + name: weights.held(t.to(like)) for name, t in _connector(config, connector, seed).items()}
    said = llava_parts.described(
        folder=out,
        family=family("fastvlm"),
        config=config,
        tokenizer=tokenizer,
        processor=original.processor(resolution or said_resolution(source)),
        template=template or "qwen_2",
        image=image or "pad",
        options={},
        generation=text_folder,
    )
    tensors = {name: entry.cast(dtype) for name, entry in tensors.items()}
    with beside(out) as new:
        weights.write(new, tensors)
        write_described(said, new, _card(vision, language, connector), commonest_type(tensors))
    return load(out, dtype="auto")


def _entries(source: Path) -> dict[str, Entry]:
    return weights.found(source) if source.is_dir() else weights.of_file(source)


def _inside(found: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tower's tensors among others, without what stands before their names; nothing when there is no tower."""
    for prefix in _PREFIXES:
        inside = {name.removeprefix(prefix): entry for name, entry in found.items() if name.startswith(prefix)}
        if any(name.startswith(("stem.0.", "patch_embed.0.")) for name in inside):
            return inside
    return {}


def read_tower(source: Path) -> tuple[Sizes, dict[str, Entry]]:
    """Sizes and tensors, by timm's names, of the FastViTHD in a folder or file. ValueError when there is none, or one
    that is not whole or not folded."""
    found = _entries(source)
    inside = _inside(found)
    if not inside:
        raise ValueError(
            f"vision: {source}: holds no FastViTHD, but {', '.join(sorted(found)[:5]) or 'nothing'}; give a FastVLM "
            f"folder or checkpoint, or timm's {ARCHITECTURE}"
        )
    fastvlm_names.refuse_branches(inside, str(source))
    named = _timm_names(inside)
    return fastvlm_names.sizes(named, str(source)), named


def _timm_names(tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """Without the head, which no FastVLM uses."""
    apple = any(name.startswith("patch_embed.") for name in tensors)
    named = {fastvlm_names.to_timm(name) if apple else name: entry for name, entry in tensors.items()}
    return {name: entry for name, entry in named.items() if name is not None and not name.startswith("head.")}


def said_resolution(source: Path) -> int:
    """The side in pixels that a tower's folder says, in Apple's words or in an image processor's; else 1,024."""
    if not source.is_dir():
        return RESOLUTION
    raw = read_config(source) if (source / "config.json").is_file() else {}
    if "mobileclip" in str(raw.get("mm_vision_tower", "")):
        return original.resolution(raw, str(source))
    if raw.get("model_type") == "fast_vlm":
        crop = clip.read_image_processor(source).get("crop_size", RESOLUTION)
        return crop["height"] if isinstance(crop, dict) else crop
    return RESOLUTION


def read_text_config(folder: Path) -> Qwen2Config:
    """The language model's config. ValueError when it is no Qwen2."""
    if (kind := read_config(folder).get("model_type")) != "qwen2":
        raise ValueError(f"language: {folder} is a {kind!r}; FastVLM is built on Qwen2 (0.5B, 1.5B, 7B)")
    with quiet():
        return Qwen2Config.from_pretrained(folder, local_files_only=True)


def _language(folder: Path) -> dict[str, Entry]:
    found = {name: entry for name, entry in weights.found(folder).items() if not COMPUTED.search(name)}
    return {name.replace("model.", "model.language_model.", 1): entry for name, entry in found.items()}


def _connector(config: FastVlmConfig, source: str | Path | None, seed: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        made: nn.Module = FastVlmMultiModalProjector(config)
    if source is not None:
        connectors.fill(made, connectors.read(source), str(source))
    return dict(made.state_dict())


def _card(vision: str | Path, language: str | Path, connector: str | Path | None) -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        "# An assembled FastVLM, before training\n\n"
        f"- vision: `{Path(vision).name}`\n- language: `{Path(language).name}`\n"
        f"- connector: {f'`{Path(connector).name}`' if connector else 'fresh'}\n"
    )


@torch.no_grad()
def compare_vision(source: Path, ours: nn.Module) -> list[Row]:
    """Two rows: every tensor of the tower in `source` against `ours`, then what both make of two pictures."""
    sizes, tensors = read_tower(source)
    held, worst, wrong = ours.state_dict(), 0.0, ""
    dtype = next(ours.parameters()).dtype
    read = {f"timm_model.{name}": entry.cast(dtype).read() for name, entry in tensors.items()}
    if missing := read.keys() ^ held.keys():
        wrong = f"{min(missing)} is on one side only; likely cause: the source is not the one it was assembled from"
    for name in sorted(read.keys() & held.keys()):
        if not torch.equal(read[name], held[name]):
            worst = max(worst, difference(read[name], held[name]))
            wrong = wrong or f"{name} differs; likely cause: other weights, or a cast between the two"
    rows = [Row("vision", "weights", len(read), worst, wrong)]
    return rows if missing else [*rows, _compare_features(sizes, read, ours)]


def _compare_features(sizes: Sizes, read: Mapping[str, torch.Tensor], ours: nn.Module) -> Row:
    with torch.device("meta"):
        tower = Tower(CONFIG_MAPPING["timm_wrapper"](**fastvlm_names.vision_config(sizes)))
    tower.load_state_dict(dict(read), assign=True)
    dtype = next(ours.parameters()).dtype
    pixels = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, other = (model.eval()(pixels).last_hidden_state for model in (tower, ours))
    found = difference(one, other)
    wrong = "" if found <= TOLERANCE.get(dtype, 1e-5) else "features differ; see the row above"
    return replace(Row("vision", "features", 1, found), wrong=wrong)
