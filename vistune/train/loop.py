"""The training loop: for every step of the plan, exact loss, one update, one row of metrics.

The same for one device and for many ranks. Knows nothing of files: batches come in, rows go out, and `save` is called
when a checkpoint is due.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vistune import console, ranks
from vistune.data.batch import Batch
from vistune.recipe import Recipe
from vistune.train import parallel, precision
from vistune.train.checkpoint import seed_step
from vistune.train.metrics import memory
from vistune.train.optimizer import Optimizer, scale_gradients
from vistune.train.quarantine import Ledger
from vistune.train.step import StepModule


@dataclass
class LossScale:
    """Dynamic scale for fp16: halved when a gradient overflows, doubled after 1,000 clean steps. 1 otherwise."""

    value: float = 1.0
    clean: int = 0

    def good(self) -> None:
        self.clean += 1
        if self.value > 1 and self.clean % 1000 == 0:
            self.value *= 2

    def bad(self) -> bool:
        """Halve; False when there is nothing left to halve, so that the step is a true fault."""
        self.clean = 0
        if self.value <= 1:
            return False
        self.value /= 2
        return True


@dataclass
class State:
    """Where a run stands, beside its tensors. All of it goes into the checkpoint."""

    step: int = 0
    consumed: int = 0
    tokens: int = 0
    skipped: int = 0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    seconds: float = 0.0
    scale: LossScale = field(default_factory=LossScale)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> State:
        return cls(**(saved | {"scale": LossScale(**saved["scale"])}))


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks and micro-batches of one step."""

    supervised: int
    tokens: int
    computed: int
    samples: int
    faults: int
    stop: int  # ranks that were asked to stop


class Stop:
    """SIGINT and SIGTERM ask the run to save after the step it is in; a second SIGINT ends it at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._process = os.getpid()
        self._before = {s: signal.signal(s, self._on) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a data worker inherits the handler: Ctrl-C is not for it, SIGTERM is
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        console.warn(f"{signal.Signals(number).name}: saving after this step (Ctrl-C again ends it at once)")

    def release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Interrupted(Exception):
    """The run was stopped by a signal after saving; `code` is the exit code the shell expects."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}; the same command goes on from there")
        self.code = 128 + number


@dataclass
class Loop:
    """All that a step needs. `flops` gives the floating point operations of one micro-batch, forward and backward.

    `beat` hears what this rank is about to do (data, forward, update, save) with which samples (source, row).
    `ending` says that the run cannot go on: every rank then calls `save` after the same step, and it raises.
    """

    recipe: Recipe
    module: StepModule
    optimizer: Optimizer
    device: torch.device
    dtype: torch.dtype
    steps: int
    state: State
    ledger: Ledger
    flops: Callable[[Batch], float]
    peak: float
    report: Callable[[dict[str, Any]], None]
    save: Callable[[State], None]
    beat: Callable[[str, list[tuple[int, int]]], None] = lambda phase, keys: None
    ending: Callable[[], bool] = lambda: False

    def run(self, batches: Iterator[list[Batch]]) -> None:
        """Steps `state.step + 1 .. steps`. Raises Interrupted after a signal, ValueError when the run must stop."""
        stop = Stop()
        try:
            with console.progress("{task.fields[note]}") as bar:
                task = bar.add_task("train", total=self.steps, completed=self.state.step, note="")
                while self.state.step < self.steps:
                    began = time.perf_counter()
                    self.beat("data", [])
                    row = self.step(next(batches), stop, began)
                    self.report(row)
                    bar.update(task, advance=1, note=f"loss {row['loss']:.4f}")
                    due = self.state.step % self.recipe.checkpoint.every == 0 or self.state.step == self.steps
                    if due or row["stop"]:
                        self.beat("save", [])
                        self.save(self.state)
                    if row["stop"] and self.state.step < self.steps:
                        raise Interrupted(stop.signal or signal.SIGTERM, self.state.step)
        finally:
            stop.release()

    def step(self, batches: list[Batch], stop: Stop, began: float) -> dict[str, Any]:
        """One update over the step's micro-batches; returns its metrics."""
        self.module.train()
        seed_step(self.recipe.train.seed, self.state.step)
        # Before the first collective: who waits in it has its data, and is told from a rank that is still reading.
        self.beat("forward", [key for batch in batches for key in batch.keys])
        totals = self._totals(batches, stop)
        if totals.faults:
            met = ranks.gather([fault for batch in batches for fault in batch.faults])
            self.ledger.add(fault for faults in met for fault in faults)
        loss = self._backward(batches, totals.supervised)
        norm = self._update(totals, loss, batches)
        self.state.step += 1
        self.state.consumed += totals.samples
        self.state.tokens += totals.tokens
        seconds = time.perf_counter() - began
        self.state.seconds += seconds
        return self._row(batches, totals, loss, norm, seconds)

    def _totals(self, batches: list[Batch], stop: Stop) -> Totals:
        mine = [
            sum(len(b.targets) for b in batches),
            sum(b.tokens for b in batches),
            sum(len(b.ids) for b in batches),
            sum(b.samples for b in batches),
            sum(len(b.faults) for b in batches),
            int(stop.signal != 0 or self.ending()),
        ]
        if ranks.world() > 1:
            mine = ranks.all_sum(torch.tensor(mine, device=self.device)).tolist()
        return Totals(*mine)

    def _backward(self, batches: list[Batch], supervised: int) -> float:
        """Gradients of the step's mean loss over `supervised` tokens of all ranks, and that loss."""
        total = torch.zeros((), device=self.device)
        factor = self.state.scale.value * parallel.loss_factor() / max(1, supervised)
        for batch in batches:
            if not len(batch.targets):
                continue
            self.beat("forward", batch.keys)
            with precision.autocast(self.recipe.train.precision, self.dtype, self.device):
                loss = self.module(batch.to(self.device))
            if loss.requires_grad:  # a batch of text alone leaves a lone connector untouched
                (loss * factor).backward()
            total += loss.detach()
        return float(ranks.all_sum(total)) / max(1, supervised)

    def _update(self, totals: Totals, loss: float, batches: list[Batch]) -> float:
        """Sum the gradients over the ranks, clip, update. A step that is not finite, or supervises nothing, is
        skipped and counted. Returns the gradient norm before clipping."""
        scale, clip = self.state.scale, self.recipe.optimizer.clip
        self.beat("update", [])
        gradients = self.optimizer.gradients()
        parallel.reduce(gradients)
        parallel.average(parallel.followed(self.module).values())
        norm = float(parallel.norm(gradients)) / scale.value
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self._count_nonfinite(batches, norm, loss)
        elif totals.supervised == 0:
            self.state.skipped += 1
        else:
            factor = (min(1.0, clip / (norm + 1e-6)) if clip else 1.0) / scale.value
            if factor != 1.0:
                scale_gradients(gradients, factor)
            self.optimizer.update(self.state.step + 1)
            self.state.nonfinite_in_a_row = 0
            scale.good()
        self.optimizer.clear()
        return norm

    def _count_nonfinite(self, batches: list[Batch], norm: float, loss: float) -> None:
        self.state.skipped += 1
        if self.state.scale.bad():
            return
        self.state.nonfinite += 1
        self.state.nonfinite_in_a_row += 1
        if self.state.nonfinite_in_a_row >= self.recipe.train.nonfinite_limit:
            keys = [key for b in batches for key in b.keys]
            raise ValueError(
                f"step {self.state.step + 1}: loss {loss} and gradient norm {norm} are not finite, "
                f"{self.state.nonfinite_in_a_row} steps in a row. Samples of this step on rank {ranks.rank()} "
                f"(source, row): {keys[:16]}{' ...' if len(keys) > 16 else ''}. "
                "Lower the rates in [learn], or look at these rows with `vistune data show`."
            )

    def _row(self, batches: list[Batch], totals: Totals, loss: float, norm: float, seconds: float) -> dict[str, Any]:
        mine = torch.tensor(float(sum(self.flops(b) for b in batches)), device=self.device)
        flops = float(ranks.all_sum(mine))
        state = self.state
        return {
            "step": state.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": self.optimizer.rates(state.step),
            "tokens": totals.tokens,
            "supervised": totals.supervised,
            "samples": totals.samples,
            "padding": 1 - totals.tokens / max(1, totals.computed),
            "tokens_per_s": totals.tokens / seconds,
            "supervised_per_s": totals.supervised / seconds,
            "samples_per_s": totals.samples / seconds,
            "mfu": flops / seconds / (self.peak * ranks.world()) if self.peak else 0.0,
            "ms": seconds * 1e3,
            "skipped": state.skipped,
            "nonfinite": state.nonfinite,
            "loss_scale": state.scale.value,
            "consumed_samples": state.consumed,
            "global_batch": self.recipe.train.batch,
            "memory": memory(self.device),
            "eta_s": state.seconds / state.step * (self.steps - state.step),
            "seconds": state.seconds,
            "stop": bool(totals.stop),
        }


def line(row: dict[str, Any], steps: int) -> str:
    """One console line of a step."""
    rates = " ".join(f"{key} {lr:.2e}" for key, lr in row["lr"].items())
    held = "/".join(f"{row['memory'][k]:.2f}" for k in ("allocated", "reserved", "peak"))
    minutes, seconds = divmod(int(row["eta_s"]), 60)
    return (
        f"step {row['step']}/{steps}  loss {row['loss']:.4f}  norm {row['grad_norm']:.3f}  lr {rates}  "
        f"{row['tokens_per_s']:,.0f} tok/s  {row['supervised_per_s']:,.0f} supervised/s  "
        f"{row['samples_per_s']:.1f} samples/s  padding {row['padding']:.1%}  mfu {row['mfu']:.1%}  "
        f"{row['ms']:.0f} ms  batch {row['global_batch']}  consumed {row['consumed_samples']:,}  "
        f"skipped {row['skipped']}  non-finite {row['nonfinite']}  scale {row['loss_scale']:g}  "
        f"memory {held} GiB  eta {minutes}:{seconds:02d}"
    )


def mean_last(rows: list[dict[str, Any]], count: int = 10) -> float:
    """Mean loss of the last `count` steps."""
    last = [row["loss"] for row in rows[-count:]]
    return sum(last) / len(last)
