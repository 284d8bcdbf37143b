"""LLaVA's own format: a JSON list, or one JSON object per line, of conversations with picture paths.

A row is read by its place in the file, one at a time; the file is never held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vistune.data.formats import refuse_unknown, register
from vistune.data.json_rows import find_rows
from vistune.samples import Fault, FaultCode, Image, Message, Role, Sample, SampleError

ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a character in UTF-16. Without the other half it is no text, and no file can hold it."""


class LlavaJson:
    """Rows `{"id", "image": path or list of paths (optional), "conversations": [{"from": human|gpt|system, "value"}]}`.

    Other keys are ignored, a row without id is called by its number. A relative picture path is looked for in
    `folders` in order (in the file's own folder if there are none); one that is nowhere keeps the first folder.

    Whether marks and pictures agree is not judged here: see `vistune.data.tokenize.check_marks`.
    """

    def __init__(self, path: str, folders: Sequence[str], name: str, cache: Path | None = None):
        self.path = path
        self.name = name
        self.folders = [Path(folder) for folder in folders] or [Path(path).parent]
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"{path}: its image folder {folder} does not exist")
        try:
            facts = os.stat(path)
        except OSError as error:
            raise ValueError(f"{path}: the data file cannot be opened: {error.strerror}") from None
        self._facts = f"{Path(path).absolute()} {facts.st_size} {facts.st_mtime_ns}"
        self._spans_file = cache / f"rows-{_digest(self._facts)}.npy" if cache else None
        self._spans = self._find()
        self._file: int | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> Sample:
        data = self._object(row)
        id = row if data.get("id") is None else data["id"]
        if isinstance(id, bool) or not isinstance(id, str | int):
            raise self._fault(row, "", "row_unreadable", f"id is {_kind(id)}, expected a string or a number")
        messages = tuple(self._messages(row, str(id), data))
        paths = self._paths(row, str(id), data)
        images = tuple(Image(path=self._resolve(path)) for path in paths)
        return Sample(id=str(id), source=self.name, row=row, messages=messages, images=images)

    def raw(self, row: int) -> bytes:
        """The row as it stands in the file; no bytes for a row that is no object."""
        start, end = (int(byte) for byte in self._spans[row])
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        return os.pread(self._file, end - start, start)

    def fingerprint(self) -> str:
        return _digest(f"{self._facts} {self.name} {[str(folder.absolute()) for folder in self.folders]}")

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the file itself, and maps the row places where they are on disk.
        return self.__dict__ | {"_file": None, "_spans": None if self._spans_file else self._spans}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._spans is None:
            self._spans = self._find()

    def _find(self) -> np.ndarray:
        if self._spans_file is None:
            return find_rows(self.path)
        if not self._spans_file.exists():
            spans = find_rows(self.path)
            self._spans_file.parent.mkdir(parents=True, exist_ok=True)
            beside = self._spans_file.with_suffix(f".{os.getpid()}.npy")
            np.save(beside, spans)
            os.replace(beside, self._spans_file)
        return np.load(self._spans_file, mmap_mode="r")

    def _object(self, row: int) -> dict[str, Any]:
        start, end = (int(byte) for byte in self._spans[row])
        raw = self.raw(row)
        try:
            data = json.loads(raw.decode("utf-8"))  # by itself `json` lets halves of characters pass
            if _HALF.search(raw):
                json.dumps(data, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            reason = "not a JSON object" if start == end else f"not JSON (row begins at byte {start}): {error}"
            raise self._fault(row, "", "row_unreadable", reason) from None
        if not isinstance(data, dict):
            raise self._fault(row, "", "row_unreadable", f"{_kind(data)}, expected an object")
        return data

    def _messages(self, row: int, id: str, data: dict[str, Any]) -> list[Message]:
        turns = data.get("conversations")
        if not isinstance(turns, list) or not turns:
            reason = "is missing" if turns is None else f"is {_kind(turns)}, expected a list of turns"
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
        return messages

    def _paths(self, row: int, id: str, data: dict[str, Any]) -> list[str]:
        value = data.get("image")
        paths = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) and path for path in paths):
            reason = f"image is {json.dumps(value)[:80]}, expected a path or a list of paths"
            raise self._fault(row, id, "row_unreadable", reason)
        return paths

    def _resolve(self, path: str) -> str:
        tried = [folder / path for folder in self.folders]  # an absolute path stays itself
        return str(tried[0] if len(tried) == 1 else next((file for file in tried if file.exists()), tried[0]))

    def _fault(self, row: int, id: str, code: FaultCode, reason: str) -> SampleError:
        return SampleError(Fault(source=self.name, row=row, id=id, code=code, reason=reason))


@register("llava_json")
def open_llava_json(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> LlavaJson:
    refuse_unknown(path, "llava_json", options)
    return LlavaJson(path, images, name, cache)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number") + (" that is empty" if value in ([], {}, "") else "")
