"""Pictures of one to four handwritten digits on a grid of two by two, as PNG files with LLaVA JSON beside them.

Knows the scans, and draws; what is said about a picture comes from `words`. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vistune.quickstart import digits, words

CELL = 48
SIDE = 2 * CELL
"""Side of a picture in pixels."""

_INKS = ((28, 42, 92), (122, 24, 40), (18, 92, 76), (92, 48, 128), (48, 48, 52), (148, 76, 12))
_PAPERS = ((250, 248, 240), (244, 246, 250), (248, 243, 232), (240, 246, 240))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Number of pictures in each file. `turns` questions are asked about a picture of `instruct` or `questions`."""

    align: int = 2000
    instruct: int = 2000
    captions: int = 200
    questions: int = 200
    turns: int = 5


class Jitter(NamedTuple):
    """How far a scan may stray: size in pixels (least, most), turn in degrees, shear, shift in pixels."""

    size: tuple[float, float] = (34.0, 42.0)
    turn: float = 6.0
    shear: float = 0.06
    shift: float = 2.5


class Paths(NamedTuple):
    """The files that `write` made. Pictures lie in `images`, which is what the rows' paths are relative to."""

    images: Path
    align: Path
    instruct: Path
    captions: Path
    questions: Path


class Scene(NamedTuple):
    scans: tuple[int | None, ...]
    cells: words.Cells


def scene(draw: random.Random, scans: Sequence[int], labels: np.ndarray) -> Scene:
    """One to four of the scans, each number of digits as likely as another, in cells drawn at random."""
    full = set(draw.sample(range(4), draw.randint(1, 4)))
    chosen = [draw.choice(scans) if cell in full else None for cell in range(4)]
    a, b, c, d = (None if scan is None else int(labels[scan]) for scan in chosen)
    return Scene(tuple(chosen), (a, b, c, d))


def picture(scene: Scene, images: np.ndarray, draw: random.Random, jitter: Jitter | None = None) -> Image.Image:
    """The scene in coloured ink on pale paper, RGB, SIDE x SIDE."""
    paper = Image.new("RGB", (SIDE, SIDE), draw.choice(_PAPERS))
    for cell, scan in enumerate(scene.scans):
        if scan is not None:
            ink = Image.new("RGB", (CELL, CELL), draw.choice(_INKS))
            paper.paste(ink, (cell % 2 * CELL, cell // 2 * CELL), _stroke(images[scan], draw, jitter or Jitter()))
    return paper


def _stroke(scan: np.ndarray, draw: random.Random, jitter: Jitter) -> Image.Image:
    """One scan enlarged to a cell, as coverage from 0 to 255."""
    padded = np.pad(scan, 2).astype(np.float32) * (255 / 16)
    scale = scan.shape[0] / draw.uniform(*jitter.size)
    angle = math.radians(draw.uniform(-jitter.turn, jitter.turn))
    lean = draw.uniform(-jitter.shear, jitter.shear)
    cx, cy = (CELL / 2 + draw.uniform(-jitter.shift, jitter.shift) for _ in range(2))
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    a, b, d, e = cos, lean * cos - sin, sin, lean * sin + cos  # turn after shear; from cell to scan, as PIL wants it
    middle = padded.shape[0] / 2
    matrix = (a, b, middle - a * cx - b * cy, d, e, middle - d * cx - e * cy)
    source = Image.fromarray(padded.astype(np.uint8))
    return source.transform((CELL, CELL), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def write(folder: Path, seed: int = 0, sizes: Sizes | None = None) -> Paths:
    """Draw every picture and write the four data files. The same arguments give the same bytes.

    `align` and `instruct` show training scans only, `captions` and `questions` held-out scans only.
    """
    sizes = sizes or Sizes()
    folder = Path(folder)
    paths = Paths(folder / "images", *(folder / f"{name}.json" for name in _NAMES))
    train, held_out = (part.tolist() for part in digits.split())
    _file(paths.align, seed, sizes.align, train, _captions)
    _file(paths.instruct, seed, sizes.instruct, train, partial(_dialogues, turns=sizes.turns))
    _file(paths.captions, seed, sizes.captions, held_out, _captions)
    _file(paths.questions, seed, sizes.questions, held_out, partial(_questions, turns=sizes.turns))
    return paths


_NAMES = ("align", "instruct", "heldout_captions", "heldout_questions")
_Rows = Callable[[str, str, words.Cells, random.Random], list[dict[str, Any]]]


def _file(path: Path, seed: int, count: int, scans: list[int], rows: _Rows) -> None:
    """One data file and its pictures, drawn from a random stream of its own."""
    images, labels = digits.load()
    draw = random.Random(f"{seed} {path.stem}")
    shown_in = path.parent / "images" / path.stem
    shown_in.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    for i in range(count):
        shown = scene(draw, scans, labels)
        picture(shown, images, draw).save(shown_in / f"{i:05d}.png", compress_level=1)
        found += rows(f"{path.stem}-{i:05d}", f"{path.stem}/{i:05d}.png", shown.cells, draw)
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _captions(key: str, image: str, cells: words.Cells, draw: random.Random) -> list[dict[str, Any]]:
    return [_row(key, image, [("Describe the picture.", words.caption(cells))])]


def _dialogues(key: str, image: str, cells: words.Cells, draw: random.Random, turns: int) -> list[dict[str, Any]]:
    asked = _asked(cells, draw, turns)
    return [_row(key, image, [(q.text, q.answer) for q in asked])]


def _questions(key: str, image: str, cells: words.Cells, draw: random.Random, turns: int) -> list[dict[str, Any]]:
    asked = _asked(cells, draw, turns)
    return [_row(f"{key}-{q.kind}", image, [(q.text, q.answer)]) for q in asked]


def _asked(cells: words.Cells, draw: random.Random, turns: int) -> list[words.Question]:
    possible = words.questions(cells, draw)
    return draw.sample(possible, min(turns, len(possible)))


def _row(key: str, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    talk: list[dict[str, str]] = []
    for question, answer in turns:
        talk += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    talk[0]["value"] = "<image>\n" + talk[0]["value"]
    return {"id": key, "image": image, "conversations": talk}
