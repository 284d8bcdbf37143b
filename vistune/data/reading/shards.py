"""One shard of a table: a parquet file, or arrow as an IPC file or stream. Its groups of rows, and one group read.

A group is what can be read alone: a row group of parquet, a record batch of arrow. Knows no other shard.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vistune import files

_FILE_MAGIC = b"ARROW1"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3  # org.apache.arrow.flatbuf.MessageHeader
_HEAD = 1 << 13  # bytes read at once in search of a message's header; nearly always all of it
_BUFFER = 1 << 20


@dataclass(frozen=True, slots=True)
class Group:
    """`rows` rows that take `bytes` bytes in memory, all columns together. `start` and `size` are where an arrow batch
    lies in the file."""

    rows: int
    bytes: int
    start: int = 0
    size: int = 0


def open_shard(path: str) -> ParquetShard | ArrowShard:
    """Raises ValueError that names the shard when it is torn or no table at all."""
    try:
        shard = ParquetShard(path) if path.lower().endswith(".parquet") else ArrowShard(path)
        _read_names(shard.schema)  # names that are no text are found here, not at the first row
        return shard
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise torn(path, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None


def torn(path: str, reason: str) -> ValueError:
    """The error of a shard that cannot be read at all."""
    return ValueError(
        f"{path}: this shard cannot be read ({reason}); it is torn or not what its name says. Fetch or write it again, "
        "or move it out of the folder."
    )


def _read_names(fields: Iterable[pa.Field]) -> None:
    """Raises UnicodeDecodeError."""
    for field in fields:
        assert isinstance(field.name, str)
        kind = field.type
        _read_names([kind.field(i) for i in range(kind.num_fields)])


class ParquetShard:
    """A parquet file. Read, never mapped: a file that is cut while a run goes on is an error then, not a crash."""

    def __init__(self, path: str):
        self.path = path
        source: Any = files.open_binary(path) if files.is_remote(path) else path
        self._file = pq.ParquetFile(source, buffer_size=_BUFFER, pre_buffer=False)
        self.schema = self._file.schema_arrow

    def groups(self) -> list[Group]:
        about = self._file.metadata
        # What the footer says of single columns is not asked: pyarrow ends the process over some spoiled ones.
        groups = [about.row_group(number) for number in range(about.num_row_groups)]
        found = [Group(group.num_rows, max(group.total_byte_size, 0)) for group in groups]
        if any(group.rows < 0 for group in found) or sum(group.rows for group in found) != about.num_rows:
            raise torn(self.path, f"its footer counts {about.num_rows} rows, its row groups others")
        return found

    def read(self, number: int, group: Group, columns: Sequence[str]) -> pa.Table:
        return self._file.read_row_group(number, columns=list(columns), use_threads=False)

    def walk(self, number: int, rows: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The group's rows in order, `rows` at a time, no more than those in memory."""
        yield from self._file.iter_batches(rows, row_groups=[number], columns=list(columns), use_threads=False)


class ArrowShard:
    """Record batches in a stream, or in an IPC file, which is a stream between two magics. Local ones are mapped."""

    def __init__(self, path: str):
        self.path = path
        self._size = files.size(path)
        self._map = None if files.is_remote(path) or not self._size else pa.memory_map(path)
        is_file = self._bytes(0, len(_FILE_MAGIC)) == _FILE_MAGIC
        if is_file and self._bytes(self._size - len(_FILE_MAGIC), len(_FILE_MAGIC)) != _FILE_MAGIC:
            raise torn(path, "no footer at its end")
        self._start = 8 if is_file else 0
        head = next(self._messages(self._start), None)
        if head is None or head.kind != _SCHEMA:
            raise torn(path, "it does not begin with a schema")
        self._after_schema = head.end
        self.schema = pa.ipc.read_schema(pa.py_buffer(self._bytes(head.start, head.end - head.start)))
        self._dictionaries: list[_Message] | None = None

    def groups(self) -> list[Group]:
        messages = list(self._messages(self._after_schema))
        return [Group(m.rows, m.end - m.start, m.start, m.end - m.start) for m in messages if m.kind == _BATCH]

    def read(self, number: int, group: Group, columns: Sequence[str]) -> pa.Table:
        """Without copying it where the file is mapped and not compressed."""
        if self._map is not None and not self._has_dictionaries():
            self._map.seek(group.start)
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._map), self.schema)
        else:
            batch = self._alone(group)
        return pa.Table.from_batches([batch]).select(list(columns))

    def _alone(self, group: Group) -> pa.RecordBatch:
        """The batch through a stream of its own: schema, the dictionaries before it, and it."""
        parts = [(self._start, self._after_schema)]
        if self._has_dictionaries():
            if self._dictionaries is None:
                self._dictionaries = [m for m in self._messages(self._after_schema) if m.kind == _DICTIONARY]
            parts += [(m.start, m.end) for m in self._dictionaries if m.start < group.start]
        parts.append((group.start, group.start + group.size))
        stream = b"".join(self._bytes(start, end - start) for start, end in parts)
        return pa.ipc.open_stream(stream).read_next_batch()

    def _has_dictionaries(self) -> bool:
        return any("dictionary<" in str(field.type) for field in self.schema)

    def _bytes(self, start: int, count: int) -> bytes:
        count = min(count, self._size - start)
        if count <= 0 or start < 0:
            return b""
        if self._map is None:
            return files.read(self.path, start, count)
        self._map.seek(start)
        return self._map.read(count)

    def _messages(self, at: int) -> Iterator[_Message]:
        """From byte `at` to the mark at the end. Reads their headers alone. Raises ValueError for a torn shard."""
        while True:
            head = self._bytes(at, _HEAD)
            if len(head) < 8:
                raise torn(self.path, f"it ends at byte {self._size} without the mark of its end")
            # Before format 0.15 a message began with its length; since then with -1 and the length.
            mark, length = struct.unpack_from("<ii", head)
            skip, length = (8, length) if mark == -1 else (4, mark)
            if not length:
                return
            if length > len(head) - skip:
                head = self._bytes(at, skip + length)
            if length < 0 or len(head) < skip + length:
                raise torn(self.path, f"the message at byte {at} goes beyond its end")
            message = _message(head[skip : skip + length], at, at + skip + length)
            if message is None or message.end > self._size:
                raise torn(self.path, f"the message at byte {at} goes beyond its end")
            yield message
            at = message.end


@dataclass(frozen=True, slots=True)
class _Message:
    kind: int
    rows: int
    start: int
    end: int


def _message(metadata: bytes, start: int, body: int) -> _Message | None:
    """Kind, rows and end of a message, out of its flatbuffer (Message.fbs); None when it is none."""
    try:
        table = _Flat(metadata, struct.unpack_from("<I", metadata)[0])
        kind, length = table.number(1, "<B"), table.number(3, "<q")
        header = table.table(2)
        rows = header.number(0, "<q") if kind == _BATCH else 0
        # Lengths below 0 pass pyarrow's reading, and end the process in its validation.
        nodes = header.pairs(1) if kind == _BATCH else np.zeros((0, 2), np.int64)
    except (struct.error, ValueError):
        return None
    return _Message(kind, rows, start, body + length) if min(length, rows, *nodes[:, 0].tolist()) >= 0 else None


@dataclass(frozen=True, slots=True)
class _Flat:
    """A table of a flatbuffer: a field is found through the offsets in its vtable. Raises struct.error."""

    data: bytes
    at: int

    def number(self, field: int, kind: str) -> int:
        place = self._place(field)
        return struct.unpack_from(kind, self.data, place)[0] if place else 0

    def table(self, field: int) -> _Flat:
        place = self._place(field)
        return _Flat(self.data, place + struct.unpack_from("<I", self.data, place)[0])

    def pairs(self, field: int) -> np.ndarray:
        """int64 [n, 2]: a vector of structs of two 64-bit numbers (FieldNode: length, nulls). Or ValueError."""
        place = self._place(field)
        if not place:
            return np.zeros((0, 2), np.int64)
        place += struct.unpack_from("<I", self.data, place)[0]
        count = struct.unpack_from("<I", self.data, place)[0]
        return np.frombuffer(self.data, "<i8", 2 * count, place + 4).reshape(-1, 2)

    def _place(self, field: int) -> int:
        vtable = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        if vtable < 0:
            raise struct.error("a vtable before the message")
        size = struct.unpack_from("<H", self.data, vtable)[0]
        offset = struct.unpack_from("<H", self.data, vtable + 4 + 2 * field)[0] if 4 + 2 * field < size else 0
        return self.at + offset if offset else 0
