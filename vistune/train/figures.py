"""What a step leaves on the device for its row of metrics, on its way to the host; and when the step was done there."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Mark:
    """A moment in the work of a device: when all that was asked of it before is done. On a CPU that is now."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(device))
        elif device.type != "cpu":
            torch.accelerator.synchronize()
        self.at = time.perf_counter()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def since(self, before: Mark) -> float:
        """Seconds between two moments, on the clock of the device; waits for both."""
        if self.event is None or before.event is None:
            return self.at - before.at
        before.wait()
        self.wait()
        return before.event.elapsed_time(self.event) / 1e3


class Figures:
    """A few numbers, copied to the host beside the work that follows."""

    def __init__(self, values: Tensor):
        """`values`: fp32 [n], asked of the device before now."""
        on_gpu = values.device.type == "cuda"
        self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_gpu)
        self.host.copy_(values, non_blocking=on_gpu)
        self.done = Mark(values.device)

    def read(self) -> list[float]:
        """The numbers; waits until they are there."""
        self.done.wait()
        return self.host.tolist()
