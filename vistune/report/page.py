"""The page of a run, or of several side by side: `vistune report RUN [RUN ...]`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vistune import console, pages
from vistune.pages import charts
from vistune.report import answers, compare, curves, figures, mixture
from vistune.report.mixture import MOST_PICTURES, Mixture
from vistune.report.run import Run, open_run

PAGES = Path(__file__).parent / "pages"
FAULTS = 5
"""Rows of every code that the page names; all of them are in quarantine.jsonl."""
_EVALUATIONS = 8  # columns of the table over steps


def write(runs: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Write the page into `out`, or report.html in the first run. Returns {"page": its path, "runs": [figures]}.

    Raises ValueError for a folder that is no run.
    """
    opened = [open_run(folder) for folder in runs]
    if len({run.folder.resolve() for run in opened}) < len(opened):
        raise ValueError("report: the same run twice; a run is compared with others")
    _tell_apart(opened)
    mixtures = [mixture.read(run) for run in opened]
    found = [figures.of(run, mixed) for run, mixed in zip(opened, mixtures, strict=True)]
    place = Path(out) if out else opened[0].folder / "report.html"
    alone = len(opened) == 1
    values = _alone(opened[0], mixtures[0], found[0]) if alone else _together(opened, mixtures, found)
    pages.write(place, PAGES / ("report.html" if alone else "compare.html"), **values)
    console.say(f"page: {place}")
    return {"page": str(place), "runs": found}


def _tell_apart(runs: Sequence[Run]) -> None:
    """Runs of one name are called by their folders."""
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    for run in runs:
        if run.name in twice:
            run.name = str(run.folder)


def _alone(run: Run, mixed: Mixture | None, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": run,
        "found": found,
        "verdict": figures.verdict(run),
        "remarks": figures.remarks(run, mixed),
        "tiles": figures.tiles(found),
        "curves": curves.of_run(run),
        "scores": curves.scores(run),
        "evaluations": _evaluations(run),
        "asked": answers.asked(run),
        "mixture": mixed,
        "histograms": _histograms(mixed) if mixed else [],
        "rates": _rates(run),
        "lora": run.recipe.get("lora", {}),
        "faults": _faults(run),
        "environment": compare.flat(run.environment),
        "recipe": compare.flat({key: value for key, value in run.recipe.items() if key != "learn"}),
    }


def _together(runs: Sequence[Run], mixtures: Sequence[Mixture | None], found: list[dict[str, Any]]) -> dict[str, Any]:
    hashes = {one.hash for one in mixtures if one}
    return {
        "runs": runs,
        "found": found,
        "verdicts": [figures.verdict(run) for run in runs],
        "recipes": compare.recipes([run.recipe for run in runs]),
        "data": compare.data(mixtures),
        "same_index": len(hashes) == 1 and None not in mixtures,
        "lost_index": [run.name for run, one in zip(runs, mixtures, strict=True) if one is None],
        "environments": compare.environments([run.environment for run in runs]),
        "curves": curves.of_runs(runs),
        "scores": curves.scores_of(runs),
        "table": _scores_together(found),
    }


def _evaluations(run: Run) -> dict[str, Any]:
    """The table over steps: the first evaluation and the last ones."""
    rows = run.evaluations[:1] + run.evaluations[1:][-_EVALUATIONS + 1 :]
    lines: list[tuple[str, list[Any]]] = [("held-out loss", [row.get("held_out_loss") for row in rows])]
    sources = dict.fromkeys(name for row in rows for name in row.get("held_out") or {})
    if len(sources) > 1:
        lines += [
            (f"held-out loss: {name}", [(row.get("held_out") or {}).get(name) for row in rows]) for name in sources
        ]
    for name in dict.fromkeys(name for row in rows for name in row.get("scores") or {}):
        headline = [(row.get("headline") or {}).get(name) for row in rows]
        lines.append((name, headline))
        kinds = dict.fromkeys(kind for row in rows for kind in (row.get("scores") or {}).get(name) or {})
        values = [(kind, [((row.get("scores") or {}).get(name) or {}).get(kind) for row in rows]) for kind in kinds]
        lines += [(f"{name}: {kind}", found) for kind, found in values if found != headline]
    shown = [(name, values) for name, values in lines if any(value is not None for value in values)]
    return {"steps": [row["step"] for row in rows], "lines": shown, "left_out": len(run.evaluations) - len(rows)}


def _histograms(mixed: Mixture) -> list[dict[str, Any]]:
    """How long samples are and how many pictures they have, as columns of a chart each."""
    made = []
    if any(mixed.lengths):
        edges = mixed.edges
        names = [f"{low:,} to {high - 1:,} tokens" for low, high in pairwise(edges)]
        ticks = charts.linear(0, edges[-1], 6, tight=True).ticks
        made.append(_columns("Length", "tokens of a sample", names, mixed.lengths, ticks))
    if mixed.pictures:
        numbers = range(max(*mixed.pictures, 5) + 1)
        names = [f"{i}{' or more' if i == MOST_PICTURES else ''} picture{'' if i == 1 else 's'}" for i in numbers]
        places = [round(100 * (i + 0.5) / len(numbers), 2) for i in numbers]
        ticks = [(at, f"{i}{'+' if i == MOST_PICTURES else ''}") for i, at in enumerate(places)]
        made.append(_columns("Pictures", "of a sample", names, [mixed.pictures.get(i, 0) for i in numbers], ticks))
    return made


def _columns(
    title: str, unit: str, names: Sequence[str], counts: Sequence[int], ticks: Sequence[tuple[float, str]]
) -> dict[str, Any]:
    most = max(counts)
    bars = [
        {"height": round(100 * count / most, 2), "title": f"{name}: {count:,} samples"}
        for name, count in zip(names, counts, strict=True)
    ]
    return {"title": title, "unit": unit, "bars": bars, "ticks": ticks}


def _rates(run: Run) -> list[tuple[str, Any, Any]]:
    """Parts that learn: (part, highest rate, rate of the last step)."""
    learn = run.recipe.get("learn", {})
    rates = {key: rate if isinstance(rate, dict) else {"lr": rate} for key, rate in learn.items()}
    return [(key, rate.get("lr"), rate.get("min_lr", 0.0)) for key, rate in rates.items()]


def _faults(run: Run) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """By code, the most frequent first: how many, and the first few."""
    counts = Counter(str(fault.get("code")) for fault in run.faults)
    return [
        (code, count, [fault for fault in run.faults if str(fault.get("code")) == code][:FAULTS])
        for code, count in counts.most_common()
    ]


def _scores_together(found: list[dict[str, Any]]) -> list[tuple[str, list[Any], list[float | None]]]:
    """Rows of the last scores side by side: name, values, and the share of the questions where it is a part."""
    rows: list[tuple[str, list[Any], list[float | None]]] = []
    if any(one["held_out_loss"] is not None for one in found):
        rows.append(("held-out loss", [one["held_out_loss"] for one in found], [None] * len(found)))
    for name in dict.fromkeys(name for one in found for name in one["headline"]):
        shares = [one["evaluated_partly"].get(name) for one in found]
        rows.append((name, [one["headline"].get(name) for one in found], shares))
    return rows
