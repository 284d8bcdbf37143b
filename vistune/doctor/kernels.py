"""Packed attention on this machine: which kernel serves, and whether what it computes is right."""

from __future__ import annotations

from typing import Any

from vistune.doctor.findings import Finding, ok, problem, warning
from vistune.doctor.trial import Trial, probe

TIMEOUT = 240.0  # a kernel may be compiled on the way


def look() -> list[Finding]:
    return findings(probe("kernels", timeout=TIMEOUT))


def findings(trial: Trial) -> list[Finding]:
    """Nothing is said where torch or transformers does not import: that has its own lines."""
    facts = trial.facts
    if "device" not in facts:
        return [] if trial.code else [problem("attention", "the probe said nothing", "run it again")]
    where = f"{facts['device']} in {facts['dtype']}"
    if "packed" not in facts:
        how = f"hung for {trial.seconds:.0f} s" if trial.hung else f"died ({trial.killer or trial.last_line})"
        return [problem("attention", f"packed attention {how} on {where}", "train.attention=sdpa")]
    if facts["packed"] is not True:
        return [problem("attention", f"packed attention on {where}: {facts['packed']}", "train.attention=sdpa")]
    kernels = " and ".join(sorted(set(facts.get("chosen", {}).values())))
    text = f"packed attention forward and backward on {where}: right{', by ' if kernels else ''}{kernels}"
    return [ok("attention", text), *_kernels(facts), *_slow(facts)]


def _kernels(facts: dict[str, Any]) -> list[Finding]:
    """Which kernels run and why the others do not."""
    tried = facts.get("kernels", {})
    runs = [name for name, why in tried.items() if not why]
    others = [f"not {name}: {why}" for name, why in tried.items() if why]
    return [ok("attention kernels", "; ".join([", ".join(runs), *others]))] if tried else []


def _slow(facts: dict[str, Any]) -> list[Finding]:
    """An accelerator on which only attention sample by sample is left."""
    if facts["device"].startswith("cpu") or facts.get("chosen", {}).get("language") != "sdpa":
        return []
    text = "no kernel for packed rows runs on this device: attention goes sample by sample, which is slower"
    fix = "a torch whose varlen attention or FlexAttention has this device; the reasons stand in the line above"
    return [warning("attention kernels", text, fix)]
