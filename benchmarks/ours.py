"""vistune's real stage on the prepared data: recipe, index, plan, metrics, dry-run save and progress all attached.

One job from a JSON file, one JSON result; knows no other contender. It only listens: a step lasts from the end of the
one before to its own, and what it did is read from the run's `metrics.jsonl`.
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
from listen import Listener, attached
from measure import Memory, StepClock
from safetensors.torch import save_file
from stages import LORA, Stage, learns

import vistune
from vistune import recipe as recipes
from vistune.data.batch import Batch
from vistune.samples import NO_LOSS
from vistune.train import metrics, stage
from vistune.train.loop import Loop
from vistune.train.spreading import precision

VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, vistune, PIL)}


def run(
    model_folder: str,
    data_json: str,
    image_folder: str,
    *,
    stage: Stage,
    precision: str,
    steps: int,
    batch: int,
    lr: float,
    **more: Any,
) -> list[dict[str, Any]]:
    """One stage; per step: loss, tokens, supervised, rows (of the data file), cpu_s, wall_s. `more`: see `recipe`."""
    job = {"model": model_folder, "data": data_json, "images": image_folder, "stage": stage, "steps": steps}
    return _run({**job, "precision": precision, "batch": batch, "lr": lr, **more})[0]


def recipe(job: dict[str, Any], folder: str) -> recipes.Recipe:
    """The job as a recipe that runs in `folder`: all of a step in one forward, as the peers do, unless told less."""
    language = learns(job["stage"])
    parts = ["connector"] if language == "nothing" else ["connector", "language"]
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
        "lora": {"r": LORA.r, "alpha": LORA.alpha} if language == "adapters" else {},
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


class _Heard(Listener):
    """What a step was given, and a clock that ends a step where the loop does. With `keep_adapters` the values that
    adapters begin with are written to that file, for a peer to begin with the same."""

    def __init__(self, job: dict[str, Any]):
        self.job, self.clock, self.facts, self.computed = job, StepClock(), [], ""

    def run_begins(self, loop: Loop) -> None:
        self.computed = {torch.float32: "fp32", torch.bfloat16: "bf16"}[loop.dtype]
        if path := self.job.get("keep_adapters"):
            named = loop.module.model.named_parameters()
            save_file({name: p.detach().float().contiguous() for name, p in named if ".lora_" in name}, path)
        self.clock.start()

    def given(self, batches: list[Batch]) -> None:
        self.facts.append(_facts(batches, self.job.get("keep_ids", False)))

    def step_ends(self, number: int) -> None:
        self.clock.step()


def _run(job: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The steps, and the type in which they were computed."""
    heard, has_bf16 = _Heard(job), precision.has_bf16
    if job.get("bf16_anyway"):
        precision.has_bf16 = lambda device: True
    try:
        with tempfile.TemporaryDirectory() as folder, attached(heard):
            stage.run(recipe(job, folder))
            rows = metrics.read(folder)
    finally:
        precision.has_bf16 = has_bf16
    said = [{key: row[key] for key in ("loss", "tokens", "supervised", "padding")} for row in rows]
    whole = zip(said, heard.facts, heard.clock.steps, strict=True)
    return [{**row, **facts, **cost} for row, facts, cost in whole], heard.computed


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
    steps, computed = _run(job)
    peak = {"baseline_bytes": memory.baseline, "peak_bytes": memory.peak(), "memory": memory.how}
    return {"steps": steps, "computed": computed, **peak, "versions": VERSIONS}


if __name__ == "__main__":
    after_imports = Memory()
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(result(given, after_imports)))
