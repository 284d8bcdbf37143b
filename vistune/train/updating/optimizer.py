"""AdamW over the learned parameters, each with its own rate, and the schedule of the rates. It works on what this rank
holds of each parameter; moments in fp32 or 8 bits, weights with or without fp32 masters. Knows no models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vistune.recipe import Optimizer as Settings
from vistune.train.learn import Learned
from vistune.train.spreading import parallel
from vistune.train.updating import adamw, moments, rounding
from vistune.train.updating.moments import Blocks, Whole, part

PIECE = 1 << 25
"""Values that are copied to fp32 at once where weights, gradients or moments are not: 128 MiB for each of them."""


def schedule(settings: Settings, step: int, steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of update number `step` (the first is 1) out of `steps`.

    Linear warm-up from 0, then cosine, linear or constant down to `min_lr`, which the last update reaches.
    """
    warmup = warmup_steps(settings, steps)
    if step < warmup:
        return lr * step / warmup
    if settings.schedule == "constant":
        return lr
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return min_lr + (lr - min_lr) * left


def warmup_steps(settings: Settings, steps: int) -> int:
    return math.ceil(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)


@dataclass
class Held:
    """What this rank holds of one learned parameter: the weight, its moments, and its master where there is one."""

    one: Learned
    weight: Tensor
    first: Whole | Blocks
    second: Whole | Blocks
    master: Tensor | None

    @property
    def decays(self) -> bool:
        return self.one.parameter.ndim > 1 and not self.one.name.endswith("bias")

    @property
    def copied(self) -> bool:
        """Whether an update needs fp32 copies, so that it is done piece by piece."""
        return self.weight.dtype != torch.float32 or self.first.bits == 8


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of what is held of a parameter, during an update."""

    held: Held
    rows: slice

    @property
    def weight(self) -> Tensor:
        return part(self.held.weight, self.rows)

    def values(self) -> Tensor:
        """The fp32 weights: themselves, their masters, or a copy in the order of the elements."""
        if self.held.master is not None:
            return part(self.held.master, self.rows)
        return self.weight.to(torch.float32, memory_format=torch.preserve_format)

    def gradient(self, like: Tensor) -> Tensor:
        grad = self.held.one.parameter.grad
        assert grad is not None
        return laid(part(parallel.local(grad), self.rows).to(like.dtype), like)


class Optimizer:
    """AdamW with a rate for each learn key and decay for matrices.

    Weights of half precision have fp32 `masters` (by name, this rank's shard; made of the weights where none are given)
    and are written from them after each update; with `rounding_seed` they have none, and updates are rounded
    stochastically. Raises ValueError where the 8-bit moments' library is missing.
    """

    def __init__(
        self,
        settings: Settings,
        learned: list[Learned],
        steps: int,
        masters: Mapping[str, Tensor] | None = None,
        rounding_seed: int | None = None,
    ):
        self.settings, self.steps, self.rounding_seed = settings, steps, rounding_seed
        self.learned = learned
        self.held = [self._hold(one, masters or {}) for one in learned]
        self.device = self.held[0].weight.device
        self.count = torch.zeros((), dtype=torch.float32, device=self.device)  # updates done

    @torch.no_grad()
    def _hold(self, one: Learned, masters: Mapping[str, Tensor]) -> Held:
        weight = parallel.local(one.parameter)
        master = None
        if weight.dtype != torch.float32 and self.rounding_seed is None:
            master = masters[one.name] if one.name in masters else weight.float()
        if self.settings.name == "adamw8bit" and moments.eight(one.parameter):
            return Held(one, weight, Blocks(weight, signed=True), Blocks(weight, signed=False), master)
        return Held(one, weight, Whole(weight), Whole(weight), master)

    def _hold_again(self) -> None:
        """Sharding may move what a rank holds to another place, as it does before the first forward."""
        for held in self.held:
            held.weight = parallel.local(held.one.parameter)

    @property
    def masters(self) -> dict[str, Tensor]:
        """The fp32 values of weights of half precision, by name."""
        return {held.one.name: held.master for held in self.held if held.master is not None}

    def gradients(self) -> list[Tensor]:
        """Every learned parameter's gradient; one that got none this step has a zero gradient, on every rank alike."""
        for one in self.learned:
            if one.parameter.grad is None:
                one.parameter.grad = torch.zeros_like(one.parameter)
        return [one.parameter.grad for one in self.learned]  # type: ignore[misc]

    @torch.no_grad()
    def update(self, step: int, divisor: Tensor | None = None, skip: Tensor | None = None) -> None:
        """One AdamW update with the rates of update number `step`.

        divisor: what the gradients are divided by (clipping, loss scale). skip: 1 leaves everything as it is. Both are
        fp32 scalars and are not read on the host, unless the weights are held there (offload).
        """
        divisor = None if divisor is None else divisor.to(self.device)
        skip = None if skip is None else skip.to(self.device)
        self.count.add_(1 if skip is None else 1 - skip)
        self._hold_again()
        for pieces in self._together():
            self._update(pieces, step, divisor, skip)

    def _together(self) -> Iterator[list[Piece]]:
        """Pieces of one rate and decay that are updated at once; of those that need copies, so many as fit."""
        groups: dict[tuple[str, bool, bool, torch.dtype], list[Held]] = {}
        for held in self.held:
            if (weight := held.weight).numel():  # a shard may be empty
                groups.setdefault((held.one.key, held.decays, held.copied, weight.dtype), []).append(held)
        for (_, _, copied, _), members in groups.items():
            pieces = [Piece(held, rows) for held in members for rows in (_rows(held.weight) if copied else [ALL])]
            yield from _filled(pieces) if copied else [pieces]

    def _update(self, pieces: list[Piece], step: int, divisor: Tensor | None, skip: Tensor | None) -> None:
        one = pieces[0].held.one
        values = [piece.values() for piece in pieces]
        both = [(piece.held.first.read(piece.rows), piece.held.second.read(piece.rows)) for piece in pieces]
        firsts = [laid(first, like) for (first, _), like in zip(both, values, strict=True)]
        seconds = [laid(second, like) for (_, second), like in zip(both, values, strict=True)]
        adamw.update(
            values,
            [piece.gradient(like) for piece, like in zip(pieces, values, strict=True)],
            firsts,
            seconds,
            self.count,
            lr=schedule(self.settings, step, self.steps, one.rate.lr, one.rate.min_lr),
            betas=self.settings.betas,
            eps=self.settings.eps,
            decay=self.settings.weight_decay if pieces[0].held.decays else 0.0,
            divisor=divisor,
            skip=skip,
        )
        for piece, first, second in zip(pieces, firsts, seconds, strict=True):
            piece.held.first.keep(piece.rows, first, skip)
            piece.held.second.keep(piece.rows, second, skip)
        self._write(pieces, values, step)

    def _write(self, pieces: list[Piece], values: list[Tensor], step: int) -> None:
        """The fp32 `values` into the weights, where these are of half precision."""
        if pieces[0].weight.dtype == torch.float32:
            return
        weights = [piece.weight for piece in pieces]
        if self.rounding_seed is not None:
            values = self._rounded(pieces, values, step)
        torch._foreach_copy_(weights, values)

    def _rounded(self, pieces: list[Piece], values: list[Tensor], step: int) -> list[Tensor]:
        """Stochastically rounded, all in one row, so that the kernels are few."""
        assert self.rounding_seed is not None
        sizes = [value.numel() for value in values]
        noise = torch.empty(sum(sizes), dtype=torch.int32, device=self.device)
        for piece, out in zip(pieces, noise.split(sizes), strict=True):
            key = rounding.key(self.rounding_seed, step, piece.held.one.name)
            rounding.number(out, first_element(piece), key)
        flat = torch.cat([value.reshape(-1) for value in values])
        done = rounding.to_bf16(flat, rounding.mix(noise)).split(sizes)
        return [one.view(value.shape) for one, value in zip(done, values, strict=True)]

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the weights, after they were loaded."""
        self._hold_again()
        for held in self.held:
            if held.master is not None:
                held.weight.copy_(held.master)

    def clear(self) -> None:
        for one in self.learned:
            one.parameter.grad = None

    def rates(self, step: int) -> dict[str, float]:
        """Rate of each `learn` key at update number `step`."""
        return {
            one.key: schedule(self.settings, step, self.steps, one.rate.lr, one.rate.min_lr) for one in self.learned
        }

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Flat state by parameter name: moments, the number of updates, and masters where there are some.

        The tensors are the optimizer's own: what is loaded into them counts (`write_back` after it). Of the number of
        updates there is one, under every name.
        """
        flat = {}
        for held in self.held:
            name, like = held.one.name, held.one.parameter
            flat[f"{name}/step"] = self.count
            for kind, moment in (("exp_avg", held.first), ("exp_avg_sq", held.second)):
                flat |= {f"{name}/{kind}{suffix}": value for suffix, value in moment.state(like).items()}
            if held.master is not None:
                flat[f"{name}/master"] = parallel.spread(held.master, like)
        return flat


ALL = slice(None)


def _rows(weight: Tensor) -> list[slice]:
    """The rows of a tensor in parts of at most `PIECE` values, or of one row."""
    if not weight.ndim:
        return [ALL]
    many = max(1, PIECE // max(1, weight.shape[1:].numel()))
    return [slice(start, min(start + many, len(weight))) for start in range(0, len(weight), many)]


def _filled(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Neighbours together, as long as they are at most `PIECE` values."""
    filled: list[Piece] = []
    size = 0
    for piece in pieces:
        if filled and size + piece.weight.numel() > PIECE:
            yield filled
            filled, size = [], 0
        filled.append(piece)
        size += piece.weight.numel()
    yield filled


def first_element(piece: Piece) -> int:
    """The index, in the whole parameter, of the first element of a piece."""
    parameter = piece.held.one.parameter
    inside = (piece.rows.start or 0) * parameter.shape[1:].numel()
    if not isinstance(parameter, DTensor):
        return inside
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    assert shape[1:] == tuple(parameter.shape[1:]), "shards are rows"
    return inside + offset[0] * parameter.shape[1:].numel()


def laid(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the memory layout of `like`, which the kernel wants of all it is given."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)
