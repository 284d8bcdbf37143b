"""Ranks that meet: two real ones over gloo on the loopback, one that waits in vain, and made-up meetings."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vistune.doctor import cluster
from vistune.doctor.findings import Finding
from vistune.doctor.trial import Trial, read_facts

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def start(rank: int, world: int, port: int, *words: str, **more: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    environment |= {"MASTER_ADDR": "127.0.0.1", **more}
    command = [sys.executable, "-m", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_ranks_meet_and_rank_0_speaks_for_both(port: int):
    words = ("vistune", "doctor", "--json", "--only", "processes", "--only", "ranks")
    both = [start(0, 2, port, *words), start(1, 2, port, *words, OMP_NUM_THREADS="999")]
    (out, err), (silent, _) = (process.communicate(timeout=100) for process in both)
    assert [process.returncode for process in both] == [0, 0], err
    found = {one["title"]: one for one in json.loads(out)["findings"] if one["group"] == "ranks"}
    assert not silent
    assert "2 on 1 node(s)" in found["ranks"]["found"] and found["gloo"]["level"] == "ok"
    assert found["clocks"]["level"] == "ok"
    assert "OMP_NUM_THREADS=999" in found["cores (rank 1)"]["found"] and found["cores (rank 1)"]["level"] == "warning"


@pytest.mark.slow
def test_a_rank_that_waits_in_vain_names_who_did_not_come(port: int):
    process = start(0, 3, port, "vistune.doctor.probes.meeting", "2", "[]")
    out, err = process.communicate(timeout=60)
    facts = read_facts(out)
    assert process.returncode == 0 and facts["missing"] == [1, 2], err
    found = cluster.findings(Trial(0, facts), ENVIRONMENT | {"WORLD_SIZE": "3"})
    assert found[0].level == "problem" and found[0].found.endswith("1, 2")


def test_a_port_that_nobody_listens_on(port: int):
    told = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    unreached = cluster.reach(told)
    assert "refused" in unreached and cluster.reach(told | {"TORCHELASTIC_USE_AGENT_STORE": ""}) == ""
    found = cluster.findings(Trial(1), ENVIRONMENT | told, unreached)
    assert [one.level for one in found] == ["problem"] and f"127.0.0.1:{port}" in found[0].found


def rank(number: int, **more: Any) -> dict[str, Any]:
    made = {"rank": number, "host": f"node{number // 2}", "torch": "2.11.0", "device": "H200", "uuid": f"GPU-{number}"}
    return made | {"findings": []} | more


def met(ranks: list[dict[str, Any]], **facts: Any) -> dict[str, Finding]:
    known = {"present": ranks, "missing": [], "skews": [0.0] * len(ranks), "gloo": True, "nccl": True}
    return {one.title: one for one in cluster.findings(Trial(0, known | facts), ENVIRONMENT)}


def test_a_good_meeting():
    found = met([rank(n) for n in range(4)])
    assert {one.level for one in found.values()} == {"ok"}
    assert found["ranks"].found == "4 on 2 node(s) (node0: 0-1; node1: 2-3), on H200"


def test_two_ranks_on_one_card():
    found = met([rank(0), rank(1, uuid="GPU-0"), rank(2), rank(3, uuid="GPU-0")])
    assert found["cards"].level == "problem" and "ranks 0-1, 3 on GPU-0" in found["cards"].found


def test_a_clock_that_is_off():
    found = met([rank(n) for n in range(4)], skews=[0.0, 0.001, -37.5, 0.0])
    assert found["clocks"].level == "warning" and "rank 2 (node1) is -37.5 s" in found["clocks"].found


def test_nccl_that_fails_or_hangs():
    for said in ("hung", "NCCL error: unhandled system error"):
        one = met([rank(n) for n in range(4)], nccl=said)["nccl"]
        assert one.level == "problem" and said in one.found and "NCCL_DEBUG=INFO" in one.fix


def test_ranks_of_different_torch():
    one = met([rank(0), rank(1, torch="2.13.0"), rank(2), rank(3)])["torch on the ranks"]
    assert one.level == "problem" and "2.13.0: 1" in one.found and "2.11.0: 0, 2-3" in one.found


def test_what_other_ranks_found_is_told_once():
    same = {"level": "problem", "title": "compiler", "found": "none", "fix": "apt"}
    other = {"level": "warning", "title": "memory", "found": "little", "fix": "more"}
    found = met(
        [rank(0, findings=[other]), rank(1, findings=[other]), rank(2, findings=[same]), rank(3, findings=[same])]
    )
    assert found["compiler (rank 2-3)"] == Finding("problem", "compiler (rank 2-3)", "none", "apt")
    assert not any(title.startswith("memory") for title in found)


def test_a_meeting_that_breaks_off():
    found = {
        one.title: one for one in cluster.findings(Trial(None, {"present": [rank(0)], "missing": []}), ENVIRONMENT)
    }
    assert found["gloo"].level == "problem" and "hung" in found["gloo"].found
    lost = cluster.findings(Trial(1, stderr="DistStoreError: timed out\n"), ENVIRONMENT)
    assert lost[0].level == "problem" and "rank 0 did not reach" in lost[0].found and "timed out" in lost[0].found


def test_it_is_asked_only_under_a_launcher():
    assert cluster.is_launched(ENVIRONMENT) and not cluster.is_launched(ENVIRONMENT | {"MASTER_ADDR": ""})
