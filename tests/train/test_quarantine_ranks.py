"""What breaks mid-run: one ledger and one loss curve on one rank, on two, and after a kill in the middle."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from tests.made import made_data, made_recipe, stage0
from tests.runs import start_ranks
from vistune import inputs
from vistune.samples import Fault
from vistune.train import metrics
from vistune.train.guarding.quarantine import Ledger
from vistune.train.keeping import checkpoint


def finish(processes: list, folder: Path, code: int = 0) -> None:
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [code] * len(processes), (
        folder / "output-0.txt"
    ).read_text()[-3000:]


@pytest.fixture
def broken(tmp_path):
    """A recipe whose index was made while all pictures were whole; then some broke, each in another way."""
    data = made_data(tmp_path / "data", rows=48)
    recipe = made_recipe(
        stage0(tmp_path / "model"),
        data,
        tmp_path / "one",
        data={"cache": str(tmp_path / "cache"), "quarantine_cap": 0.5},
        learn={"connector": 1e-3},
        train={"batch": 8, "steps": 7},
        checkpoint={"every": 2, "keep": 99},
    )
    assert not inputs.read(recipe, inputs.describe_model(recipe), tmp_path / "cache").index.faults
    images = data.parent / "images"
    (images / "0_0.png").unlink()
    for name in ("3_0.png", "2_1.png"):
        (images / name).write_bytes((images / name).read_bytes()[:60])
    for name in ("6_0.png", "6_1.png", "20_0.png"):
        (images / name).write_text("no picture")
    (images / "31_0.png").write_bytes(b"")
    (images / "44_0.png").unlink()
    (images / "44_0.png").mkdir()
    return recipe


WANTED = {0: "image_missing", **dict.fromkeys((2, 3, 6, 20, 31, 44), "image_broken")}


def ledger(run: Path) -> str:
    return (run / "quarantine.jsonl").read_text()


@pytest.mark.slow
def test_the_ledger_is_the_same_on_ranks_and_after_a_kill(broken, tmp_path):
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    finish(start_ranks(broken, tmp_path), tmp_path)
    lines = [json.loads(line) for line in ledger(one).splitlines()]
    assert {line["row"]: line["code"] for line in lines} == WANTED and len(lines) == len(WANTED)
    assert next(line["path"] for line in lines if line["row"] == 6).endswith("6_0.png")

    finish(start_ranks(broken, tmp_path, f"run={two}", world=2), tmp_path)
    assert ledger(two) == ledger(one)
    curve = [row["loss"] for row in metrics.read(one)]
    assert [row["loss"] for row in metrics.read(two)] == pytest.approx(curve, abs=1e-5)
    supervised = [[row["supervised"] for row in metrics.read(run)] for run in (one, two)]
    assert supervised[0] == supervised[1]

    processes = start_ranks(broken, tmp_path, f"run={killed}", world=2)
    while len(checkpoint.folders(killed)) < 3:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.join()
    assert len(metrics.read(killed)) < 7
    finish(start_ranks(broken, tmp_path, f"run={killed}"), tmp_path)
    assert ledger(killed) == ledger(one)
    assert [row["loss"] for row in metrics.read(killed)] == pytest.approx(curve, abs=1e-5)


@pytest.mark.slow
def test_the_checkpoint_brings_the_ledger_back(broken, tmp_path):
    """The file is lost, or has what only later steps met: the run goes on with what the checkpoint knows."""
    one = tmp_path / "one"
    finish(start_ranks(broken, tmp_path), tmp_path)
    whole = ledger(one)
    known = [len(checkpoint.read_state(folder)["quarantine"]) for folder in checkpoint.folders(one)]
    assert known[0] == 0 and known == sorted(known) and known[-1] == len(WANTED)
    middle = next(number for number, count in enumerate(known) if 0 < count < len(WANTED))
    for change in ("lost", "ahead"):
        run = tmp_path / change
        shutil.copytree(one, run)
        shutil.rmtree(run / "model")
        (run / "summary.json").unlink()
        for folder in checkpoint.folders(run)[middle + 1 :]:
            shutil.rmtree(folder)
        if change == "lost":
            (run / "quarantine.jsonl").unlink()
        finish(start_ranks(broken, tmp_path, f"run={run}"), tmp_path)
        assert ledger(run) == whole


@pytest.mark.slow
def test_above_the_cap_every_rank_stops(broken, tmp_path):
    """Twelve rows are faulty, ten are allowed; the twelve are met by two ranks in several steps."""
    images = tmp_path / "data" / "images"
    for row in (4, 8, 11, 15, 16):
        (images / f"{row}_0.png").write_bytes(b"torn")
    finish(start_ranks(broken, tmp_path, "data.quarantine_cap=0.0", world=2), tmp_path, code=2)
    said = (tmp_path / "output-0.txt").read_text() + (tmp_path / "output-1.txt").read_text()
    assert "more than the 10 that data.quarantine_cap allows" in said and "Traceback" not in said
    rows = [json.loads(line)["row"] for line in ledger(tmp_path / "one").splitlines()]
    assert len(rows) == len(set(rows)) > 10


def fault(row: int, path: str = "a.jpg", source: str = "a.json") -> Fault:
    return Fault(source=source, row=row, id=str(row), code="image_broken", reason="torn", path=path)


def test_order_and_pairs(tmp_path):
    ledger = Ledger(tmp_path, samples=100, cap=0.001, strict=False)
    ledger.add([fault(7), fault(2, "z.jpg"), fault(2, "b.jpg"), fault(1, source="b.json")])
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    assert [(line["source"], line["row"], line["path"]) for line in lines] == [
        ("a.json", 2, "b.jpg"),
        ("a.json", 7, "a.jpg"),
        ("b.json", 1, "a.jpg"),
    ]
    again = Ledger(tmp_path, samples=100, cap=0.001, strict=False)
    again.restore(ledger.state()[:1])
    assert list(again.faults) == [("a.json", 2, "image_broken")] and len(again.path.read_text().splitlines()) == 1


def test_what_no_file_can_hold_is_written_all_the_same(tmp_path):
    ledger = Ledger(tmp_path, samples=100, cap=0.001, strict=False)
    ledger.add([fault(1, "half \ud800 é.jpg")])
    assert Ledger(tmp_path, 100, 0.001, False).faults == ledger.faults
