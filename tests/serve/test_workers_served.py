"""`vistune serve --workers 2` of a real, tiny model, as a process: answers, a worker killed, a drain, a sudden end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.made import stage0
from tests.serve.served import until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ASKED = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stage0(tmp_path_factory.mktemp("model"))


@dataclass
class Running:
    """The process in front, where it answers, and what it has written."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def workers(self) -> list[psutil.Process]:
        """In the order of their numbers."""
        found = [one for one in psutil.Process(self.process.pid).children() if "watched" in " ".join(one.cmdline())]
        return sorted(found, key=lambda one: one.cmdline()[-1])

    def ready(self) -> Any:
        return httpx.get(f"{self.url}/ready", timeout=20).json()

    def whole(self, **more: Any) -> Any:
        return httpx.post(f"{self.url}/v1/chat/completions", json={**ASKED, "max_tokens": 6, **more}, timeout=60)


@contextmanager
def running(folder: Path, *words: str, fails: bool = False) -> Iterator[Running]:
    log = folder / "log"
    said = [sys.executable, "-m", "vistune", "serve", *words, "--workers", "2", "--device", "cpu", "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VISTUNE_API_KEY": "", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(said, stdout=out, stderr=subprocess.STDOUT, env=environment)
    made = Running(process, log)
    try:
        if not fails:
            assert until(lambda: "  api   " in log.read_text() or process.poll() is not None, 120), log.read_text()
            made.url = next(x for x in log.read_text().splitlines() if "  api   " in x).split()[1].removesuffix("/v1")
        yield made
    finally:
        children = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait(10)
        for one in children:
            assert until(lambda one=one: not one.is_running() or one.status() == psutil.STATUS_ZOMBIE, 20)


def streamed(server: Running, tokens: int, heard: list[str], begun: threading.Event) -> None:
    asked = {**ASKED, "stream": True, "max_tokens": tokens}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked, timeout=120) as answer:
        for line in answer.iter_lines():
            begun.set()
            if line.startswith("data: "):
                heard.append(line.removeprefix("data: "))


def several(server: Running, count: int, tokens: int) -> tuple[list[list[str]], list[threading.Thread]]:
    """Streams that have begun."""
    heard: list[list[str]] = [[] for _ in range(count)]
    events = [threading.Event() for _ in range(count)]
    threads = [
        threading.Thread(target=streamed, args=(server, tokens, one, event), daemon=True)
        for one, event in zip(heard, events, strict=True)
    ]
    for thread in threads:
        thread.start()
    assert all(event.wait(60) for event in events)
    return heard, threads


def test_answers_a_worker_killed_and_a_drain(model: Path, tmp_path: Path) -> None:
    with running(tmp_path, f"tiny={model}", "--drain", "3") as server:
        assert server.ready() == {"status": "ready", "workers": {"0": "ready", "1": "ready"}}
        models = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [one["id"] for one in models] == ["tiny"]
        assert httpx.get(server.url, follow_redirects=True).headers["content-type"].startswith("text/html")
        texts = {server.whole().json()["choices"][0]["message"]["content"] for _ in range(4)}
        assert len(texts) == 1
        text = httpx.get(f"{server.url}/metrics").text
        assert all(f'vistune_requests_total{{worker="{n}",model="tiny",reason="length"}} 2.0' in text for n in "01")
        assert not any("torch" in one.path for one in psutil.Process(server.process.pid).memory_maps())

        first, second = server.workers()
        heard, threads = several(server, 4, 1200)
        first.kill()
        assert until(lambda: sum('"worker_died"' in "".join(one) for one in heard) == 2, 30)
        broken = [one for one in heard if '"worker_died"' in one[-1]]
        assert len(broken) == 2 and all(json.loads(one[-1])["error"]["type"] == "server_error" for one in broken)
        assert server.ready()["workers"]["0"] in ("dead", "starting", "not ready")
        assert server.whole().status_code == 200  # by the other
        assert until(lambda: server.ready()["workers"]["0"] == "ready", 120), server.log.read_text()
        assert second in server.workers() and first not in server.workers()
        for thread in threads:
            thread.join(120)
        assert sorted(one[-1] == "[DONE]" for one in heard) == [False, False, True, True]

        heard, threads = several(server, 8, 2000)
        server.process.send_signal(signal.SIGTERM)
        assert until(lambda: server.whole().status_code == 503, 10)
        for thread in threads:
            thread.join(30)
        assert server.process.wait(20) == 0
        for one in heard:
            assert one[-1] == "[DONE]" or json.loads(one[-1])["error"]["type"] == "server_error"


def test_no_worker_outlives_a_front_that_is_killed(model: Path, tmp_path: Path) -> None:
    with running(tmp_path, str(model)) as server:
        workers = server.workers()
        assert len(workers) == 2
        server.process.kill()
        server.process.wait(10)
        gone, left = psutil.wait_procs(workers, 20)
        assert len(gone) == 2 and not left


def test_an_end_that_is_asked_for_while_models_are_read_is_no_failure(model: Path, tmp_path: Path) -> None:
    with running(tmp_path, str(model), fails=True) as server:
        assert until(lambda: len(server.workers()) == 2, 60)
        workers = server.workers()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.log.read_text()
        assert not psutil.wait_procs(workers, 10)[1]


def test_a_model_that_cannot_be_opened_ends_all_with_its_own_sentence(tmp_path: Path) -> None:
    with running(tmp_path, str(tmp_path / "nothing"), fails=True) as server:
        assert server.process.wait(120) == 2
        *_, last = server.log.read_text().strip().splitlines()
        assert last.startswith("error: ") and "nothing" in last
