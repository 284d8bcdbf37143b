"""Pages of HTML that need nothing beside them: what a check found, and samples as the model will see them.

Every text of the data is escaped by the templates in `pages/`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFile

from vistune import pages
from vistune.anyres import AnyresLayout
from vistune.data.checking import guarded, pictures
from vistune.data.checking.findings import Finding, Report
from vistune.data.checking.show import packs_in_order, rows_in_order, view
from vistune.data.formats import Reader
from vistune.data.plan import Plan
from vistune.data.tokenize import Language
from vistune.images import ImageError, Layout, open_image
from vistune.samples import Image, Sample, SampleError

PER_SOURCE, PER_CODE = 6, 30  # examples on a check's page
_THUMBNAIL, _PICTURE = 168, 640  # longest side in pixels
_EXCERPT = 240  # characters

_PAGES = Path(__file__).parent / "pages"


def check_page(report: Report, readers: Sequence[Reader], out: Path, *, workers: int = 1) -> None:
    """The page of a check: counts, sources, lengths, and the first findings of every code with their pictures."""
    summary = report.summary
    examples = list(_examples(report, readers, workers))
    pages.write(
        out,
        _PAGES / "check.html",
        s=summary,
        names=", ".join(source["name"] for source in summary["sources"]),
        took=f"{summary['seconds'] / 60:.0f} minutes" if summary["seconds"] > 120 else f"{summary['seconds']:g} s",
        tiles=_tiles(summary),
        most=max((code["findings"] for code in summary["codes"].values()), default=1),
        expects=any(source["expect"] for source in summary["sources"]),
        examples=examples,
        example_codes={example.finding.code for example in examples},
        **_histograms(summary),
    )


def show_page(
    readers: Sequence[Reader],
    language: Language,
    length: int,
    out: Path,
    *,
    rows: int = 50,
    plan: Plan | None = None,
    wanted: Sequence[tuple[int, int]] = (),
    title: str = "",
) -> None:
    """A page of about `rows` samples with every token: with a plan the first packs of the run, whole; else the first
    rows of every source; or the `wanted` (source, row), with their places in the plan where there is one."""
    packs = packs_in_order(plan, rows, wanted) if plan else rows_in_order(readers, rows, wanted)
    pages.write(
        out,
        _PAGES / "show.html",
        title=title or ", ".join(reader.name for reader in readers),
        length=length,
        packs=[(pack, [view(readers, *place, language, length) for place in pack.shown]) for pack in packs],
        picture=functools.partial(_figure, language.layout),
        planned=plan is not None,
    )


def _figure(layout: Layout, image: Image) -> tuple[str, str, str]:
    """The picture for a page as a data URI, or else why it cannot be opened; and how `layout` lays it out, in words.

    Where it is cut into tiles is drawn on it.
    """
    try:
        picture = open_image(image)
        size = picture.size
        picture.thumbnail((_PICTURE, _PICTURE))
        if isinstance(layout, AnyresLayout):
            _draw_cuts(picture, *layout.cuts(*size))
        return pages.data_uri(picture, _PICTURE), "", _laid_out(layout, *size)
    except ImageError as error:
        return "", str(error), ""


def _draw_cuts(picture: PIL.Image.Image, across: Sequence[float], down: Sequence[float]) -> None:
    """Thin lines, dark and light side by side so that they show on any picture."""
    pen = PIL.ImageDraw.Draw(picture)
    for offset, colour in ((0, "black"), (1, "white")):
        for share in across:
            pen.line([(share * picture.width + offset, 0), (share * picture.width + offset, picture.height)], colour)
        for share in down:
            pen.line([(0, share * picture.height + offset), (picture.width, share * picture.height + offset)], colour)


def _laid_out(layout: Layout, width: int, height: int) -> str:
    """How a picture of that size is laid out, where not all are laid out alike."""
    if (grid := layout.grid(width, height)) is None:
        return ""
    said = f"{grid[2]} x {grid[1]} patches"
    if isinstance(layout, AnyresLayout):
        high, wide = layout.canvas(width, height)
        said = f"whole, and in {wide // layout.size} x {high // layout.size} tiles"
    return f"{width} x {height} pixels: {said}, {layout.tokens(width, height):,} tokens"


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = max(1, summary["rows"])
    formats = ", ".join(f"{count:,} {name}" for name, count in list(summary["pictures"]["formats"].items())[:3])
    tiles = [
        (f"{summary['rows']:,}", "rows"),
        (f"{summary['usable']:,}", f"usable ({summary['usable'] / rows:.1%})"),
        (f"{summary['set_aside']:,}", f"set aside, {summary['allowed']:,} allowed"),
        (f"{summary['pictures']['distinct']:,}", f"distinct pictures{': ' if formats else ''}{formats}"),
    ]
    if summary["lengths"]:
        share = sum(source["supervised_share"] * source["tokens"].get("total", 0) for source in summary["sources"])
        total = sum(source["tokens"].get("total", 0) for source in summary["sources"])
        tiles[3:3] = [(f"{summary['shortened']:,}", f"shortened ({summary['shortened'] / rows:.1%})")]
        tiles += [(f"{share / max(1, total):.1%}", f"of {total:,} tokens supervised")]
    return tiles


def _histograms(summary: dict[str, Any]) -> dict[str, Any]:
    """Bars of the lengths, of all sources and of each, in the SVG's 1000 x 250 units."""
    lengths = summary["lengths"]
    if not lengths:
        return {"histograms": []}
    edges = lengths["edges"]
    wide = 950 / (len(edges) - 1)
    names = [source["name"] for source in summary["sources"]]
    shown = [("every source", lengths["counts"])]
    shown += zip(names, lengths["sources"], strict=True) if len(names) > 1 else []
    across = (edges[-1] - edges[0]) or 1
    every = next(every for every in (1, 2, 5, 10, 20) if every * 8 >= len(edges) - 1)
    return {
        "histograms": [(name, f"{max(counts):,}", list(_bars(edges, counts, wide, lengths))) for name, counts in shown],
        "ticks": [(round(47 + i * wide, 1), f"{edges[i]:,}") for i in range(0, len(edges), every)],
        "room_at": round(47 + 950 * lengths["room"] / across, 1) if lengths["room"] <= edges[-1] else 0,
        "percentiles": " · ".join(f"{name} {value:,}" for name, value in lengths["percentiles"].items()),
    }


def _bars(edges: list[int], counts: list[int], wide: float, lengths: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    most = max(1, *counts)
    for i, count in enumerate(counts):
        if count:
            height = max(1.5, 200 * count / most)
            title = f"{edges[i]:,} to {edges[i + 1] - 1:,} tokens: {count:,} rows"
            left = round(47.5 + i * wide, 1)
            yield left, round(220 - height, 1), round(wide - 1, 1), round(height, 1), title, edges[i] >= lengths["room"]


@dataclass(frozen=True, slots=True)
class Example:
    """One finding on the page; `blank` says in words why there is no thumbnail."""

    finding: Finding
    excerpt: str = ""
    thumbnail: str = ""
    blank: str = ""


@dataclass(frozen=True, slots=True)
class _Exemplify:
    readers: tuple[Reader, ...]

    def __call__(self, found: Finding) -> Example:
        if found.row < 0:
            return Example(found)
        reader = self.readers[found.number]
        try:
            sample = reader[found.row]
        except (SampleError, ValueError, OSError):
            raw = getattr(reader, "raw", None)
            return Example(found, raw(found.row)[:_EXCERPT].decode("utf-8", "replace") if raw else "")
        excerpt = "\n".join(f"{message.role}: {message.text}" for message in sample.messages)[:_EXCERPT]
        return Example(found, excerpt, *_thumbnail(sample, found, pictures.folders_of(reader)))


def _thumbnail(sample: Sample, found: Finding, folders: tuple[str, ...]) -> tuple[str, str]:
    """The picture that the finding is about, else the row's first; or why there is none."""
    images = [image for image in sample.images if found.path and image.path == found.path] or list(sample.images)
    if not images:
        return "", ""
    image = pictures.locate(images[0], folders).image
    if image is None:
        return "", "no picture"
    # What is left of a torn picture shows what it was. This process makes thumbnails and nothing else.
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        return pages.data_uri(open_image(image), _THUMBNAIL), ""
    except (ImageError, OSError, ValueError):
        return "", "cannot be opened"


def _examples(report: Report, readers: Sequence[Reader], workers: int) -> Iterator[Example]:
    """The first findings of every code and source, made in another process: their pictures may be anything."""
    chosen: list[Finding] = []
    per_source: Counter[tuple[str, int]] = Counter()
    per_code: Counter[str] = Counter()
    for found in report.findings():
        if per_source[found.code, found.number] < PER_SOURCE and per_code[found.code] < PER_CODE:
            per_source[found.code, found.number] += 1
            per_code[found.code] += 1
            chosen.append(found)
    chosen.sort(key=lambda found: (found.severity, list(report.summary["codes"]).index(found.code)))
    made = dict(
        guarded.run(
            _Exemplify(tuple(readers)), ((i, [one]) for i, one in enumerate(chosen)), workers=workers, seconds=10
        )
    )
    for i, found in enumerate(chosen):
        (example,) = made[i]
        yield Example(found, blank="cannot be opened") if isinstance(example, guarded.Lost) else example
