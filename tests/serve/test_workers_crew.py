"""Processes of workers: started together, started again, ended together, and never left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer
from rich.console import Console

from tests.serve.served import until
from vistune import cli, cli_serve
from vistune.serve.workers import crew as crews
from vistune.serve.workers import places as where
from vistune.serve.workers import process as processes
from vistune.serve.workers import watched
from vistune.serve.workers.crew import Crew
from vistune.serve.workers.places import places
from vistune.serve.workers.process import Process
from vistune.serve.workers.worker import Worker

STUB = """
import os, signal, socket, sys
place, number = sys.argv[1], int(sys.argv[2])
if os.path.exists(place + ".bad"):
    print("error: the folder has no model; name another", file=sys.stderr)
    sys.exit(2)
listener = socket.socket(socket.AF_UNIX)
listener.bind(place)
listener.listen()
if os.path.exists(place + ".deaf"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: (print("ends", flush=True), os._exit(0)))
print("hears", os.environ.get("VISTUNE_API_KEY"), os.environ.get("OMP_NUM_THREADS"), flush=True)
while True:
    plug, _ = listener.accept()
    plug.recv(10000)
    plug.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n")
    plug.close()
"""
"""A server that is ready at once, without uvicorn, which takes half a second to import."""


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp())
    yield made
    shutil.rmtree(made)


def made(folder: Path, count: int) -> tuple[Crew, list[Process]]:
    started: list[Process] = []

    def start(worker: Worker) -> Process:
        words = [sys.executable, "-c", STUB, str(worker.place), str(worker.number)]
        started.append(Process(worker.number, words, {"OMP_NUM_THREADS": "7"}))
        return started[-1]

    return Crew([Worker(number, folder / f"{number}.sock") for number in range(count)], start), started


async def soon(true: Any, seconds: float = 10.0) -> bool:
    end = asyncio.get_running_loop().time() + seconds
    while not (found := true()) and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.01)
    return bool(found)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"LOOK": 0.02, "LOOK_AGAIN": 0.05, "PAUSE": 0.1}.items():
        monkeypatch.setattr(crews, name, seconds)


def test_one_that_dies_is_started_again_and_all_end_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISTUNE_API_KEY", "a key that workers need not know")

    async def story() -> None:
        crew, started = made(folder, 2)
        await crew.begin()
        assert [one.state for one in crew.workers] == ["ready", "ready"]
        assert await soon(lambda: "hears None 7" in started[0].last)
        first = started[0]._process.pid
        os.kill(first, signal.SIGKILL)
        assert await soon(lambda: not crew.workers[0].ready) and crew.workers[1].ready
        assert await soon(lambda: crew.workers[0].ready)
        assert crew.workers[0].starts == 2 and crew.workers[1].starts == 1
        pids = [process._process.pid for process in started]
        await crew.end(10.0)
        assert [one.state for one in crew.workers] == ["ending", "ending"]
        assert started[1].last[-1] == "ends" and not any(map(psutil.pid_exists, pids))

    asyncio.run(story())


@pytest.mark.slow
def test_it_is_tried_again_and_again_with_growing_pauses(folder: Path) -> None:
    async def story() -> None:
        crew, started = made(folder, 1)
        await crew.begin()
        Path(f"{crew.workers[0].place}.bad").touch()
        started[0]._process.kill()
        assert await soon(lambda: len(started) >= 3)
        assert crew.workers[0].state in ("dead", "starting") and not crew.workers[0].ready
        Path(f"{crew.workers[0].place}.bad").unlink()
        assert await soon(lambda: crew.workers[0].ready)
        await crew.end(10.0)

    asyncio.run(story())


def test_one_that_cannot_start_ends_all_with_its_own_sentence(folder: Path) -> None:
    async def story() -> list[int]:
        crew, started = made(folder, 2)
        Path(f"{crew.workers[1].place}.bad").touch()
        with pytest.raises(ValueError, match=r"^the folder has no model; name another$"):
            await crew.begin()
        await crew.end(10.0)
        return [process._process.pid for process in started]

    assert not any(map(psutil.pid_exists, asyncio.run(story())))


def test_one_that_does_not_end_is_ended(folder: Path) -> None:
    async def story() -> None:
        crew, started = made(folder, 1)
        Path(f"{crew.workers[0].place}.deaf").touch()
        await crew.begin()
        assert await soon(lambda: started[0].last)
        await crew.end(0.2)
        assert started[0]._process.returncode == -signal.SIGKILL

    asyncio.run(story())


def test_one_that_lives_and_is_not_ready_is_started_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "LOST", 0.2)

    async def story() -> None:
        crew, _ = made(folder, 1)
        await crew.begin()
        crew.workers[0].place.unlink()  # it listens where nobody finds it
        assert await soon(lambda: not crew.workers[0].ready)
        assert await soon(lambda: crew.workers[0].starts == 2 and crew.workers[0].ready)
        await crew.end(10.0)

    asyncio.run(story())


def test_reasons_of_an_end() -> None:
    process = Process(3, [], {})
    assert process.reason(-9) == "worker 3 ended by signal 9"
    process.last.extend(["reading", "Traceback", "error: a"])
    assert process.reason(2) == "a"
    process.last.append("Killed")
    process.last.remove("error: a")
    assert process.reason(1) == "worker 3 ended with exit code 1; its last words: Killed"


def test_a_worker_ends_when_the_front_does_however_that_is(folder: Path) -> None:
    front = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {SLEEPER!r}, {str(folder / "up")!r}], stdin=subprocess.PIPE)
print(child.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", front], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        child = psutil.Process(int(running.stdout.readline()))
        try:
            assert until((folder / "up").exists)
            running.kill()
            assert until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
        finally:
            running.kill()


SLEEPER = f"""
import pathlib, runpy, sys, time
sys.path.insert(0, {str(Path(watched.__file__).parents[3])!r})
from vistune.serve.workers import watched
def stay(*_, **__):
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
runpy.run_module = stay
watched.main()
"""


def test_threads_of_a_cpu_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where.limits, "cores", lambda: 8)
    assert [one.environment["OMP_NUM_THREADS"] for one in places(3, "cpu", sized=False, environment={})] == ["2"] * 3
    assert places(9, "cpu", sized=False, environment={})[0].environment["MKL_NUM_THREADS"] == "1"
    chosen = places(2, "cpu", sized=False, environment={"OMP_NUM_THREADS": "5"})[0]
    assert "OMP_NUM_THREADS" not in chosen.environment and chosen.device == ""


def test_each_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_found", lambda: ("cuda", 2))
    found = places(2, "auto", sized=False, environment={"CUDA_VISIBLE_DEVICES": "4,6"})
    assert [dict(one.environment) for one in found] == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]
    found = places(4, "cuda", sized=True, environment={})
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "1", "0", "1"]
    rocm = places(2, "auto", sized=False, environment={"HIP_VISIBLE_DEVICES": "1,2"})
    assert [dict(one.environment) for one in rocm] == [{"HIP_VISIBLE_DEVICES": "1"}, {"HIP_VISIBLE_DEVICES": "2"}]
    with pytest.raises(ValueError, match="--workers 3 on 2 GPUs"):
        places(3, "auto", sized=False, environment={})
    with pytest.raises(ValueError, match="--workers 2 on one GPU"):
        places(2, "cuda:1", sized=False, environment={})
    assert [one.device for one in places(2, "cuda:1", sized=True, environment={})] == ["", ""]
    monkeypatch.setattr(where, "_found", lambda: ("xpu", 2))
    assert [one.device for one in places(2, "auto", sized=False, environment={})] == ["xpu:0", "xpu:1"]


def test_workers_get_the_words_that_are_theirs() -> None:
    """All but where to listen and who may ask; the front registers with a controller, and its workers answer it."""
    serve: Any = typer.main.get_command(cli.app)
    said = ["m", "n=other folder", "--workers", "2", "--port", "0", "--host", "0.0.0.0", "--api-key", "new"]
    said += [
        "--allow-host",
        "a",
        "--adapter",
        "x=1",
        "--adapter",
        "y=2",
        "--no-page",
        "--rows",
        "4",
        "--kv-bytes",
        "1GiB",
    ]
    said += ["--llava-controller", "http://c", "--llava-allow", "h", "--root-path", "/p", "--quantize", "4bit"]
    words = cli_serve.inner_words(serve.commands["serve"].make_context("serve", list(said)))
    assert words[:3] == ["serve", "m", "n=other folder"] and words[-1] == "--no-log"
    assert not {"--workers", "--port", "--host", "--api-key", "--allow-host", "--llava-controller", "new"} & set(words)
    again = serve.commands["serve"].make_context("serve", words[1:]).params
    assert again["adapter"] == ["x=1", "y=2"] and again["page"] is False and again["log"] is False
    assert (again["rows"], again["kv_bytes"], again["root_path"], again["quantize"]) == (4, "1GiB", "/p", "4bit")
    assert again["llava"] is True and again["llava_allow"] == ["h"] and again["llava_controller"] == ""
    plain = cli_serve.inner_words(serve.commands["serve"].make_context("serve", ["m", "--workers", "2"]))
    assert plain == ["serve", "m", "--no-log"]


def test_what_a_worker_writes_is_passed_on_but_for_its_addresses_and_its_last_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.console, "err", Console(stderr=True, soft_wrap=True))

    async def story() -> Process:
        say = "print('a'); print('at /folder/0.sock'); print('b', end=''); raise SystemExit('error: why')"
        process = Process(4, [sys.executable, "-c", say], {}, hidden=("/folder",))
        await process.start()
        assert await process.ended() == 1
        return process

    assert asyncio.run(story()).reason(1) == "why"
    assert sorted(capsys.readouterr().err.splitlines()) == ["worker 4: a", "worker 4: b"]
