"""A benchmark's files as their authors publish them: found by their names, read with the line in every error.

Knows names and lines, not what any benchmark means by them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vistune.evaluate.items import Answer
from vistune.samples import Image

DEPTH = 3
"""How many folders deep a file is looked for; archives put one or two around what they hold."""


@dataclass(frozen=True)
class Place:
    """Where a benchmark's files lie: under `root`, its pictures under `images` if that is said. What `root` lacks may
    lie in `others`: LLaVA's archive, scripts and docs call some folders differently."""

    root: Path
    images: Path | None = None
    others: tuple[Path, ...] = ()

    def file(self, *names: str) -> Path:
        """The first of these names that lies in the folder or, once, below it. A name may have folders and `*`.

        ValueError when none does, or when one lies in several places below.
        """
        if (found := self.find(*names)) is not None:
            return found
        wanted = " or ".join(names)
        raise ValueError(
            f"{self.root}: {wanted} is not there; docs/evaluate.md says where each benchmark's files come from"
        )

    def find(self, *names: str) -> Path | None:
        """As `file`, and None when there is none."""
        for root, name in product((self.root, *self.others), names):
            here = sorted(root.glob(name))
            found = here or [path for folder in _below(root, DEPTH) for path in sorted(folder.glob(name))]
            if len(found) > 1 and "*" not in name:
                raise ValueError(
                    f"{name} lies in {len(found)} places: {found[0]} and {found[1]}; give a folder with one"
                )
            if found:
                return found[0]
        return None

    def picture(self, name: str, *folders: str) -> Image:
        """The picture `name`, which lies under `images`, or in one of these folders of the benchmark's own.

        Nothing is opened: where none of them has it, the first is what the error will name when it is.
        """
        roots = (self.root, *self.others)
        places = [self.images] if self.images else [root / folder for root, folder in product(roots, folders or (".",))]
        chosen = next((place for place in places if (place / name).exists()), places[0])
        return Image(path=str(chosen / name))


def place(data: Path, folders: Sequence[str], images: Path | None = None) -> Place:
    """A benchmark's folders in `data`: those of its own names there (`folders`, as LLaVA says), or `data` itself."""
    if not data.is_dir():
        raise ValueError(f"--data {data}: no such folder")
    data = data.absolute()  # a file that was found stays where it is when it names the folder of its pictures
    own = [data / name for name in folders if (data / name).is_dir()]
    distinct = [one for i, one in enumerate(own) if not any(one.samefile(other) for other in own[:i])]
    return Place(distinct[0] if distinct else data, images, tuple(distinct[1:]))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file. ValueError that names file and line for anything else."""
    rows = []
    for number, line in _lines(path):
        row = _object(line)
        if row is None:
            raise ValueError(f"{path}:{number}: not a JSON object: {line[:80]!r}; mend or remove the line")
        rows.append(row)
    return rows


def question_rows(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The rows of a question file as LLaVA writes them: each has question_id, text and `keys`, no two have one id.

    ValueError that names file, row and what is wrong with it.
    """
    rows = json_lines(path)
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for key in ("question_id", "text", *keys):
            field(row, key, path, number)
        before = first.setdefault(str(row["question_id"]), number)
        if before != number:
            raise ValueError(
                f"{path}:{number}: question_id {row['question_id']} is row {before}'s too; ids must differ"
            )
    return rows


def json_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}; fetch it again") from None


def members(path: Path, key: str | None, publisher: str) -> list[dict[str, Any]]:
    """The list of objects that a JSON file has under `key`, or is where that is None. ValueError when it has none."""
    whole = json_file(path)
    rows = whole if key is None else whole.get(key) if isinstance(whole, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        what = "not a list of objects" if key is None else f"no list of objects under {key!r}"
        raise ValueError(f"{path}: {what}; fetch it again from {publisher}")
    return rows


def answers(path: Path, instead: Sequence[str] = ()) -> tuple[list[Answer], list[str]]:
    """The answers of a JSON lines file, and the numbers of the lines that are none (a killed run leaves half a line).

    A row needs question_id and text, or one of `instead` in place of the text (a row of reviews). ValueError when the
    file is not there or no line is an answer.
    """
    if not path.is_file():
        raise ValueError(f"--answers {path}: no such file")
    found, broken = [], []
    for number, line in _lines(path):
        row = _object(line)
        text = None if row is None else _text(row, instead)
        if row is None or text is None:
            broken.append(str(number))
            continue
        found.append(Answer(id=row["question_id"], prompt=str(row.get("prompt", "")), text=text, row=row))
    if not found:
        raise ValueError(f"--answers {path}: no line of it is an answer; each is an object with question_id and text")
    return found, broken


def _text(row: dict[str, Any], instead: Sequence[str]) -> str | None:
    """What an answer's row answers; None if it is no answer."""
    if "question_id" not in row:
        return None
    if isinstance(text := row.get("text"), str):
        return text
    return "" if any(key in row for key in instead) else None


def write(path: Path, text: str) -> Path:
    """What an official scorer takes, or what is kept beside it; never half of it, and its folder is made. Returns the
    path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text, encoding="utf-8", newline="\n")
    return beside.replace(path)


def field(row: dict[str, Any], key: str, path: Path, number: int | str) -> Any:
    """`row[key]`; ValueError that names file, row (its id, or counted from 1) and key where it is missing."""
    if key not in row:
        raise ValueError(f"{path}:{number}: {key} is missing; it has {', '.join(sorted(row)) or 'nothing'}")
    return row[key]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1. Only \\n ends one: a text may hold other separators."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Folders below `folder`, nearest first, `depth` deep. Beside them lie pictures by the hundred thousand."""
    level = [folder]
    for _ in range(depth):
        level = [path for one in level for path in _folders(one)]
        yield from level


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())
