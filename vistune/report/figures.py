"""The figures of a run as programs take them (`--json`), and in words for its page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vistune.pages.words import count, duration, figure
from vistune.report.mixture import Mixture
from vistune.report.run import Run

_LAST = 10
"""Steps whose mean is a run's last loss, as its summary has it; and those that tell its speed."""


def of(run: Run, mixture: Mixture | None) -> dict[str, Any]:
    """What a run came to; null where nothing says it. `partial`: not all steps are done."""
    last = run.rows[-1] if run.rows else {}
    losses = run.series("loss")
    return {
        "run": str(run.folder),
        "name": run.name,
        "state": run.state,
        "partial": run.state != "finished",
        "step": run.done,
        "steps": run.steps,
        "first_loss": _finite(losses[0]) if len(losses) else None,
        "loss": _mean(losses[-_LAST:]),
        "seconds": last.get("seconds"),
        "tokens": int(np.nansum(run.series("tokens"))) if run.rows else 0,
        "samples": last.get("consumed_samples"),
        "tokens_per_s": _middle(run.series("tokens_per_s")),
        "mfu": _middle(run.series("mfu")),
        "memory_peak_gib": _most(run.series("memory", "peak")),
        "padding": _mean(run.series("padding")),
        "skipped": last.get("skipped"),
        "nonfinite": last.get("nonfinite"),
        "quarantined": len(run.faults),
        "checkpoints": [one.step for one in run.checkpoints],
        "data": mixture.as_dict() if mixture else None,
        **_evaluated(run),
    }


def tiles(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The first look: (value, what it is)."""
    of_steps = f"of {count(found['steps'])} steps" if found["partial"] else "steps"
    made = [
        (count(found["step"]), of_steps),
        (figure(found["loss"]), f"loss, mean of the last {_LAST} steps; first {figure(found['first_loss'])}"),
    ]
    if found["held_out_loss"] is not None:
        made.append((figure(found["held_out_loss"]), "held-out loss"))
    whole = found["headline"].items()
    made += [
        (figure(value), f"{name}{', on a part' if name in found['evaluated_partly'] else ''}") for name, value in whole
    ]
    if found["seconds"] is not None:
        speed = f", {count(found['tokens_per_s'])} a second" if found["tokens_per_s"] else ""
        made += [
            (duration(found["seconds"]), "of training"),
            (_large(found["tokens"]), f"tokens{speed}"),
        ]
    if found["mfu"]:
        made.append((f"{found['mfu']:.1%}", "MFU, median"))
    if found["memory_peak_gib"] is not None:
        made.append((f"{found['memory_peak_gib']:.2f} GiB", "memory at most, first device"))
    made.append((count(found["quarantined"]), "rows set aside"))
    return made


def verdict(run: Run) -> str:
    """How the run stands, as one sentence."""
    if run.state == "finished":
        return f"Finished: {count(run.done)} steps."
    if run.state == "not begun":
        return "Partial: no step is done yet" + (", and the run is at work." if run.alive else ".")
    where = f"step {count(run.done)} of {count(run.steps)}"
    if run.state == "going":
        left = run.rows[-1].get("eta_s", 0.0)
        return f"Partial: the run is at work, {where} is done, about {duration(left)} are left."
    saved = f"from its checkpoint of step {count(run.checkpoints[-1].step)}" if run.checkpoints else "from the start"
    return f"Partial: stopped after {where}; the same command goes on {saved}."


def remarks(run: Run, mixture: Mixture | None) -> list[str]:
    """What was odd, one sentence each."""
    made, last = [], run.rows[-1] if run.rows else {}
    if bad := last.get("nonfinite"):
        made.append(f"Steps skipped because loss or gradient was not finite: {count(bad)} (red marks).")
    if run.torn:
        made.append(f"Lines of its files that are cut short, as a kill leaves them, and left out: {count(run.torn)}.")
    if not run.recipe:
        made.append("recipe.toml is missing or cannot be read.")
    if not run.rows:
        made.append("metrics.jsonl has no step.")
    if mixture is None:
        made.append("The index of its data is not there any more, so its mixture cannot be shown.")
    if not run.evaluations:
        made.append("It was not evaluated; [evaluate] in the recipe does that.")
    return made


def _evaluated(run: Run) -> dict[str, Any]:
    """The last value of everything that was evaluated, and the best checkpoint."""
    headline: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    partial: dict[str, float] = {}
    held: float | None = None
    for row in run.evaluations:
        held = row.get("held_out_loss") if row.get("held_out_loss") is not None else held
        headline |= row.get("headline") or {}
        scores |= row.get("scores") or {}
        partial |= row.get("partial") or {}
    partly = {name: share for name, share in partial.items() if isinstance(share, int | float) and share < 1}
    return {
        "held_out_loss": held,
        "headline": headline,
        "scores": scores,
        "evaluated_partly": partly,
        "evaluations": len(run.evaluations),
        "best": run.best or None,
    }


def _large(value: float) -> str:
    for least, name in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= least:
            return f"{value / least:.3g}{name}"
    return count(value)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: np.ndarray) -> float | None:
    good = values[np.isfinite(values)]
    return float(good.mean()) if len(good) else None


def _middle(values: np.ndarray) -> float | None:
    good = values[np.isfinite(values)]
    return float(np.median(good)) if len(good) else None


def _most(values: np.ndarray) -> float | None:
    good = values[np.isfinite(values)]
    return float(good.max()) if len(good) else None
