"""Conversations in tables: parquet, arrow, JSON lines, and the folders that `datasets` and the hub make of them.

A row is found by its number and read alone; what its columns mean is known in `vistune.data.reading.columns`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vistune import files
from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.columns import NAMES, ColumnError, Columns, conversation, find_columns, notes
from vistune.data.reading.json_rows import JsonRows, RowError
from vistune.data.reading.pictures import Folders, PictureError, beside, picture
from vistune.data.reading.shard_files import find_shards
from vistune.data.reading.tables import Table
from vistune.samples import IMAGE_MARK, Fault, FaultCode, Sample, SampleError

OPTIONS = ("columns", "split", "prompt", "notes", "unpack")


class Rows(Protocol):
    """Rows as mappings, by number. `row` raises RowError."""

    facts: str

    def __len__(self) -> int: ...

    def row(self, row: int) -> Mapping[str, Any]: ...


class JsonShards:
    """The rows of several JSON files, one after the other."""

    def __init__(self, paths: Sequence[str], cache: Path | None):
        self._shards = [JsonRows(path, cache) for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.facts = " ".join(shard.facts for shard in self._shards)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, row: int) -> Mapping[str, Any]:
        number = int(np.searchsorted(self._ends, row, "right"))
        shard = self._shards[number]
        return shard.object(row - int(self._ends[number]) + len(shard))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How rows are understood. `columns` None: each row is looked at anew, since JSON has no schema. `chosen`: what
    the source says of columns. `kept`: the notes, None for all that are small."""

    columns: Columns | None
    chosen: Mapping[str, str]
    kept: Sequence[str] | None
    prompt: str


class Messages:
    """Samples of a table."""

    def __init__(self, rows: Rows, name: str, folders: Folders, reading: Reading):
        self.name = name
        self._rows = rows
        self._folders = folders
        self._reading = reading

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.name}: row {row} of {len(self)}")
        id = str(row)
        try:
            values = self._rows.row(row)
            columns = self._reading.columns or find_columns(list(values), self._chosen_in(values))
            id = _id(values.get(columns.id), row)
            messages, own, column = conversation(values, columns, self._reading.prompt)
            images = tuple(picture(value, self._folders) for value in _placed(own, column))
        except RowError as error:
            raise self._fault(row, "", "row_unreadable", str(error)) from None
        except (ColumnError, PictureError) as error:
            raise self._fault(row, id, error.code, error.reason) from None
        said = notes(values, columns, self._reading.kept)
        return Sample(id=id, source=self.name, row=row, messages=tuple(messages), images=images, notes=said)

    def fingerprint(self) -> str:
        parts = (self._rows.facts, self.name, self._folders.fingerprint(), self._reading)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def _chosen_in(self, values: Mapping[str, Any]) -> dict[str, str]:
        """JSON rows leave out what is empty: a chosen column that one lacks is none there, unless it is its text."""
        chosen = self._reading.chosen
        return {use: name if name in values or use not in ("id", "images") else "" for use, name in chosen.items()}

    def _fault(self, row: int, id: str, code: FaultCode, reason: str) -> SampleError:
        return SampleError(Fault(source=self.name, row=row, id=id, code=code, reason=reason))


@register("messages")
def open_messages(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> Messages:
    """Options: `columns` = {messages = NAME, images = NAME, ...}, `split`, `prompt` (what captions answer to), `notes`
    = false or the columns kept as notes, `unpack` (see `Table`)."""
    refuse_unknown(path, "messages", options, OPTIONS)
    chosen = _chosen(path, options.get("columns", {}))
    kept = _kept(path, options.get("notes", True))
    prompt = _option(path, options, "prompt", str, IMAGE_MARK)
    unpack = _option(path, options, "unpack", bool, None)
    kind, shards = find_shards(path, _option(path, options, "split", str, ""))
    folders = Folders(path, images, path if files.is_folder(path) else beside(shards[0]))
    if kind == "json":
        reading = Reading(columns=None, chosen=chosen, kept=kept, prompt=prompt)
        return Messages(JsonShards(shards, cache), name, folders, reading)
    found: list[Columns] = []

    def needed(schema: pa.Schema) -> list[str]:
        try:
            found.append(find_columns(schema.names, chosen))
        except ColumnError as error:
            raise ValueError(f"{shards[0]}: {error.reason}. Say which with options.columns, see formats.md") from None
        return list(dict.fromkeys([*found[0].used(), *_noted(schema, kept)]))

    table = Table(shards, needed, cache, unpack)
    return Messages(table, name, folders, Reading(columns=found[0], chosen=chosen, kept=kept, prompt=prompt))


def _placed(own: list[Any], column: list[Any]) -> list[Any]:
    """Pictures in the order of their marks: those the parts hold, the column's where a part holds none itself."""
    rest = iter(column)
    wanted = sum(value is None for value in own)
    if wanted > len(column):
        reason = f"{wanted} parts are pictures without saying which, the row has {len(column)}"
        raise PictureError("mark_without_image", reason)
    return [*(next(rest) if value is None else value for value in own), *rest]


def _id(value: Any, row: int) -> str:
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    if value is None or value == "":
        return str(row)
    raise ColumnError("row_unreadable", f"id is {str(value)[:60]!r}, expected a string or a number")


def _noted(schema: pa.Schema, kept: Sequence[str] | None) -> list[str]:
    """Columns read as notes: `kept`, or all of numbers and text and of short lists of them."""
    if kept is not None:
        return [name for name in kept if name in schema.names]
    return [field.name for field in schema if _is_plain(field.type)]


def _is_plain(kind: pa.DataType) -> bool:
    for _ in range(2):  # choices are a list, boxes a list of lists
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    kinds = (
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    return any(test(kind) for test in kinds)


def _chosen(path: str, columns: Any) -> dict[str, str]:
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns.values()):
        raise ValueError(f"{path}: options.columns = {columns!r}, expected a table such as {{ messages = NAME }}")
    for use in columns:
        if use not in NAMES:
            raise ValueError(f"{path}: options.columns has no {use!r}; it takes {', '.join(NAMES)}")
    return dict(columns)


def _kept(path: str, said: Any) -> list[str] | None:
    if isinstance(said, bool):
        return None if said else []
    if isinstance(said, list) and all(isinstance(name, str) for name in said):
        return said
    raise ValueError(f"{path}: options.notes = {said!r}, expected true, false, or a list of columns")


def _option(path: str, options: Mapping[str, Any], key: str, kind: type, otherwise: Any) -> Any:
    value = options.get(key, otherwise)
    if key in options and not isinstance(value, kind):
        raise ValueError(f"{path}: options.{key} = {value!r}, expected {'text' if kind is str else 'true or false'}")
    return value
