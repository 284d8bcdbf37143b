"""Conversations that go on about a picture: what remembering what was read saves, and `transformers serve` beside it.

    python benchmarks/serve_talk.py                8 conversations at once, 6 questions each, five rounds
    python benchmarks/serve_talk.py --quick        a smoke test: no figure of it means anything

Everybody asks about a picture of its own, and each next question comes with all that was said so far, which is the same
for every contender: their own answers are not used. No picture comes again in a later round. The contenders are real
processes, take turns round by round, and the others rest. Medians over the rounds go to
`benchmarks/results/serve_talk.json` and `.md` (`--out`).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import made_data
from measure import machine
from serve import HERE, SIZES, WORDS, Answer, Server, about, answer, data_url, everybodys, ours, report, stock

SAID = "It is a picture of many colours; what stands in its middle is larger than what stands at its sides. " * 3
"""What was answered to each question before the last."""
WITHOUT = "vistune serve --prefixes 0"
WITH = "vistune serve"


def main(arguments: list[str] | None = None) -> int:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("--size", choices=SIZES, default="full")
    said.add_argument("--talks", type=int, default=8, help="conversations at once")
    said.add_argument("--questions", type=int, default=6, help="of a conversation")
    said.add_argument("--max-tokens", type=int, default=16)
    everybodys(said)
    asked = said.parse_args(arguments)
    if asked.quick:
        asked.size, asked.talks, asked.questions, asked.rounds, asked.max_tokens = "tiny", 2, 2, 1, 4
    out = asked.out or HERE / "results" / "serve_talk.json"
    with tempfile.TemporaryDirectory() as made:
        result = measure(asked, Path(made))
    report(result, markdown(result), out)
    return 0


def measure(asked: argparse.Namespace, place: Path) -> dict[str, Any]:
    made = made_data.make(asked.data or place / "data", SIZES[asked.size])
    paths, folder = sorted(made.images.rglob("*.jpg"))[: asked.talks], made.model("8k")
    runs: list[dict[str, Any]] = []
    with ExitStack() as up:
        servers = [
            up.enter_context(stock(folder, asked.threads, place)),
            up.enter_context(ours(folder, asked.threads, place, "--prefixes", "0", name=WITHOUT)),
            up.enter_context(ours(folder, asked.threads, place, name=WITH)),
        ]
        for number in range(asked.rounds + 1):  # the first does not count
            pictures = [data_url(path, str(number)) for path in paths]
            for server in servers:
                run = asyncio.run(load(server, pictures, asked))
                runs += [run | {"round": number}] if number else []
    names = ("size", "talks", "questions", "max_tokens", "rounds", "threads")
    return {
        "machine": machine(),
        **{name: getattr(asked, name) for name in names},
        "runs": runs,
        "summary": summary(runs),
    }


async def load(server: Server, pictures: Sequence[str], asked: argparse.Namespace) -> dict[str, Any]:
    """All conversations at once, each with its questions one after the other."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
        began = time.perf_counter()
        found = await asyncio.gather(*(one_talk(client, server, picture, asked) for picture in pictures))
        took = time.perf_counter() - began
    return {
        "who": server.name,
        "seconds": took,
        "firsts": [statistics.median(one.first for one in turn) for turn in zip(*found, strict=True)],
        "broken": sum(one.broken for some in found for one in some),
        "memory": server.process.memory_info().rss,
        "texts": [[None if one.broken else one.text for one in some] for some in found],
    }


async def one_talk(client: httpx.AsyncClient, server: Server, picture: str, asked: argparse.Namespace) -> list[Answer]:
    messages, found = [about(picture, WORDS[0])], []
    for number in range(asked.questions):
        found.append(await answer(client, server, messages, asked.max_tokens))
        words = WORDS[(number + 1) % len(WORDS)]
        messages += [{"role": "assistant", "content": SAID}, {"role": "user", "content": words}]
    return found


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of each contender; factors of the last one over each other, of the same rounds."""
    by = {name: [run for run in runs if run["who"] == name] for name in dict.fromkeys(run["who"] for run in runs)}
    mine = by[WITH]
    return {
        name: {
            "seconds": statistics.median(run["seconds"] for run in found),
            "firsts": [statistics.median(each) for each in zip(*(run["firsts"] for run in found), strict=True)],
            "faster": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(found, mine, strict=True)),
            "sooner": [
                statistics.median(a["firsts"][i] / b["firsts"][i] for a, b in zip(found, mine, strict=True))
                for i in range(len(mine[0]["firsts"]))
            ],
            "memory": statistics.median(run["memory"] for run in found),
            "broken": sum(run["broken"] for run in found),
            "same_texts": [same(a["texts"], b["texts"]) for a, b in zip(found, mine, strict=True)],
        }
        for name, found in by.items()
    }


def same(one: Sequence[Sequence[str | None]], other: Sequence[Sequence[str | None]]) -> list[int]:
    """How many texts are the same, and how many both have."""
    pairs = [(a, b) for some, others in zip(one, other, strict=True) for a, b in zip(some, others, strict=True)]
    both = [(a, b) for a, b in pairs if None not in (a, b)]
    return [sum(a == b for a, b in both), len(both)]


def markdown(result: dict[str, Any]) -> str:
    count = result["questions"]
    lines = [
        f"{result['machine']['processor']}, {result['machine']['cores']} cores; the {result['size']} model, fp32, on "
        f"the CPU; {result['talks']} conversations at once of {count} questions about a picture, answers of at most "
        f"{result['max_tokens']} tokens, greedy, streamed; medians of {result['rounds']} rounds. First text of the "
        "question with this number:",
        "",
        f"| who | {' | '.join(str(i + 1) for i in range(count))} | all of it | memory |",
        f"|---|{'---|' * count}---|---|",
    ]
    for name, row in result["summary"].items():
        firsts = " | ".join(f"{one * 1e3:.0f} ms" for one in row["firsts"])
        lines.append(f"| {name} | {firsts} | {row['seconds']:.2f} s | {row['memory'] / 1e6:.0f} MB |")
    lines.append("")
    for name, row in result["summary"].items():
        if name != WITH:
            same, both = (sum(one[i] for one in row["same_texts"]) for i in range(2))
            lines.append(
                f"- {WITH} beside {name}: {row['faster']:.2f} times as fast in all, the first text of question {count} "
                f"{row['sooner'][-1]:.2f} times as soon; the same texts in {same} of {both}."
                + (f" {row['broken']} broken off." if row["broken"] else "")
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
