"""The curves of a run, and those of several on one axis: which numbers of a step are drawn, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vistune.pages.charts import COLOURS, Chart, Line, chart
from vistune.report.run import Run


@dataclass(frozen=True)
class Curve:
    """One chart over the steps. `of` names its lines: (name, keys of a row's number, factor)."""

    title: str
    unit: str
    of: tuple[tuple[str, tuple[str, ...], float], ...]
    log: bool = False
    low: float | None = 0.0
    smooth: bool = True


LOSS = Curve("Loss", "of the supervised tokens of a step", (("loss", ("loss",), 1.0),), log=True, low=None)
NORM = Curve("Gradient norm", "before clipping", (("norm", ("grad_norm",), 1.0),), log=True)
SPEED = Curve(
    "Throughput", "tokens a second", (("tokens", ("tokens_per_s",), 1), ("supervised", ("supervised_per_s",), 1))
)
MFU = Curve("MFU", "% of the device's peak", (("MFU", ("mfu",), 100.0),))
TIME = Curve("Time of a step", "ms", (("time", ("ms",), 1.0),), log=True)
PADDING = Curve("Padding", "% of the computed tokens", (("padding", ("padding",), 100.0),))
MEMORY = Curve(
    "Memory",
    "GiB of the first device",
    tuple((name, ("memory", name), 1.0) for name in ("peak", "reserved", "allocated")),
    smooth=False,
)
SCALE = Curve("Loss scale", "of fp16", (("scale", ("loss_scale",), 1.0),), log=True, low=None, smooth=False)


def of_run(run: Run) -> list[Chart]:
    """All curves of one run; those that it has no numbers for are left out."""
    held = _held_out(run, 1, "held out")
    made = [
        _chart(LOSS, _lines(LOSS, [run]) + held, note="Dots: the loss on held-out samples." if held else ""),
        _chart(NORM, _lines(NORM, [run]), levels=_clip(run)),
        chart("Learning rate", list(_rates(run)), low=0.0),
        *(_chart(curve, _lines(curve, [run])) for curve in (SPEED, MFU, TIME, PADDING, MEMORY)),
    ]
    scales = run.series("loss_scale")
    if len(np.unique(scales[np.isfinite(scales)])) > 1:
        made.append(_chart(SCALE, _lines(SCALE, [run])))
    return [one for one in made if one is not None]


def of_runs(runs: Sequence[Run]) -> list[Chart]:
    """The same curves with one line a run, always in the run's colour."""
    made: list[Chart | None] = [_chart(LOSS, _lines(LOSS, runs))]
    if held := [line for i, run in enumerate(runs) for line in _held_out(run, i, run.name)]:
        made.append(chart("Held-out loss", held, log=True))
    made.append(_chart(NORM, _lines(NORM, runs)))
    made.append(chart("Learning rate", [line for i, run in enumerate(runs) for line in _rates(run, i)], low=0.0))
    made += [_chart(curve, _lines(_first(curve), runs)) for curve in (SPEED, MFU, TIME, PADDING, MEMORY)]
    return [one for one in made if one is not None]


def scores(run: Run) -> list[Chart]:
    """The evaluations of a run over its steps: a chart for every scale that its benchmarks are scored on."""
    names = _benchmarks([run])
    small = [name for name in names if _highest([run], name) <= 1]
    percent = [name for name in names if 1 < _highest([run], name) <= 100]
    rest = [[name] for name in names if name not in small and name not in percent]
    groups = [group for group in (percent, small, *rest) if group]
    made: list[Chart | None] = []
    if len(sources := _sources(run)) > 1:
        lines = [_evaluated(run, _held_out_of(s), s, i) for i, s in enumerate(sources)]
        made.append(chart("Held-out loss by source", lines, log=True))
    for group in groups:
        lines = [_evaluated(run, _headline(name), name, i) for i, name in enumerate(group)]
        made.append(chart("Scores" if len(group) > 1 else group[0], lines, note=_partial_note([run], group)))
    return [one for one in made if one is not None]


def scores_of(runs: Sequence[Run]) -> list[Chart]:
    """A chart a benchmark, one line a run."""
    made = [
        chart(
            name,
            [_evaluated(run, _headline(name), run.name, i) for i, run in enumerate(runs)],
            note=_partial_note(runs, [name]),
        )
        for name in _benchmarks(runs)
    ]
    return [one for one in made if one is not None]


def _chart(curve: Curve, lines: Sequence[Line], **more: Any) -> Chart | None:
    return chart(curve.title, lines, unit=curve.unit, log=curve.log, low=curve.low, **more)


def _lines(curve: Curve, runs: Sequence[Run]) -> list[Line]:
    """One a number of one run; one a run of several."""
    alone = len(runs) == 1
    return [
        Line(
            name if alone else run.name,
            run.at,
            factor * run.series(*keys),
            colour=number if alone else i,
            smooth=curve.smooth,
            dashes=0 if alone else i // COLOURS,
        )
        for i, run in enumerate(runs)
        for number, (name, keys, factor) in enumerate(curve.of)
    ]


def _first(curve: Curve) -> Curve:
    return Curve(curve.title, f"{curve.unit} ({curve.of[0][0]})" if len(curve.of) > 1 else curve.unit, curve.of[:1])


def _rates(run: Run, colour: int | None = None) -> Iterator[Line]:
    """One a rate, named by the parts that have it; of several runs, in the run's colour with dashes for its rates."""
    keys = dict.fromkeys(key for row in run.rows[:1] + run.rows[-1:] for key in row.get("lr", {}))
    alike: dict[bytes, list[str]] = {}
    for key in keys:
        alike.setdefault(run.series("lr", key).tobytes(), []).append(key)
    for i, parts in enumerate(alike.values()):
        values, name = run.series("lr", parts[0]), ", ".join(parts)
        if colour is not None:
            name = f"{run.name}: {name}" if len(alike) > 1 else run.name
        yield Line(name, run.at, values, i if colour is None else colour, dashes=0 if colour is None else i % 3)


def _clip(run: Run) -> list[tuple[float, str]]:
    clip = run.recipe.get("optimizer", {}).get("clip", 0.0)
    return [(clip, f"clipped above {clip:g}")] if clip else []


def _held_out(run: Run, colour: int, name: str) -> list[Line]:
    line = _evaluated(run, lambda row: row.get("held_out_loss"), name, colour)
    return [line] if line.x else []


def _evaluated(run: Run, value: Callable[[dict[str, Any]], Any], name: str, colour: int) -> Line:
    points = [(row["step"], found) for row in run.evaluations if isinstance(found := value(row), int | float)]
    return Line(name, [at for at, _ in points], [y for _, y in points], colour, dots=True, dashes=colour // COLOURS)


def _held_out_of(source: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: (row.get("held_out") or {}).get(source)


def _headline(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: (row.get("headline") or {}).get(name)


def _benchmarks(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for row in run.evaluations for name in row.get("headline") or {}))


def _sources(run: Run) -> list[str]:
    return list(dict.fromkeys(name for row in run.evaluations for name in row.get("held_out") or {}))


def _highest(runs: Sequence[Run], name: str) -> float:
    found = [(row.get("headline") or {}).get(name) for run in runs for row in run.evaluations]
    return max((value for value in found if isinstance(value, int | float)), default=0.0)


def _partial_note(runs: Sequence[Run], names: Sequence[str]) -> str:
    """What is no score of the benchmark is not called one."""
    shares = {
        name: share for run in runs for row in run.evaluations for name, share in (row.get("partial") or {}).items()
    }
    said = [f"{name} {share:.1%}" for name, share in shares.items() if name in names and share < 1]
    return f"On a part of the questions, not the benchmark's score: {', '.join(said)}." if said else ""
