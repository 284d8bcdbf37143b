"""FastVLM's original checkpoints, as Apple's code writes and reads them: one state dict with the vision tower in it.

Its config.json names the tower by a word ("mobileclip_l_1024") and says nothing of its sizes: those are read from the
tensors. Whether it says `unfreeze_mm_vision_tower` does not matter here; Apple's code needs it to be true.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, FastVlmConfig

from vistune import console
from vistune.models import families, weights
from vistune.models.checkpoints import Checkpoint, fastvlm_names, llava_config, llava_names, llava_parts
from vistune.models.checkpoints.hf import KEPT
from vistune.models.fit import COMPUTED
from vistune.models.folders import read_config
from vistune.models.load import commonest_type
from vistune.models.towers.fastvithd import Sizes
from vistune.models.weights import Entry

_WORDS = ("model.embed_tokens.weight", "lm_head.weight")


class OriginalFastVlm:
    """See `vistune.models.checkpoints.Format`."""

    name = "fastvlm"
    holds = (
        "Apple's original FastVLM (config.json with mm_vision_tower mobileclip_l_*, safetensors or pytorch_model*.bin)"
    )

    def recognises(self, folder: Path) -> str:
        if not (folder / "config.json").is_file() or not weights.has_weights(folder):
            return ""
        raw = read_config(folder)
        said = str(raw.get("mm_vision_tower", ""))
        return (
            f"config.json: mm_vision_tower is {said!r}" if "mobileclip" in said and "vision_config" not in raw else ""
        )

    def read(
        self,
        folder: Path,
        *,
        base: Path | None,
        template: str | None = None,
        image: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        if base is not None:
            raise ValueError(f"{folder}: is a whole checkpoint, so a base ({base}) has no use; leave it out")
        raw, where = read_config(folder), str(folder)
        ours = raw.pop("vistune", {})
        _refuse_what_is_not_fastvlm(raw, where)
        if not any((folder / name).exists() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError(
                f"{folder}: no tokenizer in it (tokenizer.json, or vocab.json and merges.txt); copy its own there"
            )
        found = weights.found(folder)
        tensors, kept = _named(found, where)
        sizes = tower_sizes(tensors, where)
        text = llava_config.text_config(raw)
        tokenizer, image_token = llava_parts.tokenizer(folder, text)
        rows = grow(tensors, text, tokenizer, where)
        config = FastVlmConfig(
            vision_config=CONFIG_MAPPING["timm_wrapper"](**fastvlm_names.vision_config(sizes)),
            text_config=text,
            image_token_index=image_token,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )
        said = llava_parts.described(
            folder=folder,
            family=families.family("fastvlm"),
            config=config,
            tokenizer=tokenizer,
            processor=processor(resolution(raw, where)),
            template=template or ours.get("template") or "qwen_2",
            image=image or ("pad" if raw.get("image_aspect_ratio") == "pad" else "square"),
            options={**ours.get("options", {}), **(options or {})},
            generation=folder,
        )
        kept |= llava_parts.small_files(folder)
        said.origin |= ours.get("origin", {}) | {
            self.name: {
                "config": raw,
                "weights": "safetensors" if any(folder.glob("*.safetensors")) else "bin",
                "rows": rows,
                "kept": list(kept),
            }
        }
        kept |= weights.safetensors(folder / KEPT) if (folder / KEPT).exists() else {}
        return Checkpoint(format=self.name, why=self.recognises(folder), said=said, tensors=tensors, kept=kept)

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        said = checkpoint.said
        if said.family.name != self.name:
            raise ValueError(f"{said.folder}: is a {said.family.name}; Apple's format holds FastVLM alone")
        origin = said.origin.get(self.name, {})
        config = _config(checkpoint, origin)
        own = checkpoint.kept.keys() & set(origin.get("kept", ()))  # none of it in a folder that was trained since
        files = {name: checkpoint.kept[name] for name in own if name.startswith(llava_parts.FILE)}
        tensors = {original(name): entry for name, entry in checkpoint.tensors.items()}
        for name in _WORDS:
            if origin and name in tensors:
                tensors[name] = tensors[name].rows(origin["rows"])
        tensors |= {name: entry for name, entry in checkpoint.kept.items() if name in own - files.keys()}
        writer = weights.write_pickles if origin.get("weights") == "bin" else weights.write
        writer(folder, dict(sorted(tensors.items())))
        if others := {name: entry for name, entry in checkpoint.kept.items() if name not in own}:
            weights.write_file(folder / KEPT, others)
        llava_parts.write_small(said, files, config, folder)


def published(name: str) -> str | None:
    """The name in a model folder of what Apple's checkpoint calls `name`; None for the tower's head."""
    if name.startswith(fastvlm_names.APPLE):
        inner = fastvlm_names.to_timm(name.removeprefix(fastvlm_names.APPLE))
        return None if inner is None else fastvlm_names.TIMM + inner
    return llava_names.published(name, families.family("fastvlm"))


def original(name: str) -> str:
    """Apple's name of what a model folder calls `name`."""
    if fastvlm_names.TIMM.removeprefix("model.") in name:
        return fastvlm_names.APPLE + fastvlm_names.to_apple(name.partition("timm_model.")[2])
    return llava_names.original(name, connector="mlp2x_gelu")


def tower_sizes(tensors: Mapping[str, Entry], where: str) -> Sizes:
    """Sizes of the tower among a model folder's tensors. ValueError when it is not among them."""
    mark = fastvlm_names.TIMM
    return fastvlm_names.sizes({k.removeprefix(mark): v for k, v in tensors.items() if k.startswith(mark)}, where)


def _named(found: Mapping[str, Entry], where: str) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Tensors by a model folder's names, and by Apple's what such a folder has no place for."""
    fastvlm_names.refuse_branches((name for name in found if name.startswith(fastvlm_names.APPLE)), where)
    named, kept = {}, {}
    for name, entry in found.items():
        to = None if COMPUTED.search(name) else published(name)
        if to is None:
            kept[name] = entry
        else:
            named[to] = entry
    return named, kept


def grow(tensors: dict[str, Entry], text: Any, tokenizer: Any, where: str) -> int:
    """Room for the image's token, a multiple of 64 rows, where there is none yet: in `tensors`, which have a model
    folder's names, and in the language model's config. Returns how many rows there were. ValueError for too few."""
    embedding, head = (str(published(name)) for name in _WORDS)
    if embedding not in tensors:
        raise ValueError(f"{where}: the language model's embedding is missing ({embedding})")
    rows = tensors[embedding].shape[0]
    if len(tokenizer) - 1 > rows:
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer) - 1} tokens beside {llava_parts.IMAGE_MARK}, the embedding "
            f"{rows} rows; take the tokenizer that belongs to these weights"
        )
    if rows != text.vocab_size or len(tokenizer) <= rows:  # shapes that config.json does not say are named later
        return rows
    text.vocab_size = -(-len(tokenizer) // llava_parts.STEP) * llava_parts.STEP
    for name in (embedding, head):
        if name in tensors and tensors[name].shape[0] == rows:
            tensors[name] = weights.grown(tensors[name], text.vocab_size)
    return rows


def _refuse_what_is_not_fastvlm(raw: Mapping[str, Any], where: str) -> None:
    if llava_config.language_kind(raw) != "qwen2":
        raise ValueError(f"{where}: config.json: model_type {raw.get('model_type')!r}; FastVLM is built on Qwen2")
    expected = {
        "mm_projector_type": ("mlp2x_gelu",),
        "image_aspect_ratio": ("pad", "square", None),
        "mm_patch_merge_type": ("flat", None),
    }
    for key, known in expected.items():
        if raw.get(key) not in known:
            raise ValueError(f"{where}: config.json: {key} is {raw.get(key)!r}; {known[0]} can be read")
    for key in ("mm_use_im_start_end", "s2"):
        if raw.get(key):
            raise ValueError(f"{where}: config.json: {key} is true; no published FastVLM has it, and it cannot be read")


def resolution(raw: Mapping[str, Any], where: str) -> int:
    match = re.fullmatch(r"mobileclip_l_(\d+)", str(raw["mm_vision_tower"]).rpartition("/")[2])
    if not match:
        raise ValueError(
            f"{where}: config.json: mm_vision_tower is {raw['mm_vision_tower']!r}, not mobileclip_l_<pixels>"
        )
    return int(match[1])


def processor(side: int) -> dict[str, Any]:
    """How Apple's code makes pixels for a tower of this name: values in 0..1, nothing subtracted."""
    edges = {"height": side, "width": side}
    said = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": edges, "resample": 3}
    return said | {"do_normalize": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def _config(checkpoint: Checkpoint, origin: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as Apple's code reads it: the one that came where it still holds, or one that is made."""
    said = checkpoint.said
    config = dict(origin.get("config") or {})
    if not config:
        if tower_sizes(checkpoint.tensors, str(said.folder)) != Sizes():
            console.warn("Apple's code knows one size of FastViTHD, mobileclip_l; it will not open this one")
        config = llava_config.to_original(said, commonest_type(checkpoint.tensors))
        config |= {"mm_vision_select_layer": -2, "mm_vision_tower": "mobileclip_l_0", "image_grid_pinpoints": None}
    layout: Any = said.layout
    named = re.sub(r"\d+$", str(layout.size), config["mm_vision_tower"])
    config |= {"mm_vision_tower": named, "unfreeze_mm_vision_tower": True}
    if config.get("image_aspect_ratio") != "pad" or layout.mode != "pad":
        config["image_aspect_ratio"] = layout.mode
    extra: dict[str, Any] = {} if said.template_name == "qwen_2" else {"template": said.template_name}
    if others := {name: one for name, one in said.origin.items() if name != OriginalFastVlm.name}:
        extra["origin"] = others
    return config | ({"vistune": extra} if extra else {})


FORMAT = OriginalFastVlm()
