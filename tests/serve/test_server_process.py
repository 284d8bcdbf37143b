"""`vistune serve` as a process: what a signal in the midst of eight streams does to them, and what its log says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.guarded import until
from tests.serve.served import picture, shows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent


class Child:
    """A server of its own; `said` is what it has written so far."""

    def __init__(self, *words: str, **environment: str):
        command = [sys.executable, "-m", "vistune", "serve", *words]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=variables, start_new_session=True
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def address(self, line: str = r"api   (http\S+)/v1") -> str:
        assert until(lambda: re.search(line, self.said) or self.process.poll() is not None, 120), self.said
        found = re.search(line, self.said)
        assert found, self.said
        return found[1]

    def ended(self, seconds: float) -> int:
        """Its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code


@contextmanager
def child(*words: str, **environment: str) -> Iterator[Child]:
    made = Child(*words, **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait(20)


async def streamed(client: httpx.AsyncClient, number: int, tokens: int, began: list[int]) -> list[str]:
    """The events of one answer, without `data: `."""
    body = {"messages": [shows(f"question {number}", picture(number))], "stream": True, "max_tokens": tokens}
    events = []
    async with client.stream("POST", "v1/chat/completions", json=body | {"temperature": 0}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if '"content":"' in line and number not in began:
                    began.append(number)
    return events


async def eight(url: str, tokens: int, then: Any) -> list[list[str]]:
    """Eight streams at once; `then` is called when each of them has begun."""
    began: list[int] = []
    async with httpx.AsyncClient(base_url=f"{url}/", timeout=120, trust_env=False) as client:
        tasks = [asyncio.create_task(streamed(client, number, tokens, began)) for number in range(8)]
        end = time.monotonic() + 60
        while len(began) < 8 and time.monotonic() < end and not any(task.done() for task in tasks):
            await asyncio.sleep(0.005)
        assert len(began) == 8
        then()
        return await asyncio.gather(*tasks)


@pytest.mark.parametrize(("drain", "tokens"), [(60.0, 150), (0.4, 1900)], ids=["all finish", "all are told"])
def test_a_signal_in_the_midst_of_eight_streams(start: Path, drain: float, tokens: int) -> None:
    with child(f"m={start}", "--device", "cpu", "--port", "0", "--drain", str(drain)) as server:
        url, when = server.address(), []

        def stop() -> None:
            when.append(time.monotonic())
            server.process.send_signal(signal.SIGTERM)

        answers = asyncio.run(eight(url, tokens, stop))
        assert time.monotonic() - when[0] < drain + 10, server.said
        assert server.ended(60) == 0, server.said
    for events in answers:
        parsed = [json.loads(event) for event in events if event != "[DONE]"]
        if drain < 1:
            assert parsed[-1]["error"]["code"] == "stopping" and parsed[-1]["error"]["type"] == "server_error"
        else:
            assert events[-1] == "[DONE]"
            assert [one["choices"][0]["finish_reason"] for one in parsed if one["choices"]][-1] in ("stop", "length")
    assert "Traceback" not in server.said and "stopping: 8 requests" in server.said


def test_a_second_signal_ends_at_once(start: Path) -> None:
    with child(f"m={start}", "--device", "cpu", "--port", "0") as server:
        url = server.address()

        def stop() -> None:
            server.process.send_signal(signal.SIGTERM)
            assert until(lambda: "stopping" in server.said)
            server.process.send_signal(signal.SIGINT)

        with pytest.raises(httpx.HTTPError):
            asyncio.run(eight(url, 1900, stop))
        assert server.ended(10) == 128 + signal.SIGINT


def test_a_signal_while_the_model_is_read(start: Path) -> None:
    with child(f"m={start}", "--device", "cpu", "--port", "0") as server:
        url = server.address(r"(http\S+)/health answers already")
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(20) == 0
    assert "Traceback" not in server.said


def test_nothing_of_a_request_is_in_the_log(start: Path, tmp_path: Path) -> None:
    """A key of the environment, text, a picture's bytes, a wrong one, a header, a query: none of them."""
    key, canary = "key-of-the-environment", "canary"
    with child(f"m={start}", "--device", "cpu", "--port", "0", VISTUNE_API_KEY=key) as server:
        url = server.address()
        headers = {"authorization": f"Bearer {key}", "x-canary": canary, "cookie": canary}
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
            ask = "/v1/chat/completions?canary"
            good = {"messages": [shows(canary, picture())], "max_tokens": 3, "user": canary}
            assert client.post(ask, json=good).status_code in (200, 400)
            assert client.post(ask, json={**good, "user": None}).status_code in (200, 400)
            bad = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{canary}"}}
            assert client.post(ask, json={"messages": [{"role": "user", "content": [bad]}]}).status_code == 400
            json_type = {"content-type": "application/json"}
            assert client.post(ask, content=b'{"canary', headers=json_type).status_code == 400
            assert client.post(ask, json={"canary": canary, "model": canary, "messages": canary}).status_code == 400
            assert client.get("/v1/models/canary").status_code == 404
            assert client.get("/x", headers={"authorization": f"Bearer {canary}"}).status_code == 401
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(20) == 0
    assert canary not in re.sub(r"GET /v1/models/canary 404", "", server.said) and key not in server.said
    assert len(re.findall(r" POST /v1/chat/completions \d+ [\d.]+s \d+B", server.said)) == 5
    assert "iVBOR" not in server.said and "Traceback" not in server.said
