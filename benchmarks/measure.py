"""What one contender's process costs, step by step, and what this machine can do.

Standard library and torch only: it runs in every contender's environment and knows none of them.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


class Memory:
    """Peak resident memory above what was resident when this object was made (after the imports), in bytes.

    On Linux the kernel's high-water mark (VmHWM) is set back by writing 5 to /proc/self/clear_refs; where that is not
    allowed, `ru_maxrss` stands in, which also remembers the imports' own peak. `how` says which.
    """

    def __init__(self) -> None:
        self.how = "VmHWM, set back after the imports"
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.how = "ru_maxrss, not set back"
        self.baseline = self._status("VmRSS") if self._linux() else self._maxrss()

    def peak(self) -> int:
        """Bytes above the baseline, at the highest."""
        top = self._status("VmHWM") if self.how.startswith("VmHWM") else self._maxrss()
        return max(0, top - self.baseline)

    @staticmethod
    def _linux() -> bool:
        return Path("/proc/self/status").is_file()

    @staticmethod
    def _maxrss() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise ValueError(f"/proc/self/status has no {key}")


class StepClock:
    """Costs between the ends of two steps: data, forward, backward, update, logging, everything in between."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._mark = self._now()

    def start(self) -> None:
        self._mark = self._now()

    def step(self, **figures: Any) -> None:
        """A step ended; `figures` are what it did (loss, tokens, ...)."""
        wall, cpu, busy = self._now()
        was_wall, was_cpu, was_busy = self._mark
        passed = wall - was_wall
        foreign = max(0.0, (busy - was_busy) - (cpu - was_cpu)) / passed if passed and busy else 0.0
        self.steps.append({**figures, "wall_s": passed, "cpu_s": cpu - was_cpu, "foreign_cores": foreign})
        self._mark = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Wall, this process's CPU seconds over all its threads, the whole machine's busy CPU seconds."""
        busy = 0.0
        stat = Path("/proc/stat")
        if stat.is_file():
            user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.read_text().split()[1:8])
            busy = (user + nice + system + irq + softirq) / TICK
        return time.perf_counter(), time.process_time(), busy


def machine() -> dict[str, Any]:
    """Processor, cores and the versions in this environment."""
    info: dict[str, Any] = {
        "system": platform.system(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instructions": [],
        "torch": torch.__version__,
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text()
        models = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
        flags = set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
        info["processor"] = models[0] if models else info["processor"]
        info["instructions"] = sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_tile"})
    return info


def matmul_peak(dtype: torch.dtype, threads: int, n: int = 2048, seconds: float = 2.0) -> float:
    """Best FLOP/s of an n x n x n product in `dtype`, over at least three tries and `seconds`."""
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    best = _best(lambda: a @ b, seconds)
    torch.set_num_threads(was)
    return 2 * n**3 / best


def _best(work: Callable[[], Any], seconds: float) -> float:
    """Shortest time of one call in seconds."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
