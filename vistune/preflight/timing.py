"""How long a step takes: its floating point operations over what the GPUs do of them. The share they do (MFU) comes
from what is given, from earlier runs on this machine, or from a stated default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vistune.preflight.sizes import Card
from vistune.preflight.steps import Run
from vistune.recipe import Recipe

USUAL, USUAL_TWICE = 0.40, 0.30
"""What packed training of this kind reaches by published accounts (30 to 40 %, docs/preflight.md); with every
activation computed twice, three quarters of it."""
RECENT = 50


@dataclass(frozen=True)
class Time:
    """Of a step and of the whole run, where its steps are known; what it was worked out from."""

    step: float
    run: float | None
    tflop: float
    mfu: float
    peak_tflops: float
    basis: str

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def time(recipe: Recipe, run: Run, card: Card, world: int, mfu: float = 0.0, peak_tflops: float = 0.0) -> Time | None:
    """Seconds, or None for a card whose peak is not known and not given. ValueError for an MFU that is no share."""
    if mfu > 1 or mfu < 0:
        raise ValueError(f"--mfu {mfu:g}: a share of the peak, such as 0.4")
    peak = peak_tflops or recipe.log.peak_tflops or card.tflops
    if not peak:
        return None
    share, basis = (mfu, "given") if mfu else expected(recipe)
    step = run.flops / (world * peak * 1e12 * share)
    steps = run.facts.get("steps")
    return Time(step, step * steps if steps else None, run.flops / 1e12, share, peak, basis)


def expected(recipe: Recipe) -> tuple[float, str]:
    """The MFU of earlier runs (this recipe's own first), or the usual one, and where it is from."""
    for file in (Path(recipe.run) / "metrics.jsonl", *sorted(Path("runs").glob("*/*/metrics.jsonl"))):
        if found := [row["mfu"] for row in _rows(file) if row.get("mfu") and (row.get("memory") or {}).get("peak")]:
            return median(found[-RECENT:]), f"of {file}"
    if recipe.train.checkpointing == "full":
        return USUAL_TWICE, "usual with recomputation"
    return USUAL, "usual"


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.endswith("}"):  # the last may be half written
                yield json.loads(line)
