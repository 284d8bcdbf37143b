"""A model in outline gets memory and values: each tensor read, cut to what this rank holds of it, and let go.

Knows names and layouts of tensors; why a model is laid out as it is, others know.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vistune import console, ranks
from vistune.models.fit import NONFINITE, refuse
from vistune.models.load import Loaded, stored_tensors

ADAPTER, BASE = ".lora_", ".base_layer"
"""In the names of an adapter's tensors, and of those of the layer that it lies beside."""

Initial = Callable[[str, Sequence[int]], Tensor]
"""The value that a tensor of an adapter begins with, whole, by its name and shape."""


@torch.no_grad()
def fill(
    loaded: Loaded,
    device: torch.device,
    home: torch.device | None = None,
    initial: Initial | None = None,
    exact: Collection[str] = (),
) -> dict[str, Tensor]:
    """Give the tensors of `loaded.model` memory on `device`, in the types and layouts that its outline has, and values.
    Parameters lie on `home` where that is given.

    A parameter that lies in shards (a DTensor) gets this rank's shard alone: no more than one whole tensor is held at
    a time. A module with a method `pieces` (a quantised layer) is given its stored weight and says what its own tensors
    are. `initial` is asked for what adapters begin with. Parameters become other objects of the same names.

    Returns, of the parameters named in `exact`, this rank's part of the stored value in fp32, whatever type they are
    held in. ValueError for values that are not finite, on all ranks alike.
    """
    filling = _Filling(loaded, device, home or device, initial, frozenset(exact))
    with console.progress() as bar:
        task = bar.add_task("reading the model", total=sum(1 for _ in loaded.model.modules()))
        for path, module in loaded.model.named_modules():
            filling.module(path, module)
            bar.advance(task)
    loaded.model.load_state_dict({}, strict=False)  # tells those who shard it that what they hold has changed
    wrong = {name for names in ranks.gather(filling.wrong) for name in names}
    refuse(loaded.where, {NONFINITE: wrong})
    return filling.exactly


class _Filling:
    def __init__(
        self,
        loaded: Loaded,
        device: torch.device,
        home: torch.device,
        initial: Initial | None,
        exact: frozenset[str],
    ):
        self.stored, self.stored_name = stored_tensors(loaded), loaded.family.stored_name
        self.device, self.home, self.initial, self.exact = device, home, initial, exact
        self.made: dict[nn.Parameter, nn.Parameter] = {}  # for each that was, so that tied ones stay one
        self.exactly: dict[str, Tensor] = {}
        self.wrong: list[str] = []

    def module(self, path: str, module: nn.Module) -> None:
        """All tensors of the module itself."""
        prefix = f"{path}." if path else ""
        pieces = getattr(module, "pieces", None)
        given = self._pieces(f"{prefix}weight", pieces) if pieces is not None else {}
        for leaf, held in module._parameters.items():
            if held is not None:
                module._parameters[leaf] = self._parameter(prefix + leaf, held, given.get(leaf))
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                kept = leaf not in module._non_persistent_buffers_set
                value = given[leaf] if leaf in given else self.stored(prefix + leaf) if kept else buffer
                module._buffers[leaf] = _memory(buffer, value, self.device)

    def _pieces(self, name: str, pieces: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
        weight = self._read(name, ())
        self._check(name, weight)
        return pieces(weight.to(self.device))  # quantising takes minutes on a host

    def _parameter(self, name: str, held: nn.Parameter, piece: Tensor | None) -> nn.Parameter:
        if held not in self.made:
            self.made[held] = self._new(name, held, self._read(name, held.shape) if piece is None else piece)
        return self.made[held]

    def _new(self, name: str, held: nn.Parameter, whole: Tensor) -> nn.Parameter:
        value = part(whole, held)
        self._check(name, value)
        if name in self.exact:
            self.exactly[name] = value.to(self.home, torch.float32, copy=True)
        made: Tensor = _memory(held, value, self.home)
        if isinstance(held, DTensor):  # not from_local, which copies what lies on the host to the mesh's kind of device
            made = DTensor(made, held._spec, requires_grad=False)
        return nn.Parameter(made, requires_grad=held.requires_grad)

    def _read(self, name: str, shape: Sequence[int]) -> Tensor:
        if ADAPTER in name:
            assert self.initial is not None, name
            return self.initial(name, shape)
        return self.stored(name.replace(BASE, ""))

    def _check(self, name: str, value: Tensor) -> None:
        if value.is_floating_point() and not torch.isfinite(value).all():
            self.wrong.append(self.stored_name(name.replace(BASE, "")))


def _memory(like: Tensor, value: Tensor, device: torch.device) -> Tensor:
    return torch.empty(value.shape, dtype=like.dtype, device=device).copy_(value)


def part(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of `whole` when it is laid out as `like`: a view."""
    if not isinstance(like, DTensor):
        return whole
    place = like.device_mesh.get_coordinate()
    assert place is not None
    for at, ranks_there, placement in zip(place, like.device_mesh.shape, like.placements, strict=True):
        if placement.is_shard():
            dim: int = placement.dim  # type: ignore[attr-defined]
            chunks = whole.chunk(ranks_there, dim)
            whole = chunks[at] if at < len(chunks) else whole.narrow(dim, 0, 0)
    return whole
