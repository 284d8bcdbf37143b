"""One part of a data set brought to its place: found among carried-in archives or downloaded, checked, unpacked.

Knows one part at a time; which of them are needed is decided in `prepare`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from vistune import files
from vistune.data.fetching import covers
from vistune.data.fetching.archives import Part
from vistune.data.fetching.download import BROKEN_NET, Patience, download, request
from vistune.data.fetching.unpack import is_whole_zip, members, unpack

MB = 1_000_000
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Way:
    """How parts come: the data's root, the folder for work in progress, carried-in archives if any, patience, bars."""

    root: Path
    work: Path
    source: Path | None
    patience: Patience
    bar: Progress
    keep: bool  # a downloaded archive stays after it is unpacked


def bring(part: Part, way: Way, wanted: Collection[str]) -> int:
    """Bring one part to its place; returns how many files. `wanted`: names below its folder that the JSON asks for.

    Raises ValueError (DownloadError among them) that names the archive or address; OSError for the disk; Stopped.
    """
    if part.kind != "archive":
        _file(part, way, part.home(way.root))
        return 1
    to = way.root / part.folder
    if way.source is not None:
        return _unpack(part, carried(way.source, part, wanted), to, way)
    archive = way.work / part.file
    _download(part, archive, way, is_whole_zip)
    try:
        count = _unpack(part, archive, to, way)
    except ValueError:
        if not way.keep:
            archive.unlink(missing_ok=True)  # torn inside: the next call fetches it anew
        raise
    if not way.keep:
        archive.unlink()
    return count


def carried(source: Path, part: Part, wanted: Collection[str]) -> Path:
    """The archive below `source` that holds `part`: told by the pictures in it, since three owners call theirs
    images.zip. Raises ValueError when none does."""
    names = (part.file, part.address.rpartition("/")[2])
    found = sorted(map(Path, files.listed(source, ".zip")), key=lambda path: path.name not in names)
    best, most = None, 0
    for archive in found:
        inside = members(archive, part.folder)
        share = sum(name in inside for name in wanted) if wanted else int(archive.name == part.file)
        if share > most:
            best, most = archive, share
        if wanted and share * 2 > len(wanted):
            break
    if best is None:
        raise ValueError(f"{source}: none of its {len(found)} zip archives holds {part.folder}; save it as {part.file}")
    return best


def hub_facts(address: str, patience: Patience) -> tuple[int | None, str]:
    """Size and SHA-256 that the hub tells of a large file before it hands it out; (None, "") where it does not."""
    opener = urllib.request.build_opener(_Stay)
    try:
        with opener.open(request(address, method="HEAD"), timeout=patience.timeout) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
        error.close()
    except BROKEN_NET:
        return None, ""  # the download itself will say what is wrong
    size = headers.get("X-Linked-Size") or ""
    sha256 = (headers.get("X-Linked-ETag") or "").strip('"')
    return int(size) if size.isdigit() else None, sha256 if SHA256.fullmatch(sha256) else ""


def is_whole_json(path: Path) -> None:
    """Raises ValueError for what does not begin and end as a JSON list, object or lines of them do."""
    with open(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(max(0, os.path.getsize(path) - 4096))
        end = file.read().rstrip()[-1:]
    if (start, end) not in ((b"[", b"]"), (b"{", b"}")):
        raise ValueError(f"no whole JSON file: it begins with {start!r} and ends with {end!r}")


class _Stay(urllib.request.HTTPRedirectHandler):
    """The hub's own answer is wanted, not that of the store that it points to."""

    def redirect_request(self, *asked: Any) -> None:
        return None


def _file(part: Part, way: Way, to: Path) -> None:
    check = covers.is_links_file if part.kind == "covers" else is_whole_json
    if way.source is None:
        _download(part, to, way, check)
        return
    found = [Path(path) for path in files.listed(way.source, part.file) if Path(path).name == part.file]
    if not found:
        raise ValueError(f"{way.source}: there is no {part.file} in it")
    try:
        check(found[0])
    except ValueError as error:
        raise ValueError(f"{found[0]}: {error}") from None
    to.parent.mkdir(parents=True, exist_ok=True)
    half = to.with_name(to.name + ".half")
    shutil.copyfile(found[0], half)
    os.replace(half, to)


def _download(part: Part, to: Path, way: Way, check: Callable[[Path], None]) -> None:
    if to.exists():  # whole, since it has its name: only what comes after it was stopped
        return
    size, sha256 = part.size, part.sha256
    if part.on_hub and size is None:
        size, sha256 = hub_facts(part.link, way.patience)
    task = way.bar.add_task(f"{part.file}, MB", total=None if size is None else size // MB)

    def heard(have: int, total: int | None) -> None:
        way.bar.update(task, completed=have // MB, total=total and max(1, total // MB))

    download(part.link, to, size=size, sha256=sha256, check=check, heard=heard, patience=way.patience)
    way.bar.remove_task(task)


def _unpack(part: Part, archive: Path, to: Path, way: Way) -> int:
    task = way.bar.add_task(f"{archive.name}: unpacking", total=len(members(archive, part.folder)))
    count = unpack(archive, to, lambda done: way.bar.update(task, completed=done), way.patience.stop)
    way.bar.remove_task(task)
    return count


@dataclass
class Ledger:
    """What was unpacked by earlier calls: part -> how many files, and how many wanted pictures were missing after.

    A part is not brought twice for pictures that its archive never had."""

    path: Path

    def read(self) -> dict[str, dict[str, int]]:
        try:
            return dict(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ValueError(f"{self.path}: torn ({error}); remove it, and what is there is looked at anew") from None

    def note(self, part: str, unpacked: int, missing: int) -> None:
        known = self.read() | {part: {"files": unpacked, "missing": missing}}
        half = self.path.with_name(self.path.name + ".half")
        half.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(half, self.path)

    def has_nothing_for(self, part: str, missing: int) -> bool:
        known = self.read().get(part)
        return known is not None and missing <= known["missing"]
