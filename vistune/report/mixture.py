"""What a run's data consists of, from the columns of its index: sources, shares, lengths, pictures.

Knows counts; no row is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistune.data.growing import COLUMNS
from vistune.data.shares import Share, samples_each
from vistune.report.run import Run

BINS = 40
_PIECE = 4_000_000  # rows that are held at once
MOST_PICTURES = 9
"""And more: samples with so many pictures are counted together."""


@dataclass(frozen=True)
class Source:
    """One source; `samples` come in an epoch, with about so many `tokens`, of these `supervised`."""

    name: str
    rows: int
    usable: int
    shortened: int
    samples: int
    tokens: float
    supervised: float
    longest: int
    text_alone: int


@dataclass(frozen=True)
class Mixture:
    """The index of a run. `lengths` and `pictures` count usable rows: `lengths[i]` from `edges[i]` up to the next."""

    hash: str
    length: int
    sources: list[Source]
    edges: list[int]
    lengths: list[int]
    pictures: dict[int, int]

    def total(self, name: str) -> float:
        return sum(getattr(source, name) for source in self.sources)

    def as_dict(self) -> dict[str, Any]:
        names = ("rows", "usable", "samples", "tokens", "supervised")
        return {"index": self.hash} | {name: self.total(name) for name in names} | {"sources": len(self.sources)}


def read(run: Run) -> Mixture | None:
    """The mixture of the run's index; None when the index is not there any more."""
    folder = _index_of(run)
    if folder is None:
        return None
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
    data = run.recipe.get("data", {})
    numbers = columns["source"]
    count = int(numbers[-1]) + 1 if len(numbers) else 0
    edges = [*np.searchsorted(numbers, np.arange(count, dtype=numbers.dtype)).tolist(), len(numbers)]
    measured = [_Measured(meta["length"]) for _ in range(count)]
    for one, start, stop in zip(measured, edges[:-1], edges[1:], strict=True):
        for piece in _pieces(start, stop):
            one.add({name: np.asarray(columns[name][piece]) for name in COLUMNS})
    said = data.get("sources", [])
    taken = _taken([one.usable for one in measured], said)
    names = [_name(said[i]) if len(said) == count else f"source {i + 1} of {count}" for i in range(count)]
    return Mixture(
        meta["hash"],
        meta["length"],
        [one.source(name, samples) for one, name, samples in zip(measured, names, taken, strict=True)],
        *_histogram(measured, meta["length"]),
        _pictures(measured),
    )


def _index_of(run: Run) -> Path | None:
    """The index that the run trained on: beside it or in its cache, known by its hash; else the only one there."""
    cache = run.recipe.get("data", {}).get("cache") or ""
    places = [run.folder / "index", *([Path(cache)] if cache else [])]
    found = [folder.parent for place in places for folder in sorted(place.glob("index-*/meta.json"))]
    whole = [folder for folder in found if all((folder / f"{name}.npy").is_file() for name in COLUMNS)]
    if wanted := run.environment.get("data_index"):
        return next((one for one in whole if json.loads((one / "meta.json").read_text())["hash"] == wanted), None)
    return whole[0] if len(whole) == 1 else None


def _pieces(start: int, stop: int) -> Iterator[slice]:
    for at in range(start, stop, _PIECE):
        yield slice(at, min(at + _PIECE, stop))


class _Measured:
    """Sums over the rows of one source."""

    def __init__(self, length: int):
        self.width = max(1, -(-length // BINS))
        self.rows = self.usable = self.shortened = self.tokens = self.supervised = self.longest = self.text_alone = 0
        self.lengths = np.zeros(BINS + 1, np.int64)
        self.pictures = np.zeros(MOST_PICTURES + 1, np.int64)

    def add(self, columns: dict[str, np.ndarray]) -> None:
        good = columns["fault"] == 0
        tokens = columns["text"][good].astype(np.int64) + columns["image"][good]
        pictures = columns["images"][good].astype(np.int64)
        self.rows += len(good)
        self.usable += len(tokens)
        self.shortened += int(columns["shortened"][good].sum())
        self.tokens += int(tokens.sum())
        self.supervised += int(columns["supervised"][good].sum(dtype=np.int64))
        self.longest = max(self.longest, int(tokens.max(initial=0)))
        self.text_alone += int((pictures == 0).sum())
        self.lengths += np.bincount(np.minimum(tokens // self.width, BINS), minlength=BINS + 1)
        self.pictures += np.bincount(np.minimum(pictures, MOST_PICTURES), minlength=MOST_PICTURES + 1)

    def source(self, name: str, samples: int) -> Source:
        often = samples / self.usable if self.usable else 0.0
        return Source(
            name,
            self.rows,
            self.usable,
            self.shortened,
            samples,
            self.tokens * often,
            self.supervised * often,
            self.longest,
            self.text_alone,
        )


def _taken(usable: list[int], said: list[dict[str, Any]]) -> list[int]:
    """Samples of each source in an epoch; as many as there are where the recipe's shares do not tell."""
    if len(said) != len(usable):  # a blend file names sources of its own
        return usable
    shares = [Share(epochs=s.get("epochs", 1.0), weight=s.get("weight", 0.0), cap=s.get("cap", 0)) for s in said]
    try:
        return samples_each(usable, shares)
    except ValueError:  # a weight on a source of which nothing is left
        return usable


def _name(source: dict[str, Any]) -> str:
    return source.get("name") or Path(source.get("path", "")).name


def _histogram(measured: list[_Measured], length: int) -> tuple[list[int], list[int]]:
    """Edges and counts, up to the last that is not empty."""
    width = max(1, -(-length // BINS))
    counts = np.sum([one.lengths for one in measured], axis=0) if measured else np.zeros(BINS + 1, np.int64)
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 1
    return [i * width for i in range(last + 1)], counts[:last].tolist()


def _pictures(measured: list[_Measured]) -> dict[int, int]:
    counts = np.sum([one.pictures for one in measured], axis=0) if measured else np.zeros(1, np.int64)
    return {i: int(count) for i, count in enumerate(counts) if count}
