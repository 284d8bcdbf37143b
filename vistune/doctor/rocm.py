"""ROCm and DTK: the toolkit's folder, the kernel's device and who may open it, and the variables that hide cards."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vistune.doctor.findings import Finding, ok, problem, warning

DEVICE = Path("/dev/kfd")
FOLDERS = ("/opt/rocm", "/opt/dtk")
HIDING = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, slots=True)
class Rocm:
    """`folders`: the toolkits that are here; `named`: what ROCM_PATH says and whether it exists."""

    has_device: bool = False
    may_open: bool = True
    folders: list[str] = field(default_factory=list)
    named: str = ""
    named_exists: bool = False


def gather(environment: Mapping[str, str] = os.environ) -> Rocm:
    named = environment.get("ROCM_PATH", "")
    return Rocm(
        has_device=DEVICE.exists(),
        may_open=os.access(DEVICE, os.R_OK | os.W_OK),
        folders=[folder for folder in FOLDERS if Path(folder).is_dir()],
        named=named,
        named_exists=Path(named).is_dir() if named else False,
    )


def findings(rocm: Rocm, torch: Mapping[str, Any], environment: Mapping[str, str]) -> list[Finding]:
    """`torch`: the facts of the probe `devices`. Nothing is said where there is nothing of ROCm at all."""
    if not (rocm.has_device or rocm.folders or rocm.named or torch.get("hip")):
        return []
    return [*_device(rocm, torch), *_path(rocm, torch), *_hidden(torch, environment)]


def _device(rocm: Rocm, torch: Mapping[str, Any]) -> list[Finding]:
    if rocm.has_device and not rocm.may_open:
        fix = "usermod -a -G render,video $USER, log in anew; a container takes --device=/dev/kfd --device=/dev/dri"
        return [problem("ROCm device", f"{DEVICE} is here and this user may not open it", fix)]
    if rocm.has_device and torch.get("version") and not torch.get("hip") and not torch.get("cuda"):
        text = f"{DEVICE} is here and torch {torch['version']} is built for processors alone"
        return [problem("ROCm and torch", text, "the vendor's torch for this toolkit; see docs/doctor.md")]
    if torch.get("hip") and not rocm.has_device:
        fix = "load the amdgpu (hydcu) module; a container takes --device=/dev/kfd --device=/dev/dri"
        return [problem("ROCm device", f"torch is built for ROCm {torch['hip']}, and {DEVICE} is not here", fix)]
    return []


def _path(rocm: Rocm, torch: Mapping[str, Any]) -> list[Finding]:
    if rocm.named and not rocm.named_exists:
        fix = f"export ROCM_PATH={rocm.folders[0]}" if rocm.folders else "unset ROCM_PATH"
        return [problem("ROCM_PATH", f"{rocm.named} does not exist", fix)]
    if not rocm.named and torch.get("hip") and rocm.folders:
        text = f"not set; {rocm.folders[0]} is here. Compiling and some libraries look for it"
        return [warning("ROCM_PATH", text, f"export ROCM_PATH={rocm.folders[0]}")]
    if not rocm.named and torch.get("hip"):
        text = "not set, and no toolkit where one usually lies: torch brings its own libraries, compiling may not work"
        return [warning("ROCM_PATH", text, "export ROCM_PATH=the folder of the toolkit")]
    return [ok("ROCM_PATH", rocm.named)] if rocm.named else []


def _hidden(torch: Mapping[str, Any], environment: Mapping[str, str]) -> list[Finding]:
    if not torch.get("hip"):
        return []
    said = [(name, environment[name]) for name in HIDING if name in environment]
    empty = [name for name, value in said if value.strip() in ("", "-1")]
    if empty:
        return [problem(empty[0], "hides every card", f"unset {empty[0]}")]
    return [ok(name, f"shows {value}") for name, value in said]
