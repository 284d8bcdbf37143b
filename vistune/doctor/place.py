"""The interpreter, and what it runs in: virtual environment, container, WSL."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vistune.doctor.findings import Finding, ok, problem, warning

OLDEST, TESTED = (3, 11), ((3, 11), (3, 12))


@dataclass(frozen=True, slots=True)
class Here:
    """`kernel` is the text of /proc/version."""

    version: tuple[int, int, int]
    executable: str
    is_virtual: bool
    machine: str
    system: str
    kernel: str = ""
    container: str = ""
    has_lock: bool = True


def gather() -> Here:
    lock = getattr(sys, "_is_gil_enabled", None)
    return Here(
        version=sys.version_info[:3],
        executable=sys.executable,
        is_virtual=sys.prefix != sys.base_prefix,
        machine=platform.machine(),
        system=platform.system(),
        kernel=_text(Path("/proc/version")),
        container=container(os.environ),
        has_lock=lock() if lock else True,
    )


def container(environment: Mapping[str, str]) -> str:
    """What kind of container this is, as far as it says so."""
    if environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER"):
        return "apptainer"
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    return "kubernetes" if environment.get("KUBERNETES_SERVICE_HOST") else ""


def findings(here: Here) -> list[Finding]:
    return [*_python(here), *_system(here)]


def _python(here: Here) -> list[Finding]:
    text = f"{'.'.join(str(part) for part in here.version)}, {here.executable}"
    if here.version[:2] < OLDEST:
        return [problem("Python", f"{text}: too old", "python3.12 -m venv .venv, and install into that")]
    if not here.has_lock:
        return [warning("Python", f"{text}: without the global lock, which is not tested", "a Python with it")]
    if here.version[:2] not in TESTED:
        return [warning("Python", f"{text}: newer than what is tested (3.11, 3.12)", "python3.12 -m venv .venv")]
    return [ok("Python", f"{text}{'' if here.is_virtual else ' (no virtual environment)'}")]


def _system(here: Here) -> list[Finding]:
    kernel = here.kernel.split()
    release = f"{here.system} {kernel[2]}" if len(kernel) > 2 else here.system
    text = f"{release}, {here.machine}{f', in a container ({here.container})' if here.container else ''}"
    if "microsoft" in here.kernel.lower():
        return [warning("system", f"{text}: WSL", WSL)]
    if here.system not in ("Linux", "Darwin"):
        return [warning("system", f"{text}: not tested", "Linux, or WSL2 on Windows")]
    return [ok("system", text)]


WSL = "keep data inside WSL, not on a Windows drive; give it memory in .wslconfig; the driver is Windows' own"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
