"""`vistune doctor`: every group of findings in turn, shown as they come; 1 where one of them is a problem."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vistune.doctor import (
    cluster,
    compiler,
    devices,
    driver,
    hub,
    imports,
    kernels,
    packages,
    place,
    processes,
    rocm,
    show,
    storage,
)
from vistune.doctor.findings import Finding, problem

INFINIBAND = Path("/sys/class/infiniband")


def main(arguments: list[str] | None = None) -> int:
    """The command line of the verb; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="vistune doctor",
        description="Find out whether this machine can train, and what to change. Needs Python alone. Under torchrun: "
        "also whether the ranks reach each other. Exit code 0: fine, or warnings only; 1: a problem.",
    )
    parser.add_argument("run_folder", nargs="?", default="runs", type=Path, help="where runs are to be written (runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--only", action="append", choices=GROUPS, help="look at this group alone; may be repeated")
    help_timeout = "seconds that one import may take (%(default)g)"
    parser.add_argument("--timeout", type=float, default=imports.TIMEOUT, help=help_timeout)
    asked = parser.parse_args(arguments)
    return examine(asked.run_folder, json=asked.json, only=asked.only, timeout=asked.timeout)


def examine(
    run_folder: Path, *, json: bool = False, only: list[str] | None = None, timeout: float = imports.TIMEOUT
) -> int:
    """Look at everything (or the groups `only` names), print it, return the exit code. Rank 0 speaks for all ranks."""
    first, known = os.environ.get("RANK", "0") == "0" or not cluster.is_launched(), Known(run_folder, timeout)
    groups: dict[str, list[Finding]] = {}
    for name in only or (GROUPS if os.environ.get("LOCAL_RANK", "0") == "0" or not cluster.is_launched() else OF_RANK):
        show.print_wait(f"looking at {name} ..." if first else "")
        groups[name] = _looked(GROUPS[name], known, groups)
        show.print_wait("")
        if first and not json:
            show.print_group(name, groups[name], sys.stdout)
    if not first:
        _of_another_rank(groups, known.heard)
        return 0  # a code here would make torchrun end rank 0 before it has spoken, whose code counts for all
    if json:
        show.print_json(groups, sys.stdout)
    else:
        show.print_end(groups, sys.stdout)
    return show.code(groups)


def _of_another_rank(groups: show.Groups, heard: bool) -> None:
    """What rank 0 has not heard, this rank says itself; on stderr, since stdout may be rank 0's JSON."""
    for name, found in groups.items() if not heard else ():
        show.print_group(f"rank {os.environ['RANK']}: {name}", [one for one in found if one.fix], sys.stderr)


class Known:
    """What groups learn from each other: the probe's facts about torch; whether rank 0 has heard this one."""

    def __init__(self, run_folder: Path, timeout: float) -> None:
        self.run_folder, self.timeout = run_folder, timeout
        self.torch: dict[str, Any] = {}
        self.found: list[Finding] = []
        self.heard = False


Look = Callable[[Known], list[Finding]]


def _looked(look: Look, known: Known, groups: dict[str, list[Finding]]) -> list[Finding]:
    known.found = [one for found in groups.values() for one in found]
    try:
        return look(known)
    except Exception as error:  # one group that fails must not hide the others
        if os.environ.get("VISTUNE_TRACEBACK"):
            raise
        text = f"the examination itself failed: {type(error).__name__}: {error}"
        return [problem("doctor", text, "run it again with VISTUNE_TRACEBACK=1, and report what it prints")]


def _python(known: Known) -> list[Finding]:
    return [*place.findings(place.gather()), *packages.look(), *imports.look(known.timeout)]


def _devices(known: Known) -> list[Finding]:
    found, known.torch = devices.look()
    nvidia = driver.gather()
    seen = driver.visible(os.environ.get("CUDA_VISIBLE_DEVICES"), nvidia, os.environ)
    of_rocm = rocm.findings(rocm.gather(), known.torch, os.environ)
    return [*driver.findings(nvidia, known.torch), *of_rocm, *seen, *found]


def _kernels(known: Known) -> list[Finding]:
    return [*kernels.look(), *compiler.look()]


def _storage(known: Known) -> list[Finding]:
    return [*storage.look(known.run_folder), *hub.look()]


def _processes(known: Known) -> list[Finding]:
    return processes.findings(processes.gather(), os.environ, INFINIBAND.is_dir() and any(INFINIBAND.iterdir()))


def _ranks(known: Known) -> list[Finding]:
    if not cluster.is_launched():
        return []
    found, known.heard = cluster.look(known.found)
    return found


OF_RANK = ("devices", "kernels", "ranks")
"""What differs between the ranks of one node; the rest is looked at once on each."""
GROUPS: dict[str, Look] = {
    "python": _python,
    "devices": _devices,
    "kernels": _kernels,
    "storage": _storage,
    "processes": _processes,
    "ranks": _ranks,
}
