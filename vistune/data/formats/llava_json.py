"""LLaVA's own format: a JSON list, or one JSON object per line, of conversations with picture paths.

A row is read by its place in the file, one at a time; the file is never held in memory, and may lie behind a URI.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.columns import MAX_TEXT
from vistune.data.reading.json_rows import JsonRows, RowError, kind
from vistune.data.reading.pictures import LONGEST_PATH, Folders, beside
from vistune.samples import Fault, FaultCode, Image, Message, Role, Sample, SampleError

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
KEYS = ("id", "image", "conversations")


class LlavaJson:
    """Rows `{"id", "image": path or list of paths (optional), "conversations": [{"from": human|gpt|system, "value"}]}`.

    Other keys are the sample's notes, a row without id is called by its number. A relative picture path is looked for
    in `folders` in order (in the file's own folder if there are none); one that is nowhere keeps the first folder.
    File and folders may be URIs.

    Whether marks and pictures agree is not judged here: see `vistune.data.tokenize.check_marks`.
    """

    def __init__(self, path: str, folders: Sequence[str], name: str, cache: Path | None = None):
        self.path = path
        self.name = name
        self.folders = Folders(path, folders, beside(path))
        self._rows = JsonRows(path, cache)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        try:
            data = self._rows.object(row)
        except RowError as error:
            raise self._fault(row, "", "row_unreadable", str(error)) from None
        id = row if data.get("id") is None else data["id"]
        if isinstance(id, bool) or not isinstance(id, str | int):
            raise self._fault(row, "", "row_unreadable", f"id is {kind(id)}, expected a string or a number")
        messages = tuple(self._messages(row, str(id), data))
        images = tuple(Image(path=self.folders.resolve(path)) for path in self._paths(row, str(id), data))
        notes = {key: value for key, value in data.items() if key not in KEYS}
        return Sample(id=str(id), source=self.name, row=row, messages=messages, images=images, notes=notes)

    def raw(self, row: int) -> bytes:
        """The row as it stands in the file; no bytes for what is no object."""
        return self._rows.raw(row)

    def fingerprint(self) -> str:
        said = f"{self._rows.facts} {self.name} {self.folders.fingerprint()}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def _messages(self, row: int, id: str, data: dict[str, Any]) -> list[Message]:
        turns = data.get("conversations")
        if not isinstance(turns, list) or not turns:
            reason = "is missing" if turns is None else f"is {kind(turns)}, expected a list of turns"
            raise self._fault(row, id, "row_unreadable", f"conversations {reason}")
        messages = []
        for i, turn in enumerate(turns):
            if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
                reason = f'turn {i} is not {{"from": string, "value": string}}: {json.dumps(turn)[:80]}'
                raise self._fault(row, id, "row_unreadable", reason)
            if turn["from"] not in ROLES:
                reason = f"turn {i} is from {turn['from']!r}, expected one of {', '.join(ROLES)}"
                raise self._fault(row, id, "role_order", reason)
            messages.append(Message(role=ROLES[turn["from"]], text=turn["value"]))
        if sum(len(message.text) for message in messages) > MAX_TEXT:
            raise self._fault(row, id, "row_unreadable", f"a conversation of more than {MAX_TEXT:,} characters")
        return messages

    def _paths(self, row: int, id: str, data: dict[str, Any]) -> list[str]:
        value = data.get("image")
        paths = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) and 0 < len(path) <= LONGEST_PATH and "\0" not in path for path in paths):
            reason = f"image is {json.dumps(value)[:80]}, expected a path or a list of paths"
            raise self._fault(row, id, "row_unreadable", reason)
        return paths

    def _fault(self, row: int, id: str, code: FaultCode, reason: str) -> SampleError:
        return SampleError(Fault(source=self.name, row=row, id=id, code=code, reason=reason))


@register("llava_json")
def open_llava_json(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> LlavaJson:
    refuse_unknown(path, "llava_json", options)
    return LlavaJson(path, images, name, cache)
