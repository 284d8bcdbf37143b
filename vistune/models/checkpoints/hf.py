"""Model folders: config.json, safetensors, tokenizer, processor, as vistune, `transformers` and servers open them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vistune.models import weights
from vistune.models.checkpoints import Checkpoint
from vistune.models.families import families_of
from vistune.models.folders import describe, read_config, write_described
from vistune.models.load import commonest_type

KEPT = "kept.vistune"
"""Beside the weights: what the format that the model came from has and a model folder has not. Safetensors by content,
but not by name: some servers read every such file of a folder as weights."""


class ModelFolder:
    """See `vistune.models.checkpoints.Format`."""

    name = "hf"
    holds = "a model folder of one of our families (config.json, safetensors, tokenizer, processor)"

    def recognises(self, folder: Path) -> str:
        if not (folder / "config.json").is_file() or (folder / "run.json").is_file():  # the latter: a run's checkpoint
            return ""
        config = read_config(folder)
        return f"config.json: model_type {config.get('model_type')}" if families_of(config) else ""

    def read(self, folder: Path, *, base: Path | None, **said: Any) -> Checkpoint:
        if base is not None:
            raise ValueError(f"{folder}: is a whole model folder, so a base ({base}) has no use; leave it out")
        described = describe(folder, **said)
        kept = weights.safetensors(folder / KEPT) if (folder / KEPT).exists() else {}
        return Checkpoint(
            format=self.name,
            why=self.recognises(folder),
            said=described,
            tensors=weights.stored(folder),
            kept=kept,
        )

    def write(self, checkpoint: Checkpoint, folder: Path) -> None:
        weights.write(folder, checkpoint.tensors)
        if checkpoint.kept:
            weights.write_file(folder / KEPT, checkpoint.kept)
        write_described(checkpoint.said, folder, _card(checkpoint), commonest_type(checkpoint.tensors))


def _card(checkpoint: Checkpoint) -> str:
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        f"# {checkpoint.said.folder.name}\n\nConverted by vistune from the format `{checkpoint.format}` "
        f"({checkpoint.why}).\n"
    )


FORMAT = ModelFolder()
