"""An index while it is made: whatever is measured lies on disk, so a build that was killed goes on where it was.

Knows columns, faults and digests of chunks; nothing of readers and tokens.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, overload

import numpy as np

from vistune import console
from vistune.samples import Fault

COLUMNS: dict[str, type] = {
    "source": np.uint16,  # number of the source, in the order of the recipe
    "row": np.int64,  # within the source
    "text": np.int32,  # tokens, images apart
    "image": np.int32,  # placeholders
    "supervised": np.int32,  # targets
    "images": np.uint16,
    "fault": np.uint8,  # 0: none, else 1 + the code's place in CODES
    "shortened": np.bool_,
}
FORMAT = 2  # of the folder; raised when the columns or what is measured change
_DONE = np.dtype([("rows", "<i8"), ("faults", "<i8"), ("digest", "u1", 32)])
"""After each chunk: rows so far, bytes of faults.jsonl so far, digest of the chunk."""
_KEEP_SECONDS = 5.0
_OLD_SECONDS = 14 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One chunk: columns of equal length, its faults, and a digest of the tokens seen."""

    columns: dict[str, np.ndarray]
    faults: list[Fault]
    digest: bytes


class Faults(Sequence[Fault]):
    """The faults of a kept index, read from its file when they are asked for: there may be millions."""

    def __init__(self, path: Path, count: int):
        self.path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Fault]:
        with open(self.path, encoding="utf-8") as lines:
            for line in lines:
                yield Fault(**json.loads(line))

    @overload
    def __getitem__(self, at: int) -> Fault: ...
    @overload
    def __getitem__(self, at: slice) -> list[Fault]: ...
    def __getitem__(self, at: int | slice) -> Fault | list[Fault]:
        if isinstance(at, slice):
            return list(self)[at]
        if not -self._count <= at < self._count:
            raise IndexError(at)
        return next(islice(self, at % self._count, None))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class Growing:
    """Takes chunk after chunk. In `folder`, or in memory without one; what is held then is the pages in use."""

    def __init__(self, folder: Path | None, rows: int, head: str):
        self._folder, self._head = folder, head
        self._done: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []
        self._kept_at = time.monotonic()
        self.faults: list[Fault] = []  # without a folder
        self._log: IO[bytes] | None = None
        if folder is not None:
            self._resume(folder, rows)
        self.columns = {name: self._column(name, rows) for name in COLUMNS}

    @property
    def chunks(self) -> int:
        """How many are measured already."""
        return sum(map(len, self._done)) + len(self._waiting)

    @property
    def rows(self) -> int:
        return int((self._waiting or self._done)[-1]["rows"][-1]) if self.chunks else 0

    def add(self, part: Measured) -> None:
        """The next chunk, in order."""
        at, count = self.rows, len(part.columns["row"])
        seen = hashlib.sha256(part.digest)
        for name, column in self.columns.items():
            column[at : at + count] = part.columns[name]
            seen.update(part.columns[name].tobytes())
        place = 0
        if self._log is None:
            self.faults += part.faults
        else:
            lines = (json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in part.faults)
            self._log.write("".join(lines).encode("utf-8", "backslashreplace"))
            place = self._log.tell()
        digest = np.frombuffer(seen.digest(), np.uint8)
        self._waiting.append(np.array([(at + count, place, digest)], _DONE))
        if time.monotonic() - self._kept_at > _KEEP_SECONDS:
            self.keep()

    def keep(self) -> None:
        """What was added so far survives a kill: columns and faults first, then the record that says so."""
        if self._waiting:
            records = np.concatenate(self._waiting)
            if self._folder is not None and self._log is not None:
                for column in self.columns.values():
                    column.flush()  # type: ignore[attr-defined]
                self._log.flush()
                os.fsync(self._log.fileno())
                with open(self._folder / "chunks.bin", "ab") as done:
                    done.write(records.tobytes())
                    done.flush()
                    os.fsync(done.fileno())
            self._done, self._waiting = [*self._done, records], []
        self._kept_at = time.monotonic()

    def close(self) -> None:
        self.keep()
        if self._log is not None:
            self._log.close()

    def hash(self) -> str:
        """Of everything added."""
        seen = hashlib.sha256(f"{FORMAT} {self._head}".encode())
        for records in [*self._done, *self._waiting]:
            seen.update(np.ascontiguousarray(records["digest"]).tobytes())
        return seen.hexdigest()

    def _column(self, name: str, rows: int) -> np.ndarray:
        if self._folder is None:
            return np.zeros(rows, COLUMNS[name])
        path = self._folder / f"{name}.npy"
        if self.chunks:
            return np.load(path, mmap_mode="r+")
        return np.lib.format.open_memmap(path, mode="w+", dtype=COLUMNS[name], shape=(rows,))

    def _resume(self, folder: Path, rows: int) -> None:
        """Take over what an earlier build left in `folder`, or empty it."""
        done = folder / "chunks.bin"
        count = done.stat().st_size // _DONE.itemsize if done.exists() else 0
        records = np.fromfile(done, _DONE, count) if count else np.zeros(0, _DONE)
        if count:
            self._done = [records]
            os.truncate(done, count * _DONE.itemsize)  # a record may be torn
            console.say(f"index: goes on after {self.rows:,} of {rows:,} rows that were measured before")
        self._log = open(folder / "faults.jsonl", "r+b" if count else "w+b")  # noqa: SIM115 (closed in close())
        self._log.truncate(int(records["faults"][-1]) if count else 0)
        self._log.seek(0, os.SEEK_END)


def version_of(folder: Path) -> tuple[int, int] | None:
    """Other for each index that is put there; None when there is no whole one of this format."""
    try:
        facts = (folder / "meta.json").stat()
        whole = json.loads((folder / "meta.json").read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError):
        return None
    return (facts.st_ino, facts.st_mtime_ns) if whole else None


@contextmanager
def claimed(folder: Path, version: tuple[int, int] | None) -> Iterator[Path | None]:
    """The folder in which an index that replaces `version` of `folder` grows; it takes that name when all went well.

    One process at a time has it; others wait. None when another has replaced that version meanwhile. What an error or
    a kill leaves, the next build goes on with, unless nothing was kept.
    """
    part = folder.with_name(f".{folder.name}.part")
    _forget_old(folder.parent)
    with _locked(part):
        if version_of(folder) != version:
            shutil.rmtree(part)
            yield None
            return
        try:
            yield part
        finally:
            if not (part / "meta.json").exists() and not (part / "chunks.bin").exists():
                shutil.rmtree(part)
        (part / "lock").unlink()
        if folder.exists():
            os.replace(folder, old := folder.with_name(f".{folder.name}.old.{os.getpid()}"))
            os.replace(part, folder)
            shutil.rmtree(old)
        else:
            os.replace(part, folder)


@contextmanager
def _locked(part: Path) -> Iterator[None]:
    """Alone with `part`, which is made if need be. The kernel frees the lock of a process that dies.

    It is a lock of the process, which its workers do not inherit.
    """
    while True:
        part.mkdir(parents=True, exist_ok=True)
        with open(part / "lock", "a") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                console.say(f"another process makes this index ({part}); waiting for it")
                fcntl.lockf(lock, fcntl.LOCK_EX)
            if _is_still(lock, part / "lock"):
                yield
                return


def _is_still(lock: IO[str], path: Path) -> bool:
    """Whether the lock is on the file that is there now, not on one that was moved away meanwhile."""
    return path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())


def _forget_old(cache: Path) -> None:
    """Builds that nobody went on with for two weeks."""
    for part in cache.glob(".index-*.part") if cache.exists() else ():
        if time.time() - max(file.stat().st_mtime for file in [part, *part.iterdir()]) > _OLD_SECONDS:
            shutil.rmtree(part, ignore_errors=True)
