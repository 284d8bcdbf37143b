"""A folder whose subfolders are adapters: which of them are whole, new, changed or gone.

Knows files alone: what becomes of an adapter is its callers' business.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from vistune import console
from vistune.models import adapted

EVERY = 1.0
"""Seconds between looks, however often somebody asks."""
SETTLED = 2.0
"""Seconds for which nothing may have been written into an adapter before it is opened: it may be in the midst of being
copied, its connector still to come."""
T = TypeVar("T")
Mark = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Found(Generic[T]):
    """A subfolder as it was last opened. `made`: what that gave, None for nothing."""

    mark: Mark
    made: T | None


class Watched(Generic[T]):
    """`add(name, place, where)` is called for an adapter that is new or has changed, with a copy of it at `place` that
    nobody writes into, and raises ValueError where it cannot be used; `drop(made)` for one that is gone. ValueError
    when `folder` is not there."""

    def __init__(self, folder: Path, add: Callable[[str, Path, str], T], drop: Callable[[T], None]):
        if not folder.is_dir():
            raise ValueError(f"--adapters {folder}: no such folder")
        self.folder, self._add, self._drop = folder, add, drop
        self._lock = threading.Lock()
        self._last = -EVERY
        self._known: dict[str, Found[T]] = {}
        self._absent = False

    def made(self) -> list[T]:
        """What there is, in the order of names. From any thread, at once."""
        known = self._known
        return [made for name in sorted(known) if (made := known[name].made) is not None]

    def look(self) -> None:
        """See what has come and gone, unless that was done a second ago, or somebody is at it. It reads files."""
        if not self._lock.acquire(blocking=False):
            return  # an adapter is being read: who asks meanwhile gets what there is, and no thread waits for it
        try:
            if time.monotonic() - self._last >= EVERY:
                self._look()
                self._last = time.monotonic()
        finally:
            self._lock.release()

    def _look(self) -> None:
        try:
            places = {one.name: place for one in self.folder.iterdir() if (place := _place(one))}
        except OSError as error:
            if not self._absent:
                console.warn(f"--adapters {self.folder}: {error.strerror or error}; what was there stays")
            self._absent = True
            return
        self._absent = False
        known = dict(self._known)
        for name in known.keys() - places.keys():
            self._forget(known.pop(name))
        for name, place in sorted(places.items()):
            mark = _mark(place)
            before = known.get(name)
            if mark is None or (before is not None and before.mark == mark) or not _settled(mark):
                continue
            made = self._opened(name, place, mark)
            if before is not None:
                self._forget(before)
            known[name] = Found(mark, made)
        self._known = known  # at once: it is read by others meanwhile

    def _forget(self, found: Found[T]) -> None:
        if found.made is not None:
            self._drop(found.made)

    def _opened(self, name: str, place: Path, mark: Mark) -> T | None:
        """What became of it; None, and a line in the log, where it cannot be used or changes while it is read."""
        try:
            with _apart(place) as copy:
                if _mark(place) != mark:
                    return None
                return self._add(name, copy, str(place))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            console.warn(f"adapter {name}: not served: {error}")
            return None


def _place(folder: Path) -> Path | None:
    return None if folder.name.startswith(".") else adapted.place_of(folder)


def _mark(place: Path) -> Mark | None:
    """By which a change is known: names, sizes and when they were last written; None while files come and go."""
    try:
        stats = [(file.name, file.stat()) for file in adapted.files_of(place)]
    except OSError:
        return None
    return tuple((name, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for name, one in stats)


def _settled(mark: Mark) -> bool:
    """By the time at which the file itself was written here, which no copying of dates sets back."""
    return time.time() - max(changed for *_, changed in mark) / 1e9 >= SETTLED


@contextmanager
def _apart(place: Path) -> Iterator[Path]:
    """A copy, so that nothing read from it can change: a file that is cut short while it is mapped ends the process."""
    with tempfile.TemporaryDirectory(prefix="vistune-adapter-") as made:
        for file in adapted.files_of(place):
            shutil.copyfile(file, Path(made) / file.name)
        yield Path(made)
