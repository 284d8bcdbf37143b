"""A server under load and attack for a while: what leaks, what falters, what gets through.

    python benchmarks/serve_soak.py                ten minutes, 32 connections, every fifth request a fault
    python benchmarks/serve_soak.py --minutes 1    a first look: memory is compared after a shorter warm-up
    python benchmarks/serve_soak.py --quick        a smoke test of seconds

`vistune serve` runs as a process of its own with a key and a tiny model; good requests (text, pictures, several turns,
fetched pictures, streams) and `serve_faults.FAULTS` come over all connections, a third process asks for /health every
250 ms. Ends with 1 where a line of the verdict fails. Goes to `benchmarks/results/serve_soak.json` and `.md` (`--out`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import made_data
import psutil
import serve_faults as faults
from measure import machine
from serve import free_port
from serve_made import CERTIFICATES, ROOT, Canary, PictureHost, Secret, as_json, saved

HERE = Path(__file__).resolve().parent
KEY = "soaked-in-faults-3f9c"
STALL, FETCH, BODY, DRAIN = 5.0, 3.0, 8 << 20, 10.0
"""Given to the server: shorter and smaller than its own, so that ten minutes see more of each."""
SLACK = 48 << 20
"""Bytes of resident memory that do not count as a leak, or a tenth if that is more: allocators keep some back."""
WAIT = 180.0
"""Seconds after which a request counts as hung."""


@dataclass
class Seen:
    """What came of the requests."""

    said: Counter[tuple[str, faults.Said]] = field(default_factory=Counter)
    escaped: list[str] = field(default_factory=list)
    texts: dict[str, Counter[str]] = field(default_factory=dict)
    took: list[float] = field(default_factory=list)
    tokens: int = 0
    asked: int = 0

    def wrong(self, kind: str, reply: faults.Reply, why: str = "") -> None:
        self.escaped.append(f"{kind}: {reply.status} {why or reply.body[:300].decode(errors='replace')}")


def main(arguments: list[str] | None = None) -> int:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("--minutes", type=float, default=10.0)
    said.add_argument("--warm-up", type=float, default=0.0, help="seconds; 0: a minute, or a quarter of the time")
    said.add_argument("--connections", type=int, default=32)
    said.add_argument("--faults", type=float, default=0.2, help="their share of all requests")
    said.add_argument("--seed", type=int, default=0)
    said.add_argument("--threads", type=int, default=0, help="of the server; 0: its own choice")
    said.add_argument("--port", type=int, default=0)
    said.add_argument("--model", type=Path, help="a model folder; empty: a tiny one is made")
    said.add_argument("--word", action="append", default=[], help="more words for `vistune serve`")
    said.add_argument("--quick", action="store_true")
    said.add_argument("--out", type=Path, default=HERE / "results" / "serve_soak.json")
    asked = said.parse_args(arguments)
    if asked.quick:
        asked.minutes, asked.connections = 0.1, 4
    asked.warm_up = asked.warm_up or min(60.0, 15 * asked.minutes)
    with tempfile.TemporaryDirectory() as place:
        result = asyncio.run(soak(asked, Path(place)))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    asked.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0 if all(line["holds"] for line in result["verdict"]) else 1


async def soak(asked: argparse.Namespace, place: Path) -> dict[str, Any]:
    folder = asked.model or made_data.make(place / "data", made_data.QUICK).model("8k")
    secret, picture = Secret(place / "canary.png", saved(99)), saved(7)
    async with Canary() as canary, PictureHost(picture, canary.port) as host:
        names = [f"{name}:{host.port}" for name in ("pictures.test", "both.test", "nowhere.test")]
        names += [f"{name}:{canary.port}" for name in ("inside.test", "localhost")]
        port = asked.port or free_port()
        with serving(asked, folder, port, names, place) as server:
            at = faults.Target(port, KEY, "soaked", host.port, canary.port, str(secret.path), STALL, BODY)
            await ready(at, server, place)
            seen, samples, health = await loaded(at, server, asked)
            end = await rested(at, server)
            code = await asyncio.to_thread(ended, server)
        touched = {"canary": canary.hits, "secret": secret.opened, "host": dict(host.asked)}
    log = (place / "server.log").read_text(errors="replace")
    leaked = [word for word in (KEY, str(secret.path), "iVBORw0KGgo", *faults.WORDS) if word in log]
    return summary(asked, seen, samples, health, end, touched, code, leaked)


@contextmanager
def serving(
    asked: argparse.Namespace, folder: Path, port: int, names: list[str], place: Path
) -> Iterator[psutil.Process]:
    """`vistune serve` with the made names, ended with the block."""
    words = [sys.executable, str(HERE / "serve_made.py"), "serve", f"soaked={folder}", "--port", str(port)]
    words += [word for name in names for word in ("--picture-host", name)]
    words += ["--template", "v1", "--device", "cpu", "--stall", str(STALL), "--fetch", str(FETCH), "--body", str(BODY)]
    words += ["--drain", str(DRAIN), *asked.word]
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "SSL_CERT_FILE": str(CERTIFICATES / "ca.pem")}
    quiet |= {"VISTUNE_API_KEY": KEY} | ({"OMP_NUM_THREADS": str(asked.threads)} if asked.threads else {})
    with (place / "server.log").open("wb") as log:
        child = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | quiet)
    try:
        yield psutil.Process(child.pid)
    finally:
        child.kill()
        child.wait(60)


def ended(server: psutil.Process) -> int | None:
    """Its exit code after SIGTERM; None: it had to be killed."""
    server.send_signal(signal.SIGTERM)
    try:
        return server.wait(DRAIN + 20)
    except psutil.TimeoutExpired:
        return None


async def ready(at: faults.Target, server: psutil.Process, place: Path) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        try:
            if (await got(at, "/ready")).status == 200:
                return
        except OSError:
            pass  # it does not listen yet
        await asyncio.sleep(0.2)
    raise SystemExit(f"the server did not start:\n{(place / 'server.log').read_text(errors='replace')[-3000:]}")


async def got(at: faults.Target, path: str) -> faults.Reply:
    wire = await faults.Wire.open(at)
    try:
        return await wire.ask(faults.head(at, None, method="GET", path=path))
    finally:
        wire.close()


# The load


async def loaded(
    at: faults.Target, server: psutil.Process, asked: argparse.Namespace
) -> tuple[Seen, list[dict[str, float]], list[dict[str, float]]]:
    """Everything at once for as long as was asked for: what came of it, the server's size by second, its health."""
    seen, until = Seen(), time.monotonic() + 60 * asked.minutes
    samples: list[dict[str, float]] = []
    probe = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / "serve_probe.py"), str(at.port), "0.25"), stdout=subprocess.PIPE
    )
    watch = asyncio.create_task(watching(server, samples))
    try:
        await asyncio.gather(
            *(
                connection(at, random.Random(f"{asked.seed} {n}"), asked.faults, until, seen)
                for n in range(asked.connections)
            )
        )
    finally:
        watch.cancel()
        probe.terminate()
        printed, _ = await probe.communicate()
    lines = [line.split() for line in printed.decode().splitlines() if line.count(" ") == 2]
    return (
        seen,
        samples,
        [{"at": float(at_), "took": float(took), "status": int(status)} for at_, took, status in lines],
    )


async def watching(server: psutil.Process, samples: list[dict[str, float]]) -> None:
    began = time.monotonic()
    while True:
        samples.append({"at": time.monotonic() - began, **size(server)})
        await asyncio.sleep(1.0)


def size(server: psutil.Process) -> dict[str, float]:
    with server.oneshot():
        return {"memory": server.memory_info().rss, "files": server.num_fds(), "threads": server.num_threads()}


async def connection(at: faults.Target, draw: random.Random, share: float, until: float, seen: Seen) -> None:
    """One client: good requests on a connection that is kept, each fault on another."""
    wire: faults.Wire | None = None
    while time.monotonic() < until:
        seen.asked += 1
        if draw.random() < share:
            await bad(at, draw, seen)
            continue
        wire = wire or await faults.Wire.open(at)
        if not await asks(at, wire, draw, seen):
            wire.close()
            wire = None
    if wire:
        wire.close()


async def bad(at: faults.Target, draw: random.Random, seen: Seen) -> None:
    kind = draw.choice(list(faults.FAULTS))
    try:
        async with asyncio.timeout(WAIT):
            reply = await faults.fault(at, kind, draw)
    except TimeoutError:
        reply = faults.Reply("hung")
    except OSError as error:
        reply = faults.Reply(type(error).__name__)
    seen.said[kind, reply.status] += 1
    if reply.status not in faults.FAULTS[kind] and not busy(reply):
        seen.wrong(kind, reply)


def busy(reply: faults.Reply) -> bool:
    """Told to come again: no fault of anybody."""
    return reply.status in (429, 503) and "retry-after" in reply.headers


async def asks(at: faults.Target, wire: faults.Wire, draw: random.Random, seen: Seen) -> bool:
    """A good request; whether the connection is of further use."""
    kind, name, body = faults.good(at, draw)
    sent, began = as_json(body), time.perf_counter()
    try:
        async with asyncio.timeout(WAIT):
            reply = await wire.ask(faults.head(at, len(sent)), sent)
    except TimeoutError:
        reply = faults.Reply("hung")
    seen.said[kind, reply.status] += 1
    if reply.status == 200:
        try:
            text, tokens = faults.heard(reply, body["stream"])
        except (ValueError, KeyError, IndexError) as error:
            seen.wrong(kind, reply, f"{type(error).__name__}: {error}")
        else:
            seen.texts.setdefault(name, Counter())[text] += 1
            seen.tokens += tokens
            seen.took.append(time.perf_counter() - began)
    elif not busy(reply):
        seen.wrong(kind, reply)
    elif reply.status != 200:
        await asyncio.sleep(1.0)
    return reply.status == 200 and reply.headers.get("connection") != "close"


async def rested(at: faults.Target, server: psutil.Process) -> dict[str, Any]:
    """The server when everybody has gone: after ten quiet seconds, or thirty where rows are not free by then."""
    wanted = ("requests_running", "requests_waiting", "kv_cache_tokens_used", "requests_in_flight")
    found, until, quiet = {}, time.monotonic() + 30, time.monotonic() + 10
    while time.monotonic() < until:
        text = (await got(at, "/metrics")).body.decode()
        found = {name: total(text, f"vistune_{name}") for name in wanted}
        if not any(found.values()) and time.monotonic() > quiet:
            break
        await asyncio.sleep(0.5)
    return size(server) | {"slots": found, "ready": (await got(at, "/ready")).status}


def total(text: str, name: str) -> float:
    """Of a metric over its labels; NaN when there is none."""
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else float("nan")


# What is said of it


def summary(
    asked: argparse.Namespace,
    seen: Seen,
    samples: list[dict[str, float]],
    health: list[dict[str, float]],
    end: dict[str, Any],
    touched: dict[str, Any],
    code: int | None,
    leaked: list[str],
) -> dict[str, Any]:
    took = sorted(one["took"] for one in health)
    warm = [one for one in samples if one["at"] >= asked.warm_up] or samples[-1:]
    start = {name: warm[0][name] for name in ("memory", "files", "threads")}
    result = {
        "machine": machine(),
        "minutes": asked.minutes,
        "connections": asked.connections,
        "faults": asked.faults,
        "requests": seen.asked,
        "answered": len(seen.took),
        "requests_per_s": seen.asked / (60 * asked.minutes),
        "tokens_per_s": seen.tokens / (60 * asked.minutes),
        "answer_p50": statistics.median(seen.took) if seen.took else None,
        "health": {
            "asked": len(took),
            "p50": quantile(took, 0.5),
            "p99": quantile(took, 0.99),
            "max": took[-1] if took else None,
            "not_200": sum(one["status"] != 200 for one in health),
            "slowest": [
                {"second": round(one["at"] - health[0]["at"], 1), "took": one["took"]}
                for one in sorted(health, key=lambda one: -one["took"])[:10]
            ],
        },
        "start": start,
        "along": [warm[len(warm) * quarter // 4] for quarter in (1, 2, 3)],
        "peak": max(one["memory"] for one in samples),
        "end": end,
        "questions": len(seen.texts),
        "answered_in_two_ways": sum(len(texts) > 1 for texts in seen.texts.values()),
        "touched": touched,
        "exit_code": code,
        "in_the_log": leaked,
        "said": {kind: counted(seen, kind) for kind in dict.fromkeys(kind for kind, _ in sorted(seen.said, key=str))},
        "escaped": seen.escaped[:100],
        "escapes": len(seen.escaped),
    }
    return result | {"verdict": verdict(result)}


def counted(seen: Seen, kind: str) -> dict[str, int]:
    return {str(status): count for (one, status), count in sorted(seen.said.items(), key=str) if one == kind}


def quantile(values: list[float], share: float) -> float | None:
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def failures(said: dict[str, dict[str, int]]) -> tuple[int, int]:
    """Statuses of 500 and above: deliberate ones (another host's fault, come again), and others."""
    deliberate = other = 0
    for kind, counts in said.items():
        for status, count in counts.items():
            if status.isdigit() and int(status) >= 500:
                meant = int(status) in faults.DELIBERATE.get(kind, ()) or int(status) == 503
                deliberate, other = deliberate + count * meant, other + count * (not meant)
    return deliberate, other


def verdict(result: dict[str, Any]) -> list[dict[str, Any]]:
    meant, other = failures(result["said"])
    start, end, health = result["start"], result["end"], result["health"]
    room = start["memory"] + max(SLACK, start["memory"] // 10)
    touched, slots = result["touched"], end["slots"]
    attacks = sum(sum(counts.values()) for kind, counts in result["said"].items() if kind in faults.FAULTS)
    lines = {
        f"no 5xx but the deliberate ones ({meant} of those): {other}": other == 0,
        f"every attack refused, every good request answered: {result['escapes']} of {attacks:,} attacks and "
        f"{result['requests'] - attacks:,} good requests went otherwise": result["escapes"] == 0 < result["answered"],
        f"the canary inside was touched {touched['canary']} times, the secret file opened "
        f"{'(not watched)' if touched['secret'] is None else touched['secret']} times": not (
            touched["canary"] or touched["secret"]
        ),
        f"/health p99 {ms(health['p99'])} (p50 {ms(health['p50'])}, longest {ms(health['max'])}, "
        f"{health['asked']:,} asked, {health['not_200']} not 200)": bool(
            health["p99"] and health["p99"] < 0.1 and not health["not_200"]
        ),
        f"memory back to the start: {mb(start['memory'])} after the warm-up, {mb(end['memory'])} at the end": (
            end["memory"] <= room
        ),
        f"slots back to the start: {', '.join(f'{name} {value:g}' for name, value in slots.items())}": not any(
            slots.values()
        )
        and end["ready"] == 200,
        f"open files {start['files']:g} -> {end['files']:g}, threads {start['threads']:g} -> {end['threads']:g}": (
            end["files"] <= start["files"] + 4 and end["threads"] <= start["threads"] + 8
        ),
        f"nothing of a request in the log: {len(result['in_the_log'])} found": not result["in_the_log"],
        f"ended by SIGTERM with {result['exit_code']}": result["exit_code"] == 0,
    }
    return [{"line": line, "holds": holds} for line, holds in lines.items()]


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f} ms"


def mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def markdown(result: dict[str, Any]) -> str:
    made = result["machine"]
    lines = [
        f"{made['processor']}, {made['cores']} cores, shared with what asks; a tiny model, fp32. {result['minutes']:g} "
        f"minutes, {result['connections']} connections, {result['faults']:.0%} faults: {result['requests']:,} requests "
        f"({result['requests_per_s']:.1f} / s), {result['tokens_per_s']:.0f} tokens / s, half of the good ones within "
        f"{ms(result['answer_p50'])}.",
        "",
        *(f"- {'holds' if one['holds'] else '**FAILS**'}: {one['line']}" for one in result["verdict"]),
        f"- {result['questions']} different questions; {result['answered_in_two_ways']} were answered in two ways",
        "",
        "Memory after the warm-up, at a quarter, half and three quarters of the time, at its highest, and at the end: "
        + ", ".join(
            mb(value)
            for value in (
                result["start"]["memory"],
                *(one["memory"] for one in result["along"]),
                result["peak"],
                result["end"]["memory"],
            )
        )
        + ".",
        "",
        "| request | status: how often | allowed |",
        "|---|---|---|",
    ]
    for kind, counts in result["said"].items():
        allowed = ", ".join(sorted(map(str, faults.FAULTS.get(kind, {200}))))
        lines.append(
            f"| {kind} | {', '.join(f'{status}: {count:,}' for status, count in counts.items())} | {allowed} |"
        )
    if result["escaped"]:
        lines += ["", "What went otherwise:", "", *(f"- `{one[:200]}`" for one in result["escaped"][:20])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
