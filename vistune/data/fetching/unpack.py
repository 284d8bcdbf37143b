"""A zip of pictures into its folder: every byte checked, beside first, never half of it in place.

Knows nothing of where the archive comes from.
"""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path, PurePosixPath
from threading import Event

from vistune.data.fetching.threads import Stopped

JUNK = ("__MACOSX", ".DS_Store", "Thumbs.db")
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, UnicodeDecodeError)


def members(archive: Path, folder: str) -> dict[str, zipfile.ZipInfo]:
    """Files of a zip by the path that they get below `folder`.

    A folder that holds everything else in the archive and is called like `folder`'s end is left out: `train2017/a.jpg`
    and `a.jpg` both belong to coco/train2017 as a.jpg. Raises ValueError for what is no whole zip, and for a member
    that would be written elsewhere (`..`, an absolute path) or is a link.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            entries = [entry for entry in file.infolist() if not entry.is_dir()]
    except (OSError, *BROKEN_ZIP) as error:
        raise ValueError(f"{archive}: not a whole zip archive: {error}") from None
    found = {_path(archive, entry): entry for entry in entries if not _is_junk(entry.filename)}
    top = _common([path.parts[:-1] for path in found])
    skip = len(top) if top and top[-1] == PurePosixPath(folder).name else 0
    return {str(PurePosixPath(*path.parts[skip:])): entry for path, entry in found.items()}


def is_whole_zip(path: Path) -> None:
    """Raises ValueError for a file that does not end as a zip does; its content is checked while it is unpacked."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(200).lstrip()[:60]
        kind = "a web page" if start[:1] == b"<" else f"a file that begins with {start[:12]!r}"
        raise ValueError(f"no zip archive, or not all of one, but {kind}")


def unpack(archive: Path, to: Path, heard: Callable[[int], None] = lambda done: None, stop: Event | None = None) -> int:
    """All files of `archive` into the folder `to`; returns how many.

    They are written into a folder beside, read against their check sums; then that folder takes the name. Where `to`
    is there already, files of equal size stay and the others are moved in one by one, each of them whole; what stood
    in their place is kept as NAME.replaced. Called again after a crash it goes on with what lies beside.

    Raises ValueError (archive, member) for what is torn; OSError for the disk; Stopped.
    """
    wanted = members(archive, to.as_posix())
    if not wanted:
        raise ValueError(f"{archive}: a zip archive without a file in it")
    beside = to.with_name(f".{to.name}.unpacking")
    missing = {path: entry for path, entry in wanted.items() if _size(to / path) != entry.file_size}
    _check_room(archive, to, sum(entry.file_size for entry in missing.values()))
    heard(len(wanted) - len(missing))
    with zipfile.ZipFile(archive) as file:
        for done, (path, entry) in enumerate(missing.items(), 1):
            if stop is not None and stop.is_set():
                raise Stopped
            if _size(beside / path) != entry.file_size:
                _write(file, entry, beside / path, archive)
            heard(len(wanted) - len(missing) + done)
    if missing:
        _into_place(beside, to, list(missing))
    return len(wanted)


def _write(file: zipfile.ZipFile, entry: zipfile.ZipInfo, to: Path, archive: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    half = to.with_name(to.name + ".half")
    try:
        with file.open(entry) as source, open(half, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except BROKEN_ZIP as error:
        half.unlink(missing_ok=True)
        raise ValueError(f"{archive}: {entry.filename} in it is broken: {error}; fetch the archive again") from None
    os.replace(half, to)


def _into_place(beside: Path, to: Path, paths: list[str]) -> None:
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        os.rename(beside, to)
        return
    for path in paths:
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        if _size(to / path) >= 0:
            os.replace(to / path, to / f"{path}.replaced")
        os.replace(beside / path, to / path)
    shutil.rmtree(beside)


def _path(archive: Path, entry: zipfile.ZipInfo) -> PurePosixPath:
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    outside = path.is_absolute() or ".." in path.parts or ":" in entry.filename[:2] or not path.parts
    if outside or stat.S_ISLNK(entry.external_attr >> 16):
        raise ValueError(f"{archive}: {entry.filename!r} in it points outside its folder; nothing was unpacked")
    return path


def _is_junk(name: str) -> bool:
    return any(part in JUNK for part in name.split("/"))


def _common(folders: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders that all of them begin with."""
    if not folders:
        return ()
    pairs = zip(min(folders), max(folders), strict=False)
    return tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _size(path: Path) -> int:
    """-1 for what is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _check_room(archive: Path, to: Path, needed: int) -> None:
    free = free_bytes(to)
    if needed > free:
        raise ValueError(
            f"{archive} unpacks to {needed:,} bytes more and {to} has room for {free:,}; free some, or use another root"
        )


def free_bytes(path: Path) -> int:
    """Free on the disk where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
