"""Writes conversations with OpenAI-style columns: parquet with the pictures inside, or JSON lines with them beside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from vistune.data.converting.staged import Staged
from vistune.data.reading.picture_bytes import own_name, read_picture
from vistune.data.writers import register
from vistune.data.writers.llava_json import JsonRows
from vistune.samples import Image, Sample

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    ]
)
_ROWS, _BYTES = 1000, 8 << 20  # of one row group: what is held, and what a reader must fetch for one row


class MessagesParquet:
    """`id`, `messages` (role, content) and `images` (bytes, path), the columns of the hub's picture datasets.

    `embed` False leaves pictures that are files where they are and names them.
    """

    def __init__(self, out: Path, embed: bool = True):
        self.report: dict[str, Any] = {"samples": 0, "pictures_written": 0, "pictures_named": 0, "notes_left_out": 0}
        self._staged = Staged(out)
        self._embed = embed
        self._held: list[dict[str, Any]] = []
        self._bytes = 0
        self._file = pq.ParquetWriter(self._staged[out], SCHEMA)

    def add(self, sample: Sample) -> None:
        images = [self._image(image) for image in sample.images]
        turns = [{"role": message.role, "content": message.text} for message in sample.messages]
        self._held.append({"id": sample.id, "messages": turns, "images": images})
        self._bytes += sum(len(image["bytes"] or b"") for image in images)
        self.report["samples"] += 1
        self.report["pictures_written"] += sum(image["bytes"] is not None for image in images)
        self.report["pictures_named"] += sum(image["bytes"] is None for image in images)
        self.report["notes_left_out"] += bool(sample.notes)
        if len(self._held) >= _ROWS or self._bytes >= _BYTES:
            self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._flush()
        self._file.close()
        if kind is None:
            self._staged.commit()
        else:
            self._staged.abandon()

    def _image(self, image: Image) -> dict[str, Any]:
        if self._embed or image.data is not None or image.size is not None:
            return {"bytes": read_picture(image), "path": own_name(image) or None}
        return {"bytes": None, "path": image.path if "://" in image.path else str(Path(image.path).absolute())}

    def _flush(self) -> None:
        if self._held:
            self._file.write_table(pa.Table.from_pylist(self._held, SCHEMA))
        self._held, self._bytes = [], 0


class MessagesLines(JsonRows):
    def row(self, sample: Sample, images: Sequence[str]) -> dict[str, Any]:
        turns = [{"role": message.role, "content": message.text} for message in sample.messages]
        return {"id": sample.id, "messages": turns, "images": list(images)}


@register("messages")
def open_messages(out: Path, **options: Any) -> MessagesParquet | MessagesLines:
    """By the suffix of `out`: .parquet (option `embed`), .jsonl (options `copy`, `root`, `notes`)."""
    if str(out).endswith(".parquet"):
        return MessagesParquet(out, **options)
    if str(out).endswith((".jsonl", ".ndjson")):
        return MessagesLines(out, **options)
    raise ValueError(f"{out}: messages are written to a .parquet or a .jsonl file")
