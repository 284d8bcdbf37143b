"""Under torchrun: whether the ranks reach each other, whose clock is off, two ranks on one card; and what the other
ranks have found on their nodes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vistune.doctor.findings import Finding, ok, problem, warning
from vistune.doctor.trial import Trial, probe

PATIENCE = 60.0
"""Seconds that a rank waits for the others."""
SKEW = 2.0
"""Seconds between clocks that confuse logs and make file times look as if they came from the future."""
CLOSED = {
    "all": "open the port between the nodes, or another: torchrun --rdzv-endpoint HOST:PORT",
    "gloo": "export GLOO_SOCKET_IFNAME=the interface between the nodes (ip route get shows it)",
    "nccl": "NCCL_DEBUG=INFO says where; often NCCL_SOCKET_IFNAME=the interface, NCCL_IB_DISABLE=1, or --ipc=host",
}


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    return all(environment.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def look(own: Sequence[Finding], patience: float = PATIENCE) -> tuple[list[Finding], bool]:
    """Meet the other ranks; `own` is what this one has found. The second is whether rank 0 has heard it."""
    environment = dict(os.environ)
    told = json.dumps([asdict(one) for one in own if one.level != "ok"])
    trial = probe("meeting", str(patience), told, timeout=4 * patience)
    heard = "present" in trial.facts and 0 not in trial.facts["missing"]
    return findings(trial, environment, reach(environment)), heard


def reach(environment: Mapping[str, str]) -> str:
    """Nothing where torchrun listens at MASTER_ADDR:MASTER_PORT, else the error; without it rank 0 listens later."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    try:
        with socket.create_connection((environment["MASTER_ADDR"], int(environment["MASTER_PORT"])), timeout=10):
            return ""
    except OSError as error:
        return str(error)


def findings(trial: Trial, environment: Mapping[str, str], unreached: str = "") -> list[Finding]:
    where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    facts, world = trial.facts, environment["WORLD_SIZE"]
    if unreached:
        return [problem("ranks", f"nobody answers at {where}: {unreached}", CLOSED["all"])]
    if "present" not in facts:
        how = "did not answer in time" if trial.hung else trial.last_line or f"ended with {trial.killer or trial.code}"
        return [
            problem("ranks", f"rank {environment['RANK']} did not reach the others at {where}: {how}", CLOSED["all"])
        ]
    if facts["missing"]:
        ranks = ", ".join(str(rank) for rank in facts["missing"])
        text = f"of {world} ranks these did not come within the time: {ranks}"
        return [problem("ranks", text, "look at what they printed, and at their nodes"), *_others(facts["present"])]
    present = facts["present"]
    found = [_who(present), *_shared(present), *_versions(present), *_clocks(facts, present)]
    found += [_passes(name, facts[name], world) for name in ("gloo", "nccl") if name in facts]
    if "gloo" not in facts:
        how = f"hung for {trial.seconds:.0f} s" if trial.hung else trial.last_line
        found.append(problem("gloo", f"the ranks met, then {how}", CLOSED["gloo"]))
    return found + _others(present)


def _who(present: Sequence[Mapping[str, Any]]) -> Finding:
    hosts: dict[str, list[int]] = {}
    for one in present:
        hosts.setdefault(one["host"], []).append(one["rank"])
    said = "; ".join(f"{host}: {spans(ranks)}" for host, ranks in hosts.items())
    devices = sorted({one["device"] for one in present})
    return ok("ranks", f"{len(present)} on {len(hosts)} node(s) ({said}), on {', '.join(devices)}")


def spans(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shared(present: Sequence[Mapping[str, Any]]) -> list[Finding]:
    cards: dict[str, list[int]] = {}
    for one in present:
        if one.get("uuid"):
            cards.setdefault(one["uuid"], []).append(one["rank"])
    twice = [f"ranks {spans(ranks)} on {uuid}" for uuid, ranks in cards.items() if len(ranks) > 1]
    if not twice:
        return []
    fix = "CUDA_VISIBLE_DEVICES must not be the same single card for all; --nproc-per-node at most the cards"
    return [problem("cards", f"more than one rank on a card: {'; '.join(twice)}", fix)]


def _versions(present: Sequence[Mapping[str, Any]]) -> list[Finding]:
    versions = {one["torch"] for one in present}
    if len(versions) == 1:
        return []
    said = "; ".join(f"{v}: {spans([one['rank'] for one in present if one['torch'] == v])}" for v in sorted(versions))
    return [problem("torch on the ranks", said, "the same environment on every node")]


def _clocks(facts: Mapping[str, Any], present: Sequence[Mapping[str, Any]]) -> list[Finding]:
    skews = facts.get("skews")
    if skews is None:
        return []
    worst = max(range(len(skews)), key=lambda rank: abs(skews[rank]))
    if abs(skews[worst]) < SKEW:
        return [ok("clocks", f"within {max(abs(skew) for skew in skews):.2g} s of rank 0's")]
    host = next((one["host"] for one in present if one["rank"] == worst), "")
    text = f"rank {worst} ({host}) is {skews[worst]:+.1f} s from rank 0: logs and file times mislead"
    return [warning("clocks", text, "timedatectl set-ntp true, on every node")]


def _passes(name: str, said: Any, world: str) -> Finding:
    if said is True:
        return ok(name, f"adds up over {world} ranks")
    return problem(name, f"the ranks met, but: {said}", CLOSED[name])


def _others(present: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What ranks but 0 found, once for all that found the same; rank 0 has said its own."""
    own = {_key(one) for rank in present if rank["rank"] == 0 for one in rank["findings"]}
    who: dict[tuple[str, ...], list[int]] = {}
    for rank in present:
        for one in rank["findings"]:
            if _key(one) not in own:
                who.setdefault(_key(one), []).append(rank["rank"])
    made = {"warning": warning, "problem": problem}
    return [made[level](f"{title} (rank {spans(ranks)})", *rest) for (level, title, *rest), ranks in who.items()]


def _key(one: Mapping[str, str]) -> tuple[str, ...]:
    return one["level"], one["title"], one["found"], one["fix"]
