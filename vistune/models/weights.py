"""Tensors on disk: which ones a folder or file holds, each read when asked for, and many written in shards.

A 7B model passes through here one tensor at a time. Knows names and tensors, nothing of models.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vistune import console

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PIECE = re.compile(r"(?:model|pytorch_model)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
SHARD_BYTES = 5_000_000_000
PICKLE_BYTES = 2_000_000_000
"""Of a shard that is pickled, which is on disk twice while it is written."""

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


def grown(entry: Entry, rows: int) -> Entry:
    """Its rows, and below them their mean as often as is needed for `rows`. The mean is summed in fp64, some rows at a
    time."""
    assert rows >= entry.shape[0], (rows, entry.shape)
    if rows == entry.shape[0]:
        return entry

    def read() -> Tensor:
        old = entry.read()
        new = old.new_empty((rows, *entry.shape[1:]))
        new[: len(old)] = old
        mean = sum(piece.double().sum(0) for piece in old.split(1024)) / len(old)
        new[len(old) :] = mean.to(old.dtype)
        return new

    return replace(entry, shape=(rows, *entry.shape[1:]), read=read)


def file_bytes(file: Path) -> Entry:
    """A small file as a tensor of its bytes."""
    return held(torch.tensor(list(file.read_bytes()), dtype=torch.uint8))


def found(folder: Path) -> dict[str, Entry]:
    """The weights of a folder by name: safetensors, or where there are none pickles (`pytorch_model*.bin`), in one file
    or several, with or without an index. ValueError for none, and for a file that is missing or cut."""
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / index).exists() or (folder / single).exists():
            return _of_files(folder, single, index)
    pieces = sorted(path for path in folder.glob("*-of-*") if _PIECE.fullmatch(path.name))
    if not pieces:
        raise ValueError(f"{folder}: no weights in it, neither {SINGLE} nor {PICKLE} nor shards of these")
    kind = [path for path in pieces if path.suffix == ".safetensors"] or pieces
    count = int(_PIECE.fullmatch(kind[0].name)[2])  # type: ignore[index]
    if len(kind) != count:
        raise ValueError(f"{folder}: holds {len(kind)} of {count} shards ({kind[0].name}, ...); copy the folder again")
    return {name: entry for file in kind for name, entry in of_file(file).items()}


def has_weights(folder: Path) -> bool:
    """Whether `found` would look into any file here."""
    return any((folder / name).exists() for name in (SINGLE, INDEX, PICKLE, PICKLE_INDEX)) or any(
        _PIECE.fullmatch(path.name) for path in folder.glob("*-of-*")
    )


def of_file(file: Path) -> dict[str, Entry]:
    """The tensors of one file, safetensors or a pickle. ValueError when it holds something else."""
    if file.suffix == ".safetensors":
        return safetensors(file)
    tensors = pickled(file)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{file}: {name} is a {type(value).__name__}, not a tensor")
    return {name: held(value) for name, value in tensors.items()}


def stored(folder: Path) -> dict[str, Entry]:
    """The safetensors of a model folder, by name. ValueError for a folder without weights, or with a shard that is
    missing or cut."""
    if not (folder / INDEX).exists() and not (folder / SINGLE).exists():
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; is this a model folder?")
    return _of_files(folder, SINGLE, INDEX)


def _of_files(folder: Path, single: str, index: str) -> dict[str, Entry]:
    if not (folder / index).exists():
        return of_file(folder / single)
    names = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
    for file in sorted(set(names.values())):
        if not (folder / file).exists():
            raise ValueError(f"{folder}: {index} names {file}, which is not there; copy the folder again")
    files = {file: of_file(folder / file) for file in sorted(set(names.values()))}
    for name, file in names.items():
        if name not in files[file]:
            raise ValueError(f"{folder}: {index} says {name} is in {file}, which does not hold it")
    return {name: files[file][name] for name, file in names.items()}


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
    _write_shards(folder, tensors, limit, note, SINGLE, INDEX, write_file)


def write_pickles(folder: Path, tensors: Mapping[str, Entry], limit: int = PICKLE_BYTES) -> None:
    """As `write`, into `pytorch_model*.bin`, which `torch.load` opens."""
    _write_shards(folder, tensors, limit, "writing", PICKLE, PICKLE_INDEX, write_pickle)


def _write_shards(
    folder: Path, tensors: Mapping[str, Entry], limit: int, note: str, single: str, index: str, write_one: Any
) -> None:
    shards = _shards(tensors, limit)
    stem, _, kind = single.rpartition(".")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{kind}" for i in range(len(shards))]
    total = sum(entry.nbytes for entry in tensors.values())
    with console.progress() as bar:
        task = bar.add_task(note, total=total)
        for name, shard in zip(names if len(shards) > 1 else [single], shards, strict=True):
            write_one(folder / name, shard, lambda done: bar.update(task, advance=done))
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        said = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(said, indent=2), encoding="utf-8")


def write_pickle(file: Path, tensors: Mapping[str, Entry], written: Callable[[int], None] = lambda done: None) -> None:
    """One file of `torch.save`, a dict of tensors. They lie in mapped files beside it first, which are saved from there
    without memory; each holds no more than itself, whatever it is a view of."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        copies = {}
        for number, (name, entry) in enumerate(tensors.items()):
            copies[name] = mapped(entry, Path(scratch) / str(number))
            written(entry.nbytes)
        torch.save(copies, file)
        del copies


def mapped(entry: Entry, file: Path) -> Tensor:
    """The tensor in a new file of its own, mapped: its pages are the file's, not the process's."""
    if not entry.nbytes:  # nothing can be mapped
        return entry.read().clone()
    values = torch.from_file(str(file), shared=True, size=torch.Size(entry.shape).numel(), dtype=entry.dtype)
    return values.view(entry.shape).copy_(entry.read())


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
