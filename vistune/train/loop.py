"""The training loop: for every step of the plan, exact loss, one update, one row of metrics.

The same for one device and for many ranks. The host does not wait for the device: what a step leaves there is read when
the next one has been asked for. Knows nothing of files: batches come in, rows go out, `save` is called when it is due.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vistune import console, ranks
from vistune.data.batch import Batch
from vistune.recipe import Recipe
from vistune.train.figures import Figures, Mark
from vistune.train.guarding import out_of_memory
from vistune.train.guarding.out_of_memory import OutOfMemory as OutOfMemory
from vistune.train.guarding.quarantine import Ledger
from vistune.train.keeping.checkpoint import seed_step
from vistune.train.metrics import memory
from vistune.train.spreading import parallel, precision
from vistune.train.step import StepModule
from vistune.train.updating.loss_scale import DeviceScale, LossScale
from vistune.train.updating.optimizer import Optimizer
from vistune.train.upload import upload

Keys = list[tuple[int, int]]
"""Samples as (number of the source, row)."""


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

    flops: float
    supervised: int
    tokens: int
    computed: int
    samples: int
    faults: int
    stop: int  # ranks that were asked to stop


@dataclass(frozen=True, slots=True)
class Asked:
    """A step that was asked of the device and whose row has not been read."""

    step: int
    consumed: int
    totals: Totals
    figures: Figures  # loss, gradient norm before clipping, 1 if one of them is not finite
    since: Mark
    memory: dict[str, float]
    keys: Keys


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
        console.warn_at_once(f"{signal.Signals(number).name}: saving after this step (Ctrl-C again ends it at once)")

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
    `asks` says after which steps `evaluate` is called, once what is due is saved.
    `ending` says that the run cannot go on: every rank then calls `save` after the same step, and it raises.
    `run` sets `stopping`, whether this rank was asked to stop, and `note`, which puts words beside the bar.
    `late`: how many steps may be asked of the device before the row of the first of them is read.
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
    beat: Callable[[str, Keys], None] = lambda phase, keys: None
    asks: Callable[[int], bool] = lambda step: False
    evaluate: Callable[[State], None] = lambda state: None
    ending: Callable[[], bool] = lambda: False
    stopping: Callable[[], bool] = lambda: False
    note: Callable[[str], None] = lambda text: None
    late: int = -1

    def __post_init__(self) -> None:
        if self.late < 0:  # a CPU has done what it was asked when the call returns
            self.late = int(self.device.type == "cuda")
        self._asked: deque[Asked] = deque()
        self._before: Mark | None = None
        self._scale: DeviceScale | None = None

    @property
    def scale(self) -> DeviceScale:
        """The loss scale on the device; made anew by `run`, from the state that was taken up."""
        if self._scale is None:
            self._scale = DeviceScale(self.state.scale, self.device)
        return self._scale

    def run(self, batches: Iterator[list[Batch]]) -> None:
        """Steps `state.step + 1 .. steps`. Raises Interrupted after a signal, ValueError when the run must stop."""
        stop = Stop()
        self.stopping = lambda: stop.signal != 0
        self._scale = None
        try:
            with console.progress("{task.fields[note]}") as bar:
                task = bar.add_task("train", total=self.steps, completed=self.state.step, note="")
                self.note = lambda text: bar.update(task, note=text)
                while self.state.step < self.steps:
                    self._before = self._before or Mark(self.device)
                    self.beat("data", [])
                    stopped = self.step(next(batches), stop)
                    due = self.state.step % self.recipe.checkpoint.every == 0 or self.state.step == self.steps
                    asked = self.asks(self.state.step) and not stopped
                    for row in self.rows(0 if due or stopped or asked else self.late):
                        self.report(row)
                        bar.update(task, completed=row["step"], note=f"loss {row['loss']:.4f}")
                    if due or stopped:
                        self.beat("save", [])
                        self.save(self.state)
                    if asked:
                        self.beat("evaluate", [])
                        self.evaluate(self.state)
                    if due or stopped or asked:
                        self._before = None  # what is between two steps is no part of the next one's time
                    if stopped and self.state.step < self.steps:
                        raise Interrupted(stop.signal or signal.SIGTERM, self.state.step)
        except Exception as error:
            self._report_rest(error)
            raise
        finally:
            stop.release()

    def step(self, batches: list[Batch], stop: Stop) -> bool:
        """Ask the device for one update over the step's micro-batches; True if a rank was asked to stop. `rows` has
        its metrics."""
        self.module.train()
        seed_step(self.recipe.train.seed, self.state.step)
        before = self._before or Mark(self.device)
        keys = [key for batch in batches for key in batch.keys]
        # Before the first collective: who waits in it has its data, and is told from a rank that is still reading.
        self.beat("forward", keys)
        totals = self._totals(batches, stop)
        if totals.faults:
            met = ranks.gather([fault for batch in batches for fault in batch.faults])
            self.ledger.add(fault for faults in met for fault in faults)
        loss = self._backward(batches, totals.supervised)
        with self._memory("in the update of the weights", batches):
            figures = self._update(totals, loss, keys)
        self.state.step += 1
        self.state.consumed += totals.samples
        self.state.tokens += totals.tokens
        self._before = figures.done
        self._asked.append(
            Asked(self.state.step, self.state.consumed, totals, figures, before, memory(self.device), keys)
        )
        return bool(totals.stop)

    def rows(self, left: int = 0) -> Iterator[dict[str, Any]]:
        """Metrics of all steps that were asked for but the last `left`, oldest first; waits for the device. What they
        tell of the run goes into `state`. Raises ValueError after too many steps that were not finite."""
        while len(self._asked) > left:
            yield self._row(self._asked.popleft())

    def _report_rest(self, error: Exception) -> None:
        """Before the run ends in `error`: the rows that nobody has read."""
        try:
            for row in self.rows():
                self.report(row)
        except Exception as another:  # noqa: BLE001 - the device may be broken; the first error is the one to tell
            error.add_note(f"the rows of the last steps could not be read: {another}")

    def _memory(self, phase: str, batches: list[Batch]) -> Any:
        return out_of_memory.named(self.state.step + 1, phase, batches, self.recipe.run, self.device)

    def _totals(self, batches: list[Batch], stop: Stop) -> Totals:
        """Over the host, where all of it is known: the device is not waited for."""
        mine = [
            sum(self.flops(b) for b in batches),
            sum(len(b.targets) for b in batches),
            sum(b.tokens for b in batches),
            sum(len(b.ids) for b in batches),
            sum(b.samples for b in batches),
            sum(len(b.faults) for b in batches),
            int(stop.signal != 0 or self.ending()),
        ]
        if ranks.world() > 1:
            mine = ranks.all_sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        return Totals(mine[0], *map(int, mine[1:]))

    def _backward(self, batches: list[Batch], supervised: int) -> Tensor:
        """Gradients of the step's mean loss over `supervised` tokens of all ranks, and that loss: fp32 scalar."""
        sharded = parallel.sharded(self.recipe)  # then every rank takes part in everything
        total = torch.zeros((), device=self.device)
        factor = self.scale.value / max(1, supervised)
        taken = [batch for batch in batches if sharded or len(batch.targets)]
        moved = upload(taken, self.device)
        for batch in taken:
            self.beat("forward", batch.keys)
            with self._memory("in a micro-batch", [batch]):
                with precision.autocast(self.recipe.train.precision, self.dtype, self.device):
                    loss = self.module(next(moved))
                if loss.requires_grad:  # a batch of text alone leaves a lone connector untouched
                    (loss * factor).backward()
            total += loss.detach()
        return ranks.all_sum(total) / max(1, supervised)

    def _update(self, totals: Totals, loss: Tensor, keys: Keys) -> Figures:
        """Sum the gradients over the ranks, clip, update. A step that is not finite is skipped, on the device; so is
        one that supervises nothing. Returns loss, gradient norm before clipping, and whether they are finite."""
        self.beat("update", keys)
        gradients = self.optimizer.gradients()
        parallel.reduce(gradients)
        parallel.average(parallel.followed(self.module).values())
        norm = parallel.norm(gradients).to(self.device, torch.float32) / self.scale.value
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        if totals.supervised:
            self.optimizer.update(self.state.step + 1, self._divisor(norm), bad.float())
            self.scale.follow(bad)
        self.optimizer.clear()
        return Figures(torch.stack([loss, norm, bad.float()]))

    def _divisor(self, norm: Tensor) -> Tensor | None:
        """What the gradients are divided by: the loss scale, times how often the largest norm goes into theirs."""
        clip = self.recipe.optimizer.clip
        if not clip:
            return self.scale.value if self.scale.used else None
        return self.scale.value * ((norm + 1e-6) / clip).clamp(min=1.0)

    def _count(self, asked: Asked, loss: float, norm: float, bad: bool) -> None:
        """How a step ended, into the state. Raises ValueError when too many were not finite."""
        state = self.state
        if asked.totals.supervised == 0:
            state.skipped += 1
        elif not bad:
            state.nonfinite_in_a_row = 0
            state.scale.good()
        else:
            state.skipped += 1
            if state.scale.bad():
                return
            state.nonfinite += 1
            state.nonfinite_in_a_row += 1
            if state.nonfinite_in_a_row >= self.recipe.train.nonfinite_limit:
                self._asked.clear()  # what came after it counts no more
                raise ValueError(
                    f"step {asked.step}: loss {loss} and gradient norm {norm} are not finite, "
                    f"{state.nonfinite_in_a_row} steps in a row. Samples of this step on rank {ranks.rank()} "
                    f"(source, row): {asked.keys[:16]}{' ...' if len(asked.keys) > 16 else ''}. "
                    "Lower the rates in [learn], or look at these rows with `vistune data show`."
                )

    def _row(self, asked: Asked) -> dict[str, Any]:
        loss, norm, bad = asked.figures.read()
        seconds = asked.figures.done.since(asked.since)
        self._count(asked, loss, norm, bool(bad))
        state, totals = self.state, asked.totals
        state.seconds += seconds
        return {
            "step": asked.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": self.optimizer.rates(asked.step),
            "tokens": totals.tokens,
            "supervised": totals.supervised,
            "samples": totals.samples,
            "padding": 1 - totals.tokens / max(1, totals.computed),
            "tokens_per_s": totals.tokens / seconds,
            "supervised_per_s": totals.supervised / seconds,
            "samples_per_s": totals.samples / seconds,
            "mfu": totals.flops / seconds / (self.peak * ranks.world()) if self.peak else 0.0,
            "ms": seconds * 1e3,
            "skipped": state.skipped,
            "nonfinite": state.nonfinite,
            "loss_scale": state.scale.value,
            "consumed_samples": asked.consumed,
            "global_batch": self.recipe.train.batch,
            "memory": asked.memory,
            "eta_s": state.seconds / asked.step * (self.steps - asked.step),
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
