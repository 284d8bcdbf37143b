"""Rows of a table that lies in many parquet or arrow shards, by number, with a bounded share of them in memory.

Knows columns and types; what they mean to a conversation it does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vistune import files
from vistune.console import progress
from vistune.data.reading.json_rows import RowError
from vistune.data.reading.shards import ArrowShard, Group, ParquetShard, open_shard

MEMORY = 1 << 27
"""Bytes of decoded row groups that a process holds, those of all its tables together."""

LARGE = 1 << 26
"""Bytes of a row group that is not decoded at once: for a single row of it that would be far too much."""

_SLICE = 1 << 22  # bytes of a piece of a large group
_OPEN = 32  # shards held open
_PLACES = ("shard", "rows", "bytes", "start", "size")


class Recent:
    """What was used last, up to `limit` in all; `weight` says what an entry counts."""

    def __init__(self, limit: int):
        self.limit = limit
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._weight = 0
        # Open files and their locks are of no use to a forked process.
        os.register_at_fork(after_in_child=self.clear)

    def get(self, key: Hashable, make: Callable[[], Any], weight: int = 1) -> Any:
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key][0]
        value = make()
        self._held[key] = (value, weight)
        self._weight += weight
        while self._weight > self.limit and len(self._held) > 1:
            self._weight -= self._held.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        self._held.clear()
        self._weight = 0


_decoded, _opened = Recent(MEMORY), Recent(_OPEN)


class Table:
    """`columns(schema)` names the columns that are read. `cache`: a folder for what is slow to find again: where the
    groups lie, and large row groups unpacked. `unpack`: True for all row groups, False for none, None for large ones.

    Raises ValueError for a torn shard, and for one whose columns differ from the first one's.
    """

    def __init__(
        self,
        paths: Sequence[str],
        columns: Callable[[pa.Schema], Sequence[str]],
        cache: Path | None = None,
        unpack: bool | None = None,
    ):
        self.paths = list(paths)
        self.cache = cache
        self.unpack = unpack
        schema = open_shard(self.paths[0]).schema
        self.columns = list(columns(schema))
        self.facts = _facts(self.paths)
        self._key = hashlib.sha256(f"{self.facts} {self.columns}".encode()).hexdigest()[:16]
        self._groups_file = cache / f"groups-{self._key}.npy" if cache else None
        self._groups = self._find(schema)
        self._count()
        if not len(self):
            raise ValueError(f"{self.paths[0]}: no rows in it" + (" nor in its other shards" * (len(self.paths) > 1)))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, row: int) -> dict[str, Any]:
        """The columns' values as Python has them. Raises RowError for a row that cannot be read."""
        place = int(np.searchsorted(self._ends, row, "right"))
        shard, rows, size, start, length = (int(value) for value in self._groups[place])
        within = row - int(self._ends[place]) + rows
        number = place - int(self._first[shard])
        try:
            piece = self._piece(self.paths[shard], number, Group(rows, size, start, length), within)
            return {name: piece.column(name)[0].as_py() for name in self.columns}
        except (pa.ArrowException, OSError, ValueError, KeyError, RecursionError) as error:
            if isinstance(error, UnpackError):
                raise
            reason = str(error).splitlines()[0][:200] if str(error) else ""
            where = f"row {within} of group {number} of {self.paths[shard]}"
            raise RowError(f"{where} cannot be read: {type(error).__name__} {reason}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ends": None, "_first": None, "_groups": None if self._groups_file else self._groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._groups is None:
            assert self._groups_file
            self._groups = (
                np.load(self._groups_file, mmap_mode="r")
                if self._groups_file.exists()
                else self._find(open_shard(self.paths[0]).schema)
            )
        self._count()

    def _count(self) -> None:
        """Where the rows of each group end, and which group is the first of each shard."""
        self._ends = np.cumsum(self._groups[:, 1])
        self._first = np.searchsorted(self._groups[:, 0], np.arange(len(self.paths)))

    def _piece(self, path: str, number: int, group: Group, within: int) -> pa.Table:
        shard = _opened.get((self._key, path), lambda: open_shard(path))
        if isinstance(shard, ArrowShard):
            batch, sound = _decoded.get(
                (self._key, path, number), lambda: _checked(shard.read(number, group, self.columns)), group.size
            )
            piece = batch.slice(within, 1)
            return piece if sound else sound_row(piece)
        unpack = group.bytes > LARGE if self.unpack is None else self.unpack
        if unpack and self.cache:
            return self._unpacked(path, number, group).row(within)
        if group.bytes > LARGE:
            key = (self._key, path, number)
            walk = _decoded.get(key, lambda: _Walk(shard, number, group, self.columns), 2 * _SLICE)
            return walk.row(within)
        table = _decoded.get(
            (self._key, path, number), lambda: shard.read(number, group, self.columns), max(group.bytes, 1)
        )
        return table.slice(within, 1)

    def _unpacked(self, path: str, number: int, group: Group) -> _Unpacked:
        """The row group as an arrow file in `cache`, made when it is first wanted."""
        name = hashlib.sha256(f"{self._key} {path} {number}".encode()).hexdigest()[:16]
        assert self.cache
        place = self.cache / "unpacked" / f"{name}.arrow"
        if not place.exists():
            try:
                self._unpack(path, number, group, place)
            except OSError as error:
                raise UnpackError(
                    f"{place}: a row group of {path} cannot be unpacked here: {error}. Make room, let the data's cache "
                    "lie elsewhere, or say options.unpack = false"
                ) from None
        return _opened.get(str(place), lambda: _Unpacked(str(place), self.columns))

    def _unpack(self, path: str, number: int, group: Group, place: Path) -> None:
        shard = ParquetShard(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_suffix(f".{os.getpid()}.tmp")
        schema = pa.schema([shard.schema.field(name) for name in self.columns])
        with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in shard.walk(number, _slice_rows(group), self.columns):
                writer.write_batch(batch.select(self.columns).cast(schema))
        os.replace(beside, place)

    def _find(self, schema: pa.Schema) -> np.ndarray:
        """int64 [groups, 5]: see `_PLACES`."""
        if self._groups_file and self._groups_file.exists():
            return np.load(self._groups_file, mmap_mode="r")
        found: list[tuple[int, ...]] = []
        first = {name: schema.field(name).type for name in self.columns}
        with progress() as bar, ThreadPoolExecutor(8) as pool:
            task = bar.add_task("shards", total=len(self.paths))
            for number, groups in enumerate(_mapped(pool, lambda path: self._groups_of(path, first), self.paths)):
                found += [(number, group.rows, group.bytes, group.start, group.size) for group in groups]
                bar.update(task, advance=1)
        table = np.array(found, np.int64).reshape(-1, len(_PLACES))
        if not self._groups_file:
            return table
        self._groups_file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._groups_file.with_suffix(f".{os.getpid()}.npy")
        np.save(beside, table)
        os.replace(beside, self._groups_file)
        return np.load(self._groups_file, mmap_mode="r")

    def _groups_of(self, path: str, first: dict[str, pa.DataType]) -> list[Group]:
        shard = open_shard(path)
        for name, kind in first.items():
            at = shard.schema.get_field_index(name)
            there = shard.schema.field(at).type if at >= 0 else None
            if there is None or not same_type(kind, there):
                raise ValueError(
                    f"{path}: column {name!r} is {there or 'not there'}, in {self.paths[0]} it is {kind}. The shards "
                    "of a source have one schema: write this shard again with that type (pyarrow: "
                    "table.cast(schema of the first shard)), or make it a source of its own."
                )
        return shard.groups()


class UnpackError(ValueError):
    """There is no room for what would be unpacked: not the fault of a row."""


class _Walk:
    """A large row group gone through in order; a row before the last one asked for begins it anew."""

    def __init__(self, shard: ParquetShard, number: int, group: Group, columns: Sequence[str]):
        self._begin = lambda: shard.walk(number, _slice_rows(group), columns)
        self._restart()

    def _restart(self) -> None:
        self._batches: Iterator[pa.RecordBatch] = self._begin()
        self._start = self._stop = 0
        self._batch: pa.Table | None = None

    def row(self, within: int) -> pa.Table:
        if within < self._start:
            self._restart()
        while self._batch is None or within >= self._stop:
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"the group ends after {self._stop} rows")
            self._batch = pa.Table.from_batches([batch])
            self._start, self._stop = self._stop, self._stop + self._batch.num_rows
        return self._batch.slice(within - self._start, 1)


class _Unpacked:
    """An unpacked row group, mapped."""

    def __init__(self, path: str, columns: Sequence[str]):
        self._shard = ArrowShard(path)
        self._columns = columns
        self._groups = self._shard.groups()
        self._ends = np.cumsum([group.rows for group in self._groups])

    def row(self, within: int) -> pa.Table:
        number = int(np.searchsorted(self._ends, within, "right"))
        group = self._groups[number]
        return self._shard.read(number, group, self._columns).slice(within - int(self._ends[number]) + group.rows, 1)


def _checked(batch: pa.Table) -> tuple[pa.Table, bool]:
    """The batch, and whether all of it is sound. Mapped bytes are taken as they are: offsets that are wrong in the file
    would end the process. Parquet is decoded, which finds them."""
    try:
        batch.validate(full=True)
    except pa.ArrowException:
        return batch, False
    return batch, True


def sound_row(row: pa.Table) -> pa.Table:
    """A row of a batch that is not sound, if the row is. Raises pa.ArrowException or ValueError."""
    for column in row.columns:
        for chunk in column.chunks:
            _check(chunk)
    return row


def _check(array: pa.Array) -> None:
    """As a full validation, yet of this slice alone: pyarrow's own goes through all that a slice of a list lies in."""
    kind = array.type
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        offsets, values = array.offsets.to_numpy(), array.values
        if (np.diff(offsets) < 0).any() or offsets[0] < 0 or offsets[-1] > len(values):
            raise ValueError(f"a list whose items lie at {offsets[0]} to {offsets[-1]} of {len(values)}")
        _check(values.slice(offsets[0], offsets[-1] - offsets[0]))
    elif isinstance(array, pa.StructArray):
        for number in range(kind.num_fields):
            _check(array.field(number))
    else:
        array.validate(full=True)


def same_type(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether values of both read alike: widths, 64-bit offsets, dictionaries and the order of a struct's fields do not
    matter, and what is null throughout goes with anything."""
    return _alike(_shape(one), _shape(other))


def _alike(one: Any, other: Any) -> bool:
    if one == other or "null" in (one, other):
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return isinstance(one, list) and isinstance(other, list) and _alike(one[0], other[0])


def _shape(kind: pa.DataType) -> Any:
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _shape(kind.storage_type)
    if types.is_dictionary(kind):
        return _shape(kind.value_type)
    if types.is_struct(kind):
        return {field.name: _shape(field.type) for field in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_shape(kind.value_type)]
    for name, test in _FAMILIES:
        if test(kind):
            return name
    return str(kind)


_FAMILIES: tuple[tuple[str, Callable[[pa.DataType], bool]], ...] = (
    ("string", lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()),
    ("bytes", lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view()),
    ("integer", pa.types.is_integer),
    ("number", pa.types.is_floating),
)


def _slice_rows(group: Group) -> int:
    return max(1, min(group.rows, _SLICE * group.rows // max(group.bytes, 1)))


def _facts(paths: Sequence[str]) -> str:
    """Of all shards; a digest, since there may be thousands."""
    seen = hashlib.sha256()
    with ThreadPoolExecutor(8) as pool:
        for facts in _mapped(pool, files.facts, paths):
            seen.update(json.dumps(facts).encode())
    return seen.hexdigest()


def _mapped(pool: ThreadPoolExecutor, function: Callable[[str], Any], paths: Sequence[str]) -> Iterator[Any]:
    """In order; the first error is raised and what has not begun is left."""
    try:
        yield from pool.map(function, paths)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
