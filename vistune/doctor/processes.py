"""How many threads, processes and open files there may be, against what training starts."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from dataclasses import dataclass

from vistune import limits
from vistune.doctor.findings import Finding, ok, problem, warning

POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
WORKERS = 4
"""`data.workers` where a recipe says nothing."""
FILES = 4096
"""Open files below which many workers, shards and checkpoints have failed with `Too many open files`."""
FEW = 256


@dataclass(frozen=True, slots=True)
class Allowed:
    """What this process may use and start. `installed`: cores of the machine, of which `cores` are granted."""

    cores: int
    installed: int
    room: limits.Room
    files: int
    files_most: int
    locked: int
    ranks: int = 1


def gather(environment: Mapping[str, str] = os.environ) -> Allowed:
    soft, hard = limits.allowed("NOFILE")
    locked, _ = limits.allowed("MEMLOCK")
    ranks = environment.get("LOCAL_WORLD_SIZE", "1")
    counted = int(ranks) if ranks.isdigit() else 1
    return Allowed(limits.cores(), os.cpu_count() or 1, limits.room(), soft, hard, locked, counted)


def findings(allowed: Allowed, environment: Mapping[str, str], has_infiniband: bool = False) -> list[Finding]:
    found = [*_cores(allowed, environment), *_room(allowed), *_files(allowed), *_workers(environment)]
    if has_infiniband and allowed.locked < 1 << 30:
        text = f"{allowed.locked // 1024} KiB may be locked: NCCL cannot register memory with InfiniBand"
        found.append(problem("locked memory", text, "ulimit -l unlimited  (a container takes --ulimit memlock=-1)"))
    return found


def _cores(allowed: Allowed, environment: Mapping[str, str]) -> list[Finding]:
    share = max(1, allowed.cores // max(1, allowed.ranks))
    text = f"{allowed.cores} of {allowed.installed} usable"
    many = {name: environment[name] for name in POOLS if _given(environment, name) > share}
    if many:
        said = ", ".join(f"{name}={value}" for name, value in many.items())
        whose = f" for each of {allowed.ranks} processes" if allowed.ranks > 1 else ""
        said = f"{text}; {said}: more threads than cores{whose}"
        return [warning("cores", said, f"export {next(iter(many))}={share}")]
    silent = not _given(environment, "OMP_NUM_THREADS") and allowed.cores < allowed.installed
    if silent and allowed.cores < allowed.installed // 2:
        text += "; libraries that count the machine's cores start too many threads"
        return [warning("cores", text, f"export OMP_NUM_THREADS={share}")]
    return [ok("cores", text)]


def _given(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _room(allowed: Allowed) -> list[Finding]:
    room, title = allowed.room, "processes"
    if room.free is None:
        return [ok(title, "no limit that holds this process")]
    cap = limits.threads(room.free, allowed.cores, allowed.ranks)
    workers = limits.most_workers(room.free, allowed.ranks) or 0
    text = f"{room.free} more threads and processes may be started: {room.source}"
    if cap is None and workers >= WORKERS:
        return [ok(title, text)]
    said = f"{text}. Every command keeps to {cap or allowed.cores} thread(s) a library and {workers} data worker(s)"
    if room.free < limits.RESERVE:
        return [problem(title, said, "raise it: ulimit -u, or --pids-limit of the container")]
    return [warning(title, said, "raise it: ulimit -u, or --pids-limit of the container")]


def _files(allowed: Allowed) -> list[Finding]:
    title, text = "open files", f"{allowed.files}" if allowed.files < limits.UNLIMITED else "no limit"
    fix = f"ulimit -n {min(65536, allowed.files_most)}"
    if allowed.files < FEW:
        return [problem(title, f"{text}: too few for workers", fix)]
    if allowed.files < FILES:
        return [warning(title, f"{text}: few for many workers and shards (`Too many open files`)", fix)]
    return [ok(title, text)]


def _workers(environment: Mapping[str, str]) -> list[Finding]:
    """How data workers are started, and tokenizers beside them."""
    method = environment.get("VISTUNE_WORKERS", "fork")
    if method not in multiprocessing.get_all_start_methods():
        method = "spawn"
    if method == "fork" and environment.get("TOKENIZERS_PARALLELISM", "").lower() in ("1", "true", "yes", "on"):
        text = "data workers are forked and TOKENIZERS_PARALLELISM asks for threads: forks of threads may hang"
        return [warning("data workers", text, "unset TOKENIZERS_PARALLELISM, or VISTUNE_WORKERS=spawn")]
    return [ok("data workers", f"started by {method}, tokenizers without threads of their own")]
