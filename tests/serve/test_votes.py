"""Votes: lines that readers of LLaVA's log can read, whole ones, whoever writes; and nothing that is not a vote."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.browser import Stub
from vistune.serve.page.votes import MOST_BODY, Votes
from vistune.serve.refused import Refused

DIGEST = "ab" * 32
VOTE: dict[str, Any] = {
    "type": "upvote",
    "model": "tiny",
    "messages": [
        {"role": "system", "text": "Be brief."},
        {"role": "user", "text": "How many?", "pictures": [DIGEST, "cd" * 32]},
        {"role": "assistant", "text": "Two."},
        {"role": "user", "text": "七 \u2028 再说一次"},
    ],
    "parameters": {"temperature": 0.2, "top_p": 0.7, "max_tokens": 512, "seed": None},
    "answer": "Two, as I said.\n",
}


def sent(stub: Stub, vote: Any, client: Any = ("203.0.113.7", 1), **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        place = httpx.ASGITransport(app=stub.app, client=client)
        async with httpx.AsyncClient(transport=place, base_url="http://here") as asker:
            body = vote if isinstance(vote, bytes) else json.dumps(vote).encode()
            return await asker.post("/votes", content=body, headers={"content-type": "application/json", **headers})

    return asyncio.run(ask())


def test_a_vote_is_a_line_of_llavas_log(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "votes.jsonl"
    before = time.time()
    answer = sent(Stub(file), VOTE)
    assert answer.status_code == 200
    raw = file.read_bytes()
    assert raw.endswith(b"\n") and raw.count(b"\n") == 1
    line = json.loads(raw)
    assert {"tstamp", "type", "model", "state", "ip"} <= line.keys()
    assert before - 1 < line["tstamp"] <= time.time() and answer.json() == {"tstamp": line["tstamp"]}
    assert (line["type"], line["model"], line["ip"]) == ("upvote", "tiny", "203.0.113.7")
    state = line["state"]
    assert {"system", "roles", "messages", "offset", "sep", "sep2"} == state.keys()
    assert state["system"] == "Be brief." and state["offset"] == 0
    assert state["messages"] == [
        ["USER", "<image>\n<image>\nHow many?"],
        ["ASSISTANT", "Two."],
        ["USER", "七 \u2028 再说一次"],
        ["ASSISTANT", "Two, as I said.\n"],
    ]
    assert all(role in state["roles"] for role, _ in state["messages"])
    assert line["images"] == [DIGEST, "cd" * 32]
    assert line["parameters"] == VOTE["parameters"]
    assert file.stat().st_mode & 0o077 == 0  # what people wrote is for who runs the server


def test_who_voted_is_who_is_connected_or_whom_the_process_in_front_saw(tmp_path: Path) -> None:
    stub = Stub(tmp_path / "votes")
    said = {"x-forwarded-for": "198.51.100.1, 192.0.2.9"}
    assert sent(stub, VOTE, **said).status_code == 200
    assert sent(stub, VOTE, client=None, **said).status_code == 200
    lines = [json.loads(line) for line in (tmp_path / "votes").read_text(encoding="utf-8").splitlines()]
    assert [line["ip"] for line in lines] == ["203.0.113.7", "192.0.2.9"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"type": "like"}, "type"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"answer": None}, "answer"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "text": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "text": "x", "pictures": ["data:image/png;base64,AAAA"]}]},
            "messages.0.pictures.0",
        ),
        ({"parameters": {"temperature": "hot"}}, "parameters.temperature"),
        ({"tstamp": 0}, "tstamp"),
    ],
)
def test_what_is_no_vote_is_refused_and_not_written(tmp_path: Path, change: dict[str, Any], param: str) -> None:
    answer = sent(Stub(tmp_path / "votes"), VOTE | change)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert (tmp_path / "votes").read_bytes() == b""


def test_a_vote_of_a_foreign_form_too_large_or_broken_is_refused(tmp_path: Path) -> None:
    stub = Stub(tmp_path / "votes")
    assert sent(stub, VOTE, **{"content-type": "text/plain"}).status_code == 415
    assert sent(stub, VOTE | {"answer": "x" * MOST_BODY}).status_code == 413
    broken = sent(stub, b'{"type": "secret words')
    assert broken.status_code == 400 and "secret" not in broken.text
    assert (tmp_path / "votes").read_bytes() == b""
    off = sent(Stub(), VOTE)
    assert off.status_code == 404 and off.json()["error"]["code"] == "votes_off"


def _write(path: Path, who: int) -> None:
    votes = Votes(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: votes.add({"who": who, "n": n, "text": "字" * 3000}), range(20)))


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_lines_of_many_threads_and_processes_are_whole(tmp_path: Path, processes: int) -> None:
    path = tmp_path / "votes"
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=_write, args=(path, who)) for who in range(1, processes + 1)]
    for one in others:
        one.start()
    _write(path, 0)
    for one in others:
        one.join(60)
        assert one.exitcode == 0
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 20 * (processes + 1)
    assert {(line["who"], line["n"]) for line in lines} == {(w, n) for w in range(processes + 1) for n in range(20)}


def test_half_a_line_is_ended_and_a_full_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "votes"
    path.write_text('{"half": ')
    Votes(path).add({"a": 1})
    assert path.read_text() == '{"half": \n{"a": 1}\n'
    with pytest.raises(Refused, match="has its 25 bytes") as error:
        Votes(path, most=25).add({"b": 2})
    assert error.value.status == 507 and path.read_text().endswith('{"a": 1}\n')


def test_a_disk_that_takes_half_a_line_keeps_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes"
    votes = Votes(path)
    votes.add({"a": 1})
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:4]))
    with pytest.raises(Refused, match="no space left") as error:
        votes.add({"b": 2})
    assert error.value.status == 507 and path.read_text() == '{"a": 1}\n'


def test_a_file_that_was_moved_away_is_begun_again(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes")
    votes.add({"a": 1})
    (tmp_path / "votes").rename(tmp_path / "old")
    votes.add({"b": 2})
    assert (tmp_path / "votes").read_text() == '{"b": 2}\n'


def test_a_place_where_nothing_can_be_kept_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Votes(tmp_path / "file" / "votes")
