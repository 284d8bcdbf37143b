"""Memory, and the folders that a run writes to: space, whether writing and renaming work, the kind of file system,
shared memory for workers."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vistune.doctor.findings import Finding, ok, problem, size, warning

OVER_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p")
LITTLE, SCANT = 20 * 2**30, 2**30
"""Free bytes below which a folder gets a warning (one 7B checkpoint is 13 GiB), and those that are a problem."""
SHARED = 2**30
"""Shared memory below which workers that send pictures have died (containers give 64 MiB unless told otherwise)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, or the nearest above it that exists. `error`: of a trial of writing and renaming."""

    folder: str
    free: int
    total: int
    inodes: int | None
    kind: str
    error: str = ""


def look(run_folder: Path) -> list[Finding]:
    memory = Path("/proc/meminfo")
    found = memory_findings(_text(memory), cgroup_memory(Path("/sys/fs/cgroup")))
    found += place_findings("run folder", gather(run_folder))
    found += place_findings("temporary files", gather(Path(tempfile.gettempdir())), SCANT)
    shared = Path("/dev/shm")
    return found + (shared_findings(shutil.disk_usage(shared).total) if shared.is_dir() else [])


def gather(folder: Path) -> Place:
    """Look at a folder that need not exist yet, and try to write where it would be."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    usage, stats = shutil.disk_usage(there), os.statvfs(there)
    inodes = stats.f_favail if stats.f_files else None
    return Place(str(there), usage.free, usage.total, inodes, kind_of(there, _text(Path("/proc/mounts"))), tried(there))


def tried(folder: Path) -> str:
    """Write beside, then rename, as everything here writes; nothing, or the error."""
    try:
        with tempfile.TemporaryDirectory(prefix=".vistune-doctor-", dir=folder) as inner:
            written = Path(inner) / "written"
            with written.open("wb") as file:
                file.write(b"\0" * 2**20)
                os.fsync(file.fileno())
            written.rename(Path(inner) / "renamed")
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"
    return ""


def kind_of(folder: Path, mounts: str) -> str:
    """The type of the file system that holds `folder`, from the text of /proc/mounts."""
    best, kind = "", ""
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal.group(1), 8)), words[1])
        inside = point == "/" or str(folder) == point or str(folder).startswith(point + "/")
        if inside and len(point) >= len(best):
            best, kind = point, words[2]
    return kind


def place_findings(title: str, place: Place, little: int = LITTLE) -> list[Finding]:
    text = f"{place.folder}: {size(place.free)} free of {size(place.total)}{f', {place.kind}' if place.kind else ''}"
    if place.error:
        return [problem(title, f"{place.folder}: cannot write ({place.error})", "another folder, or its permissions")]
    if place.free < SCANT:
        return [problem(title, text, "make room, or another folder")]
    if place.inodes is not None and place.inodes < 1000:
        return [problem(title, f"{text}; room for {place.inodes} more files", "remove small files: no inodes are left")]
    found = [ok(title, text)]
    if place.free < little:
        found = [warning(title, f"{text}: a 7B model and its optimizer do not fit", "make room, or another folder")]
    if place.kind in OVER_NETWORK:
        fix = "checkpoint.background=true; keep pictures in tar shards, not in many small files"
        found.append(warning(f"{title}, network", f"{place.kind}: slow for small files and for each checkpoint", fix))
    return found


def memory_findings(meminfo: str, group: tuple[int, int] | None) -> list[Finding]:
    """`meminfo`: the text of /proc/meminfo; `group`: limit and use of the control group in bytes."""
    kib = {name: int(value) for name, value in re.findall(r"(?m)^(\w+):\s+(\d+) kB", meminfo)}
    total, free = kib.get("MemTotal", 0) * 1024, kib.get("MemAvailable", 0) * 1024
    if not total:
        return []
    text = f"{size(free)} available of {size(total)}"
    if group and group[0] < total:
        free = min(free, max(0, group[0] - group[1]))
        text += f"; this container may use {size(group[0])}, {size(free)} of it left"
    if free < 2 * 2**30:
        return [problem("memory", text, "end what uses it, or raise the container's limit (--memory)")]
    if free < 8 * 2**30:
        return [warning("memory", f"{text}: little for a model of some billions", "more memory, or a smaller model")]
    return [ok("memory", text)]


def cgroup_memory(mount: Path) -> tuple[int, int] | None:
    """Limit and use of memory of the control group at `mount`, of either version; None without a limit."""
    for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
        folder = mount if limit == "max" else mount / "memory"
        words = [_text(folder / f"memory.{name}").strip() for name in (limit, used)]
        if words[0].isdigit() and words[1].isdigit() and int(words[0]) < 2**60:
            return int(words[0]), int(words[1])
    return None


def shared_findings(total: int) -> list[Finding]:
    if total >= SHARED:
        return [ok("shared memory", f"/dev/shm holds {size(total)}")]
    text = f"/dev/shm holds {size(total)}: data workers may die with `Bus error`"
    return [warning("shared memory", text, "start the container with --ipc=host or --shm-size=8g; or data.workers=0")]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
