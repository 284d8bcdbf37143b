"""vistune's real stage on the prepared data: recipe, index, plan, metrics, dry-run save and progress all attached.

One job from a JSON file, one JSON result; knows no other contender. It only listens: a step ends when its row of
metrics has been written.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from measure import Memory, StepClock

import vistune
from vistune import recipe as recipes
from vistune.data.batch import Batch
from vistune.samples import NO_LOSS
from vistune.train import metrics, precision, stage

VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, vistune, PIL)}


def run(
    model_folder: str,
    data_json: str,
    image_folder: str,
    *,
    stage: int,
    precision: str,
    steps: int,
    batch: int,
    lr: float,
    **more: Any,
) -> list[dict[str, Any]]:
    """One stage; per step: loss, tokens, supervised, rows (of the data file), cpu_s, wall_s. `more`: see `recipe`."""
    job = {"model": model_folder, "data": data_json, "images": image_folder, "stage": stage, "steps": steps}
    return _run({**job, "precision": precision, "batch": batch, "lr": lr, **more})


def recipe(job: dict[str, Any], folder: str) -> recipes.Recipe:
    """The job as a recipe that runs in `folder`: all of a step in one forward, as the peers do, unless told less."""
    parts = ["connector"] if job["stage"] == 1 else ["connector", "language"]
    tree = {
        "name": "train_step",
        "run": folder,
        "model": {"start": job["model"], "template": job.get("template_name"), "image": "square"},
        "data": {
            "sources": [{"path": job["data"], "images": job["images"]}],
            "length": job.get("length", 2048),
            "pack": job.get("pack", True),
            "workers": 0,
        },
        "learn": dict.fromkeys(parts, job["lr"]),
        "optimizer": {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "clip": 1.0},
        "train": {
            "batch": job["batch"],
            "micro_batch": job.get("micro_batch") or job["batch"],
            "steps": job["steps"],
            "precision": job["precision"],
            "device": "cpu",
        },
    }
    return recipes.build(tree, "of the benchmark")


def order(job: dict[str, Any]) -> list[int]:
    """Rows of the data file in the order in which the job's steps take them: `batch` rows a step."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = recipe(job, folder)
        data = stage.read_data(wanted, stage.load_model(wanted), Path(folder))
        rows = data.index.columns["row"]
        steps = [[int(rows[i]) for pack in data.plan.step(k) for i in pack] for k in range(job["steps"])]
    short = [k for k, step in enumerate(steps) if len(step) != job["batch"]]
    if short:
        raise ValueError(f"{job['data']}: step {short[0]} is the short end of an epoch; take fewer steps or more rows")
    return [row for step in steps for row in step]


def _run(job: dict[str, Any]) -> list[dict[str, Any]]:
    clock, seen = StepClock(), []

    class Timed(metrics.Report):
        """The stage's own report; every row it writes ends a step of the clock."""

        def __init__(self, *given: Any):
            super().__init__(*given)
            clock.start()

        def step(self, row: dict[str, Any]) -> None:
            super().step(row)
            clock.step(**{key: row[key] for key in ("loss", "tokens", "supervised", "padding")}, **seen[-1])

    load_batches, report, has_bf16 = stage.load_batches, metrics.Report, precision.has_bf16
    if job.get("bf16_anyway"):
        precision.has_bf16 = lambda device: True

    def listened(*given: Any, **named: Any) -> Iterator[list[Batch]]:
        for batches in load_batches(*given, **named):
            seen.append(_facts(batches, job.get("keep_ids", False)))
            yield batches

    stage.load_batches, metrics.Report = listened, Timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            stage.run(recipe(job, folder))
    finally:
        stage.load_batches, metrics.Report, precision.has_bf16 = load_batches, report, has_bf16
    return clock.steps


def _facts(batches: list[Batch], keep_ids: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "rows": [row for batch in batches for _, row in batch.keys],
        "positions": sum(len(batch.ids) for batch in batches),
    }
    if keep_ids:
        both = [pair for batch in batches for pair in _samples(batch)]
        facts |= {"ids": [ids for ids, _ in both], "labels": [labels for _, labels in both]}
    return facts


def _samples(batch: Batch) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each sample of the batch, as a stock model would take them."""
    labels = torch.full_like(batch.ids, NO_LOSS)
    labels[batch.rows + 1] = batch.targets
    start = 0
    for length in batch.lengths[: batch.samples]:
        yield batch.ids[start : start + length].tolist(), labels[start : start + length].tolist()
        start += length


def result(job: dict[str, Any], memory: Memory) -> dict[str, Any]:
    """What the driver reads: the order of the rows, or the steps and what they cost."""
    torch.set_num_threads(job["threads"])
    if job.get("only_order"):
        return {"order": order(job)}
    steps = _run(job)
    peak = {"baseline_bytes": memory.baseline, "peak_bytes": memory.peak(), "memory": memory.how}
    return {"steps": steps, **peak, "versions": VERSIONS}


if __name__ == "__main__":
    after_imports = Memory()
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(result(given, after_imports)))
