"""The lock of a run's folder: a second run is refused, what a dead one left is not in the way."""

import json
import multiprocessing
import os
import time
from dataclasses import asdict, replace

import pytest

from tests.made import made_recipe
from vistune.train import stage
from vistune.train.guarding import lock


def dead_pid():
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
    process.start()
    process.join()
    return process.pid


def left_by(folder, **changes):
    """The lock that another holder left in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = replace(lock.Holder.here(), **changes)
    (folder / lock.NAME).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_second_run_in_the_folder_is_refused(start, data, tmp_path):
    run = tmp_path / "run"
    parent = os.getppid()  # alive, and not us
    left_by(run, pid=parent, started=lock._started(parent))
    with pytest.raises(ValueError, match=rf"run .*run: another run is at work there \(process {parent} on .*run=DIR"):
        stage.run(made_recipe(start, data, run))
    assert sorted(file.name for file in run.iterdir()) == [lock.NAME]


@pytest.mark.parametrize("changes", [{"pid": 0}, {"started": "1"}, {}], ids=["dead", "number given anew", "our own"])
def test_a_lock_whose_process_is_gone_is_taken(tmp_path, changes):
    left_by(tmp_path, **({"pid": dead_pid()} if changes == {"pid": 0} else changes))
    began = time.monotonic()
    with lock.alone(tmp_path):
        assert lock.read(tmp_path / lock.NAME) == lock.Holder.here()
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 1


def test_a_holder_on_another_machine_is_watched_for_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 0.4)
    left_by(tmp_path, machine="another", host="far")
    with lock.alone(tmp_path):
        assert lock.read(tmp_path / lock.NAME) == lock.Holder.here()
    left_by(tmp_path, machine="another", host="far")
    real = time.sleep

    def living(seconds):
        real(seconds)
        os.utime(tmp_path / lock.NAME)

    monkeypatch.setattr(time, "sleep", living)
    with pytest.raises(ValueError, match=r"another run is at work there .*on far"), lock.alone(tmp_path):
        pass


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SIGN", 0.02)
    with lock.alone(tmp_path):
        os.utime(tmp_path / lock.NAME, (0, 0))
        ends = time.monotonic() + 10
        while lock._sign(tmp_path / lock.NAME) == 0:
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_a_torn_lock_is_taken_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE", 0.2)
    (tmp_path / lock.NAME).write_text('{"host": "fa')
    with lock.alone(tmp_path):
        assert lock.read(tmp_path / lock.NAME) == lock.Holder.here()


def test_a_folder_that_is_something_else_gets_no_lock(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no run of vistune"), lock.alone(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
