"""Adapters on one model in memory, put on and taken off by name. What an adapted model has in its places lies ready,
and changing is setting pointers: no weight is copied. Knows nothing of requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistune.models import lowbit, merge
from vistune.models.checkpoints import llava_lora
from vistune.models.fit import plain
from vistune.models.load import Loaded
from vistune.models.weights import Entry

FILES = (*merge.FILES, merge.ADAPTER_CONFIG, merge.LEARNED, llava_lora.OTHERS, "config.json")
"""All that may say something of an adapter; what else lies beside it is not its own."""


def place_of(folder: Path) -> Path | None:
    """Where an adapter lies: `folder`, or `adapter/` of a run of vistune's; None where there is none."""
    return next((one for one in (folder, folder / "adapter") if merge.is_adapter(one)), None)


def base_of(folder: Path) -> str:
    """What an adapter says that it was trained on; empty when it does not say."""
    place = place_of(folder)
    if place is None:
        return ""
    try:
        said = json.loads((place / merge.ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place}: {merge.ADAPTER_CONFIG} is not JSON ({error})") from error
    return str(said.get("base_model_name_or_path") or "")


def files_of(place: Path) -> list[Path]:
    """The files of which an adapter consists, those of them that are there."""
    return [file for name in FILES if (file := place / name).is_file()]


def read(folder: Path, loaded: Loaded) -> merge.Learned:
    """What an adapter for this model holds, in peft's layout (ours and other people's) or as the pair that LLaVA's LoRA
    training leaves. No tensor is read yet. ValueError for what is no adapter or cannot be laid on this model."""
    place = place_of(folder)
    if place is None:
        raise ValueError(f"{folder}: no adapter ({merge.ADAPTER_CONFIG} is neither in it nor in adapter/)")
    return llava_lora.learned(place, loaded) if llava_lora.FORMAT.recognises(place) else merge.read_adapter(place)


class Adapted(nn.Module):
    """A linear layer with an adapter beside it: `down` [r, in], `up` [out, r] with the scale in it; `gain` [out] is
    what DoRA multiplies each row with (arXiv 2402.09353, equation 5), computed once instead of at every token."""

    def __init__(self, linear: nn.Linear, down: Tensor, up: Tensor, gain: Tensor | None):
        super().__init__()
        self.linear = linear
        self.down: Tensor
        self.up: Tensor
        self.gain: Tensor | None
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("gain", gain, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The layer's own, as code that asks for its type and device expects."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        said = self.linear(x)
        learned = F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)
        if self.gain is None:
            return (said + learned).to(said.dtype)
        bias = 0 if self.linear.bias is None else self.linear.bias
        return ((said - bias + learned) * self.gain + bias).to(said.dtype)


@dataclass(frozen=True)
class Swap:
    """`held[key]`: what stands there without the adapter, and with it. `held` are the children, parameters or buffers
    of a module; `owner` is the layer that computes with it."""

    owner: nn.Module
    held: dict[str, Any]
    key: str
    own: Any
    other: Any


@dataclass(frozen=True)
class Adapter:
    """An adapter that lies ready for a model. `sees`: whether pictures may look otherwise to it than to the model."""

    swaps: tuple[Swap, ...]
    nbytes: int
    sees: bool


class Adapters:
    """The adapters of a model that is on its device. `wear` belongs to the thread that computes; the rest may be called
    from another one meanwhile. The model must not be moved or wrapped any more."""

    def __init__(self, loaded: Loaded):
        merge.bring_library()
        self.loaded = loaded
        self.worn = ""
        self._on: tuple[Swap, ...] = ()
        self._ready: dict[str, Adapter] = {}
        self._places = _Places(loaded)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._ready)

    @property
    def nbytes(self) -> int:
        """What all of them hold beside the model."""
        return sum(one.nbytes for one in tuple(self._ready.values()))

    def check(self, folder: Path | str) -> None:
        """ValueError for an adapter that is not whole or not for this model, by names and shapes alone."""
        self._places.fitting(read(Path(folder), self.loaded), f"{folder}")

    def add(self, name: str, folder: Path | str) -> Adapter:
        """Lay an adapter ready, on the model's device and in its type. ValueError, with nothing changed, for one that
        is not whole or not for this model, naming the tensors."""
        assert name and name not in self._ready, name
        made = self._places.made(read(Path(folder), self.loaded), f"{folder}")
        if self.loaded.model.device.type != "cpu":
            torch.accelerator.synchronize(self.loaded.model.device)  # another thread computes with it
        self._ready[name] = made
        return made

    def remove(self, name: str) -> None:
        """Let go of one that nobody will ask for. If it is worn, it stays on until another is."""
        self._ready.pop(name)

    def sees(self, name: str) -> str:
        """Whose encoded pictures serve for `name`: the model's own (""), unless vision or connector learned."""
        return name if name and self._ready[name].sees else ""

    def wear(self, name: str) -> None:
        """From here on the model is that of `name`; "": the model itself, to the bit. KeyError for none of `names`."""
        if name == self.worn:
            return
        on = self._ready[name].swaps if name else ()
        for one in self._on:
            one.held[one.key] = one.own
        for one in on:
            one.held[one.key] = one.other
        self._on, self.worn = on, name


@dataclass
class _Misfits:
    """What of an adapter does not fit, by what is wrong with it."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, name: str) -> None:
        self.found.setdefault(what, []).append(name)

    def refuse(self, where: str, model: str) -> None:
        if not self.found:
            return
        said = [
            f"{len(names)} tensors {what}:\n  " + "\n  ".join(sorted(names)[:10]) for what, names in self.found.items()
        ]
        raise ValueError(f"{where}: not an adapter of {model}: " + "\n".join(said))


ABSENT, SHAPE, QUANTIZED = "are not in it", "have another shape", "learned whole, where it is quantised"
GROWN, BROKEN = "have other rows than its vocabulary (merge it into a folder of its own)", "are not finite"


_Place = tuple[nn.Module, dict[str, Any], str, Tensor]


class _Places:
    """A model's layers and tensors as they are without adapters, by their names in every layout."""

    def __init__(self, loaded: Loaded):
        model: Any = loaded.model
        self.model, self.where, self.family = model, loaded.where, loaded.family
        self.layers: dict[str, tuple[str, dict[str, Any], str, nn.Linear]] = {}
        self.tensors: dict[str, list[_Place]] = {}
        self.language = {id(one) for root in loaded.family.parts(model)["language"] for one in root.modules()}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                parent, _, leaf = path.rpartition(".")
                held = model.get_submodule(parent)._modules
                for name in self._names(f"{path}.weight"):
                    self.layers[name] = (path, held, leaf, module)
        self._lay_tensors(model)

    def _names(self, name: str) -> set[str]:
        return {plain(name), plain(self.family.stored_name(name))}

    def _lay_tensors(self, model: nn.Module) -> None:
        """A tensor that stands in several places (a tied head) is known by its first name and changed in all."""
        at: dict[int, list[_Place]] = {}
        for path, module in model.named_modules():
            hidden = set(module.leaves()) if isinstance(module, lowbit.Quantized) else set()
            for held in (module._parameters, module._buffers):
                for leaf, tensor in held.items():
                    if tensor is None or leaf in hidden:
                        continue
                    known = id(tensor) in at
                    at.setdefault(id(tensor), []).append((module, held, leaf, tensor))
                    if not known:
                        for name in self._names(f"{path}.{leaf}"):
                            self.tensors[name] = at[id(tensor)]

    def fitting(self, learned: merge.Learned, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The layer for each adapter, and the places of each tensor. ValueError for what has none; nothing is read."""
        misfits = _Misfits()
        layers = {path: self._layer(path, parts, misfits) for path, parts in learned.adapters.items()}
        tensors = {name: self._tensor(name, entry, misfits) for name, entry in learned.whole.items()}
        misfits.refuse(where, self.where)
        return layers, tensors

    @torch.no_grad()
    def made(self, learned: merge.Learned, where: str) -> Adapter:
        """What the adapter puts where. ValueError as `fitting`, and for values that are not finite."""
        (layers, tensors), misfits = self.fitting(learned, where), _Misfits()
        swaps = [*self._adapted(learned, layers, misfits), *self._whole(learned, tensors, misfits)]
        misfits.refuse(where, self.where)
        sees = any(id(one.owner) not in self.language for one in swaps)
        return Adapter(tuple(swaps), sum({id(one.other): _bytes(one.other) for one in swaps}.values()), sees)

    def _layer(self, path: str, parts: Mapping[str, Entry], misfits: _Misfits) -> Any:
        found = self.layers.get(plain(f"{path}.weight"))
        if found is None:
            misfits.add(ABSENT, f"{path}.weight")
            return None
        linear = found[3]
        rank, out = parts["lora_A"].shape[0], linear.out_features
        wanted: dict[str, tuple[int, ...]] = {"lora_A": (rank, linear.in_features), "lora_B": (out, rank)}
        wanted["lora_magnitude_vector"] = (out,)
        for kind, entry in parts.items():
            if entry.shape != wanted[kind]:
                misfits.add(SHAPE, f"{path}.{kind} is {list(entry.shape)}, {list(wanted[kind])} would fit")
        return found

    def _tensor(self, name: str, entry: Entry, misfits: _Misfits) -> Any:
        found = self.tensors.get(plain(name))
        if found is None:
            layer = self.layers.get(plain(name))
            misfits.add(QUANTIZED if layer and isinstance(layer[3], lowbit.Quantized) else ABSENT, name)
            return None
        shape = tuple(found[0][-1].shape)
        if entry.shape != shape:
            rows = "embed" in name or "lm_head" in name or "wte" in name
            misfits.add(GROWN if rows else SHAPE, f"{name} is {list(entry.shape)}, {list(shape)} would fit")
        return found

    def _adapted(self, learned: merge.Learned, layers: Mapping[str, Any], misfits: _Misfits) -> list[Swap]:
        swaps = []
        for path, (_, held, leaf, linear) in layers.items():
            parts = {kind: entry.read() for kind, entry in learned.adapters[path].items()}
            for kind, value in parts.items():
                if not torch.isfinite(value).all():
                    misfits.add(BROKEN, f"{path}.{kind}")
            made = _beside(linear, merge.around(linear, parts, learned.config, path), self.model.dtype)
            swaps.append(Swap(linear, held, leaf, linear, made))
        return swaps

    def _whole(self, learned: merge.Learned, tensors: Mapping[str, Any], misfits: _Misfits) -> list[Swap]:
        swaps = []
        for name, places in tensors.items():
            own = places[0][-1]
            value = learned.whole[name].read()
            if not torch.isfinite(value).all():
                misfits.add(BROKEN, name)
            other = value.to(own.device, own.dtype, copy=True)
            if isinstance(own, nn.Parameter):
                other = nn.Parameter(other, requires_grad=False)
            swaps += [Swap(owner, held, leaf, own, other) for owner, held, leaf, _ in places]
        return swaps


def _beside(linear: nn.Linear, layer: Any, dtype: torch.dtype) -> Adapted:
    """The layer as peft scales it, in the type that the model computes in; sums are fp32's."""
    weight = next(iter(linear.parameters()))
    down, up = (getattr(layer, kind)["default"].weight.data.to(weight.device) for kind in ("lora_A", "lora_B"))
    up, gain = up * layer.scaling["default"], None
    if layer.use_dora["default"]:
        magnitude = layer.lora_magnitude_vector["default"].weight.data.to(weight.device)
        gain = (magnitude / torch.linalg.norm(linear.weight.float() + up @ down, dim=1)).to(dtype)
    # What was read may be a view of a file, which somebody may change.
    return Adapted(linear, down.to(dtype, copy=True), up.to(dtype), gain).eval()


def _bytes(one: Any) -> int:
    return (
        one.nbytes
        if isinstance(one, Tensor)
        else sum(buffer.nbytes for buffer in one._buffers.values() if buffer is not None)
    )
