"""LLaVA-OneVision-1.5's published folder: names `visual.* model.* lm_head.*`, and a config.json that says only what the
published code reads.

Such a folder is opened as any model folder (`hf`), with these names or those of the class in memory; this format
writes it. Knows names and config.json, nothing of how the model computes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vistune.models import weights
from vistune.models.checkpoints import Checkpoint
from vistune.models.fit import check
from vistune.models.folders import Described, describe, read_config, write_described
from vistune.models.weights import Entry

HOLDS = "onevision15"
_IN_MEMORY = ((re.compile(r"^model\.visual\."), "visual."), (re.compile(r"^model\.language_model\."), "model."))


def published(tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors by their published names, whichever of the two prefixes they came with."""
    found = {}
    for name, entry in tensors.items():
        for pattern, prefix in _IN_MEMORY:
            name = pattern.sub(prefix, name)
        found[name] = entry
    return found


def is_tied(config: Any) -> bool:
    """Whether config.json says that the head is the embedding: its text section does, and nothing else counts."""
    return bool(getattr(config.text_config, "tie_word_embeddings", False))


class OneVision15:
    """See `vistune.models.checkpoints.Format`."""

    name = "onevision15"
    holds = "LLaVA-OneVision-1.5 as published (written with --to; read as any model folder)"

    def recognises(self, folder: Path) -> str:
        """Nothing: what is published is a whole model folder already, and a folder has one claimant."""
        return ""

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        if base is not None:
            raise ValueError(f"{folder}: is a whole model folder, so a base ({base}) has no use; leave it out")
        described, why = describe(folder, **said), f"config.json: {read_config(folder).get('model_type')}"
        _refuse_others(described)
        tensors = published(weights.stored(folder))
        found = Checkpoint(format=self.name, why=why, said=described, tensors=tensors)
        check(found, f"{folder} ({self.name}: {why})")
        return found

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        said, tensors = checkpoint.said, published(checkpoint.tensors)
        _refuse_others(said)
        check(checkpoint, f"{said.folder} (to be written as {self.name})")
        types = [entry.dtype for entry in tensors.values()]
        commonest = str(max(set(types), key=types.count)).removeprefix("torch.")
        weights.write(folder, tensors)
        write_described(said, folder, _CARD, commonest)
        config = _as_published(read_config(folder), tied="lm_head.weight" not in tensors)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


_CARD = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n# LLaVA-OneVision-1.5\n"


def _refuse_others(said: Described) -> None:
    if said.family.name != HOLDS:
        raise ValueError(f"{said.folder}: is a {said.family.name}; this format holds LLaVA-OneVision-1.5 alone")


def _as_published(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Without what only vistune reads; types by the key that every release knows; the tie where it is looked for."""
    config = {key: value for key, value in config.items() if key != "vistune"}
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        if dtype := section.pop("dtype", None):
            section["torch_dtype"] = dtype
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = tied
    return config


FORMAT = OneVision15()
