"""The NVIDIA driver against the CUDA that torch was built for. Loads the driver's library only in a probe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistune.doctor.findings import Finding, ok, problem, warning
from vistune.doctor.trial import output, probe

LEAST = {11: "450", 12: "525", 13: "580"}
"""CUDA major -> the oldest driver that runs every minor of it (NVIDIA, CUDA compatibility, minor version table)."""
NVIDIA = "0x10de"


@dataclass(frozen=True, slots=True)
class Nvidia:
    """What the system says, as it says it: texts, and what the probe of libcuda told."""

    cards: int = 0  # on the PCI bus
    kernel: str = ""  # /proc/driver/nvidia/version
    smi_code: int | None = 127
    smi: str = ""  # nvidia-smi --query-gpu=index,uuid,name,driver_version --format=csv,noheader
    library: Mapping[str, Any] = field(default_factory=dict)
    is_wsl: bool = False


def gather() -> Nvidia:
    cards = sum(_text(place / "vendor") == NVIDIA and _is_display(place) for place in _devices())
    kernel = _text(Path("/proc/driver/nvidia/version"))
    wsl = "microsoft" in _text(Path("/proc/version")).lower()
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,driver_version", "--format=csv,noheader"]
    code, smi = output(query)
    return Nvidia(cards, kernel, code, smi.strip(), probe("libcuda", timeout=30).facts, wsl)


def _devices() -> list[Path]:
    bus = Path("/sys/bus/pci/devices")
    return list(bus.iterdir()) if bus.is_dir() else []


def _is_display(place: Path) -> bool:
    return _text(place / "class")[:4] in ("0x03", "0x12")  # a display or a processing accelerator


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def findings(nvidia: Nvidia, torch: Mapping[str, Any]) -> list[Finding]:
    """`torch`: the facts of the probe `devices` (`cuda`: the version torch was built for, or None; `hip`)."""
    if not is_here(nvidia):
        return _nothing_here(torch)
    faults = [*_smi(nvidia), *_library(nvidia)]
    return [*faults, *_match(nvidia, torch)]


def is_here(nvidia: Nvidia) -> bool:
    """Whether there is an NVIDIA card or any part of its driver."""
    return bool(nvidia.cards or nvidia.kernel or nvidia.smi_code != 127 or "driver_cuda" in nvidia.library)


def _nothing_here(torch: Mapping[str, Any]) -> list[Finding]:
    built = f"; torch is built for CUDA {torch['cuda']} and runs on the processor here" if torch.get("cuda") else ""
    return [ok("NVIDIA driver", f"no card and no driver{built}")]


def _smi(nvidia: Nvidia) -> list[Finding]:
    title, text = "nvidia-smi", " ".join(nvidia.smi.split())[:200]
    if nvidia.smi_code == 0:
        return [ok(title, f"{name}") for name in (_cards(nvidia),) if name]
    if nvidia.smi_code is None:
        return [problem(title, "does not answer: the driver hangs", "restart the machine; see `dmesg | grep -i xid`")]
    if "version mismatch" in nvidia.smi:
        return [problem(title, text, "the driver was updated while loaded: restart the machine (or reload nvidia)")]
    if nvidia.smi_code == 127:
        return []
    said = text or f"ends with code {nvidia.smi_code}"
    return [problem(title, said, "load the driver (modprobe nvidia), or install it")]


def _cards(nvidia: Nvidia) -> str:
    names: dict[str, int] = {}
    for line in nvidia.smi.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            names[f"{parts[2]}, driver {parts[3]}"] = names.get(f"{parts[2]}, driver {parts[3]}", 0) + 1
    return "; ".join(f"{count} x {name}" for name, count in names.items())


def driver_version(nvidia: Nvidia) -> str:
    """As 580.65.06, from nvidia-smi or from the loaded module."""
    for text in (nvidia.smi if nvidia.smi_code == 0 else "", nvidia.kernel):
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
        if found:
            return found.group(1)
    return ""


def driver_cuda(nvidia: Nvidia) -> tuple[int, int] | None:
    """The CUDA that the driver's library speaks: (12, 8)."""
    number = nvidia.library.get("driver_cuda")
    return (number // 1000, number % 1000 // 10) if number else None


def _library(nvidia: Nvidia) -> list[Finding]:
    error = nvidia.library.get("error")
    if error and nvidia.kernel:
        fix = "start the container with --gpus all (nvidia-container-toolkit), or install the driver's libraries"
        return [problem("libcuda", f"the driver is loaded, its library is not here: {error}", fix)]
    if error and nvidia.cards:
        return [problem("NVIDIA driver", "there is a card and no driver", "install the NVIDIA driver, then restart")]
    init = nvidia.library.get("init", 0)
    if init:
        return [problem("libcuda", f"does not start: error {init}", INIT.get(init, "see `dmesg | grep -i nvidia`"))]
    if not nvidia.library:
        return [problem("libcuda", "crashed or hung while loading", "restart the machine; see `dmesg | grep -i xid`")]
    return []


INIT = {
    3: "the driver is not ready: restart the machine",
    100: "no device is visible: see CUDA_VISIBLE_DEVICES, and --gpus all of a container",
    101: "a device that does not exist was asked for: unset CUDA_VISIBLE_DEVICES",
    802: "start the fabric manager: systemctl start nvidia-fabricmanager (of the driver's own version)",
    803: "the driver's library and module are of two versions: restart the machine",
    804: "take the cuda-compat folder out of LD_LIBRARY_PATH: this card does not run forward compatibility",
    999: "reload the module: rmmod nvidia_uvm; modprobe nvidia_uvm, or restart the machine",
}
"""CUresult of cuInit -> what to do (CUDA driver API, error codes)."""


def _match(nvidia: Nvidia, torch: Mapping[str, Any]) -> list[Finding]:
    title, driver = "driver and torch", driver_cuda(nvidia)
    built, version = str(torch.get("cuda") or ""), driver_version(nvidia)
    if not torch.get("version"):
        return []
    if not built and not torch.get("hip"):
        text = f"torch {torch['version']} is built for processors alone, and there is an NVIDIA card"
        return [problem(title, text, "pip uninstall torch, then install its CUDA build (the selector on pytorch.org)")]
    if not built or driver is None:
        return []
    major, minor = (int(part) for part in built.split(".")[:2])
    have = f"driver {version or '?'} speaks CUDA {driver[0]}.{driver[1]}, torch was built for {built}"
    if driver[0] < major:
        return [_too_old(title, have, major, driver[0])]
    if (driver[0], driver[1]) < (major, minor):
        return [ok(title, f"{have}: within one major version that works")]
    return [ok(title, have + _compat(nvidia))]


def _too_old(title: str, have: str, major: int, spoken: int) -> Finding:
    fix = (
        f"a driver of {LEAST.get(major, 'that version')} or newer, or a torch build for CUDA {spoken}; "
        f"on data centre cards also the package cuda-compat-{major}-*, its folder first in LD_LIBRARY_PATH"
    )
    return problem(title, f"{have}: too old by a major version", fix)


def _compat(nvidia: Nvidia) -> str:
    return ", by forward compatibility" if "compat" in str(nvidia.library.get("path", "")) else ""


def visible(chosen: str | None, nvidia: Nvidia, environment: Mapping[str, str]) -> list[Finding]:
    """CUDA_VISIBLE_DEVICES against the cards of nvidia-smi, and the ranks of this node against both."""
    rows = [[part.strip() for part in line.split(",")] for line in nvidia.smi.splitlines()]
    cards = [(row[0], row[1]) for row in rows if len(row) == 4] if nvidia.smi_code == 0 else []
    if not cards:
        return []
    named = len(cards) if chosen is None else _named(chosen, cards)
    found = _hidden(chosen, named, cards) if chosen is not None else []
    ranks = environment.get("LOCAL_WORLD_SIZE", "")
    if ranks.isdigit() and int(ranks) > named:
        text = f"{ranks} processes on this node, {named} card(s): `invalid device ordinal`"
        found.append(problem("ranks and cards", text, f"torchrun --nproc-per-node {max(1, named)}"))
    return found


def _named(chosen: str, cards: list[tuple[str, str]]) -> int:
    """How many cards a list makes visible: CUDA stops at the first that does not exist."""
    count = 0
    for word in (word.strip() for word in chosen.split(",")):
        if not any(word == index or (word and uuid.startswith(word)) for index, uuid in cards):
            if word.startswith("MIG-"):
                count += 1
                continue
            break
        count += 1
    return count


def _hidden(chosen: str, named: int, cards: list[tuple[str, str]]) -> list[Finding]:
    title, words = "CUDA_VISIBLE_DEVICES", [word for word in chosen.split(",") if word.strip()]
    if named == 0:
        return [problem(title, f"{chosen!r} hides every one of {len(cards)} card(s)", f"unset {title}")]
    if named < len(words):
        text = f"{chosen!r}: no {words[named].strip()!r} ({len(cards)} card(s)); it and what follows is hidden"
        return [problem(title, text, f"export {title}={','.join(index for index, _ in cards)}")]
    if named < len(cards):
        return [warning(title, f"{chosen!r} shows {named} of {len(cards)} cards", f"unset {title}, if all are meant")]
    return []
