"""Checkpoints written while the next steps run: the same bytes, steps that do not wait, faults that are said, kills."""

import json
import resource
import shutil
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.made import made_recipe
from tests.runs import finish_run, start_run
from vistune import ranks
from vistune.train import loop, metrics, stage
from vistune.train.keeping import checkpoint, saving

pytestmark = pytest.mark.usefixtures("one_thread")


def held(folder):
    """All tensors of a checkpoint by name, read without knowing what should be in it."""
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in known.items()}
    checkpoint.load(folder, tensors)
    return tensors


def assert_same(one, other):
    one, other = held(one), held(other)
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture
def made(tmp_path):
    """A few tensors, their saver, and the run's folder."""
    tensors = {f"model/{name}": torch.full((size,), float(size)) for name, size in (("a", 3), ("b", 50), ("c", 7))}
    return tensors, saving.Saver(tmp_path, keep=2), tmp_path


@pytest.mark.slow
def test_steps_go_on_while_a_checkpoint_is_written_and_do_not_change_it(start, data, tmp_path, monkeypatch):
    """The writer of step 2 is held until steps 3 and 4 are done; what it writes is what a foreground save has."""
    later, waited = threading.Event(), []
    write, step = saving._Writer.write_data, loop.Loop.step

    def slow(self, *args):
        if self.target.name == "step-00000002" and self.per_thread_copy_ahead == 0:
            waited.append((later.wait(30), checkpoint.is_whole(self.target)))
        return write(self, *args)

    def noticing(self, *args):
        row = step(self, *args)
        if self.state.step == 4:
            later.set()
        return row

    monkeypatch.setattr(saving._Writer, "write_data", slow)
    monkeypatch.setattr(loop.Loop, "step", noticing)
    both = {"every": 2, "keep": 9}
    stage.run(made_recipe(start, data, tmp_path / "behind", checkpoint=both))
    stage.run(made_recipe(start, data, tmp_path / "before", checkpoint=both | {"background": False}))
    assert waited == [(True, False)]
    behind, before = (checkpoint.folders(tmp_path / name) for name in ("behind", "before"))
    assert [p.name for p in behind] == [p.name for p in before] == [f"step-{k:08d}" for k in (0, 2, 4, 6)]
    for one, other in zip(behind, before, strict=True):
        assert_same(one, other)
        states = [checkpoint.read_state(folder) for folder in (one, other)]
        assert [state["state"]["step"] for state in states] == [checkpoint.step_of(one)] * 2
        assert states[0]["quarantine"] == states[1]["quarantine"] and states[0]["index"] == states[1]["index"]


@pytest.mark.parametrize("background", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_full_disk_is_one_sentence_soon_and_leaves_the_older_checkpoint(
    start, data, tmp_path, monkeypatch, background
):
    """Deep in the writer, where DCP wraps what is raised. The next save would be at step 8; the run ends before."""
    real = saving._Writer.write_data
    failed = threading.Event()

    def full(self, *args):
        if self.target.name == "step-00000004":
            failed.set()
            raise OSError(28, "No space left on device")
        return real(self, *args)

    step = loop.Loop.step
    monkeypatch.setattr(
        loop.Loop, "step", lambda self, *a: (self.state.step != 5 or failed.wait(30)) and step(self, *a)
    )
    monkeypatch.setattr(saving._Writer, "write_data", full)
    run = tmp_path / "run"
    saves = {"every": 4, "background": background}
    with pytest.raises(ValueError, match=r"^cannot write .*step-00000004: No space left on device .*free\)"):
        stage.run(made_recipe(start, data, run, train={"steps": 12}, checkpoint=saves))
    assert [p.name for p in checkpoint.folders(run)] == ["step-00000000"]
    assert len(metrics.read(run)) in ((5, 6, 7) if background else (3, 4))
    if background:
        monkeypatch.undo()
        assert stage.run(made_recipe(start, data, run, train={"steps": 12}))["steps"] == 12
        assert not list(run.glob("checkpoints/*.tmp"))


def test_a_disk_that_takes_no_more_bytes(start, data, tmp_path):
    """The system itself refuses the write, in the first save, before any step."""
    recipe = made_recipe(start, data, tmp_path / "run")
    stage.read_data(recipe, stage.load_model(recipe), tmp_path / "run")  # its index is written without the limit
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        process = start_run(recipe, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output = finish_run(process, tmp_path, code=2)
    assert "error: cannot write" in output and "step-00000000: File too large" in output
    assert "Traceback" not in output and not checkpoint.folders(tmp_path / "run")


def test_a_host_without_memory_for_the_copy_saves_in_the_foreground(made, monkeypatch, capsys):
    tensors, saver, run = made
    monkeypatch.setattr(saving, "_free_memory", lambda: 250)  # bytes; there are 240 of them, and a tenth stays free
    with saver:
        saver.save(1, tensors, {})
        assert checkpoint.folders(run) and not saver.background
        saver.save(2, tensors, {})
    assert capsys.readouterr().err.count("has no memory for a copy") == 1
    assert len(checkpoint.folders(run)) == 2


def test_an_allocator_that_fails_saves_in_the_foreground(made, monkeypatch):
    tensors, saver, run = made

    def fail(self, tensors):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(saving.DefaultStager, "stage", fail)
    with saver:
        saver.save(1, tensors, {})
        assert_same(checkpoint.folders(run)[0], saver.save(2, tensors, {}))


def test_free_memory_is_read_where_there_is_a_table(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert saving._free_memory(tmp_path / "meminfo") == 7 * 1024
    assert saving._free_memory(tmp_path / "none") is None


def test_one_save_is_under_way_at_a_time_and_leaving_waits(made, monkeypatch):
    tensors, saver, run = made
    writing, most = [], []
    real = saving._Writer.write_data

    def counting(self, *args):
        writing.append(self.target.name)
        most.append(len(writing))
        threading.Event().wait(0.05)
        done = real(self, *args)
        writing.remove(self.target.name)
        return done

    monkeypatch.setattr(saving._Writer, "write_data", counting)
    with saver:
        for step in range(4):
            saver.save(step, tensors, {"step": step})
    assert most == [1, 1, 1, 1]
    assert [checkpoint.step_of(p) for p in checkpoint.folders(run)] == [2, 3]
    assert not list((run / "checkpoints").glob("*.tmp"))


def test_an_error_of_the_steps_still_makes_the_last_checkpoint_whole(made, monkeypatch):
    tensors, saver, run = made
    with pytest.raises(KeyError), saver:
        saver.save(1, tensors, {})
        raise KeyError
    assert [checkpoint.step_of(p) for p in checkpoint.folders(run)] == [1]


def test_a_signal_does_not_say_that_a_checkpoint_stands_that_failed(made, monkeypatch):
    tensors, saver, run = made

    def full(self, metadata, results):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving._Writer, "finish", full)
    with pytest.raises(ValueError, match=r"cannot write .*step-00000001: No space left"), saver:
        saver.save(1, tensors, {})
        raise loop.Interrupted(15, 1)
    assert not checkpoint.folders(run)


def test_what_a_rank_saves_is_a_share_of_what_all_have(monkeypatch):
    tensors = {str(size): torch.zeros(size) for size in (100, 90, 50, 40, 30, 20, 10, 1)}
    shares = []
    monkeypatch.setattr(ranks, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(saving.share(tensors))
    assert sorted(name for one in shares for name in one) == sorted(tensors)
    sizes = [sum(len(t) for t in one.values()) for one in shares]
    assert max(sizes) <= 1.2 * sum(sizes) / 3


def test_a_checkpoint_that_is_removed_by_half_is_none(made, monkeypatch):
    tensors, saver, run = made
    with saver:
        folder = saver.save(1, tensors, {})

    def killed(path, **options):
        if path.exists():
            raise SystemExit

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        saving.remove(folder)
    assert not checkpoint.folders(run) and list(run.glob("checkpoints/*.tmp"))


def test_the_same_step_again_leaves_what_stands(made):
    tensors, saver, run = made
    with saver:
        saver.save(1, tensors, {"first": True})
        saver.save(1, {name: one + 1 for name, one in tensors.items()}, {"first": False})
    assert checkpoint.read_state(checkpoint.folders(run)[0]) == {"first": True}
    assert torch.equal(held(checkpoint.folders(run)[0])["model/a"], tensors["model/a"])


def test_a_checkpoint_that_cannot_be_read_is_named(made):
    tensors, saver, _ = made
    with saver:
        folder = saver.save(1, tensors, {})
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint .*step-00000001: cannot be read \(.+\)\. If an older"):
        checkpoint.load(folder, tensors)
    assert json.loads((folder / "run.json").read_text()) == {}
