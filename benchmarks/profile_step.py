"""Where one training step of vistune goes: torch's profiler over data, forward, backward and update, by kind of work.

    python benchmarks/profile_step.py                                   stages 1, 2 and lora in fp32 and in bf16
    python benchmarks/profile_step.py --stages 2 --precision bf16       on a CPU without bf16: in the imitated one

The real stage runs on the data of `train_step.py`; after `--dropped` steps come plain ones, whose clock is the step's,
then profiled ones, whose shares are shown. Beside them: the share of the measured matrix peak that the whole step
reaches (useful FLOPs), and that its products reach while they run, so that what they lose and what stands beside them
are told apart. Writes `benchmarks/results/profile_step_<processor>.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import kinds
import ours
import stages
import torch
from flops import step_flops
from listen import Listener, attached
from made_data import FULL, QUICK, Made, make
from made_model import TEMPLATE_NAMES
from measure import machine, matmul_peak
from stages import Stage, data_of
from torch.profiler import ProfilerActivity, profile

from vistune.data.batch import Batch
from vistune.train import stage
from vistune.train.loop import Loop
from vistune.train.spreading import precision

HERE = Path(__file__).resolve().parent
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Enough(Exception):
    """All steps that were wanted are done."""


class Watched(Listener):
    """A clock over plain steps, then the profiler over the last ones."""

    def __init__(self, dropped: int, plain: int, profiled: int):
        self.first, self.second = dropped, dropped + plain
        self.last = self.second + profiled
        self.rows: list[list[int]] = []
        self.clock: list[float] = []
        self.profile = profile(activities=[ProfilerActivity.CPU], with_flops=True)
        self.profiled_s = 0.0

    def given(self, batches: list[Batch]) -> None:
        self.rows.append([row for batch in batches for _, row in batch.keys])

    def run_begins(self, loop: Loop) -> None:
        self.mark = time.perf_counter()

    def step_begins(self, number: int) -> None:
        if number == self.second:
            self.mark = time.perf_counter()
            self.profile.__enter__()

    def step_ends(self, number: int) -> None:
        now = time.perf_counter()
        if self.first <= number < self.second:
            self.clock.append(now - self.mark)
        if number == self.last - 1:
            self.profiled_s = now - self.mark
            self.profile.__exit__(None, None, None)
            raise Enough
        if number < self.second:
            self.mark = now


def main(words: list[str] | None = None) -> int:
    asked = arguments(words)
    made = make(asked.data, QUICK if asked.quick else FULL)
    torch.set_num_threads(asked.threads)
    result: dict[str, Any] = {"machine": machine(), "threads": asked.threads, "vocab": asked.vocab, "cells": []}
    for one in asked.stages:
        for wanted in asked.precision:
            seconds = 0.1 if asked.quick else 2.0
            peak = matmul_peak(TYPES[wanted], asked.threads, seconds=seconds)  # beside the steps: the machine changes
            result["cells"].append(cell(made, one, wanted, peak, asked))
            write(asked.out, result)
            print(page(result), flush=True)
    return 0


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    split = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    add("--stages", type=lambda text: [stages.named(word) for word in split(text)], default=[1, 2, "lora"])
    add("--precision", type=split, default=["fp32", "bf16"], help="bf16 is computed as such, imitated or not")
    add("--vocab", default="8k")
    add("--dropped", type=int, default=2)
    add("--plain", type=int, default=3)
    add("--profiled", type=int, default=2)
    add("--batch", type=int, default=8)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--data", type=Path, default=HERE / ".data")
    add("--quick", action="store_true", help="tiny data and model: a smoke test")
    add("--out", type=Path, default=None)
    asked = parser.parse_args(words)
    asked.data = asked.data / ("quick" if asked.quick else "full")
    name = re.sub(r"[^a-z0-9]+", "-", machine()["processor"].lower()).strip("-")
    asked.out = asked.out or HERE / "results" / f"profile_step_{name}.json"
    return asked


def cell(made: Made, one: Stage, wanted: str, peak: float, asked: argparse.Namespace) -> dict[str, Any]:
    """One stage in one precision: seconds of a step, and of its kinds of work."""
    heard = Watched(asked.dropped, asked.plain, asked.profiled)
    job = {
        "model": str(made.model(asked.vocab)),
        "data": str(made.data(one)),
        "images": str(made.images),
        "template_name": TEMPLATE_NAMES[data_of(one)],
        "stage": one,
        "precision": wanted,
        "steps": heard.last,
        "batch": asked.batch,
        "lr": 1e-3,
    }
    has_bf16 = precision.has_bf16
    precision.has_bf16 = lambda device: True
    try:
        with tempfile.TemporaryDirectory() as folder, attached(heard), suppress(Enough):
            stage.run(ours.recipe(job, folder))
    finally:
        precision.has_bf16 = has_bf16
    config = json.loads((made.model(asked.vocab) / "config.json").read_text())
    counts = made.counts[data_of(one)]
    flops = [step_flops(config, [counts[row] for row in rows], one) for rows in heard.rows]
    works = kinds.work_of(heard.profile, "cpu")
    plain = flops[heard.first : heard.second]
    return {
        "stage": one,
        "precision": wanted,
        "peak": peak,
        "step_s": median(heard.clock),
        "mfu": median(f / s for f, s in zip(plain, heard.clock, strict=True)) / peak,
        "profiled_s": heard.profiled_s / asked.profiled,
        "kinds": {name: _per_step(work, asked.profiled) for name, work in kinds.shares(works).items()},
        "operators": [{"name": w.name, **_per_step(w, asked.profiled)} for w in works[:15]],
    }


def _per_step(work: kinds.Work, steps: int) -> dict[str, float]:
    return {"seconds": work.seconds / steps, "calls": work.calls / steps, "flops": work.flops / steps}


def page(result: dict[str, Any]) -> str:
    """Every cell as a table of kinds; what no operator accounts for is the interpreter, and reading of data."""
    said = result["machine"]
    lines = [
        "# Where a training step goes",
        "",
        f"{said['processor']}, {result['threads']} threads, torch {said['torch']}; instructions "
        f"{', '.join(said['instructions'])}; vocabulary {result['vocab']}. Own time of operators under the profiler.",
    ]
    for one in result["cells"]:
        lines += ["", f"## Stage {one['stage']}, {one['precision']}", "", _told(one), ""]
        lines += ["|kind|ms|share of the step|calls|share of the peak|", "|---|---|---|---|---|"]
        lines += [_row(name, work, one) for name, work in one["kinds"].items()]
        rest = one["profiled_s"] - sum(work["seconds"] for work in one["kinds"].values())
        lines += [_row("data, interpreter and the rest", {"seconds": rest, "calls": 0, "flops": 0}, one)]
        named = ", ".join(f"`{w['name']}` {w['seconds'] / one['profiled_s']:.1%}" for w in one["operators"][:10])
        lines += ["", f"Longest operators: {named}."]
    return "\n".join(lines) + "\n"


def _told(one: dict[str, Any]) -> str:
    products = one["kinds"].get("products", {"seconds": 0.0, "flops": 0.0})
    reached = products["flops"] / products["seconds"] / one["peak"] if products["seconds"] else 0.0
    return (
        f"A step takes {one['step_s'] * 1e3:,.0f} ms ({one['profiled_s'] * 1e3:,.0f} under the profiler) and reaches "
        f"{one['mfu']:.1%} of the matrix peak measured beside it, {one['peak'] / 1e9:,.0f} GFLOP/s. Its products take "
        f"{products['seconds'] / one['profiled_s']:.1%} of the time and reach {reached:.1%} of the peak while they run."
    )


def _row(name: str, work: dict[str, float], one: dict[str, Any]) -> str:
    reached = work["flops"] / work["seconds"] / one["peak"] if work["flops"] and work["seconds"] else None
    share = "" if reached is None else f"{reached:.1%}"
    return (
        f"|{name}|{work['seconds'] * 1e3:,.1f}|{work['seconds'] / one['profiled_s']:.1%}|{work['calls']:,.0f}|{share}|"
    )


def write(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((out, json.dumps(result, indent=1)), (out.with_suffix(".md"), page(result))):
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
