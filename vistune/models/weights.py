"""Safetensors on disk: which tensors a folder holds, reading one, and writing many in shards without holding them all.

Knows names and tensors, nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


class Stored:
    """The tensors of a model folder, by name, each read when asked for. Files stay open until the object goes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = _files(folder)
        self._open: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        if file not in self._open:
            self._open[file] = _opened(file)
        return self._open[file].get_tensor(name)


def _files(folder: Path) -> dict[str, Path]:
    """Where each tensor lies. ValueError for a folder without weights, or with a shard that is missing or cut."""
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for file in set(names.values()):
            if not (folder / file).exists():
                raise ValueError(f"{folder}: {INDEX} names {file}, which is not there; copy the folder again")
        return {name: folder / file for name, file in names.items()}
    if not (folder / SINGLE).exists():
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; is this a model folder?")
    return dict.fromkeys(_opened(folder / SINGLE).keys(), folder / SINGLE)


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy it again") from error


def write(folder: Path, tensors: Iterable[tuple[str, Tensor]], limit: int = SHARD_BYTES) -> None:
    """Write tensors in the order they come, `limit` bytes a file, with an index when there are several files.

    Holds one file's tensors at a time.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if shard and size + more > limit:
            _write_shard(folder, shards, shard)
            shard, size = {}, 0
        shard[name] = tensor
        size, total = size + more, total + more
    _write_shard(folder, shards, shard)
    if len(shards) == 1:
        _part(folder, 0).rename(folder / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        _part(folder, i).rename(folder / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _write_shard(folder: Path, shards: list[list[str]], shard: dict[str, Tensor]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
    save_file(held, _part(folder, len(shards)), metadata={"format": "pt"})
    shards.append(list(shard))
