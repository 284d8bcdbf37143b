"""Megatron's checkpoint files: which rank lies where, opened with a closed list of types, and written.

Knows nothing of what the tensors mean. Files are mapped; writing holds one tensor in memory, and a rank's file twice on
disk.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vistune import console
from vistune.models.checkpoints.mcore_layout import extra_states
from vistune.models.weights import Entry, mapped, pickled

LATEST, FILE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(_\d{3})?")
_LAYER = re.compile(r"language_model\.decoder\.layers\.(\d+)\.")
_NO_EXPERTS = (
    "experts (MoE, such as 30B-A3B) and expert parallelism are not supported: no family here has a mixture of experts"
)

Rank = tuple[int, int]
"""Tensor-parallel and pipeline rank."""


class Inert:
    """Stands for an object of a type that is of no use here. It takes whatever it is given and keeps nothing."""

    def __init__(self, *values: Any):
        """Keeps nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keeps nothing."""


# All that Megatron's files hold beside tensors and plain containers. The blobs in BytesIO are never opened.
_NEVER_USED = (
    "megatron.core.enums.Fp8Recipe",
    "megatron.core.enums.ModelType",
    "megatron.core.rerun_state_machine.Call",
    "megatron.core.rerun_state_machine.Caller",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunValidationStatus",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.AttnMaskType",
    "megatron.core.transformer.enums.AttnType",
    "megatron.core.transformer.enums.LayerType",
    "megatron.core.transformer.enums.ModelType",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.PosixPath",
    "signal.Signals",
)
_CLOSED_LIST: list[Any] = [argparse.Namespace, io.BytesIO, *((Inert, name) for name in _NEVER_USED)]


class Opened:
    """The files of a checkpoint, mapped; and what they say of themselves."""

    def __init__(self, folder: Path):
        """Raises ValueError for a checkpoint that is not whole, of another kind, or with experts."""
        files = _rank_files(_place(folder))
        self.tensor = 1 + max(rank[0] for rank in files)
        self.pipeline = 1 + max(rank[1] for rank in files)
        if missing := sorted({(t, p) for t in range(self.tensor) for p in range(self.pipeline)} - files.keys()):
            named = ", ".join(rank_name(rank, self.pipeline) for rank in missing[:10])
            raise ValueError(f"{folder}: {len(missing)} ranks are missing: {named}; copy the checkpoint again")
        self.held = {rank: pickled(file, _CLOSED_LIST) for rank, file in files.items()}
        self.models = {rank: _pieces_in(held, files[rank]) for rank, held in self.held.items()}
        self.args = self.held[0, 0].get("args", {})
        _refuse_experts(folder, vars(self.args) if not isinstance(self.args, dict) else self.args, self.models[0, 0])
        left = {"optimizer", "opt_param_scheduler", "rng_state"} & self.held[0, 0].keys()
        if left or any(files[0, 0].parent.glob("distrib_optimizer*")):
            console.say(f"{folder}: optimizer and random states are left behind; weights alone are converted")

    def ordered(self) -> Iterator[list[dict[str, Tensor]]]:
        """The pieces in the order of the layers; each as every tensor-parallel rank holds it."""
        for piece in range(len(self.models[0, 0])):
            for pipeline_rank in range(self.pipeline):
                yield [self.models[rank, pipeline_rank][piece] for rank in range(self.tensor)]

    def layers(self) -> list[int]:
        return [len({found[1] for name in piece[0] if (found := _LAYER.match(name))}) for piece in self.ordered()]

    def origin(self) -> dict[str, Any]:
        """What writing it again needs."""
        return {
            "tensor_parallel": self.tensor,
            "pipeline_parallel": self.pipeline,
            "virtual_pipeline": len(self.models[0, 0]),
            "layers": self.layers(),
            "args": "dict" if isinstance(self.args, dict) else "Namespace",
            "extra_state": any(name.endswith("_extra_state") for name in self.models[0, 0][0]),
        }


def _place(folder: Path) -> Path:
    """The folder of the ranks: `folder` itself, its `release`, or the iteration that it says is the latest."""
    if not (folder / LATEST).is_file():
        return folder
    latest = (folder / LATEST).read_text(encoding="utf-8").strip()
    if latest != "release" and not latest.isdecimal():
        raise ValueError(f"{folder / LATEST}: says {latest[:40]!r}; a number or the word release is expected")
    place = folder / (latest if latest == "release" else f"iter_{int(latest):07d}")
    if not place.is_dir():
        raise ValueError(f"{folder}: {LATEST} names {place.name}, which is not there; copy the checkpoint again")
    return place


def _rank_files(place: Path) -> dict[Rank, Path]:
    if any(place.glob("*.distcp")):
        raise ValueError(f"{place}: is of Megatron's distributed kind; save it there with --ckpt-format torch")
    found = {}
    for path in sorted(place.iterdir()):
        if (match := RANK.fullmatch(path.name)) and (path / FILE).is_file():
            if match[3]:
                raise ValueError(f"{path}: {_NO_EXPERTS}")
            found[int(match[1]), int(match[2] or 0)] = path / FILE
    if not found:
        raise ValueError(f"{place}: holds no mp_rank_XX/{FILE}")
    return found


def rank_name(rank: Rank, pipeline: int) -> str:
    return f"mp_rank_{rank[0]:02d}" + (f"_{rank[1]:03d}" if pipeline > 1 else "")


def _pieces_in(held: dict[str, Any], file: Path) -> list[dict[str, Tensor]]:
    """The model of one rank: whole, or its interleaved pieces `model0`, `model1`, ..."""
    pieces = (
        [held["model"]] if "model" in held else [held[f"model{i}"] for i in range(len(held)) if f"model{i}" in held]
    )
    if not pieces:
        raise ValueError(f"{file}: holds {', '.join(map(str, list(held)[:10]))}, but no model")
    for piece in pieces:
        for name, value in piece.items():
            if not isinstance(value, Tensor) and not name.endswith("_extra_state"):
                raise ValueError(f"{file}: {name} is a {type(value).__name__}, no tensor")
    return pieces


def _refuse_experts(folder: Path, args: Mapping[str, Any], pieces: list[dict[str, Tensor]]) -> None:
    said = [
        key for key in ("num_experts", "expert_parallel_size", "expert_model_parallel_size") if (args.get(key) or 0) > 1
    ]
    names = [name for piece in pieces for name in piece if ".experts." in name or ".router." in name]
    if said or names:
        raise ValueError(f"{folder}: {(said or names)[0]}: {_NO_EXPERTS}")


def save(
    file: Path,
    pieces: list[dict[str, Entry]],
    args: Any,
    extra: bool,
    written: Callable[[int], None],
) -> None:
    """One rank's file. Its tensors lie in mapped files beside it first, which `torch.save` reads without memory."""
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        models = []
        for number, piece in enumerate(pieces):
            model: dict[str, Any] = {}
            for name, entry in piece.items():
                model[name] = mapped(entry, Path(scratch) / f"{number}.{name}")
                written(entry.nbytes)
            if extra:
                model |= {name: _nothing() for name in extra_states(list(piece))}
            models.append(model)
        named = {"model": models[0]} if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}
        torch.save({**named, "checkpoint_version": 3.0, "iteration": 0, "args": args}, file)
        del models, named, model


def _nothing() -> io.BytesIO:
    """What Transformer Engine saves of a module without a state."""
    blob = io.BytesIO()
    torch.save(None, blob)
    return blob
