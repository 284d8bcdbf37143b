"""A checkpoint of one format becomes one of another, a tensor at a time, beside its place and then renamed.

Knows formats by their protocol alone; which one the source is, its contents say.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vistune import console
from vistune.models import checkpoints, hub
from vistune.models.checkpoints import Checkpoint, llava_lora
from vistune.models.fit import check
from vistune.models.folders import beside
from vistune.models.proving.compare import TOLERANCE, Report, compare

HALVES = ("llava-adapter", "llava-lora", "mcore")
"""Formats that need a base to be read."""


class NotTheSame(ValueError):
    """Source and target compute different things; `report` says in what. The target was not written."""

    def __init__(self, report: Report):
        self.report = report
        worst = next(row for row in report.rows if row.wrong)
        super().__init__(
            f"{report.target}: not written: it is not what {report.source} is: {worst.check}: {worst.wrong}"
        )


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was done."""

    source: str
    out: str
    format: str
    """The source's."""
    why: str
    to: str
    family: str
    tensors: int
    bytes: int
    seconds: float
    report: Report | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "report": self.report and self.report.as_dict()}


def convert(
    source: Path | str,
    out: Path | str,
    to: str = "hf",
    base: Path | str | None = None,
    *,
    verify: bool = False,
    tolerance: float = TOLERANCE,
    settings: Mapping[str, Any] | None = None,
    **said: Any,
) -> Conversion:
    """Write the checkpoint `source` (of any format, a run of vistune's, or a hub id) into the folder `out` as `to`.

    `base`: the other half of an adapter, be it source or target. `settings`: of the target's format
    (`tensor_parallel`). `said`: template, image and options, as `vistune.models.load.load` takes them. With `verify`
    both are opened and compared before `out` takes its name. Raises ValueError for what is not whole, what the target
    cannot hold, NotTheSame, with `verify`, for a target that computes something else; `out` is then as it was before.
    """
    began, out = time.perf_counter(), Path(out)
    writer = _writer(to, settings or {})
    given = None if base is None else hub.resolve(base, "base")
    found, folder, source_base = _read(Path(source), out, to, given, said)
    console.say(f"{folder}: {found.format} ({found.why}); {found.said.family.name}, {_size(found)}")
    check(found, f"{folder} ({found.format}: {found.why})")
    with beside(out) as new:
        _check_room(found, new)
        writer.write(found, new)
        report = None
        if verify:
            bases = source_base, _base_of_target(to, given, folder, source_base)
            if to in HALVES:  # which say nothing of a template
                said["template"] = found.said.template_name
            report = compare(folder, new, tolerance=tolerance, bases=bases, **said)
            report.source, report.target = str(folder), str(out)
            report.show()
            if not report.ok:
                raise NotTheSame(report)
    seconds = time.perf_counter() - began
    console.say(f"{out}: {to}, {seconds:.1f} s")
    return Conversion(
        source=str(folder),
        out=str(out),
        format=found.format,
        why=found.why,
        to=to,
        family=found.said.family.name,
        tensors=len(found.tensors),
        bytes=sum(entry.nbytes for entry in found.tensors.values()),
        seconds=seconds,
        report=report,
    )


def _writer(to: str, settings: Mapping[str, Any]) -> checkpoints.Format:
    """The target's format with its settings. ValueError for one that it has not."""
    found: Any = checkpoints.named(to)
    known = getattr(found, "__dataclass_fields__", {})
    for name in settings:
        if name not in known:
            raise ValueError(f"{name}: a setting that {to} does not have; it has {', '.join(known) or 'none'}")
    return replace(found, **settings) if settings else found


def _read(
    source: Path, out: Path, to: str, base: Path | None, said: Mapping[str, Any]
) -> tuple[Checkpoint, Path, Path | None]:
    """The checkpoint, the folder that can be opened as the same model, and the base that this takes."""
    if to == llava_lora.FORMAT.name and llava_lora.is_run(source):
        return llava_lora.of_run(source, base, **_whole(said)), source / "model", None
    folder = hub.resolve(source, "convert")
    _refuse_itself(folder, out)
    format, _ = checkpoints.recognise(folder)
    # The base is the target's when the source is a whole model.
    needed = base if format.name in HALVES or to not in HALVES else None
    return checkpoints.read(folder, base=needed, **said), folder, needed


def _base_of_target(to: str, given: Path | None, folder: Path, source_base: Path | None) -> Path | None:
    """What the target is opened on to be compared. ValueError for a LoRA pair when nobody says."""
    if to not in HALVES:
        return None
    if to == llava_lora.FORMAT.name and given is None:
        raise ValueError(f"--verify: a {to} can only be asked on its base; give the language model with --base")
    return given or source_base or folder


def _whole(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"template": None, "image": None, "options": None} | dict(said)


def _refuse_itself(folder: Path, out: Path) -> None:
    ours, theirs = folder.resolve(), out.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ValueError(f"{out}: is the source itself, or one lies in the other; give another folder")


def _check_room(found: Checkpoint, folder: Path) -> None:
    needed, free = sum(entry.nbytes for entry in found.tensors.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder.parent}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


def _size(found: Checkpoint) -> str:
    return f"{len(found.tensors)} tensors, {sum(entry.nbytes for entry in found.tensors.values()) / 1e9:.3g} GB"
