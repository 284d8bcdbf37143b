"""Micro-batches on their way to the device: the next one is copied beside the computing of the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from vistune.data.batch import Batch


def upload(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Every batch with its tensors on `device`. On a GPU a stream of its own copies the next one before the caller has
    asked for it; from pinned memory the host does not wait either."""
    if device.type != "cuda":
        yield from (batch.to(device) for batch in batches)
        return
    aside, waiting = _stream(device), iter(batches)
    under_way = _start(next(waiting, None), device, aside)
    while under_way is not None:
        batch, copied = under_way
        under_way = _start(next(waiting, None), device, aside)
        main = torch.cuda.current_stream(device)
        main.wait_event(copied)
        for tensor in vars(batch).values():
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                tensor.record_stream(main)  # its memory is of the other stream: not taken again before this one is done
        yield batch


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole run: memory that was freed on a stream is taken again only on it."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


def _start(
    batch: Batch | None, device: torch.device, aside: torch.cuda.Stream
) -> tuple[Batch, torch.cuda.Event] | None:
    """Begin the copy of a batch; what says that it is done."""
    if batch is None:
        return None
    with torch.cuda.stream(aside):
        moved = batch.to(device)
        copied = torch.cuda.Event()
        copied.record(aside)
    return moved, copied
