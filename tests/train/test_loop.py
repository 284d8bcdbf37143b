"""The loop over a model of one embedding: late rows are early rows, skips on the device are those of the host's rule,
nothing is read on the host in a step, and what ends a run says why."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vistune import recipe as recipes
from vistune.data.batch import Batch
from vistune.recipe import Rate
from vistune.train import loop
from vistune.train.guarding.quarantine import Ledger
from vistune.train.learn import Learned
from vistune.train.loop import Loop, OutOfMemory, State
from vistune.train.spreading import parallel
from vistune.train.updating.loss_scale import CLEAN, DeviceScale, LossScale
from vistune.train.updating.optimizer import Optimizer

CPU = torch.device("cpu")
TIMES = ("ms", "seconds", "tokens_per_s", "supervised_per_s", "samples_per_s", "mfu", "eta_s", "memory")


class Model(nn.Module):
    """Next tokens of an embedding; `faults` says what happens in which forward."""

    def __init__(self, faults: dict[int, Callable[[torch.Tensor], torch.Tensor]] | None = None):
        super().__init__()
        torch.manual_seed(1)
        self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)
        self.faults, self.calls = faults or {}, 0

    def forward(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        logits = self.head(self.table(batch.ids[batch.rows]))
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
        return self.faults[self.calls](loss) if self.calls in self.faults else loss


def a_batch(step: int, number: int, targets: int = 10) -> Batch:
    draw = torch.Generator().manual_seed(100 * step + number)
    ids = torch.randint(0, 32, (24,), generator=draw)
    rows = torch.arange(targets)
    key = (0, 2 * step + number)
    return Batch(ids, torch.arange(24), [14, 10], rows, ids[rows + 1], None, samples=1, tokens=24, keys=[key])


def all_batches(first: int, last: int, micros: int = 2) -> list[list[Batch]]:
    """Micro-batches of unequal numbers of targets."""
    return [[a_batch(step, i, 10 + i) for i in range(micros)] for step in range(first, last)]


def a_loop(folder, model: nn.Module, steps: int = 6, dtype=torch.float32, **sections: Any) -> tuple[Loop, list, list]:
    """A loop, the rows it reports and the states it saves."""
    tree: dict[str, Any] = {
        "run": str(folder),
        "model": {"start": "m"},
        "data": {"sources": [{"path": "d"}]},
        "learn": {"language": 1e-2},
        "train": {"precision": "fp32", "nonfinite_limit": 3},
        "checkpoint": {"every": 4},
    }
    recipe = recipes.build(tree | {k: tree.get(k, {}) | v for k, v in sections.items()}, "made")
    folder.mkdir(exist_ok=True)
    learned = [Learned(name, p, "language", Rate(lr=1e-2)) for name, p in model.named_parameters()]
    rows: list[dict[str, Any]] = []
    saved: list[dict[str, Any]] = []
    state = State(scale=LossScale(65536.0 if dtype == torch.float16 else 1.0))
    made = Loop(
        recipe=recipe,
        module=model,  # type: ignore[arg-type]
        optimizer=Optimizer(recipe.optimizer, learned, steps),
        device=CPU,
        dtype=torch.float32,
        steps=steps,
        state=state,
        ledger=Ledger(folder, 100, 0.1, False),
        flops=lambda batch: 1e6,
        peak=1e9,
        report=rows.append,
        save=lambda state: saved.append(json.loads(json.dumps(state.as_dict()))),
    )
    return made, rows, saved


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def overflow(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("inf")


@pytest.mark.parametrize("late", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_late_rows_are_early_rows(tmp_path, late, dtype):
    """With a step that is not finite in their midst. Rows are told before a save, so that its state is whole."""
    early, rows, states = a_loop(tmp_path / "a", Model({5: overflow}), dtype=dtype)
    early.run(iter(all_batches(0, 6)))
    other, later, others = a_loop(tmp_path / "b", Model({5: overflow}), dtype=dtype)
    other.late = late
    told: list[tuple[int, int]] = []
    other.report = lambda row: (later.append(row), told.append((row["step"], other.state.step)))
    other.run(iter(all_batches(0, 6)))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[2]["skipped"] == 1
    assert json.dumps(without_times(rows)) == json.dumps(without_times(later))  # NaN is no equal of itself
    assert told[0] == (1, 1 + late) and (4, 4) in told and told[-1] == (6, 6)
    for state, another in zip(states, others, strict=True):
        assert state | {"seconds": 0} == another | {"seconds": 0}
    for one, twin in zip(early.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(one, twin)


def test_a_skipped_step_is_as_if_it_had_not_been(tmp_path):
    """Weights and moments after steps 1, 2 (not finite), 3 are those of torch's optimizer after steps 1 and 3."""
    model, twin = Model({3: overflow}), Model()
    made, rows, _ = a_loop(tmp_path, model, steps=3, optimizer={"schedule": "constant", "warmup": 0, "clip": 0.5})
    made.run(iter(all_batches(0, 3)))
    oracle = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    for step in (0, 2):
        batches = all_batches(step, step + 1)[0]
        sum(twin(batch) for batch in batches).div(21).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        oracle.step()
        oracle.zero_grad()
    assert [row["nonfinite"] for row in rows] == [0, 1, 1]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_the_scale_on_the_device_is_the_hosts():
    draw = torch.Generator().manual_seed(0)
    for start in (1.0, 8.0, 65536.0):
        host = LossScale(start)
        there = DeviceScale(host, CPU)
        for flags in (torch.rand(3 * CLEAN, generator=draw) < 0.0003, torch.rand(60, generator=draw) < 0.4):
            for bad in flags:
                there.follow(bad)
                host.bad() if bad else host.good()
                assert float(there.value) == host.value
                assert not there.used or int(there.clean) == host.clean


@pytest.mark.parametrize("late", [0, 1])
def test_loss_scale_resumes_to_the_bit(tmp_path, late):
    """Overflows right before and after the save at step 4."""
    faults = {7: overflow, 9: overflow}
    whole, rows, states = a_loop(tmp_path / "a", Model(faults), steps=8, dtype=torch.float16)
    whole.late = late
    weights: list[dict[str, torch.Tensor]] = []
    save = whole.save
    whole.save = lambda state: (  # type: ignore[func-returns-value]
        save(state),
        weights.append(
            {k: v.detach().clone() for k, v in (whole.module.state_dict() | whole.optimizer.state()).items()}
        ),
    )
    whole.run(iter(all_batches(0, 8)))
    again, more, _ = a_loop(tmp_path / "b", Model({1: overflow}), steps=8, dtype=torch.float16)
    again.late, again.state = late, State.from_dict(states[0])
    for name, value in (again.module.state_dict() | again.optimizer.state()).items():
        value.copy_(weights[0][name])
    again.run(iter(all_batches(4, 8)))
    assert [row["loss_scale"] for row in rows] == [65536.0] * 3 + [32768.0] + [16384.0] * 4
    assert json.dumps(without_times(rows[4:])) == json.dumps(without_times(more))
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True))


@pytest.mark.parametrize("late", [0, 1])
def test_too_many_that_are_not_finite_name_their_own_samples(tmp_path, late):
    made, rows, saved = a_loop(tmp_path, Model(dict.fromkeys(range(3, 9), overflow)))
    made.late = late
    with pytest.raises(
        ValueError, match=r"^step 4: .*not finite, 3 steps in a row.*\(source, row\): \[\(0, 6\), \(0, 7\)\]"
    ):
        made.run(iter(all_batches(0, 6)))
    assert [row["step"] for row in rows] == [1, 2, 3] and not saved


def test_rows_that_nobody_read_are_told_when_a_run_fails(tmp_path):
    made, rows, _ = a_loop(tmp_path, Model())
    made.late = 2
    with pytest.raises(ZeroDivisionError):
        made.run(b if k < 3 else 1 / 0 for k, b in enumerate(all_batches(0, 6)))
    assert [row["step"] for row in rows] == [1, 2, 3]


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device: reads of values, shapes that depend on them."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.NAMES):
            self.met.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_step_reads_nothing_on_the_host(tmp_path, dtype, name, monkeypatch):
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr("vistune.train.updating.moments.SMALL", 64)
    made, _, _ = a_loop(tmp_path, Model(), dtype=dtype, optimizer={"name": name})
    made.late = 1
    stop = loop.Stop()
    stop.release()
    made.step(all_batches(0, 1)[0], stop)
    with Reads() as reads:
        made.step(all_batches(1, 2)[0], stop)
        assert float(torch.ones(())) == 1  # the test sees such a read
    assert reads.met == ["aten._local_scalar_dense.default"]
    assert len(list(made.rows(1))) == 1 and len(list(made.rows())) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_step_on_a_gpu_does_not_wait_and_equals_the_cpus(tmp_path, name, monkeypatch):
    """Four steps asked for while every wait of the host is an error; rows, weights and clocks after it."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr("vistune.train.updating.moments.SMALL", 64)
    host, rows, _ = a_loop(tmp_path / "a", Model(), optimizer={"name": name}, steps=4)
    host.run(iter(all_batches(0, 4, 3)))
    there, later, _ = a_loop(tmp_path / "b", Model().cuda(), optimizer={"name": name}, steps=4)
    there.device, there.late = torch.device("cuda", 0), 4
    stop = loop.Stop()
    stop.release()
    batches = [[pinned(batch) for batch in step] for step in all_batches(0, 4, 3)]
    there.step(batches[0], stop)  # kernels are loaded, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in batches[1:]:
            there.step(step, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    later.extend(there.rows())
    assert [row["loss"] for row in later] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert all(row["ms"] > 0 for row in later)
    for one, other in zip(host.module.parameters(), there.module.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=1e-4)


def pinned(batch: Batch) -> Batch:
    return replace(batch, **{k: v.pin_memory() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})


def test_micro_batches_without_targets_run_where_weights_are_sharded(tmp_path, monkeypatch):
    batches = [[a_batch(0, 0), a_batch(0, 1, targets=0)], [a_batch(1, 0, targets=0), a_batch(1, 1, targets=0)]]
    losses = []
    for sharded, calls in ((False, 1), (True, 4)):
        monkeypatch.setattr(parallel, "sharded", lambda recipe, sharded=sharded: sharded)
        made, rows, _ = a_loop(tmp_path / str(sharded), Model(), steps=2)
        made.run(iter(batches))
        assert made.module.calls == calls and [row["skipped"] for row in rows] == [0, 1]  # type: ignore[attr-defined]
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]


def test_the_watch_hears_every_phase_with_its_samples(tmp_path):
    made, _, _ = a_loop(tmp_path, Model(), steps=1)
    heard: list[tuple[str, list]] = []
    made.beat = lambda phase, keys: heard.append((phase, keys))
    made.run(iter(all_batches(0, 1)))
    both = [(0, 0), (0, 1)]
    micros = [("forward", [(0, 0)]), ("forward", [(0, 1)])]
    assert heard == [("data", []), ("forward", both), *micros, ("update", both), ("save", [])]


def no_memory(loss: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def no_host_memory(loss: torch.Tensor) -> torch.Tensor:
    return loss + torch.empty(1 << 60).sum()  # what torch's allocator on a CPU really says


def broken(loss: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("fault", [no_memory, no_host_memory])
def test_out_of_memory_is_one_sentence_with_all_it_takes_to_mend_it(tmp_path, fault):
    made, rows, _ = a_loop(tmp_path / "run", Model({4: fault}))
    kept = tmp_path / "run" / "checkpoints" / "step-00000001"
    kept.mkdir(parents=True)
    (kept / "run.json").write_text("{}")
    with pytest.raises(OutOfMemory) as caught:
        made.run(iter(all_batches(0, 6)))
    error, text = caught.value, str(caught.value)
    assert (error.step, error.lengths, error.images, error.tokens) == (2, [14, 10], 0, 24)
    assert isinstance(error, ValueError) and "\n" not in text
    for part in ("in step 2 on rank 0 (cpu), in a micro-batch", "24 tokens in segments of 14, 10; 0 image(s)"):
        assert part in text
    for part in ("peak", "step-00000001 is kept", "zero3", "adamw8bit", "4bit", "vistune preflight RECIPE"):
        assert part in text
    assert [row["step"] for row in rows] == [1]


def test_out_of_memory_in_the_update_names_the_whole_step(tmp_path, monkeypatch):
    made, _, _ = a_loop(tmp_path / "run", Model())
    monkeypatch.setattr(made.optimizer, "update", lambda *a: no_memory(torch.ones(())))
    with pytest.raises(
        OutOfMemory, match=r"in step 1 .*in the update of the weights.*There is no checkpoint yet"
    ) as caught:
        made.run(iter(all_batches(0, 6)))
    assert caught.value.lengths == [14, 10, 14, 10]


def test_another_error_stays_what_it_is(tmp_path):
    made, _, _ = a_loop(tmp_path / "run", Model({1: broken}))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        made.run(iter(all_batches(0, 6)))


def test_time_of_a_step_is_from_end_to_end(tmp_path, monkeypatch):
    """By a clock that moves 1 s in a forward, 2 s for data, 5 s in a save, which counts for no step."""
    now = [0.0]

    def tick(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("vistune.train.figures.time.perf_counter", lambda: now[0])
    model = Model()
    model.register_forward_hook(lambda *a: tick(1.0))
    for late in (0, 1):
        made, rows, _ = a_loop(tmp_path / str(late), model, steps=3, checkpoint={"every": 2})
        made.late = late
        save = made.save
        made.save = lambda state, save=save: (save(state), tick(5.0))  # type: ignore[func-returns-value]
        made.run((tick(2.0), batches)[1] for batches in all_batches(0, 3))  # type: ignore[func-returns-value]
        assert [row["ms"] for row in rows] == [4000.0] * 3 and rows[-1]["seconds"] == 12.0
        assert rows[0]["tokens_per_s"] == 12.0 and rows[0]["mfu"] == pytest.approx(2e6 / 4 / 1e9)
