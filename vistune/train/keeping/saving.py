"""Checkpoints written while the next steps run: tensors are copied to the host, files made beside, then renamed.

At most one save is under way. Knows nothing of the loop; what a checkpoint is stands in `checkpoint`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from vistune import console, ranks
from vistune.train.keeping import best, checkpoint

_SPARE = 0.9  # of the host's free memory that a copy may take


class Saver:
    """The checkpoints of one run, of which the newest `keep` and the best stay. Made, used, left by all ranks alike.

    With `background` the tensors are copied before `save` returns and written by a thread; without, or when the host
    has no memory for the copy, `save` returns when they are on disk. As a context it waits for the last one.
    `complete` is called on rank 0 with a checkpoint's folder when all tensors are in it, before it counts.
    """

    def __init__(self, run: Path, keep: int, background: bool = True, complete: Callable[[Path], None] | None = None):
        self.run, self.keep, self.background, self.complete = run, keep, background, complete
        # Writing has collectives of its own, beside those of the steps: over the host, and in a group for themselves.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._stager: DefaultStager | None = None
        self._under_way: tuple[Path, Future] | None = None
        # One process without a process group is a case of its own for DCP, and meant; it warns from its thread.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def save(
        self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], then: Callable[[], None] | None = None
    ) -> Path:
        """Begin checkpoint `step`, when the one before it is whole; a kill at any moment leaves the older ones whole.

        The tensors may change when this returns. `then` is called on rank 0 when this one is whole. Raises ValueError
        for a disk that cannot take it, or did not take the checkpoint before.
        """
        self.wait()
        writer = _Writer(self.run, step, state, self.keep, self.complete, then)
        mine = share(tensors)
        copied = self._copy(mine) if self.background else None
        with checkpoint.disk_errors(writer.target):
            if copied is None:
                dcp.save(mine, storage_writer=writer, process_group=self._group)
            else:
                begun = dcp.async_save(copied, storage_writer=writer, async_stager=writer, process_group=self._group)
                assert isinstance(begun, Future)  # the other answer is for copies that are still being made
                self._under_way = writer.target, begun
        return writer.target

    def failed(self) -> bool:
        """Whether the save under way has failed, on this rank or another; does not wait. `wait` says why."""
        return self._under_way is not None and self._under_way[1].done() and bool(self._under_way[1].exception())

    def wait(self) -> None:
        """Until the save under way is whole, on all ranks. Raises ValueError when it cannot be."""
        if self._under_way is None:
            return
        (target, begun), self._under_way = self._under_way, None
        with checkpoint.disk_errors(target):
            begun.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None or hasattr(error, "code"):  # stopped by a signal: what it says is that this is whole
                self.wait()
            elif self._under_way is not None and not (ranks.world() > 1 and isinstance(error, RuntimeError)):
                # Of several ranks a RuntimeError is a broken collective: then nobody is there to finish with.
                self._under_way[1].exception()
        finally:
            if self._stager is not None:
                self._stager.close()

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors on the host; None on every rank, said once, if one of them has no memory for it."""
        copied = self._stage(tensors) if self._stager is not None or _fits(tensors) else None
        if all(ranks.gather(copied is not None)):
            return copied
        console.warn(
            "checkpoint.background: the host has no memory for a copy of what is saved; "
            "checkpoints are written while the steps wait"
        )
        self.background = False
        return None

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Pinned where tensors lie on a GPU, and then kept for the next time: pinning takes longer than copying."""
        on_gpu = any(one.device.type == "cuda" for one in tensors.values())
        stager = self._stager or DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )
        try:
            copied = stager.stage(tensors)
        except (MemoryError, RuntimeError) as error:  # the last is what torch's allocators raise, of host and pinned
            if not re.search("memory", str(error), re.IGNORECASE) and not isinstance(error, MemoryError):
                raise
            return None
        assert isinstance(copied, dict)
        if on_gpu:
            self._stager = stager
        else:
            stager.close()
        return copied


def share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this rank saves: its shards, and of tensors that every rank has whole about one in `world` by size."""
    whole = [name for name, one in tensors.items() if not isinstance(one, DTensor)]
    loads = [0] * ranks.world()
    mine = set()
    for name in sorted(whole, key=lambda name: (-_bytes(tensors[name]), name)):
        least = loads.index(min(loads))
        loads[least] += _bytes(tensors[name]) + 1
        if least == ranks.rank():
            mine.add(name)
    return {name: one for name, one in tensors.items() if isinstance(one, DTensor) or name in mine}


class _Writer(dcp.FileSystemWriter):
    """Writes beside; rank 0 makes the checkpoint count by a rename, when every rank's files are flushed to the disk."""

    def __init__(
        self,
        run: Path,
        step: int,
        state: dict[str, Any],
        keep: int,
        complete: Callable[[Path], None] | None = None,
        then: Callable[[], None] | None = None,
    ):
        self.run, self.keep, self.complete, self.then = run, keep, complete, then
        self.target = checkpoint.folder_of(run, step)
        self.beside = self.target.with_name(self.target.name + ".tmp")
        self.state = json.dumps(state)  # now: the run goes on
        super().__init__(self.beside, sync_files=True)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.per_thread_copy_ahead = 0  # nothing is left to copy
        return state_dict

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """On rank 0 alone, before anybody writes."""
        shutil.rmtree(self.beside, ignore_errors=True)
        self.beside.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:
        """On rank 0 alone, after everybody has written; what it raises is raised on every rank."""
        super().finish(metadata, results)
        if self.complete is not None:
            self.complete(self.beside)
        (self.beside / "run.json").write_text(self.state, encoding="utf-8")
        _sync(self.beside)
        if checkpoint.is_whole(self.target):  # the same step once more holds the same: what stands is not touched
            shutil.rmtree(self.beside)
        else:
            shutil.rmtree(self.target, ignore_errors=True)
            os.replace(self.beside, self.target)
        _sync(self.target.parent)
        if self.then is not None:
            self.then()
        prune(self.run, self.keep)


def prune(run: Path, keep: int) -> None:
    """Leave the newest `keep` checkpoints and the best."""
    known = best.read(run)
    for old in checkpoint.folders(run)[:-keep]:
        if known is None or old != known.folder(run):
            remove(old)


def remove(folder: Path) -> None:
    """Remove a checkpoint so that a kill in the midst of it does not leave one that looks whole."""
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    os.replace(folder, beside)
    shutil.rmtree(beside)


def _sync(folder: Path) -> None:
    """Flush a folder's files, then its own entry, to the disk."""
    for path in [p for p in folder.iterdir() if p.is_file()] + [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _bytes(tensor: Tensor) -> int:
    """Of what this rank holds."""
    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return held.numel() * held.element_size()


def _fits(tensors: dict[str, Tensor]) -> bool:
    """Whether this machine, where other ranks copy as much, has memory for it. True where that cannot be known."""
    free = _free_memory()
    needed = sum(map(_bytes, tensors.values())) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free is None or needed <= _SPARE * free


def _free_memory(table: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that can be taken without swapping, as Linux estimates them."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", table.read_text() if table.exists() else "", re.MULTILINE)
    return int(found[1]) << 10 if found else None
