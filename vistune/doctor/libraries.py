"""Shared libraries that the loader does not find: where on this machine they lie, and the line that leads to them.

Knows the folders of CUDA, ROCm, DTK and the like, and those of pip's wheels; loads nothing.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

MISSING = re.compile(r"(lib[\w.+-]+?\.so(?:\.[\w.]+)?): cannot open shared object file")

TOOLKITS = ("CUDA_HOME", "CUDA_PATH", "ROCM_PATH", "ROCM_HOME", "DTKROOT", "ASCEND_TOOLKIT_HOME", "CONDA_PREFIX")
"""Variables that name the folder of a toolkit."""
FOLDERS = (
    "/usr/local/cuda",
    "/usr/local/cuda-*",
    "/opt/cuda",
    "/opt/rocm",
    "/opt/rocm-*",
    "/opt/dtk",
    "/opt/dtk-*",
    "/opt/hyhal",
    "/opt/intel/oneapi/*/latest",
    "/usr/local/Ascend/ascend-toolkit/latest",
    "/usr/local/Ascend/driver",
)
INSIDE = ("lib64", "lib", "targets/*/lib", "extras/CUPTI/lib64", "hip/lib", "llvm/lib", "nvvm/lib64")
WHEELS = ("nvidia/*/lib", "torch/lib", "*.libs")
SYSTEM = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/lib/wsl/lib")

PACKAGES = {
    "libGL.so.1": "apt install libgl1",
    "libgthread-2.0.so.0": "apt install libglib2.0-0",
    "libgomp.so.1": "apt install libgomp1",
    "libstdc++.so.6": "apt install libstdc++6",
    "libnuma.so.1": "apt install libnuma1",
    "libibverbs.so.1": "apt install libibverbs1",
    "libopenblas.so.0": "apt install libopenblas0",
    "libmpi.so.40": "apt install libopenmpi3",
}
OF_DRIVER = ("libcuda.so", "libnvidia-ml.so", "libnvidia-ptxjitcompiler.so")
"""Brought by the driver, never by a toolkit (whose `stubs` only serve for linking)."""


def missing(text: str) -> str:
    """The library that an error text says cannot be opened, or nothing."""
    found = MISSING.search(text)
    return found.group(1) if found else ""


def folders(environment: Mapping[str, str] = os.environ, path: Sequence[str] | None = None) -> list[Path]:
    """Where libraries may lie here: toolkits, pip's wheels, the system's own folders."""
    roots = [environment[name] for name in TOOLKITS if environment.get(name)] + list(FOLDERS)
    patterns = [f"{root}/{inner}" for root in roots for inner in INSIDE]
    patterns += [f"{site}/{inner}" for site in (sys.path if path is None else path) if site for inner in WHEELS]
    places = [Path(place) for pattern in (*patterns, *SYSTEM) for place in sorted(glob.glob(pattern))]
    return list(dict.fromkeys(place for place in places if place.is_dir()))


def search(name: str, places: Iterable[Path]) -> tuple[Path | None, list[Path]]:
    """The first folder with exactly `name`, and the files of other versions of the same library."""
    stem = name.split(".so")[0]
    exact, others = None, []
    for place in places:
        if place.name == "stubs":
            continue
        if exact is None and (place / name).exists():
            exact = place
        others += [one for one in sorted(place.glob(f"{stem}.so.*")) if one.name != name]
    return exact, others


def cure(name: str, places: Iterable[Path] | None = None) -> str:
    """The one line that helps against a library that is not found."""
    if name.startswith(OF_DRIVER):
        return "it comes with the NVIDIA driver: install that, or start the container with --gpus all"
    exact, others = search(name, folders() if places is None else places)
    if exact:
        return f"export LD_LIBRARY_PATH={exact}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
    if name in PACKAGES:
        return PACKAGES[name]
    if others:
        return f"only {others[0]} is here, another version: install the build that was made for it"
    return "it lies in none of the toolkits' folders: install the toolkit, or a build of the package that brings it"
