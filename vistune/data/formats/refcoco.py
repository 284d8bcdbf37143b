"""RefCOCO, RefCOCO+ and RefCOCOg as their authors publish them: refs(unc).p or refs(umd).p beside instances.json.

The references are a pickle, read as plain data: anything else in it is an error. The same list as JSON does too.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vistune import files
from vistune.data.formats import refuse_unknown, register
from vistune.data.reading.annotations import choice, messages_of, option, picture_path
from vistune.data.reading.json_members import BadRow, Rows, digest, facts_of, want, want_id
from vistune.data.reading.pictures import Folders, beside
from vistune.samples import Fault, Image, Sample, SampleError

PICTURE = "coco/train2017/{id:012}.jpg"
SPLITS = ("train", "val", "test", "testA", "testB", "all")


class PlainPickle(pickle.Unpickler):
    """Unpickles texts, numbers, lists and dicts. Whatever would run code is an error."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and only texts, numbers, lists and dicts are read")


def read_refs(path: str) -> list[dict[str, Any]]:
    """The list of references in a pickle (`.p`, `.pkl`, `.pickle`) or a JSON file. Raises ValueError."""
    try:
        data = files.read(path)
    except OSError as error:
        raise ValueError(f"{path}: the file cannot be opened: {error.strerror or error}") from None
    try:
        if path.lower().endswith((".p", ".pkl", ".pickle")):
            refs = PlainPickle(io.BytesIO(data), encoding="utf-8", errors="replace").load()
        else:
            refs = json.loads(data)
    except (
        pickle.UnpicklingError,
        ValueError,
        ArithmeticError,
        RecursionError,
        EOFError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        raise ValueError(
            f"{path}: it cannot be read: {error}. Save the list of references as JSON and name that file."
        ) from None
    if not isinstance(refs, list) or not refs:
        raise ValueError(f"{path}: it holds {type(refs).__name__}, expected a list of references")
    return refs


@dataclass(frozen=True)
class Boxes:
    """Boxes by annotation, sizes by picture: sorted columns, so that they are cheap to send to another process."""

    annotations: np.ndarray  # int64 [n], ids in order
    boxes: np.ndarray  # float64 [n, 4]: x, y, width, height in pixels
    pictures: np.ndarray  # int64 [m], ids in order
    sizes: np.ndarray  # int64 [m, 2]: width, height

    @classmethod
    def read(cls, path: str, cache: Path | None) -> Boxes:
        """From instances.json, row after row. Raises ValueError."""
        boxes = _columns(Rows(path, ("annotations", "*"), cache), _bbox)
        sizes = _columns(Rows(path, ("images", "*"), cache), _size)
        return cls(*boxes, *sizes)

    def box(self, annotation: int) -> tuple[float, float, float, float]:
        """x1, y1, x2, y2 in pixels."""
        x, y, width, height = (float(number) for number in _found(self.annotations, self.boxes, annotation))
        return x, y, x + width, y + height

    def size(self, picture: int) -> tuple[int, int]:
        width, height = (int(number) for number in _found(self.pictures, self.sizes, picture))
        return width, height


class RefCoco:
    """A row is one expression for a region; it is the answer, the question is empty. Notes: `phrase`, `box` (x1, y1,
    x2, y2 in pixels), `width` and `height` of the picture, `set`, the name of the folder of its references."""

    def __init__(
        self, pairs: Mapping[str, str], images: Sequence[str], name: str, picture: str, split: str, cache: Path | None
    ):
        """`pairs`: references -> instances, in the order of the rows."""
        self.name, self.picture, first = name, picture, next(iter(pairs))
        self.folders = Folders(first, images, beside(first))
        self._boxes = [Boxes.read(instances, cache) for instances in pairs.values()]
        self._sets = [Path(refs).parent.name for refs in pairs]
        self._rows = [(number, *row) for number, refs in enumerate(pairs) for row in _expressions(refs, split)]
        facts = [facts_of(file) for pair in pairs.items() for file in pair]
        self._digest = digest(*facts, name, self.folders.fingerprint(), picture, split)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Sample:
        number, ref, sentence = self._rows[row]
        boxes = self._boxes[number]
        id = str(ref.get("ref_id", ""))
        try:
            phrase = want(sentence, "sent", str)
            image = want(ref, "image_id", int)
            width, height = boxes.size(image)
            notes = {
                "image_id": str(image),
                "set": self._sets[number],
                "phrase": phrase,
                "box": boxes.box(want(ref, "ann_id", int)),
                "width": width,
                "height": height,
            }
            picture = self.folders.resolve(picture_path(self.picture, str(image)))
            id = want_id(sentence, "sent_id") if "sent_id" in sentence else id
        except BadRow as error:
            fault = Fault(source=self.name, row=row, id=id, code=error.code, reason=error.reason)
            raise SampleError(fault) from None
        messages = messages_of([("", phrase)])
        return Sample(id=id, source=self.name, row=row, messages=messages, images=(Image(path=picture),), notes=notes)

    def fingerprint(self) -> str:
        return self._digest


@register("refcoco")
def open_refcoco(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> RefCoco:
    refuse_unknown(path, "refcoco", options, ("instances", "also", "split", "picture"))
    split = choice(path, "refcoco", options, "split", SPLITS)
    picture = option(path, "refcoco", options, "picture", PICTURE)
    also = options.get("also", [])
    if not isinstance(also, list) or not all(isinstance(other, str) and other for other in also):
        raise ValueError(
            f"{path}: option also of format 'refcoco' is {also!r}; it must be a list of files of references"
        )
    pairs = {path: option(path, "refcoco", options, "instances", _beside(path))}
    pairs |= {other: _beside(other) for other in also}
    return RefCoco(pairs, images, name, picture, split, cache)


def _beside(refs: str) -> str:
    return files.join(beside(refs), "instances.json")


def _expressions(path: str, split: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each expression with what it refers to. Raises ValueError when none is of `split`."""
    refs = [ref for ref in read_refs(path) if isinstance(ref, dict)]
    chosen = [ref for ref in refs if _in_split(ref.get("split"), split)]
    if not chosen:
        splits = ", ".join(sorted({str(ref.get("split")) for ref in refs}))
        raise ValueError(f"{path}: no reference of it is of split {split!r}; there are {splits or 'none'}")
    for ref in chosen:
        sentences = ref.get("sentences")
        for sentence in sentences if isinstance(sentences, list) else [None]:
            yield {key: ref[key] for key in ("ref_id", "ann_id", "image_id") if key in ref}, sentence


def _in_split(of_ref: Any, wanted: str) -> bool:
    """RefCOCO names its test sets testA and testB; `test` is all of them, as in its authors' own reader."""
    return wanted in ("all", of_ref) or (wanted == "test" and isinstance(of_ref, str) and "test" in of_ref)


def _bbox(row: Any) -> list[float]:
    box = want(row, "bbox", list)
    if len(box) != 4:
        raise BadRow(f"bbox is {box!r:.60}, expected x, y, width, height")
    return [want({"bbox": number}, "bbox", float) for number in box]


def _size(row: Any) -> list[int]:
    return [want(row, "width", int), want(row, "height", int)]


def _columns(rows: Rows, read: Callable[[Any], list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    ids, values = [], []
    for number in range(len(rows)):
        try:
            row = rows[number][1]
            ids.append(want(row, "id", int))
            values.append(read(row))
        except BadRow as error:
            raise ValueError(f"{rows.path}: {rows.place[0]} {number} cannot be used: {error.reason}") from None
    order = np.argsort(ids, kind="stable")
    return np.array(ids, np.int64)[order], np.array(values)[order]


def _found(ids: np.ndarray, values: np.ndarray, wanted: int) -> np.ndarray:
    at = int(np.searchsorted(ids, wanted))
    if at == len(ids) or int(ids[at]) != wanted:
        raise BadRow(f"the instances file has no {wanted}")
    return values[at]
