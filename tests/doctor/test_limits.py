"""Threads and workers under a low limit of processes: the arithmetic, and a process that is really held by one."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from vistune import limits

ROOT = Path(__file__).parent.parent.parent


def test_room_enough_changes_nothing():
    assert limits.threads(None, 64) is None
    assert limits.threads(4096, 64) is None
    assert limits.threads(4096, 64, ranks=8) is not None
    assert limits.most_workers(None) is None


@pytest.mark.parametrize("free, cores, ranks, expected", [(10, 8, 1, 1), (0, 8, 1, 1), (48, 8, 1, 4), (96, 8, 2, 4)])
def test_little_room_means_few_threads(free: int, cores: int, ranks: int, expected: int):
    assert limits.threads(free, cores, ranks) == expected


def test_threads_and_workers_fit_in_what_is_left():
    for free in range(0, 400, 7):
        for ranks in (1, 2, 8):
            share = free // ranks
            workers = limits.most_workers(free, ranks)
            assert workers is not None and workers * limits.WORKER <= max(0, share - limits.RESERVE)
            threads = limits.threads(free, 16, ranks)
            assert threads is None or threads == 1 or threads * limits.POOLS <= share - limits.RESERVE


def test_the_environment_is_capped_and_never_raised(monkeypatch, capsys):
    monkeypatch.setattr(limits, "room", lambda: limits.Room(40, 100, "a limit of 100"))
    monkeypatch.setattr(limits, "cores", lambda: 64)
    monkeypatch.setattr(limits, "_said", set())
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "48"}
    limits.apply(environment)
    assert environment["OMP_NUM_THREADS"] == "1" and environment["MKL_NUM_THREADS"] == "3"
    assert all(environment[name] == "3" for name in limits.THREADS if name != "OMP_NUM_THREADS")
    assert limits.workers(8) == 6 and limits.workers(8) == 6 and limits.workers(2) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "3 thread(s)" in said[0] and "6 data worker(s)" in said[1]


def test_without_a_limit_nothing_is_touched(monkeypatch):
    monkeypatch.setattr(limits, "room", lambda: limits.Room(None))
    environment: dict[str, str] = {}
    limits.apply(environment)
    assert not environment and limits.workers(32) == 32


def test_tasks_are_counted_by_user():
    statuses = [
        "Name:\ta\nUid:\t7\t7\t7\t7\nThreads:\t12\n",
        "Uid:\t7\t0\t0\t0\nThreads:\t3\n",
        "Uid:\t8\nThreads:\t50\n",
        "",
    ]
    assert limits.tasks_of(7, statuses) == 15


def test_whom_the_limit_holds():
    assert limits.is_bound("Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\n")
    assert limits.is_bound("Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n", "         0       1000          1\n")
    assert not limits.is_bound("Uid:\t0\t0\t0\t0\nCapEff:\t0000000000000000\n")
    assert not limits.is_bound("Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000001000000\n")  # CAP_SYS_RESOURCE


def test_systems_without_such_files_or_limits(monkeypatch):
    monkeypatch.setattr(limits, "_read", lambda path: "")
    assert limits.room() == limits.Room(None)
    monkeypatch.setattr(limits, "resource", None)
    assert limits.room() == limits.Room(None) and limits.allowed("NPROC") == (limits.UNLIMITED,) * 2


def test_control_groups_of_both_versions(tmp_path: Path):
    own = tmp_path / "own"
    own.write_text("9:pids:/job\n8:cpu,cpuacct:/job\n0::/slice/job\n")
    for place, name, text in (
        ("slice", "pids.max", "100"), ("slice", "pids.current", "60"), ("slice/job", "pids.max", "max"),
        ("slice/job", "pids.current", "4"), ("pids/job", "pids.max", "90"), ("pids/job", "pids.current", "80"),
        ("slice/job", "cpu.max", "150000 100000"), ("cpu/job", "cpu.cfs_quota_us", "-1"),
        ("cpu/job", "cpu.cfs_period_us", "100000"),
    ):  # fmt: skip
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).write_text(text + "\n")
    assert [one.free for one in limits.groups_room(own, tmp_path)] == [10, 40]
    assert limits.cores(own, tmp_path) == min(2, len(os.sched_getaffinity(0)))
    assert limits.groups_room(tmp_path / "none", tmp_path) == []


LIBC = ctypes.CDLL(None)
NUMPY = "import numpy; print(numpy.ones((64, 64)).dot(numpy.ones((64, 64)))[0, 0])"
CAPPED = f"from vistune import limits; limits.apply(); {NUMPY}; print(limits.workers(8))"


def run_held(code: str, limit: int) -> subprocess.CompletedProcess:
    """Python in a process that may start only so many tasks, itself among them."""
    used = limits.tasks_of(os.getuid(), everybody()) if os.getuid() else 0
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**kept, "PYTHONPATH": str(ROOT)},
        preexec_fn=partial(hold, used + limit),
    )  # fmt: skip


def hold(limit: int) -> None:
    """In the child: the limit. The superuser, whom it would not hold, counts as another user without the two
    capabilities that exempt from it (PR_CAPBSET_DROP is 24), and may still read its files."""
    if os.getuid() == 0:
        for capability in (21, 24):  # CAP_SYS_ADMIN, CAP_SYS_RESOURCE
            LIBC.prctl(24, capability, 0, 0, 0)
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
        os.setresuid(54321, 0, 0)
    else:
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


def everybody() -> list[str]:
    return [limits._read(place / "status") for place in Path("/proc").iterdir() if place.name.isdigit()]


@pytest.fixture(scope="module")
def may_be_held() -> None:
    tried = run_held("from vistune import limits; print(limits.own_room().free)", 50)
    if tried.stdout.strip() != "49":
        pytest.skip(f"no process can be held by a limit here: {tried.stdout} {tried.stderr[-200:]}")


def test_numpy_imports_under_a_low_limit(may_be_held):
    """Two tasks: this process and one more. OpenBLAS would start one thread for each core."""
    done = run_held(CAPPED, 2)
    assert done.returncode == 0, done.stderr
    assert "pthread_create failed" not in done.stderr
    assert "1 thread(s) a library" in done.stderr and "0 data worker(s)" in done.stderr
    assert done.stdout.split() == ["64.0", "0"]


@pytest.mark.skipif(limits.cores() < 2, reason="one core needs no threads")
def test_without_the_cap_the_limit_is_hit(may_be_held):
    assert "pthread_create failed" in run_held(NUMPY, 1).stderr
