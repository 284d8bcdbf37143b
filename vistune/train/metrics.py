"""What a step reports, and who hears it: `metrics.jsonl` always, the trackers that the recipe names.

A tracker is three methods. One that fails is warned about once and let go; the run goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from vistune import console
from vistune.recipe import Recipe


class Tracker(Protocol):
    """Hears every step of a run."""

    def start(self, run: Path, recipe: Recipe) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class JsonLines:
    """`metrics.jsonl` in the run folder: one object a line, appended; a resumed run repeats the steps it redoes."""

    def start(self, run: Path, recipe: Recipe) -> None:
        path = run / "metrics.jsonl"
        torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
        self.file = path.open("a", encoding="utf-8")
        if torn:  # a killed run may have left half a line
            self.file.write("\n")

    def step(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def stop(self) -> None:
        self.file.close()


class TensorBoard:
    def start(self, run: Path, recipe: Recipe) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"))

    def step(self, row: dict[str, Any]) -> None:
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def stop(self) -> None:
        self.writer.close()


class Wandb:
    def start(self, run: Path, recipe: Recipe) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        if "WANDB_API_KEY" not in os.environ and "WANDB_MODE" not in os.environ:
            os.environ["WANDB_MODE"] = "offline"  # otherwise it asks at a prompt
        import wandb

        self.run = wandb.init(
            project=recipe.log.project, name=recipe.name, dir=str(run), config=recipe.model_dump(mode="json")
        )

    def step(self, row: dict[str, Any]) -> None:
        self.run.log(numbers(row), step=row["step"])

    def stop(self) -> None:
        self.run.finish()


class Trackio:
    def start(self, run: Path, recipe: Recipe) -> None:
        import trackio

        self.module = trackio
        trackio.init(project=recipe.log.project, name=recipe.name, config=recipe.model_dump(mode="json"))

    def step(self, row: dict[str, Any]) -> None:
        self.module.log(numbers(row), step=row["step"])

    def stop(self) -> None:
        self.module.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Report:
    """Tells all trackers of a run; made on rank 0 only."""

    def __init__(self, run: Path, recipe: Recipe):
        self.trackers: list[tuple[str, Tracker]] = []
        self.lines = JsonLines()
        self.lines.start(run, recipe)
        for name in recipe.log.trackers:
            tracker = TRACKERS[name]()
            try:
                tracker.start(run, recipe)
            except ImportError as error:
                raise ValueError(
                    f"log.trackers names {name}, which is not installed ({error}). Install vistune[track]."
                ) from None
            except Exception as error:  # noqa: BLE001 - a tracker's server may fail in any way; the run must go on
                self._let_go(name, error)
            else:
                self.trackers.append((name, tracker))

    def step(self, row: dict[str, Any]) -> None:
        self.lines.step(row)
        self._tell(lambda tracker: tracker.step(row))

    def evaluated(self, figures: dict[str, Any]) -> None:
        """The figures of an evaluation, for the trackers; nested, with their `step`."""
        self._tell(lambda tracker: tracker.step(figures))

    def stop(self) -> None:
        self.lines.stop()
        self._tell(lambda tracker: tracker.stop())

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - see above
                self.trackers.remove((name, tracker))
                self._let_go(name, error)

    def _let_go(self, name: str, error: Exception) -> None:
        console.warn(f"{name} failed ({type(error).__name__}: {error}); the run goes on, metrics.jsonl has everything")


def read(run: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl` by step; of a step that was done twice, the last. A torn line is left out."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a row, nested ones as `lr/connector`."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + name] = float(value)
    return flat


def memory(device: torch.device) -> dict[str, float]:
    """GiB of this rank: allocated, reserved and peak on an accelerator; resident and peak of the process on a CPU."""
    if device.type == "cuda":
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        status = _process_status()
        used, peak = status.get("VmRSS", 0), status.get("VmHWM", 0)
        held = used
    return {"allocated": used / 2**30, "reserved": held / 2**30, "peak": peak / 2**30}


def _process_status() -> dict[str, int]:
    """Bytes by name of /proc/self/status; empty where there is none."""
    path = Path("/proc/self/status")
    if not path.exists():
        return {}
    fields = (line.split() for line in path.read_text().splitlines())
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if len(f) == 3 and f[2] == "kB"}


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product in `dtype` on this device: the ceiling that MFU is a share of."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    best = float("inf")
    for _ in range(3):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize()
