"""Requests with pictures, many at once: `vistune serve` beside `transformers serve`, both as real processes in one run.

    python benchmarks/serve.py                     16 connections, the tiny model, five rounds
    python benchmarks/serve.py --size full         a model of 9 million parameters, pictures of 256 tokens
    python benchmarks/serve.py --quick             a smoke test: no figure of it means anything

Every connection asks about a picture of its own, streaming and greedy, and asks again when its answer has ended. No
picture is ever shown again in a later round: what a server remembers of one is of no use to it here (serve_talk.py is
about that). The contenders are asked the same in the same order, take turns round by round, and one rests while the
other works. Medians over the rounds, and what they said side by side, go to `benchmarks/results/serve_<size>.json` and
`.md` (`--out`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import made_data
import PIL.Image
import psutil
from measure import machine

HERE = Path(__file__).resolve().parent
SIZES = {"tiny": made_data.QUICK, "full": made_data.FULL}
WORDS = ("Describe the picture.", "What is this?", "Tell me about the colours you see.", "What stands on the left?")


@dataclass
class Server:
    """A contender: its process, where it listens, and what it calls the model."""

    name: str
    url: str
    model: str
    process: psutil.Process


@dataclass
class Answer:
    text: str
    tokens: int
    first: float
    """Seconds to the first text."""
    took: float
    broken: bool
    """Whether the server ended it with an error: the stock one does at bytes that are no character, which a model of
    random weights says now and then."""


def main(arguments: list[str] | None = None) -> int:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("--size", choices=SIZES, default="tiny")
    said.add_argument("--connections", type=int, nargs="+", default=[1, 16])
    said.add_argument("--each", type=int, default=4, help="requests of a connection, one after the other")
    said.add_argument("--max-tokens", type=int, default=64)
    everybodys(said)
    asked = said.parse_args(arguments)
    if asked.quick:
        asked.connections, asked.each, asked.rounds, asked.max_tokens = [2], 1, 1, 4
    out = asked.out or HERE / "results" / f"serve_{asked.size}.json"
    with tempfile.TemporaryDirectory() as made:
        result = measure(asked, Path(made))
    report(result, markdown(result), out)
    return 0


def everybodys(said: argparse.ArgumentParser) -> None:
    """What every benchmark of serving may be told."""
    said.add_argument("--rounds", type=int, default=5)
    said.add_argument("--threads", type=int, default=0, help="of a server; 0: its own choice")
    said.add_argument("--data", type=Path, help="made-up data of train_step.py, to be used again; empty: made anew")
    said.add_argument("--quick", action="store_true")
    said.add_argument("--out", type=Path)


def report(result: dict[str, Any], said: str, out: Path) -> None:
    """The figures to `out`, and what they say beside it and here."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(said, encoding="utf-8")
    print(said)


def measure(asked: argparse.Namespace, place: Path) -> dict[str, Any]:
    made = made_data.make(asked.data or place / "data", SIZES[asked.size])
    paths = sorted(made.images.rglob("*.jpg"))[:64]
    runs: list[dict[str, Any]] = []
    with ExitStack() as up:
        servers = [up.enter_context(one(made.model("8k"), asked.threads, place)) for one in (stock, ours)]
        for number in range(asked.rounds + 1):  # the first does not count
            for connections in asked.connections:
                pictures = [data_url(path, f"{number} {connections}") for path in paths]
                for server in servers:
                    run = asyncio.run(load(server, connections, pictures, asked))
                    runs += [run | {"round": number}] if number else []
    return {
        "machine": machine(),
        "size": asked.size,
        "threads": asked.threads,
        "each": asked.each,
        "max_tokens": asked.max_tokens,
        "rounds": asked.rounds,
        "runs": runs,
        "summary": [summary(runs, connections) for connections in asked.connections],
    }


def data_url(path: Path, mark: str = "") -> str:
    """The picture of this file, with some of its pixels by `mark`, so that it is another one for each."""
    drawn, few = PIL.Image.open(path).convert("RGB"), random.Random(mark).randbytes(3 * 64)
    drawn.paste(PIL.Image.frombytes("RGB", (8, 8), few).resize((32, 32)), (0, 0))
    drawn.save(data := io.BytesIO(), "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


@contextmanager
def stock(folder: Path, threads: int, place: Path) -> Iterator[Server]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    with process("transformers serve", [*command, "--device", "cpu"], port, threads, place) as (url, running):
        yield Server("transformers serve", url, str(folder), running)


@contextmanager
def ours(folder: Path, threads: int, place: Path, *more: str, name: str = "vistune serve") -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "vistune", "serve", f"bench={folder}", "--template", "v1", "--port", str(port)]
    with process(name, [*command, "--device", "cpu", *more], port, threads, place) as (url, running):
        yield Server(name, url, "bench", running)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def process(
    name: str, command: list[str], port: int, threads: int, place: Path
) -> Iterator[tuple[str, psutil.Process]]:
    """A server up and ready, ended with the block; what it prints lies in `place`."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"} | (
        {"OMP_NUM_THREADS": str(threads)} if threads else {}
    )
    url, log = f"http://127.0.0.1:{port}", place / f"{name}.log"
    with log.open("wb") as printed:
        child = subprocess.Popen(command, stdout=printed, stderr=printed, env=os.environ | quiet)
    try:
        wait_until_ready(name, url, child, log)
        yield url, psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(60)


def wait_until_ready(name: str, url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if child.poll() is not None:
            break
        try:
            ready = httpx.get(f"{url}/ready")
            if ready.status_code == 200 or (ready.status_code == 404 and httpx.get(f"{url}/health").is_success):
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.2)
    raise SystemExit(f"{name} did not start:\n{log.read_text(errors='replace')[-3000:]}")


async def load(server: Server, connections: int, pictures: Sequence[str], asked: argparse.Namespace) -> dict[str, Any]:
    """All connections at once, each with its requests one after the other."""
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    used = server.process.cpu_times()
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        began = time.perf_counter()
        found = await asyncio.gather(
            *(one_connection(client, server, number, pictures, asked) for number in range(connections))
        )
        took = time.perf_counter() - began
    now = server.process.cpu_times()
    answers = [one for some in found for one in some]
    firsts = sorted(one.first for one in answers)
    return {
        "who": server.name,
        "connections": connections,
        "requests": len(answers),
        "seconds": took,
        "cpu_seconds": now.user + now.system - used.user - used.system,
        "tokens": sum(one.tokens for one in answers),
        "first_p50": statistics.median(firsts),
        "first_p95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
        "took_p50": statistics.median(one.took for one in answers),
        "memory": server.process.memory_info().rss,
        "texts": [None if one.broken else one.text for one in answers],
    }


async def one_connection(
    client: httpx.AsyncClient, server: Server, number: int, pictures: Sequence[str], asked: argparse.Namespace
) -> list[Answer]:
    found = []
    for turn in range(asked.each):
        picture = pictures[(number * asked.each + turn) % len(pictures)]
        question = about(picture, WORDS[turn % len(WORDS)])
        found.append(await answer(client, server, [question], asked.max_tokens))
    return found


def about(picture: str, words: str) -> dict[str, Any]:
    """A message with a picture."""
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": words}]
    return {"role": "user", "content": content}


async def answer(client: httpx.AsyncClient, server: Server, messages: Sequence[dict[str, Any]], tokens: int) -> Answer:
    """One streamed answer. Whoever answers otherwise than with a stream of pieces ends the benchmark."""
    body: dict[str, Any] = {
        "model": server.model,
        "messages": list(messages),
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": True,
    }
    if server.name.startswith("vistune"):  # the stock server says how many there were without being asked
        body["stream_options"] = {"include_usage": True}
    text, count, first, broken, began = "", 0, 0.0, False, time.perf_counter()
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"{server.name}: {reply.status_code}: {(await reply.aread())[:500]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            said = json.loads(line.removeprefix("data: "))
            broken = broken or "error" in said
            count = (said.get("usage") or {}).get("completion_tokens", count)
            piece = "".join(one["delta"].get("content") or "" for one in said.get("choices", []))
            first = first or (time.perf_counter() - began if piece else 0.0)
            text += piece
    took = time.perf_counter() - began
    return Answer(text.strip(), count, first or took, took, broken)


def summary(runs: list[dict[str, Any]], connections: int) -> dict[str, Any]:
    """Medians over the rounds of each contender; vistune's factors over the other, of the same round's pairs."""
    here = [run for run in runs if run["connections"] == connections]
    names = list(dict.fromkeys(run["who"] for run in here))
    by = {name: [run for run in here if run["who"] == name] for name in names}
    keys = ("first_p50", "first_p95", "took_p50", "memory")
    rows = {
        name: {key: statistics.median(run[key] for run in found) for key in keys}
        | {
            "requests_per_s": statistics.median(run["requests"] / run["seconds"] for run in found),
            "tokens_per_s": statistics.median(run["tokens"] / run["seconds"] for run in found),
            "tokens_per_cpu_s": statistics.median(run["tokens"] / run["cpu_seconds"] for run in found),
            "broken": sum(text is None for run in found for text in run["texts"]),
        }
        for name, found in by.items()
    }
    theirs, mine = (by[name] for name in names)
    pairs = list(zip(theirs, mine, strict=True))
    factors = [a["seconds"] / b["seconds"] for a, b in pairs]
    firsts = [b["first_p95"] / a["first_p95"] for a, b in pairs]
    both = [(x, y) for a, b in pairs for x, y in zip(a["texts"], b["texts"], strict=True) if None not in (x, y)]
    return {
        "connections": connections,
        "rows": rows,
        "throughput": statistics.median(factors),
        "throughput_range": [min(factors), max(factors)],
        "first_p95": statistics.median(firsts),
        "first_p95_range": [min(firsts), max(firsts)],
        "same_texts": sum(x == y for x, y in both),
        "texts": len(both),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']['processor']}, {result['machine']['cores']} cores; the {result['size']} model, fp32, on "
        f"the CPU; each connection asks {result['each']} times about a picture, answers of at most "
        f"{result['max_tokens']} tokens, greedy, streamed; medians of {result['rounds']} rounds.",
        "",
        "| connections | who | requests / s | tokens / s | tokens / CPU-s | first text p50 | p95 | whole | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in result["summary"]:
        for name, row in one["rows"].items():
            lines.append(
                f"| {one['connections']} | {name} | {row['requests_per_s']:.2f} | {row['tokens_per_s']:.0f} | "
                f"{row['tokens_per_cpu_s']:.0f} | {row['first_p50'] * 1e3:.0f} ms | {row['first_p95'] * 1e3:.0f} ms | "
                f"{row['took_p50'] * 1e3:.0f} ms | {row['memory'] / 1e6:.0f} MB |"
            )
    lines.append("")
    for one in result["summary"]:
        (low, high), (least, most) = one["throughput_range"], one["first_p95_range"]
        lines.append(
            f"- {one['connections']} connections: {one['throughput']:.2f} times the throughput ({low:.2f} to "
            f"{high:.2f}), {one['first_p95']:.2f} of the time to the first text, p95 ({least:.2f} to "
            f"{most:.2f}); the same texts in {one['same_texts']} of {one['texts']} answers."
            + "".join(f" {name} broke {row['broken']} off." for name, row in one["rows"].items() if row["broken"])
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
