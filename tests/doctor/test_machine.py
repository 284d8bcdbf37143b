"""Memory, folders, shared memory, processes, files, Python, compiler, cache: made-up facts to findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vistune import limits
from vistune.doctor import compiler, hub, kernels, place, processes, storage
from vistune.doctor.findings import Finding, size
from vistune.doctor.storage import Place
from vistune.doctor.trial import Trial

MEMORY = "MemTotal:       131072000 kB\nMemFree:         2000 kB\nMemAvailable:   98304000 kB\n"
MOUNTS = """overlay / overlay rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sda1 /srv/local\\040disk ext4 rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
"""


def levels(found: list[Finding]) -> list[str]:
    return [one.level for one in found]


def test_sizes():
    assert [size(n) for n in (0, 1023, 1024, 1536, 2**30, 1000 * 2**20, 5 * 2**40)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "1 GiB", "1000 MiB", "5 TiB"
    ]  # fmt: skip


def test_memory_and_the_containers_share():
    assert levels(storage.memory_findings(MEMORY, None)) == ["ok"]
    small = storage.memory_findings(MEMORY, (4 << 30, 3 << 30))
    assert levels(small) == ["problem"] and "this container may use 4 GiB, 1 GiB of it left" in small[0].found
    assert levels(storage.memory_findings(MEMORY, (8 << 30, 2 << 30))) == ["warning"]
    assert storage.memory_findings("", None) == []


def test_limits_of_memory_of_both_versions(tmp_path: Path):
    assert storage.cgroup_memory(tmp_path) is None
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("400\n")
    assert storage.cgroup_memory(tmp_path) == (1000, 400)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7\n")
    assert storage.cgroup_memory(tmp_path) == (1000, 400)


@pytest.mark.parametrize(
    "folder, kind",
    [
        ("/data", "overlay"),
        ("/home/me", "nfs4"),
        ("/srv/local disk/runs", "ext4"),
        ("/homes", "overlay"),
        ("/dev/shm", "tmpfs"),
    ],
)
def test_the_file_system_of_a_folder(folder: str, kind: str):
    assert storage.kind_of(Path(folder), MOUNTS) == kind


RUNS = Place("/runs", 500 << 30, 1 << 40, 10**6, "ext4")


def test_the_run_folder():
    assert levels(storage.place_findings("run folder", RUNS)) == ["ok"]
    assert levels(storage.place_findings("run folder", replace(RUNS, free=5 << 30))) == ["warning"]
    assert levels(storage.place_findings("run folder", replace(RUNS, free=100 << 20))) == ["problem"]
    assert levels(storage.place_findings("run folder", replace(RUNS, inodes=3))) == ["problem"]
    over = storage.place_findings("run folder", replace(RUNS, kind="nfs4"))
    assert levels(over) == ["ok", "warning"] and "nfs4" in over[1].found
    closed = storage.place_findings("run folder", replace(RUNS, error="OSError: Read-only file system"))
    assert levels(closed) == ["problem"] and "Read-only" in closed[0].found


def test_writing_is_really_tried(tmp_path: Path):
    found = storage.gather(tmp_path / "not" / "there" / "yet")
    assert found.folder == str(tmp_path) and not found.error and found.free and not list(tmp_path.iterdir())
    assert storage.tried(tmp_path / "gone").startswith("FileNotFoundError")


def test_shared_memory_of_a_container():
    found = storage.shared_findings(64 << 20)
    assert levels(found) == ["warning"] and "64 MiB" in found[0].found and "--ipc=host" in found[0].fix
    assert levels(storage.shared_findings(8 << 30)) == ["ok"]


WIDE = processes.Allowed(16, 16, limits.Room(None), 65536, 65536, 1 << 40)


def of(title: str, found: list[Finding]) -> Finding:
    return next(one for one in found if one.title == title)


def test_a_machine_without_narrow_limits():
    assert set(levels(processes.findings(WIDE, {}))) == {"ok"}


def test_few_processes():
    room = limits.Room(40, 100, "RLIMIT_NPROC is 100, 60 in use")
    found = of("processes", processes.findings(replace(WIDE, room=room), {}))
    assert (
        found.level == "warning"
        and "3 thread(s) a library and 6 data worker(s)" in found.found
        and "ulimit -u" in found.fix
    )
    none = of("processes", processes.findings(replace(WIDE, room=replace(room, free=3)), {}))
    assert none.level == "problem"


def test_more_threads_than_cores():
    found = of("cores", processes.findings(replace(WIDE, cores=4), {"OMP_NUM_THREADS": "16"}))
    assert found.level == "warning" and found.fix == "export OMP_NUM_THREADS=4"
    ranks = of("cores", processes.findings(replace(WIDE, ranks=8), {"OMP_NUM_THREADS": "16"}))
    assert ranks.fix == "export OMP_NUM_THREADS=2" and "each of 8 processes" in ranks.found
    assert of("cores", processes.findings(replace(WIDE, cores=4), {})).level == "warning"
    assert of("cores", processes.findings(replace(WIDE, cores=4), {"OMP_NUM_THREADS": "4"})).level == "ok"


@pytest.mark.parametrize("files, level", [(64, "problem"), (1024, "warning"), (65536, "ok"), (1 << 62, "ok")])
def test_open_files(files: int, level: str):
    assert of("open files", processes.findings(replace(WIDE, files=files), {})).level == level


def test_forked_workers_and_tokenizers_with_threads(monkeypatch):
    assert of("data workers", processes.findings(WIDE, {"TOKENIZERS_PARALLELISM": "true"})).level == "warning"
    spawned = {"TOKENIZERS_PARALLELISM": "true", "VISTUNE_WORKERS": "spawn"}
    assert of("data workers", processes.findings(WIDE, spawned)).level == "ok"


def test_memory_that_may_be_locked():
    tight = replace(WIDE, locked=64 << 10)
    assert of("locked memory", processes.findings(tight, {}, has_infiniband=True)).level == "problem"
    assert "locked memory" not in {one.title for one in processes.findings(tight, {})}


HERE = place.Here((3, 12, 4), "/venv/bin/python", True, "x86_64", "Linux", "Linux version 6.8.0-45 (gcc)")


@pytest.mark.parametrize(
    "changes, title, level",
    [
        ({}, "Python", "ok"),
        ({"version": (3, 9, 2)}, "Python", "problem"),
        ({"version": (3, 14, 0)}, "Python", "warning"),
        ({"has_lock": False}, "Python", "warning"),
        ({"is_virtual": False}, "Python", "ok"),
        ({}, "system", "ok"),
        ({"kernel": "Linux version 5.15.90.1-microsoft-standard-WSL2"}, "system", "warning"),
        ({"system": "Windows", "kernel": ""}, "system", "warning"),
        ({"container": "docker"}, "system", "ok"),
    ],
)
def test_python_and_system(changes: dict, title: str, level: str):
    assert of(title, place.findings(replace(HERE, **changes))).level == level


def test_the_compiler():
    folder = Path("/usr/include/python3.12")
    assert levels(compiler.findings("g++", folder, "", "", "gcc")) == ["ok"]
    headers = compiler.findings("g++", folder, "tried.cpp:1:10: fatal error: Python.h: No such file", "", "gcc")
    assert (
        headers[0].title == "Python.h"
        and "python3-dev" in headers[0].fix
        and "torch.compile is off" in headers[0].found
    )
    assert levels(compiler.findings("g++", folder, "error: no stdio", "", "gcc")) == ["warning"]
    assert levels(compiler.findings("g++", folder, "", "error: omp.h", "")) == ["ok", "warning", "warning"]
    assert "CXX=nvc" in compiler.missing("nvc").found and compiler.look({"CXX": "/no/such"})[0].level == "warning"


def test_a_compiler_that_fails_is_heard(tmp_path: Path):
    script = tmp_path / "c++"
    script.write_text("#!/bin/sh\necho 'x.cpp:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1\n")
    script.chmod(0o755)
    assert [one.title for one in compiler.look({"CXX": str(script)})] == ["Python.h"]


KERNELS = {
    "device": "cuda:0",
    "dtype": "bfloat16",
    "packed": True,
    "chosen": {"language": "varlen", "vision": "varlen"},
}


def test_kernels():
    names = {"varlen": "", "flash": "flash-attn is not installed", "flex": "", "sdpa": ""}
    found = kernels.findings(Trial(0, KERNELS | {"kernels": names}))
    assert levels(found) == ["ok", "ok"] and "right, by varlen" in found[0].found
    assert found[1].found == "varlen, flex, sdpa; not flash: flash-attn is not installed"
    slow = kernels.findings(Trial(0, KERNELS | {"chosen": {"language": "sdpa", "vision": "sdpa"}}))
    assert levels(slow) == ["ok", "warning"]
    wrong = kernels.findings(Trial(0, KERNELS | {"packed": "RuntimeError: q: off by 0.7"}))
    assert levels(wrong) == ["problem"] and wrong[0].fix == "train.attention=sdpa"
    assert "SIGSEGV" in kernels.findings(Trial(-11, {"device": "cuda:0", "dtype": "bfloat16"}))[0].found
    assert kernels.findings(Trial(1)) == []


@pytest.mark.parametrize(
    "environment, folder",
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HF_HOME": "/b", "HF_HUB_CACHE": "/a"}, "/a"),
    ],
)
def test_where_the_cache_lies(environment: dict, folder: str):
    assert hub.cache_folder(environment) == Path(folder)


def test_the_cache_and_the_switches(tmp_path: Path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/model").write_bytes(b"0" * 5000)
    assert hub.measured(tmp_path / "hub") == (5000, True) and hub.measured(tmp_path / "none") == (0, True)
    cache = hub.Cache(tmp_path / "hub", True, 5000, True, RUNS)
    assert "4.88 KiB" in hub.findings(cache, {})[0].found
    assert levels(hub.findings(cache, {"HF_HUB_OFFLINE": "1"})) == ["ok", "ok"]
    assert levels(hub.findings(replace(cache, held=0), {"TRANSFORMERS_OFFLINE": "TRUE"})) == ["ok", "warning"]
    closed = replace(cache, place=replace(RUNS, error="PermissionError: Permission denied"))
    assert levels(hub.findings(closed, {})) == ["problem"] and levels(
        hub.findings(closed, {"HF_HUB_OFFLINE": "1"})
    ) == ["ok", "ok"]
    told = hub.findings(cache, {"HF_TOKEN": "secret", "HF_ENDPOINT": "https://mirror.example"})
    assert "secret" not in str(told) and "mirror.example" in told[-1].found
