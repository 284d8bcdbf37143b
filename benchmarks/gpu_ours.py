"""One case run by vistune: its real stage, with weights that are drawn when read and a listener beside the loop.

Nothing is saved: checkpoints and the model folder are the only things left out of the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_made
import kinds
import torch
import transformers
from listen import Listener, attached
from torch.profiler import ProfilerActivity, profile

from vistune import recipe as recipes
from vistune.data.batch import Batch
from vistune.train import metrics, stage
from vistune.train.loop import Loop
from vistune.train.spreading import precision

TRANSFORMERS = transformers.__version__
PROFILED = 2
"""Steps under the profiler."""


class Enough(Exception):
    """The steps that were wanted are done, or the time is over."""


class Timer(Listener):
    """Sizes of every step, and the time of those after the first `warmup`, at least one and at most for `seconds`."""

    def __init__(self, warmup: int, seconds: float, profiled: bool):
        self.warmup, self.seconds = warmup, seconds
        self.sizes: list[dict[str, Any]] = []
        self.waited: list[float] = []
        self.done, self.took, self.began = 0, 0.0, 0.0
        self.filled = 0
        self.profile: Any = nullcontext()
        if profiled:
            cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.profile = profile(activities=[ProfilerActivity.CPU, *cuda])
        self.profiled = profiled

    def run_begins(self, loop: Loop) -> None:
        self.loop = loop
        if loop.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.filled = torch.cuda.memory_allocated()

    def passing(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        while True:
            began = time.perf_counter()
            batches = next(steps, None)
            if batches is None:
                return
            self.waited.append(time.perf_counter() - began)
            self.sizes.append(self._sizes(batches))
            yield batches

    def _sizes(self, batches: list[Batch]) -> dict[str, Any]:
        module, total = self.loop.module, sum
        family, config = module.family, module.model.config
        forward = [
            family.flops(config, lengths=b.lengths, images=b.images, supervised=len(b.targets), learn=(), grids=b.grids)
            for b in batches
        ]
        return {
            "tokens": total(b.tokens for b in batches),
            "supervised": total(len(b.targets) for b in batches),
            "positions": total(len(b.ids) for b in batches),
            "images": total(b.images for b in batches),
            "samples": total(b.samples for b in batches),
            "micro_batches": len(batches),
            "flops": float(total(self.loop.flops(b) for b in batches)),
            "forward_flops": float(total(forward)),
            "rows": [row for b in batches for _, row in b.keys],
        }

    def step_begins(self, number: int) -> None:
        if number == self.warmup:
            wait(self.loop.device)
            self.began = time.perf_counter()
            self.profile.__enter__()
        if number > self.warmup:
            over = time.perf_counter() - self.began > self.seconds
            if over or (self.profiled and number == self.warmup + PROFILED):
                self._stop(number)

    def run_ends(self) -> None:
        self._stop(len(self.waited))

    def _stop(self, number: int) -> None:
        wait(self.loop.device)
        self.took, self.done = time.perf_counter() - self.began, number - self.warmup
        self.profile.__exit__(None, None, None)
        raise Enough


class Nothing:
    """In the place of what saves checkpoints."""

    def __init__(self, *given: Any): ...
    def save(self, *given: Any) -> None: ...
    def wait(self) -> None: ...
    def failed(self) -> bool:
        return False

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *error: Any) -> None: ...


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def result(job: dict[str, Any]) -> dict[str, Any]:
    """Run the job's case; sizes and seconds of the steps that count, the losses of all, memory, and a profile if asked.

    Raises what the stage raises; out of memory among it.
    """
    tiny = job["tiny"]
    device = torch.device("cpu" if tiny else "cuda")
    dtype = torch.float32 if tiny else torch.bfloat16
    gpu_made.answer_reads(device, dtype)
    recipe = recipe_of(job)
    peak = matmul_peak(device, recipe)
    for name, calm in (("Saver", Nothing), ("dry_run", lambda *given: None)):
        assert hasattr(stage, name), name
        setattr(stage, name, calm)
    timer = Timer(job["warmup"], job["seconds"], job.get("profile", False))
    with attached(timer), suppress(Enough):
        stage.run(recipe)
    rows = metrics.read(recipe.run)
    found = {
        "losses": [row["loss"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "checkpointing": recomputed(recipe.train),
        "compile": recipe.train.compile,
        "precision": recipe.train.precision,
        "filled_bytes": timer.filled,
        "recipe": recipes.dump(recipe),
        "order": [size["rows"] for size in timer.sizes],
        "flops": [size["flops"] for size in timer.sizes],
        **measured(timer.sizes, timer.waited, timer.warmup, timer.done, timer.took),
        **facts(device, peak),
    }
    if timer.profiled:
        found["profile"] = told(timer.profile, device, timer.took)
    return found


def recomputed(train: recipes.Train) -> str:
    """What is computed twice, in a word where vision is as the rest."""
    vision = train.checkpointing_vision
    return train.checkpointing if vision in (None, train.checkpointing) else f"{train.checkpointing}, vision {vision}"


def recipe_of(job: dict[str, Any]) -> recipes.Recipe:
    """The case's recipe with the job's words over it; what a retry changed is among them."""
    case = gpu_cases.named(job["case"], job["tiny"])
    keys = ("start", "data", "images", "run", "cache", "steps")
    tree = gpu_cases.recipe(case, job["tiny"], **{key: job[key] for key in keys})
    file = Path(job["run"]).with_suffix(".toml")
    file.write_text(recipes.dump(recipes.build(tree, job["case"])))
    words = list(job.get("words", ()))
    if job.get("checkpointing"):
        words.append(f"train.checkpointing={job['checkpointing']}")
    return recipes.read(file, words)


def measured(sizes: list[dict[str, Any]], waited: list[float], warmup: int, done: int, took: float) -> dict[str, Any]:
    """Sums over the `done` steps after the first `warmup`."""
    counted = sizes[warmup : warmup + done]
    keys = ("tokens", "supervised", "positions", "images", "samples", "micro_batches", "forward_flops")
    sums = {key: sum(size[key] for size in counted) for key in keys}
    sums["useful_flops"] = sum(size["flops"] for size in counted)
    return sums | {"steps": done, "seconds": took, "waited_s": sum(waited[warmup : warmup + done])}


def facts(device: torch.device, peak: float) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else 0,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "device_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else 0,
        "matmul_peak": peak,
    }


def matmul_peak(device: torch.device, recipe: recipes.Recipe) -> float:
    """FLOP/s of the best of several measurements, in the type that the steps compute in."""
    dtype = precision.compute_dtype(recipe.train.precision, device)
    return max(metrics.measure_peak(device, dtype) for _ in range(1 if device.type == "cpu" else 10))


def told(found: Any, device: torch.device, took: float) -> dict[str, Any]:
    """The profile as numbers: seconds by kind, and the longest kernels."""
    works = kinds.work_of(found, device.type)
    by_kind = kinds.shares(works)
    return {
        "steps": PROFILED,
        "wall_s": took,
        "busy_s": sum(work.seconds for work in works),
        "kinds": {name: work.seconds for name, work in by_kind.items()},
        "kernels": [
            {"name": work.name[:120], "kind": kinds.kind(work.name), "seconds": work.seconds, "calls": work.calls}
            for work in works[:20]
        ],
    }


def predicted(job: dict[str, Any]) -> dict[str, Any]:
    """What preflight says that the job's recipe takes: bytes in all, and of each part."""
    from vistune.preflight import check

    gpu_made.answer_reads(torch.device("cpu"), torch.float32)
    file = Path(job["run"]).with_suffix(".preflight.toml")
    file.write_text(job["recipe"])
    memory = check.check(recipes.read(file), look=False).memory
    return {"peak_bytes": memory.peak, "parts": dict(memory.parts), "at": memory.moment}
