"""How many threads and processes may still be started here, and fewer of both where that is few.

On the standard library alone: it is asked before numpy is imported, whose BLAS starts its threads on import.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMEXPR_MAX_THREADS",
    "RAYON_NUM_THREADS",  # tokenizers
    "TORCHINDUCTOR_COMPILE_THREADS",  # processes that compile
)
POOLS = 8
"""Pools of so many threads that one process may open: those above, torch's two, autograd's, one for margin."""
WORKER = 4
"""Tasks that one data worker costs: itself, its queue's feeder, its watch over the parent, one for margin."""
RESERVE = 16
"""Tasks left over for what is not counted: progress bar, pinning, checkpoint, communication."""
UNLIMITED = 1 << 62
VAST = 100_000
"""A limit above this is not counted against: nobody comes near, and counting reads every process."""
_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class Room:
    """Tasks (threads and processes) that may still be started; `free` None where nothing limits them."""

    free: int | None
    limit: int | None = None
    source: str = ""


def apply(environment: MutableMapping[str, str] = os.environ) -> None:
    """Called first of all: with little room, the environment says how many threads each library may start."""
    cap = threads(room().free, cores(), _ranks(environment))
    if cap is None:
        return
    for name in THREADS:
        given = environment.get(name, "")
        environment[name] = str(min(cap, int(given)) if given.isdigit() and int(given) else cap)
    if cap == 1:
        environment["TOKENIZERS_PARALLELISM"] = "false"
    found = room()
    _say(f"only {found.free} more threads and processes may be started ({found.source}): {cap} thread(s) a library")


def threads(free: int | None, usable: int, ranks: int = 1) -> int | None:
    """Threads for each library of one of `ranks` processes, or None where there is room enough for `usable` each."""
    if free is None:
        return None
    share = free // max(1, ranks) - RESERVE
    return None if share >= POOLS * usable else max(1, min(usable, share // POOLS))


def workers(wanted: int) -> int:
    """As many data workers for this rank as there is room for, at most `wanted`; said once where they are fewer."""
    found = room()
    may = most_workers(found.free, _ranks(os.environ))
    if may is None or wanted <= may:
        return wanted
    _say(f"only {found.free} more threads and processes may be started ({found.source}): {may} data worker(s)")
    return may


def most_workers(free: int | None, ranks: int = 1) -> int | None:
    """Data workers that each of `ranks` processes may start; None: as many as it likes."""
    return None if free is None else max(0, (free // max(1, ranks) - RESERVE) // WORKER)


def room() -> Room:
    """The narrowest of this user's limit of processes and the limits of the control groups around this process."""
    found = [own_room(), *groups_room(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    bound = [one for one in found if one.free is not None]
    return min(bound, key=lambda one: one.free or 0, default=Room(None))


def own_room() -> Room:
    """What RLIMIT_NPROC leaves; it counts threads, of every process of this user, and does not hold the superuser."""
    soft, _ = allowed("NPROC")
    own, names = _read(Path("/proc/self/status")), _read(Path("/proc/self/uid_map"))
    if soft > VAST or not own or not is_bound(own, names):
        return Room(None)
    statuses = (_read(place / "status") for place in Path("/proc").iterdir() if place.name.isdigit())
    used = tasks_of(os.getuid(), statuses)
    return Room(max(0, soft - used), soft, f"RLIMIT_NPROC is {soft}, {used} in use; `ulimit -u` shows and raises it")


def allowed(kind: str) -> tuple[int, int]:
    """Soft and hard limit of RLIMIT_`kind`; UNLIMITED where there is none."""
    if resource is None or not hasattr(resource, f"RLIMIT_{kind}"):
        return UNLIMITED, UNLIMITED
    soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))
    return tuple(UNLIMITED if one == resource.RLIM_INFINITY else one for one in (soft, hard))  # type: ignore[return-value]


def is_bound(status: str, uid_map: str = "") -> bool:
    """Whether RLIMIT_NPROC holds a process with this /proc/PID/status: not the machine's superuser, nor one with
    CAP_SYS_ADMIN or CAP_SYS_RESOURCE. Inside a user namespace (`uid_map`), as of rootless containers, it holds all."""
    if uid_map.split()[:3] not in ([], ["0", "0", "4294967295"]):
        return True
    fields = _fields(status)
    mask = int(fields.get("CapEff", "0") or "0", 16)
    return not mask & (1 << 21 | 1 << 24) and fields.get("Uid", "1").split()[0] != "0"


def tasks_of(user: int, statuses: Iterable[str]) -> int:
    """Threads of the processes of `user`, from the texts of /proc/PID/status."""
    fields = (_fields(status) for status in statuses)
    return sum(int(one.get("Threads", "0")) for one in fields if one.get("Uid", "-1").split()[0] == str(user))


def groups_room(own: Path, mount: Path) -> list[Room]:
    """What `pids.max` leaves in each control group around this process, of either version."""
    rooms = []
    for folder in _groups(own, mount, "pids"):
        limit, used = _read(folder / "pids.max").strip(), _read(folder / "pids.current").strip()
        if limit.isdigit() and used.isdigit():
            source = f"pids.max of the control group is {limit}, {used} in use; a container takes --pids-limit"
            rooms.append(Room(max(0, int(limit) - int(used)), int(limit), source))
    return rooms


def cores(own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Processor cores that this process may use: its affinity, and what its control groups grant, rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [share for folder in _groups(own, mount, "cpu") if (share := _share(folder))]
    return max(1, min([allowed, *(math.ceil(share) for share in shares)]))


def _share(folder: Path) -> float | None:
    """Cores that a control group grants, None for all: `cpu.max` of version 2, `cpu.cfs_*_us` of version 1."""
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _groups(own: Path, mount: Path, controller: str) -> list[Path]:
    """Folders of the control groups around this process, inner first; `own` is /proc/self/cgroup."""
    folders = []
    for line in _read(own).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root = mount / controller if controllers else mount
        inner = root / path.lstrip("/")
        folders += [place for place in (inner, *inner.parents) if place == root or root in place.parents]
    return folders


def _ranks(environment: MutableMapping[str, str]) -> int:
    given = environment.get("LOCAL_WORLD_SIZE", "1")
    return int(given) if given.isdigit() else 1


def _fields(status: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in status.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    """A small file of the system, empty where there is none (or it went while we looked)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _say(text: str) -> None:
    if text not in _said and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"vistune: {text}", file=sys.stderr)
    _said.add(text)
