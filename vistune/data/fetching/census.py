"""Counting what a LLaVA JSON wants against what lies on disk: rows, distinct pictures, present, missing, broken.

Names first, folder by folder; then the headers (or every pixel) in worker processes. Knows nothing of the web.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.pool import Pool
from pathlib import Path

from vistune import console
from vistune.data import processes
from vistune.data.reading.json_rows import find_rows
from vistune.images import ImageError, image_size, open_image
from vistune.samples import Image

CHUNK = 256  # pictures a worker looks at before it reports


@dataclass(kw_only=True)
class Wanted:
    """What a JSON asks for: rows by picture path (relative, as written), rows without a picture, unreadable rows."""

    pictures: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    text_rows: int = 0
    unreadable: int = 0


@dataclass(kw_only=True)
class Folder:
    """One line of the closing table. `rows` counts a row once for each of its pictures there."""

    name: str
    rows: int = 0
    wanted: int = 0
    present: int = 0
    missing: int = 0
    broken: int = 0


@dataclass(kw_only=True)
class Census:
    """The table, and the pictures behind its last two columns: path below the root, and why."""

    folders: list[Folder]
    missing: list[str]
    broken: list[tuple[str, str]]
    rows_without: int  # rows that a run would set aside


def wanted_by(path: Path) -> Wanted:
    """One pass over a LLaVA JSON (a list or one object a line). Raises ValueError for a file that is torn."""
    spans = find_rows(path)
    wanted = Wanted(rows=len(spans))
    with console.progress() as bar, open(path, "rb") as file:
        for start, end in bar.track(spans.tolist(), description=f"{path.name}: pictures"):
            file.seek(start)
            try:
                row = json.loads(file.read(end - start))
                value = row.get("image")
            except (ValueError, AttributeError, RecursionError):
                wanted.unreadable += 1
                continue
            names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            wanted.pictures.update(name for name in names if isinstance(name, str) and name)
            wanted.text_rows += not names
    return wanted


def absent(root: Path, names: Mapping[str, int], images: str) -> set[str]:
    """Those of `names` that do not lie below `root`/`images`; each folder is listed once, nothing is opened."""
    folders: dict[str, set[str]] = {}
    for name in names:
        folders.setdefault(os.path.dirname(name), set()).add(name)
    found: set[str] = set()
    for folder, inside in folders.items():
        here = _listed(root / images / folder)
        found.update(name for name in inside if os.path.basename(name) not in here)
    return found


def census(
    root: Path,
    wanted: Wanted,
    images: str,
    folder_of: Callable[[str], str],
    *,
    workers: int,
    decode: bool = False,
) -> Census:
    """Rows, wanted, present, missing and broken per folder. `decode`: every pixel instead of the header."""
    missing = absent(root, wanted.pictures, images)
    folders: dict[str, Folder] = {}
    for name, rows in wanted.pictures.items():
        folder = folders.setdefault(folder_of(name), Folder(name=folder_of(name)))
        folder.rows += rows
        folder.wanted += 1
        folder.present += name not in missing
        folder.missing += name in missing
    there = [name for name in wanted.pictures if name not in missing]
    broken = sorted(_broken(root / images, there, workers, decode))
    for name, _ in broken:
        folders[folder_of(name)].broken += 1
    gone = missing | {name for name, _ in broken}
    return Census(
        folders=sorted(folders.values(), key=lambda folder: folder.name),
        missing=sorted(missing),
        broken=broken,
        rows_without=sum(wanted.pictures[name] for name in gone),
    )


def _listed(folder: Path) -> set[str]:
    """Names of the files in a folder, none for one that is not there."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _broken(folder: Path, names: list[str], workers: int, decode: bool) -> Iterator[tuple[str, str]]:
    jobs = [(str(folder), names[at : at + CHUNK], decode) for at in range(0, len(names), CHUNK)]
    with console.progress() as bar:
        task = bar.add_task("pictures: " + ("every pixel" if decode else "headers"), total=len(names))
        if workers <= 1 or len(jobs) <= 1:
            for job in jobs:
                yield from _looked_at(job)
                bar.advance(task, len(job[1]))
            return
        with _pool(min(workers, len(jobs))) as pool:
            for found in pool.imap_unordered(_looked_at, jobs):
                yield from found
                bar.advance(task, CHUNK)


def _pool(workers: int) -> Pool:
    return processes.context().Pool(workers)


def _looked_at(job: tuple[str, list[str], bool]) -> list[tuple[str, str]]:
    folder, names, decode = job
    found = []
    for name in names:
        try:
            picture = Image(path=os.path.join(folder, name))
            if decode:
                open_image(picture)
            else:
                image_size(picture)
        except ImageError as error:
            found.append((name, error.reason))
    return found
