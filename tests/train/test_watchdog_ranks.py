"""Two real processes over gloo, of which one is killed or hangs: both end, and what they say names it."""

import os
import re
import time

import pytest

from tests.made import made_recipe
from tests.runs import start_ranks, start_run
from vistune.data import loader
from vistune.train import metrics, stage
from vistune.train.guarding import watchdog
from vistune.train.keeping import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TIMEOUT = 12.0  # seconds, of the recipe; everything below has to end within it


@pytest.fixture
def made(start, data, tmp_path):
    return made_recipe(
        start,
        data,
        tmp_path / "run",
        train={"steps": 3000, "batch": 4},
        checkpoint={"every": 2},
        parallel={"timeout": TIMEOUT},
    )


def wait_for_steps(run, processes, count=3):
    while not (run / "metrics.jsonl").exists() or len(metrics.read(run)) < count:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.02)


def end(processes, folder):
    """Exit codes and what each rank said, when all have ended by themselves."""
    began = time.monotonic()
    for process in processes:
        process.join(TIMEOUT + 30)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"still runs {time.monotonic() - began:.0f} s later")
    said = [(folder / f"output-{rank}.txt").read_text() for rank in range(len(processes))]
    return [process.exitcode for process in processes], said, time.monotonic() - began


def hanging(monkeypatch, rank, step):
    """The data of `step` never comes on `rank`. What is patched here is patched in the processes forked from here."""
    real = loader._Steps.batches

    def batches(self, k):
        if self.rank == rank and k == step - 1:
            time.sleep(1000)
        return real(self, k)

    monkeypatch.setattr(loader._Steps, "batches", batches)


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_and_is_named(made, tmp_path, killed):
    """Rank 0 is the one on which the store is."""
    both = start_ranks(made, tmp_path, world=2)
    wait_for_steps(tmp_path / "run", both)
    both[killed].kill()
    codes, said, seconds = end(both, tmp_path)
    assert codes[killed] == -9 and codes[1 - killed] == watchdog.CODE, said[1 - killed][-3000:]
    assert seconds < TIMEOUT
    place = rf"rank {killed} \([^)]*process {both[killed].pid}\) at step \d+, (data|forward|update|save)"
    assert re.search(place, said[1 - killed]) and ": gone" in said[1 - killed]
    assert "Traceback" not in said[1 - killed]
    assert checkpoint.folders(tmp_path / "run")


@pytest.mark.slow
def test_a_rank_that_waits_for_its_data_for_ever_is_named(made, tmp_path, monkeypatch):
    hanging(monkeypatch, rank=1, step=3)
    both = start_ranks(made, tmp_path, "parallel.timeout=6", world=2)
    wait_for_steps(tmp_path / "run", both, 2)
    codes, said, seconds = end(both, tmp_path)
    assert codes == [watchdog.CODE] * 2 and seconds < TIMEOUT
    sentences = re.findall(
        r"error: (rank 1 \(.*?\) at step 3, data, samples (.*?): standing still for .*)", "".join(said)
    )
    assert len(sentences) == 1, said[0] + said[1]  # by whoever was first; the other one quotes it
    assert "Waiting for it: rank 0 (" in sentences[0][0] and "at step 3, forward" in sentences[0][0]
    assert sum(" ends because rank " in one for one in said) == 1
    assert set(sentences[0][1].split(", ")) == planned(made, tmp_path, step=3, rank=1)
    stacks = (tmp_path / "run" / "stacks-rank-1.txt").read_text()
    assert "test_watchdog_ranks.py" in stacks  # where it sleeps


def planned(recipe, folder, step, rank):
    plan = stage.read_data(recipe, stage.load_model(recipe), folder / "run").plan
    micros = plan.micro_batches(step - 1, rank, 2, recipe.train.micro_batch)
    rows = plan.index.columns["row"]
    return {f"data.json:{rows[position]}" for micro in micros for pack in micro for position in pack}


@pytest.mark.slow
def test_one_process_whose_worker_hangs(made, tmp_path, monkeypatch):
    hanging(monkeypatch, rank=0, step=2)
    made = made.model_copy(update={"data": made.data.model_copy(update={"workers": 1})})
    process = start_run(made, tmp_path, "parallel.timeout=3")
    codes, said, _ = end([process], tmp_path)
    assert codes == [watchdog.CODE]
    assert re.search(r"error: rank 0 \(.*\) at step 2, data, samples data\.json:\d+.*: standing still", said[0])
    assert len(metrics.read(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_mistake_on_one_rank_ends_the_other_with_its_sentence(made, tmp_path, monkeypatch):
    real = loader._Steps.batches

    def batches(self, k):
        if os.environ.get("RANK") == "1" and k == 2:
            raise ValueError("the picture archive is gone")
        return real(self, k)

    monkeypatch.setattr(loader._Steps, "batches", batches)
    codes, said, seconds = end(start_ranks(made, tmp_path, world=2), tmp_path)
    assert codes == [2, 2] and seconds < TIMEOUT
    assert "error: the picture archive is gone" in said[1] and "Traceback" not in said[0] + said[1]
    assert "rank 0 ends because rank 1 said: the picture archive is gone" in said[0]
