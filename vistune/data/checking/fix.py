"""A corrected copy of checked sources: pictures found again, bad rows left out with reasons; the input stays as it is.

What is wrong with which row is taken from a check's report; nothing is judged here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from vistune import files
from vistune.console import progress
from vistune.data.checking.findings import Finding, Report, finding
from vistune.data.checking.pictures import FORMATS as PICTURE_FORMATS
from vistune.data.checking.pictures import folders_of, locate
from vistune.data.formats import FORMATS, Reader
from vistune.data.formats.llava_json import LlavaJson
from vistune.data.writers import NotHeld, open_writer
from vistune.images import ImageError, image_header
from vistune.samples import Image, Sample

MENDED = ("image_extension", "image_format")
"""What is put right; a row with any other error is left out."""


def fix(readers: Sequence[Reader], report: Report, out: Path) -> dict[str, Any]:
    """Write a corrected copy of `readers` into the folder `out`, and left_out.jsonl with a line for each row that is
    not in it.

    `llava_json` files keep their names and their rows byte for byte, except for the paths that are put right; other
    formats are written anew in their own format. A picture whose content is of another format than its name says gets
    a right name under `out/pictures`, to be given as one more picture folder (`images` in what is returned).

    Returns what became of every source. Raises ValueError when `out` is there already.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already; give another place for the corrected copy")
    new = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            left_out = stack.enter_context(open(new / "left_out.jsonl", "w", encoding="ascii"))
            done: list[dict[str, Any]] = []
            for number, reader in enumerate(readers):
                copy = _Copy(reader, number, _wrong(report, number), new, left_out)
                taken = {Path(one["path"]).name for one in done}
                done.append(copy.lines(taken) if type(reader) is LlavaJson else copy.anew(taken))
        for one in done:
            one |= {key: _final(one[key], new, out) for key in ("path", "images")}
        os.replace(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    keys = ("rows", "kept", "mended", "left_out")
    return {"out": str(out), **{key: sum(one[key] for one in done) for key in keys}, "sources": done}


def _final(value: Any, new: Path, out: Path) -> Any:
    """Paths below `new` as they are once it is called `out`."""
    if isinstance(value, list):
        return [_final(one, new, out) for one in value]
    return str(out) + value.removeprefix(str(new)) if value.startswith(str(new)) else value


def _wrong(report: Report, number: int) -> dict[int, list[Finding]]:
    """row -> its errors and what can be mended."""
    wrong: dict[int, list[Finding]] = {}
    for found in report.findings():
        if found.number == number and found.row >= 0 and (found.severity == "error" or found.code in MENDED):
            wrong.setdefault(found.row, []).append(found)
    return wrong


@dataclass
class _Copy:
    """One source on its way into the folder `new`."""

    reader: Reader
    number: int
    wrong: dict[int, list[Finding]]
    new: Path
    left_out: TextIO
    kept: int = 0
    mended: int = 0
    linked: bool = False

    def good(self) -> Iterator[tuple[int, list[Finding]]]:
        """Rows to be kept, each with what is to be mended; the others are written down."""
        with progress() as bar:
            for row in bar.track(range(len(self.reader)), description=f"fix {self.reader.name}"):
                found = self.wrong.get(row, [])
                errors = [one for one in found if one.code not in MENDED]
                if errors:
                    self.note(row, errors)
                    continue
                self.kept += 1
                self.mended += bool(found)
                yield row, found

    def note(self, row: int, errors: Sequence[Finding]) -> None:
        reasons = [{"code": one.code, "message": one.message, "path": one.path} for one in errors]
        line = {"source": self.reader.name, "row": row, "id": errors[0].id, "reasons": reasons}
        self.left_out.write(json.dumps(line) + "\n")

    def lines(self, taken: set[str]) -> dict[str, Any]:
        """llava_json: the rows' own bytes, in a list or in lines as they were."""
        reader = self.reader
        assert isinstance(reader, LlavaJson)
        target = self.new / _free(Path(reader.path).name, taken)
        as_list = _is_list(reader)
        with open(target, "wb") as file:
            file.write(b"[\n" if as_list else b"")
            for row, found in self.good():
                between = b",\n" if as_list else b"\n"
                file.write((between if self.kept > 1 else b"") + self._mended(reader.raw(row), reader[row], found))
            file.write(b"\n]\n" if as_list else b"\n")
        folders = [os.path.abspath(folder) if not files.is_remote(folder) else folder for folder in reader.folders.all]
        images = folders + ([str(self.new / "pictures")] if self.linked else [])
        return self._facts("llava_json", target, images)

    def anew(self, taken: set[str]) -> dict[str, Any]:
        """Any other format: the samples through its writer."""
        format = _format_of(self.reader)
        target = self.new / _free(Path(self.reader.name).name, taken)
        folders = folders_of(self.reader)
        with open_writer(format, target) as writer:
            for row, _ in self.good():
                sample = self.reader[row]
                images = [located.image or image for image in sample.images for located in (locate(image, folders),)]
                try:
                    writer.add(replace(sample, images=tuple(images)))
                except (NotHeld, ImageError) as error:
                    self.kept -= 1
                    self.note(row, [finding(self.reader.name, self.number, row, sample.id, error.code, error.reason)])
        return self._facts(format, target, [])

    def _facts(self, format: str, target: Path, images: list[str]) -> dict[str, Any]:
        return {
            "name": self.reader.name,
            "format": format,
            "path": str(target),
            "images": images,
            "rows": len(self.reader),
            "kept": self.kept,
            "mended": self.mended,
            "left_out": len(self.reader) - self.kept,
        }

    def _mended(self, raw: bytes, sample: Sample, found: Sequence[Finding]) -> bytes:
        """The row with its paths put right."""
        if not found:
            return raw
        data = json.loads(raw)
        said = data["image"] if isinstance(data["image"], list) else [data["image"]]
        for old, image in zip(said, sample.images, strict=True):
            here = [one for one in found if one.path == image.path]
            if here and (right := self._right_path(old, image, here)) != old:
                raw = _replaced(raw, old, right)
        return raw

    def _right_path(self, old: str, image: Image, found: Sequence[Finding]) -> str:
        located = locate(image, folders_of(self.reader)).image
        assert located is not None, "a row with a missing picture is left out"
        if located != image:
            old = os.path.splitext(old)[0] + os.path.splitext(located.path)[1]
        if not any(one.code == "image_format" for one in found):
            return old
        right = old + PICTURE_FORMATS[image_header(located)[0]][0]
        return self._linked(located.path, right)

    def _linked(self, path: str, right: str) -> str:
        """The file under its right name in the copy's own folder of pictures, without another copy where that goes."""
        inside = os.path.normpath(right)
        if files.is_remote(path) or os.path.isabs(inside) or inside.startswith(".."):
            return right.removesuffix(os.path.splitext(right)[1])  # no place of its own: it stays as it is called
        target = self.new / "pictures" / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        self.linked = True
        if not target.exists():
            try:
                os.link(os.path.realpath(path), target)
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, target)
        return right


def _replaced(raw: bytes, old: str, right: str) -> bytes:
    """The row with the picture `old` called `right`; nothing else of it changes where that is possible."""
    wanted = json.loads(raw)
    value = wanted["image"]
    wanted["image"] = [right if one == old else one for one in value] if isinstance(value, list) else right
    for ascii_only in (True, False):
        literal, new = (json.dumps(path, ensure_ascii=ascii_only).encode() for path in (old, right))
        for before, after in ((literal, new), (literal.replace(b"/", b"\\/"), new.replace(b"/", b"\\/"))):
            changed = raw.replace(before, after)
            if json.loads(changed) == wanted:
                return changed
    return json.dumps(wanted, ensure_ascii=False).encode()


def _is_list(reader: LlavaJson) -> bool:
    """Whether the rows lie in a list, not in lines."""
    return files.read(reader.path, 0, 4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _free(name: str, taken: set[str]) -> str:
    """`name`, or with a number before its extension when another source of the copy has it."""
    stem, extension = os.path.splitext(name)
    names = (f"{stem}{f'-{number}' if number else ''}{extension}" for number in range(len(taken) + 1))
    return next(one for one in names if one not in taken)


def _format_of(reader: Reader) -> str:
    """The format whose module the reader comes from; what transforms made is written as llava_json."""
    module = type(reader).__module__
    return next((name for name, opener in FORMATS.items() if getattr(opener, "__module__", "") == module), "llava_json")
