"""Where each worker computes: on a GPU of its own, or with its share of the CPU's threads.

Asks torch in a process of its own, so that the process in front never has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from vistune import limits

ASK = """import json, torch
found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
print(json.dumps([found.type if found else "cpu", torch.accelerator.device_count() if found else 0]))"""


@dataclass(frozen=True)
class Place:
    """What a worker is started with: its `--device`, empty for what all were told, and its environment's variables."""

    device: str
    environment: Mapping[str, str]


def places(count: int, device: str, *, sized: bool, environment: Mapping[str, str] = os.environ) -> list[Place]:
    """One for each worker. `device`: what was asked for; `sized`: whether memory for keys and values was named.
    ValueError where several would take the free memory of one GPU."""
    kind, gpus = _found() if device in ("", "auto", "cuda") else (device, 0)
    if kind == "cpu" or device == "cpu":
        share = str(max(1, limits.cores() // count))
        threads = {name: share for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if not environment.get(name)}
        return [Place("", threads)] * count
    if count > max(gpus, 1) and not sized:
        there = f"{gpus} GPUs" if gpus > 1 else "one GPU"
        raise ValueError(
            f"--workers {count} on {there}: several would each take the memory that is free; say with --kv-bytes how "
            "much one may have for keys and values, or start fewer"
        )
    return [_on_gpu(kind, number % gpus, environment) if gpus else Place("", {}) for number in range(count)]


def _on_gpu(kind: str, number: int, environment: Mapping[str, str]) -> Place:
    """A worker of CUDA or ROCm sees its GPU alone, so that nothing of it can land on another one."""
    if kind != "cuda":
        return Place(f"{kind}:{number}", {})
    name = "HIP_VISIBLE_DEVICES" if environment.get("HIP_VISIBLE_DEVICES") else "CUDA_VISIBLE_DEVICES"
    visible = [one.strip() for one in environment.get(name, "").split(",") if one.strip()]
    return Place("", {name: visible[number] if number < len(visible) else str(number)})


def _found() -> tuple[str, int]:
    """The kind of accelerator, and how many there are."""
    answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False, timeout=300)
    if answer.returncode:
        raise ValueError(f"torch does not start: {(answer.stderr.strip().splitlines() or ['no reason'])[-1]}")
    kind, count = json.loads(answer.stdout.strip().splitlines()[-1])
    return kind, count
