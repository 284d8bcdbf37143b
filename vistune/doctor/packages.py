"""What is installed, from metadata alone: versions against what is asked for, things installed twice or by half, a
vendor's torch. Imports nothing of it."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vistune.doctor.findings import Finding, ok, problem, warning
from vistune.doctor.imports import is_there
from vistune.doctor.requirements import Requirement, fits, is_early, normal, of_distribution, own, suffix

PUBLIC = re.compile(r"cpu|cu\d+|rocm[\d.]+|xpu|cxx11\.abi|cpu\.cxx11\.abi")
"""Marks of torch's own builds."""
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "protobuf": "google"}
"""What is imported, where it is not called like its distribution."""
BESIDE = ("torchvision", "torchaudio", "triton", "bitsandbytes", "flash-attn", "xformers")
"""Distributions that name the torch they were built for."""


@dataclass(frozen=True, slots=True)
class Installed:
    """`versions`: name -> every version found on the search path, the one that counts first; `rests`: half-removed."""

    versions: dict[str, list[str]] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    rests: list[str] = field(default_factory=list)


def look() -> list[Finding]:
    found = gather(sys.path)
    asked = own()
    beside = {name: of_distribution(name) for name in BESIDE if name in found.versions}
    bare = {one.name for one in asked if one.name not in found.versions and is_there(MODULES.get(one.name, one.name))}
    return [
        *ranges([one for one in asked if one.name not in bare], found.versions),
        *unnamed(bare),
        *vendor(found.versions),
        *doubles(found),
        *pairs(beside, found.versions),
    ]


def unnamed(bare: set[str]) -> list[Finding]:
    """Packages that are there without the record of an installation: copied, or on PYTHONPATH."""
    if not bare:
        return []
    text = f"{', '.join(sorted(bare))}: here without a record of an installation, so of unknown version"
    return [warning("packages", text, f"pip install --force-reinstall --no-deps {' '.join(sorted(bare))}")]


def gather(path: Iterable[str]) -> Installed:
    """The distributions on a search path, and what pip left behind of others."""
    versions: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    rests: list[str] = []
    for place in dict.fromkeys(path):
        folder = Path(place or ".")
        if not folder.is_dir():
            continue
        rests += [str(one) for one in sorted(folder.glob("~*"))]
        for one in importlib.metadata.distributions(path=[place]):
            name = one.metadata["Name"] if one.metadata is not None else None
            if not name:
                rests.append(str(getattr(one, "_path", place)))
                continue
            versions.setdefault(normal(name), []).append(one.version)
            places.setdefault(normal(name), []).append(place)
    return Installed(versions, places, rests)


def ranges(asked: Iterable[Requirement], versions: Mapping[str, list[str]]) -> list[Finding]:
    """What vistune asks for against what is there. Extras that are not installed are nobody's fault."""
    torch = versions.get("torch", [""])[0]
    needed = [one for one in asked if one.name in versions or not one.extra]
    absent = [one for one in needed if one.name not in versions]
    outside = [one for one in needed if one not in absent and not fits(versions[one.name][0], one.wanted)]
    good = [f"{one.name} {versions[one.name][0]}" for one in needed if one not in absent and one not in outside]
    found = [ok("versions", ", ".join(dict.fromkeys(good)))] if good else []
    if absent:
        names = ", ".join(one.name for one in absent)
        found.append(problem("packages", f"not installed: {names}", install(absent, torch)))
    return found + [_outside(one, versions[one.name][0], torch) for one in outside]


def _outside(one: Requirement, have: str, torch: str) -> Finding:
    text = f"{have}; the tested range is {one.wanted}"
    if one.name == "torch" and is_vendors(have):
        return warning("torch", f"{text}; it is a vendor's build", "keep it, and see in docs/doctor.md what it lacks")
    return warning(one.name, text, install([one], torch))


def install(asked: Iterable[Requirement], torch: str = "") -> str:
    """The line that installs, and leaves a vendor's torch as it is."""
    words = " ".join(f"'{one.name}{one.wanted}'" for one in asked)
    if is_vendors(torch):
        return f"echo 'torch=={torch}' > torch.txt; pip install --constraint torch.txt {words}"
    return f"pip install {words}"


def is_vendors(version: str) -> bool:
    """Whether a torch was built by somebody else than torch: by its mark, as in 2.11.0a0+nv25.11 or 2.11.0+das.dtk."""
    mark = suffix(version)
    return bool(mark) and not PUBLIC.fullmatch(mark)


def vendor(versions: Mapping[str, list[str]]) -> list[Finding]:
    """How to keep a torch that pip would not bring back."""
    have = versions.get("torch", [""])[0]
    if not is_vendors(have):
        return []
    line = f"make setup VENV_FLAGS=--system-site-packages TORCH=torch=={have}"
    if is_early(have):
        line = f"pip counts {have} as older than its number: install vistune with --no-deps, then its other packages"
    return [warning("vendor's torch", f"{have} is a vendor's build, which pip cannot bring back once replaced", line)]


def doubles(found: Installed) -> list[Finding]:
    """The same distribution in two places, and folders of a removal that did not end."""
    said = []
    for name, versions in found.versions.items():
        if len(set(versions)) > 1:
            places = ", ".join(f"{v} in {p}" for v, p in zip(versions, found.places[name], strict=True))
            said.append(warning(name, f"installed twice: {places}; the first counts", f"pip uninstall {name}, twice"))
    if found.rests:
        text = f"left over from a removal that did not end: {', '.join(found.rests[:5])}"
        said.append(warning("rests of packages", text, "rm -r these, then pip install --force-reinstall --no-deps"))
    return said


def pairs(beside: Mapping[str, list[Requirement]], versions: Mapping[str, list[str]]) -> list[Finding]:
    """Packages that name another torch than the one that is here."""
    have = versions.get("torch", [""])[0]
    found = []
    for name, asked in beside.items():
        wanted = next((one.wanted for one in asked if one.name == "torch" and not one.extra), "")
        if have and wanted and not fits(have, wanted):
            text = f"{versions[name][0]} was built for torch{wanted}; here is torch {have}"
            found.append(warning(name, text, f"pip uninstall {name}, or the version made for torch {have}"))
    return found
