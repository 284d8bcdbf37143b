"""Tensors on disk: which ones a folder or file holds, each read when asked for, and many written in shards.

A 7B model passes through here one tensor at a time. Knows names and tensors, nothing of models.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vistune import console

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

# The names that the safetensors format gives to types.
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_NAMED = {name: dtype for dtype, name in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that has not been read: its type and shape, and how to read it. `read` may give a view of a mapped
    file, so it is not written into."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def rows(self, count: int) -> Entry:
        """Its first `count` rows."""
        return replace(self, shape=(count, *self.shape[1:]), read=lambda: self.read()[:count])

    def cast(self, dtype: torch.dtype | None) -> Entry:
        """The same values as `dtype`; None, and what is not a float, stays as it is."""
        if dtype is None or dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return replace(self, dtype=dtype, read=lambda: self.read().to(dtype))


def held(tensor: Tensor) -> Entry:
    """The entry of a tensor in memory."""
    return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor.detach())


def joined(parts: Sequence[Entry]) -> Entry:
    """Entries under one another (along dimension 0); all of one type. ValueError when they are not."""
    if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        raise ValueError(f"cannot join tensors of {', '.join(f'{list(p.shape)} {p.dtype}' for p in parts)}")
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(parts[0].dtype, shape, lambda: torch.cat([part.read() for part in parts]))


def stored(folder: Path) -> dict[str, Entry]:
    """The safetensors of a model folder, by name. ValueError for a folder without weights, or with a shard that is
    missing or cut."""
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        for file in sorted(set(names.values())):
            if not (folder / file).exists():
                raise ValueError(f"{folder}: {INDEX} names {file}, which is not there; copy the folder again")
        files = {file: safetensors(folder / file) for file in sorted(set(names.values()))}
        for name, file in names.items():
            if name not in files[file]:
                raise ValueError(f"{folder}: {INDEX} says {name} is in {file}, which does not hold it")
        return {name: files[file][name] for name, file in names.items()}
    if not (folder / SINGLE).exists():
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; is this a model folder?")
    return safetensors(folder / SINGLE)


def safetensors(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; it stays open as long as one of its entries lives."""
    try:
        opened: Any = safe_open(file, framework="pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy it again") from error

    def entry(name: str, part: Any) -> Entry:
        return Entry(_NAMED[part.get_dtype()], tuple(part.get_shape()), lambda: opened.get_tensor(name))

    return {name: entry(name, part) for name, part in slices.items()}


def pickled(file: Path, also: Sequence[Any] = ()) -> dict[str, Any]:
    """What a file of `torch.save` holds, tensors mapped where the file allows it. Only tensors, plain containers and
    `also` (as `torch.serialization.safe_globals` takes them) are ever unpickled: ValueError for a file with anything
    else, of which nothing is run."""
    try:
        with torch.serialization.safe_globals(list(also)):
            try:
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6: cannot be mapped
                found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file}: not a whole pickle of tensors alone ({error}); nothing of it was run") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds a {type(found).__name__}, not a table of tensors")
    return found


def write(folder: Path, tensors: Mapping[str, Entry], limit: int = SHARD_BYTES, *, note: str = "writing") -> None:
    """Write `tensors` in their order, `limit` bytes a file, with an index when there are several files.

    One tensor is in memory at a time. A bar shows the bytes.
    """
    shards = _shards(tensors, limit)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = sum(entry.nbytes for entry in tensors.values())
    with console.progress() as bar:
        task = bar.add_task(note, total=total)
        for name, shard in zip(names if len(shards) > 1 else [SINGLE], shards, strict=True):
            write_file(folder / name, shard, lambda done: bar.update(task, advance=done))
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _shards(tensors: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in tensors.items():
        if shards[-1] and size + entry.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def write_file(file: Path, tensors: Mapping[str, Entry], written: Callable[[int], None] = lambda done: None) -> None:
    """One safetensors file, tensor after tensor; `written` hears how many bytes each had."""
    # Wide types first, so that every tensor begins at a multiple of its width and can be mapped.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in ordered:
        start, end = end, end + entry.nbytes
        header[name] = {"dtype": _TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, entry in ordered:
            tensor = entry.read()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), name
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            written(entry.nbytes)
