"""Out of memory in the midst of a step, as one sentence: what was computed and held, what is kept, what to try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from vistune import ranks
from vistune.data.batch import Batch
from vistune.train.keeping import checkpoint
from vistune.train.metrics import memory

TEXTS = (
    "out of memory",  # of CUDA, ROCm and NCCL, where it comes as a plain RuntimeError
    "can't allocate memory",  # of torch's allocator on a CPU
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
TRY = (
    'train.checkpointing="full"',
    "a shorter data.length",
    'parallel.shard="zero3" over more GPUs, parallel.offload=true',
    'optimizer.name="adamw8bit"',
    'adapters (lora.r=128), lora.quantize="4bit"',
)
SHOWN = 16


class OutOfMemory(ValueError):
    """The device, or the host, had no memory for a step. `lengths` are of the segments of the micro-batch it was in,
    in tokens; of all of the step's where the weights were updated."""

    def __init__(self, step: int, phase: str, batches: Sequence[Batch], run: Path, device: torch.device):
        self.step, self.phase = step, phase
        self.lengths = [length for batch in batches for length in batch.lengths]
        self.images = sum(batch.images for batch in batches)
        self.tokens = sum(len(batch.ids) for batch in batches)
        held = ", ".join(f"{kind} {size:.2f}" for kind, size in memory(device).items())
        shown = ", ".join(map(str, self.lengths[:SHOWN])) + (", ..." if len(self.lengths) > SHOWN else "")
        kept = checkpoint.folders(run)
        super().__init__(
            f"out of memory in step {step} on rank {ranks.rank()} ({device}), {phase}: "
            f"{self.tokens:,} tokens in segments of {shown}; {self.images:,} image(s). GiB: {held}. "
            + (f"{kept[-1]} is kept; the same command goes on from it. " if kept else "There is no checkpoint yet. ")
            + f"What needs less: {'; '.join(TRY)}. `vistune preflight RECIPE` gives the figure of each."
        )


@contextmanager
def named(step: int, phase: str, batches: Sequence[Batch], run: str, device: torch.device) -> Iterator[None]:
    """Raises OutOfMemory in place of what torch raises when there is no memory; all else passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(step, phase, batches, Path(run), device) from error


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there was no memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in TEXTS)
