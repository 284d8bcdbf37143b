"""What `torch.compile` needs of the machine: a C++ compiler that works, Python's headers, OpenMP.
Tried on a few lines."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

from vistune.doctor.findings import Finding, ok, warning
from vistune.doctor.trial import output

NAMES = ("g++", "clang++", "c++")
"""What is looked for where CXX names none, in this order, as torch's inductor does on Linux."""
SOURCE = "#include <Python.h>\n#include <vector>\nint main() { return PY_MAJOR_VERSION - 3; }\n"
OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
OFF = "torch.compile is off without it"


def look(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    chosen = compiler(environment)
    if not chosen:
        return [missing(environment.get("CXX", ""))]
    folder = Path(sysconfig.get_paths()["include"])
    headers = built(chosen, SOURCE, [f"-I{folder}", "-c"])
    openmp = built(chosen, OPENMP, ["-fopenmp"])
    triton = shutil.which(environment.get("CC", "")) or shutil.which("gcc") or shutil.which("clang") or ""
    return findings(chosen, folder, headers, openmp, triton)


def compiler(environment: Mapping[str, str]) -> str:
    """The path of the compiler that would be used, or nothing."""
    named = environment.get("CXX", "").split()
    return next((path for name in ([named[0]] if named else NAMES) if (path := shutil.which(name))), "")


def missing(named: str) -> Finding:
    text = f"CXX={named} is not there" if named else f"none of {', '.join(NAMES)} is here"
    return warning("compiler", f"{text}: {OFF}", "unset CXX" if named else "apt install g++  (or conda install gxx)")


def built(path: str, source: str, flags: list[str]) -> str:
    """Nothing where it compiles, else the first error that the compiler names."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tried.cpp"
        file.write_text(source, encoding="utf-8")
        code, said = output([path, str(file), *flags, "-o", str(file.with_suffix(".out"))], timeout=60)
    if code == 0:
        return ""
    errors = [line for line in said.splitlines() if "error" in line]
    return (errors or said.splitlines() or ["it hung" if code is None else f"code {code}"])[0].strip()


def findings(path: str, folder: Path, headers: str, openmp: str, triton: str) -> list[Finding]:
    """`headers`, `openmp`: what the compiler said of each trial, empty where it went well."""
    if "Python.h" in headers:
        text = f"no Python.h in {folder}: {OFF}"
        return [warning("Python.h", text, "apt install python3-dev  (of this Python's version)")]
    if headers:
        text = f"{path} does not compile: {headers}; {OFF}"
        return [warning("compiler", text, "apt install --reinstall g++ libc6-dev")]
    found = [ok("compiler", f"{path} compiles with Python.h{'' if openmp else ' and OpenMP'}")]
    if openmp:
        text = f"{path} has no OpenMP: {openmp}; on processors compiled layers run on one thread or not at all"
        found.append(warning("OpenMP", text, "apt install libgomp1 libomp-dev"))
    if not triton:
        text = "no gcc or clang (or CC names one that is not there): Triton, which compiles for GPUs, needs one"
        found.append(warning("C compiler", text, "apt install gcc"))
    return found
