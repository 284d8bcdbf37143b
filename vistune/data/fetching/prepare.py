"""A published data set and its pictures, from nothing to a folder that trains: fetched, checked, unpacked, counted.

The story; how a file comes, is unpacked, renamed or counted is told in the modules it calls.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

from vistune import console
from vistune.data.fetching import archives, covers
from vistune.data.fetching import census as counting
from vistune.data.fetching import rename as renaming
from vistune.data.fetching.archives import DataSet, Part
from vistune.data.fetching.bring import Ledger, Way, bring
from vistune.data.fetching.census import Census, Wanted
from vistune.data.fetching.download import DownloadError, Patience
from vistune.data.fetching.threads import spread
from vistune.data.fetching.unpack import free_bytes

AT_ONCE = 3  # archives that come side by side: they lie on as many servers, and each is one long stream
CAP_SHARE, CAP_LEAST = 0.001, 10  # rows without their picture that a run sets aside, as the quarantine's cap


@dataclass(kw_only=True)
class Report:
    """What was done and how the data stands; `failures` are (part, reason), `notes` what a person should know."""

    name: str
    root: str
    parts: list[dict[str, Any]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    folders: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    text_rows: int = 0
    rows_without_picture: int = 0
    renamed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False  # a run on it would not stop for its pictures

    @property
    def ok(self) -> bool:
        return self.complete and not self.failures

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}

    def show(self) -> None:
        if self.links:
            rows = [[part[key] for key in ("name", "size", "goes_to", "file", "comes")] for part in self.parts]
            columns = ("part", "size", "goes to", "file", "comes")
            console.table(f"{self.name} below {self.root}", columns, rows)
            for line in self.links:
                console.say(line)
        if self.folders:
            counts = ("folder", "rows", "wanted", "present", "missing", "broken")
            cells = [[f"{v:,}" if isinstance(v, int) else v for v in folder.values()] for folder in self.folders]
            if self.text_rows:
                cells.append(["(text only)", f"{self.text_rows:,}", "", "", "", ""])
            console.table(f"{self.name} below {self.root}: {self.rows:,} rows", counts, cells)
        for note in self.notes:
            console.say(note)
        for part, reason in self.failures:
            console.warn(f"{part}: {reason}")


def prepare(
    name: str,
    root: Path,
    *,
    source: Path | None = None,
    listing: bool = False,
    rename: bool = False,
    undo: bool = False,
    workers: int = 8,
    only: Sequence[str] = (),
    decode: bool = False,
    keep: bool = False,
    retry_dead: bool = False,
    patience: Patience | None = None,
) -> Report:
    """Bring the data set `name` below `root` and count it; a second call does what is left.

    `source`: a folder of archives carried in; then the net is not asked. `listing`: only the links. `rename`: pictures
    get the names of the JSON; `undo` takes that back and does nothing else. `only`: names of parts. `decode`: look at
    every pixel, not at headers alone. `keep`: archives stay after unpacking. `retry_dead`: ask dead links again.
    A part that fails is in the report and does not stop the others. Raises ValueError for an unknown name or part, a
    disk that is too small, and a root that another process is filling.
    """
    data = archives.data_set(name)
    parts = list(data.chosen(tuple(only)))
    report = Report(name=name, root=str(root))
    if listing:
        return _listed(report, parts if only else list(data.parts))
    if source is not None and not source.is_dir():
        raise ValueError(f"--from {source}: no such folder")
    work = root / ".prepare"
    with _alone(work):
        job = _Job(data, parts, root, work, source, patience or Patience(), keep, report)
        if undo:
            return job.undo()
        job.bring_rows()
        job.look()
        if rename:
            job.rename()
        job.bring_archives()
        job.bring_covers(workers, retry_dead)
        if rename:
            job.rename()
        job.count(workers, decode)
    return report


class _Job:
    """One call: the steps of `prepare`, and what they know in common."""

    def __init__(
        self,
        data: DataSet,
        parts: list[Part],
        root: Path,
        work: Path,
        source: Path | None,
        patience: Patience,
        keep: bool,
        report: Report,
    ):
        self.data, self.parts, self.root, self.work, self.report = data, parts, root, work, report
        self.source, self.patience, self.keep = source, patience, keep
        self.ledger = Ledger(work / f"{data.name}.unpacked.json")
        self.journal = work / f"{data.name}.renames.jsonl"
        self.wanted: Wanted | None = None
        self.missing: set[str] = set()

    def undo(self) -> Report:
        done = renaming.undo(self.root / self.data.images, self.journal)
        self.report.notes.append(f"{done.changed:,} pictures have their old names again")
        self.report.failures += [(name, reason) for name, reason in done.left]
        self.report.complete = True
        return self.report

    def bring_rows(self) -> None:
        if not (self.root / self.data.rows_file).exists():
            self._bring([part for part in self.parts if part.kind == "rows"])

    def look(self) -> None:
        """What the rows ask for and what is not there. Without rows, every archive is taken for needed."""
        path = self.root / self.data.rows_file
        if not path.exists():
            return
        self.wanted = self.wanted or counting.wanted_by(path)
        self.missing = counting.absent(self.root, self.wanted.pictures, self.data.images)

    def rename(self) -> None:
        if self.wanted is None:
            return
        folder = self.root / self.data.images
        changes, unclear = renaming.find_changes(folder, self.missing, self.wanted.pictures)
        done = renaming.rename(folder, changes, self.journal)
        self.report.renamed += done.changed
        self.report.notes += [f"not renamed: {name}: {reason}" for name, reason in unclear + done.left]
        self.look()

    def bring_archives(self) -> None:
        chosen = [part for part in self.parts if part.kind == "archive"]
        if self.source is not None:  # what was carried in on purpose is looked for even if it is no default
            chosen += [part for part in self.data.parts if part.kind == "archive" and part not in chosen]
        needed = [part for part in chosen if self._needs(part)]
        if self.source is None:
            _check_room(self.root, needed, self.work)
        self._bring(needed)

    def bring_covers(self, workers: int, retry_dead: bool) -> None:
        for part in self.parts:
            keys = {os.path.splitext(os.path.basename(name))[0] for name in self._missing_in(part)}
            if part.kind != "covers" or not keys:
                continue
            if self.source is not None:
                said = "more come by their links, which are not asked with --from"
                self.report.notes.append(f"{part.name}: {len(keys):,} {said}")
                continue
            self._covers(part, keys, workers, retry_dead)

    def count(self, workers: int, decode: bool) -> None:
        if self.wanted is None:
            self.report.notes.append("without the JSON nothing can be counted")
            return
        found = counting.census(
            self.root, self.wanted, self.data.images, self.data.folder_of, workers=workers, decode=decode
        )
        self.report.folders = [asdict(folder) for folder in found.folders]
        self.report.rows, self.report.text_rows = self.wanted.rows, self.wanted.text_rows
        self.report.rows_without_picture = found.rows_without
        bad = found.rows_without + self.wanted.unreadable
        self.report.complete = bad <= max(CAP_LEAST, CAP_SHARE * self.wanted.rows)
        self._tell(found)

    def _tell(self, found: Census) -> None:
        assert self.wanted is not None
        notes = self.report.notes
        if self.wanted.rows != self.data.rows:
            notes.append(f"the JSON has {self.wanted.rows:,} rows; as published it has {self.data.rows:,}")
        if self.wanted.unreadable:
            notes.append(f"{self.wanted.unreadable:,} rows cannot be read; `vistune data check` names them")
        for title, lines in (
            ("missing", found.missing),
            ("broken", [f"{name}\t{reason}" for name, reason in found.broken]),
        ):
            path = self.work / f"{self.data.name}.{title}.txt"
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            if lines:
                notes.append(f"{len(lines):,} pictures are {title}: {path}")
        if self.report.renamed:
            notes.append(f"{self.report.renamed:,} pictures were renamed; --undo-rename takes it back: {self.journal}")

    def _covers(self, part: Part, keys: set[str], workers: int, retry_dead: bool) -> None:
        file = part.home(self.root)
        dead = file.with_name("dead_links.jsonl")
        if not file.exists() and not self._bring([part]):
            return
        if retry_dead and dead.exists():
            os.replace(dead, dead.with_name(dead.name + ".before"))
        try:
            links = covers.read_links(file)
            got = covers.fetch_covers(
                links, keys, self.root / part.folder, dead, workers=workers, patience=self.patience
            )
        except (ValueError, OSError) as error:
            self._fail(part, str(error))
            self.patience = replace(self.patience, stop=Event())  # those links were stopped, not what comes after
            return
        said = f"{part.name}: {got.came:,} of {got.wanted:,} pictures came by their links"
        self.report.notes.append(f"{said}; {got.dead:,} links are dead ({dead}), {got.unknown:,} keys have none")
        if got.later:
            key, reason = got.later[0]
            self._fail(
                part, f"{len(got.later):,} links failed for the moment, call again; the first is {key}: {reason}"
            )

    def _bring(self, parts: list[Part]) -> list[Part]:
        """Parts that came; what fails is noted and does not stop the others."""
        done: list[Part] = []
        with console.progress() as bar:
            way = Way(
                root=self.root, work=self.work, source=self.source, patience=self.patience, bar=bar, keep=self.keep
            )

            def one(part: Part) -> tuple[Part, int | Exception]:
                try:
                    return part, bring(part, way, self._names(part))
                except (ValueError, OSError) as error:
                    return part, error

            for part, result in spread(one, parts, AT_ONCE, self.patience.stop):
                if isinstance(result, Exception):
                    self._fail(part, self._why(part, result))
                    continue
                done.append(part)
                before = len(self._missing_in(part))
                self.look()
                if part.kind == "archive":
                    missing = len(self._missing_in(part))
                    self.ledger.note(part.name, result, missing)
                    if before and missing == before:
                        self._fail(part, f"it came, and has none of the {missing:,} pictures that are missing")
        return done

    def _why(self, part: Part, error: Exception) -> str:
        """The reason, and after a failed download what a person can do."""
        if not isinstance(error, DownloadError):
            return str(error)
        if part.kind == "covers":
            return f"{error}. Fetch it with a browser from {part.where or part.link}, save it as {part.home(self.root)}"
        return f"{error}. Fetch it otherwise, save it as {part.file} and give its folder with --from"

    def _fail(self, part: Part, reason: str) -> None:
        if part.by_default or self.source is None:
            self.report.failures.append((part.name, reason))

    def _needs(self, part: Part) -> bool:
        if self.wanted is None:
            return not (self.root / part.folder).exists()
        missing = len(self._missing_in(part))
        return missing > 0 and not self.ledger.has_nothing_for(part.name, missing)

    def _names(self, part: Part) -> list[str]:
        """What the JSON wants of a part, as paths below its folder."""
        return self._below(part, self.wanted.pictures if self.wanted else ())

    def _missing_in(self, part: Part) -> list[str]:
        return self._below(part, self.missing)

    def _below(self, part: Part, names: Any) -> list[str]:
        start = f"{part.folder}/"
        paths = (f"{self.data.images}/{name}".lstrip("/") for name in names)
        return [path.removeprefix(start) for path in paths if path.startswith(start)]


def _listed(report: Report, parts: list[Part]) -> Report:
    report.parts = [
        {"name": part.name, "link": part.link, "size": part.size_text, "bytes": part.size, "sha256": part.sha256}
        | {"file": part.file, "goes_to": part.place, "kind": part.kind, "page": part.where}
        | {"comes": "by default" if part.by_default else "when named"}
        for part in parts
    ]
    report.links = archives.links(parts)
    report.complete = True
    return report


def _check_room(root: Path, needed: list[Part], work: Path) -> None:
    """Archive and pictures lie side by side while an archive is unpacked, and photographs hardly shrink in a zip.

    Raises ValueError when the disk is too small for what is known."""
    here = {part.name: part for part in needed if not (work / part.file).exists()}
    sizes = [part.weight for part in here.values()]
    # Of the archives only those under way lie there at one time, the largest at worst.
    expected = sum(sizes) + sum(sorted(sizes)[-AT_ONCE:])
    free = free_bytes(root)
    if expected > free:
        unknown = [part.name for part in here.values() if not part.weight]
        more = f" (and {', '.join(unknown)}, of unknown size)" if unknown else ""
        raise ValueError(
            f"{root} has {free / archives.GB:.1f} GB free; archives and pictures need about "
            f"{expected / archives.GB:.1f} GB{more}: {', '.join(here)}. Free some, or fetch parts one by one"
        )


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """One process at a time fills a root."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{work.parent}: another process is preparing data there; wait for it") from None
        yield
