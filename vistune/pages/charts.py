"""Charts as inline SVG: lines over steps with good ticks, linear and logarithmic, thinned without losing a spike.

Works out what is drawn where; `chart.html` draws it. Knows numbers, not where they are from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vistune.pages.words import short

COLOURS = 8
"""Of lines, `--c0` to `--c7` of the style: told apart by all eyes; after them come dashes."""
BUCKETS = 500
"""A line's points are thinned to the lowest and the highest of so many stretches."""
_SIDE = 1000.0  # of the drawing, which is stretched to its place
_LOGARITHMIC = 30.0  # times the median: from such a highest value on the chart opens with a logarithmic axis


Values = Sequence[float] | np.ndarray
"""Numbers; None and nan are gaps."""


@dataclass(frozen=True, eq=False)
class Line:
    """One line: y [n] over x [n], ascending. With `smooth` it is drawn faint, and its running mean strongly over it."""

    name: str
    x: Values
    y: Values
    colour: int = 0
    smooth: bool = False
    dots: bool = False
    dashes: int = 0


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with labelled places in percent of the way."""

    low: float
    high: float
    ticks: list[tuple[float, str]]
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """Shares of the way, 0 to 1."""
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Drawn:
    """One line in one view: paths in a square of 1000, the faint one first, and dots in percent."""

    colour: int
    dashes: int
    faint: str
    strong: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class View:
    """The lines on one scale."""

    kind: str
    y: Axis
    lines: list[Drawn]
    levels: list[tuple[float, str]]


@dataclass(frozen=True)
class Chart:
    """What `chart.html` draws: one view or two (linear, log), `first` shown; `data` is the hover's, as JSON."""

    title: str
    unit: str
    note: str
    x: Axis
    views: list[View]
    legend: list[tuple[str, int, int]]
    breaks: list[float]
    data: str
    first: str


@dataclass(frozen=True)
class _Points:
    """What is kept of a line: its thinned points and their running mean; `log_mean` is that of the logarithms, which is
    what a logarithmic axis shows as the middle."""

    line: Line
    x: np.ndarray
    y: np.ndarray
    mean: np.ndarray | None = None
    log_mean: np.ndarray | None = None


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    note: str = "",
    log: bool = False,
    levels: Sequence[tuple[float, str]] = (),
    low: float | None = None,
) -> Chart | None:
    """The chart of `lines`; None when there is nothing to draw. `log` offers a logarithmic axis beside the linear one.

    `levels` are lines across with their names, `low` is where the axis begins. Steps that are not finite are `breaks`.
    """
    kept = [_points(line) for line in lines]
    kept = [one for one in kept if np.isfinite(one.y).any()]
    if not kept:
        return None
    x = linear(min(float(one.x[0]) for one in kept), max(float(one.x[-1]) for one in kept), 6, tight=True)
    views = [_view("linear", _y_axis(kept, levels, low), x, kept, levels)]
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in kept])
    if log and (above := values[values > 0]).size and above.max() > above.min():
        views.append(_view("log", logarithmic(float(above.min()), float(above.max())), x, kept, levels))
    wide = len(views) > 1 and values.max() > _LOGARITHMIC * np.median(values[values > 0])
    broken = sorted({float(step) for one in lines for step in _array(one.x)[~np.isfinite(_array(one.y))][:200]})
    return Chart(
        title=title,
        unit=unit,
        note=note,
        x=x,
        views=views,
        legend=[(one.line.name, one.line.colour % COLOURS, one.line.dashes) for one in kept],
        breaks=(100 * x.place(np.array(broken))).round(2).tolist() if broken else [],
        data=_data(kept),
        first="log" if wide else "linear",
    )


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The running mean under a triangle of about 2 x `width` places, of what is finite; nan where nothing is."""
    good = np.isfinite(values)
    sums, counts = np.where(good, values, 0.0), good.astype(float)
    for _ in range(2):  # a box twice is a triangle
        sums, counts = _box(sums, width), _box(counts, width)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0.5)


def _box(values: np.ndarray, width: int) -> np.ndarray:
    """Sums over `width` places around each."""
    before, total = width // 2, np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    return total[np.minimum(at - before + width, len(values))] - total[np.maximum(at - before, 0)]


def thin(y: np.ndarray, buckets: int = BUCKETS) -> np.ndarray:
    """Places of y [n] that are enough to draw it: of every stretch the lowest, the highest and one that is not finite;
    and both ends."""
    if len(y) <= 3 * buckets:
        return np.arange(len(y))
    kept = {0, len(y) - 1}
    edges = np.linspace(0, len(y), buckets + 1).astype(int)
    for start, stop in pairwise(edges.tolist()):
        good = np.isfinite(part := y[start:stop])
        if good.any():
            kept |= {
                start + int(np.where(good, part, np.inf).argmin()),
                start + int(np.where(good, part, -np.inf).argmax()),
            }
        if not good.all():
            kept.add(start + int(good.argmin()))
    return np.array(sorted(kept))


def linear(low: float, high: float, most: int = 5, *, tight: bool = False) -> Axis:
    """At most about `most` steps of 1, 2, 2.5 or 5 times a power of ten; `tight` ends where the values end."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low * 0.5, low * 1.5) if low > 0 else (low * 1.5, low * 0.5) if low < 0 else (0.0, 1.0)
    step = _step((high - low) / most)
    largest = max(abs(low), abs(high))
    digits = max(4, math.floor(math.log10(largest / step)) + 3)
    first, last = (math.ceil, math.floor) if tight else (math.floor, math.ceil)
    slack = -1e-9 if tight else 1e-9  # a value on a tick stays there
    ticks = np.arange(first(low / step + slack), last(high / step - slack) + 1) * step
    if tight:
        ticks = ticks[ticks == ticks.round()] if high - low >= 2 else ticks
    else:
        low, high = min(low, float(ticks[0])), max(high, float(ticks[-1]))
    places = [round(100 * (at - low) / (high - low), 3) for at in ticks.tolist()]
    return Axis(
        low, high, [(at, short(tick, largest, digits)) for at, tick in zip(places, ticks.tolist(), strict=True)]
    )


def _step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= least * (1 - 1e-9))


def logarithmic(low: float, high: float) -> Axis:
    """Ticks at powers of ten, or at 1, 2 and 5 times them where there are few."""
    low, high = low / 1.05, high * 1.05
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wide = math.log10(high / low)
    times: Sequence[float] = (1,) if wide > 3 else (1, 2, 5) if wide > 0.7 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    every = max(1, math.ceil(len(powers) / 8)) if wide > 3 else 1
    ticks = [10.0**power * one for power in powers if power % every == 0 for one in times]
    axis = Axis(low, high, [], log=True)
    placed = [(float(axis.place(np.array(at))), at) for at in ticks if low <= at <= high]
    if len(placed) < 2:  # so narrow that both scales are the same
        return Axis(low, high, linear(low, high, tight=True).ticks, log=True)
    return Axis(low, high, [(round(100 * place, 3), short(at)) for place, at in placed], log=True)


def _array(values: Values) -> np.ndarray:
    return np.asarray(values, np.float64)


def _points(line: Line) -> _Points:
    x, y = _array(line.x), _array(line.y)
    kept, width = thin(y), len(y) // 40
    if not line.smooth or width < 2:
        return _Points(line, x[kept], y[kept])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.exp(smoothed(np.log(y), width))
    return _Points(line, x[kept], y[kept], smoothed(y, width)[kept], logs[kept])


def _y_axis(kept: Sequence[_Points], levels: Sequence[tuple[float, str]], low: float | None) -> Axis:
    values = np.concatenate([one.y[np.isfinite(one.y)] for one in kept])
    bottom, top = float(values.min()), float(values.max())
    top = max([top, *(level for level, _ in levels if level <= 3 * top)])
    if low is not None:
        bottom = min(bottom, low)
    elif 0 < bottom < 0.6 * top:
        bottom = 0.0
    return linear(bottom, top)


def _view(kind: str, y: Axis, x: Axis, kept: Sequence[_Points], levels: Sequence[tuple[float, str]]) -> View:
    shown = [(float(y.place(np.array(level))), name) for level, name in levels if y.low <= level <= y.high]
    return View(kind, y, [_drawn(one, x, y) for one in kept], [(round(100 * place, 2), name) for place, name in shown])


def _drawn(one: _Points, x: Axis, y: Axis) -> Drawn:
    raw = _path(x.place(one.x), y.place(one.y))
    middle = one.log_mean if y.log else one.mean
    mean = "" if middle is None else _path(x.place(one.x), y.place(middle))
    dots = []
    if one.line.dots or len(one.y) == 1:
        places = zip(x.place(one.x).tolist(), y.place(one.y).tolist(), strict=True)
        dots = [(round(100 * a, 2), round(100 * b, 2)) for a, b in places if math.isfinite(b)]
    return Drawn(one.line.colour % COLOURS, one.line.dashes, raw if mean else "", mean or raw, dots)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path through places 0 to 1, y upwards, interrupted where one is not finite."""
    parts, pen = [], "M"
    for across, up in zip((x * _SIDE).tolist(), (_SIDE - y * _SIDE).tolist(), strict=True):
        if not math.isfinite(up):
            pen = "M"
            continue
        parts.append(f"{pen}{across:.4g} {up:.4g}")
        pen = "L"
    return "".join(parts)


def _data(kept: Sequence[_Points]) -> str:
    rows: list[dict[str, Any]] = []
    for one in kept:
        row = {"name": one.line.name, "colour": one.line.colour % COLOURS, "x": one.x.astype(int).tolist()}
        row["y"] = _short(one.y)
        if one.mean is not None and one.log_mean is not None:
            row |= {"mean": _short(one.mean), "logMean": _short(one.log_mean)}
        rows.append(row)
    return json.dumps(rows, separators=(",", ":"))


def _short(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values.tolist()]
