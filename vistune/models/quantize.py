"""The language model's matrices in 8 or 4 bits, through bitsandbytes, as they are read: never all of them unquantised.

Vision, connector, embedding and head stay as they are. Knows parts through the family, nothing of formats.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vistune import console
from vistune.models.families import Family
from vistune.models.load import Loaded, as_read, load

KINDS = ("8bit", "4bit")
BLOCK, PIECE = 64, 1 << 22
"""Values of NF4 that share a scale (arXiv 2305.14314, section 3), and those that are quantised at once."""
OUTLIER = 6.0
"""Activations above this are multiplied unquantised in 8 bits (LLM.int8(), arXiv 2208.07339, section 3.2)."""


def load_quantized(
    folder: Path | str,
    kind: str,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    device: torch.device | str = "cpu",
    double: bool = False,
    **said: Any,
) -> Loaded:
    """`vistune.models.load.load` with every linear layer of the language model but its head in `kind`.

    "8bit" is LLM.int8(), "4bit" NF4 in blocks of 64 values; `double` quantises the blocks' scales too. Each matrix is
    quantised on `device` as soon as it is read. `dtype` is of everything else, and what is computed in. ValueError for
    another kind, without bitsandbytes, and as `load` raises it.
    """
    place = Quantizer(kind, torch.device(device), double)
    loaded = load(folder, dtype=dtype, place=place, **said)
    loaded.model.to(device)  # type: ignore[arg-type]  # buffers that are computed, not read
    after = sum(footprint(loaded.model, loaded.family).values())
    before = after + place.before - place.after
    console.say(f"loaded in {kind}: {size(after)} instead of {size(before)}")
    return loaded


def size(count: float) -> str:
    """Bytes for people, in decimal and in binary units."""
    return f"{count / 1e9:.3g} GB ({count / 2**30:.3g} GiB)" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def linear_paths(model: nn.Module, family: Family) -> list[str]:
    """The full paths of what is quantised: every linear layer of the language model but its head."""
    head = family.head(model)
    roots = family.parts(model)["language"]
    inside = {id(one) for root in roots for one in root.modules() if isinstance(one, nn.Linear) and one is not head}
    return [path for path, module in model.named_modules() if id(module) in inside]


@dataclass
class Quantizer:
    """See `vistune.models.load.Place`. `before`, `after`: bytes of the quantised matrices as they were and as they are.

    ValueError for another kind than 8bit and 4bit, and when bitsandbytes is not there.
    """

    kind: str
    device: torch.device
    double: bool = False
    before: int = 0
    after: int = 0
    paths: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"quantize: {self.kind!r}; there are {' and '.join(KINDS)}")
        library()

    def __call__(self, family: Family, model: nn.Module, name: str, value: Tensor) -> None:
        self.paths = self.paths or set(linear_paths(model, family))
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in self.paths:
            as_read(family, model, name, value.to(self.device))
            return
        parent, _, last = path.rpartition(".")
        made = quantized(model.get_submodule(path), value, self.kind, self.device, self.double)
        setattr(model.get_submodule(parent), last, made)
        self.before += value.nbytes
        self.after += sum(tensor.nbytes for tensor in unwrapped(made.weight))


def library() -> Any:
    """bitsandbytes. ValueError, with what to install, where it is absent or does not load."""
    try:
        import bitsandbytes
    except (ImportError, RuntimeError) as error:
        raise ValueError(f'quantize: needs bitsandbytes ({error}); pip install "vistune[quant]"') from error
    # It says at every layer of every token that activations are multiplied in fp16, which is how the method works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def quantized(linear: Any, weight: Tensor, kind: str, device: torch.device | str = "cpu", double: bool = False) -> Any:
    """A quantised layer in place of `linear` (its own weight is not looked at) with `weight` [out, in], on `device`."""
    bnb, shape = library(), (linear.in_features, linear.out_features)
    made: Any
    with torch.device("meta"):
        if kind == "8bit":
            made = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=OUTLIER)
        else:
            made = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    if kind == "8bit":
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    else:
        packed, made.quant_state = nf4(weight, device, double)
        said = {"quant_state": made.quant_state, "blocksize": BLOCK, "compress_statistics": double, "quant_type": "nf4"}
        made.weight = bnb.nn.Params4bit(packed, requires_grad=False, module=made, bnb_quantized=True, **said)
    made.bias = linear.bias
    return made.eval()


def nf4(weight: Tensor, device: torch.device | str, double: bool) -> tuple[Tensor, Any]:
    """A weight's values in 4 bits and what turns them back, to the bits of bitsandbytes' own. Piece by piece: on a CPU
    it takes tens of bytes of room for each value."""
    bnb = library().functional
    pieces = [
        bnb.quantize_4bit(one.to(device), blocksize=BLOCK, quant_type="nf4") for one in weight.reshape(-1).split(PIECE)
    ]
    scales, nested = torch.cat([state.absmax for _, state in pieces]), {}
    if double:
        nested["offset"] = scales.mean()
        scales, nested["state2"] = bnb.quantize_blockwise(scales - nested["offset"], blocksize=256)
    said = {"code": pieces[0][1].code, "blocksize": BLOCK, "quant_type": "nf4", "dtype": weight.dtype}
    state = bnb.QuantState(absmax=scales, shape=weight.shape, **said, **nested)
    return torch.cat([packed for packed, _ in pieces]), state


def footprint(model: nn.Module, family: Family) -> dict[str, int]:
    """Bytes of each part's weights as they are held, tied ones once, with what quantised ones need to be read again.

    Subclasses of tensors are unwrapped: what they say of their own size is what they stand for, not what they hold.
    """
    seen: set[int] = set()
    return {
        part: sum(_bytes(module, seen) for root in roots for module in root.modules())
        for part, roots in family.parts(model).items()
    }


def _bytes(module: nn.Module, seen: set[int]) -> int:
    total = 0
    for tensor in _held(module):
        for one in unwrapped(tensor):
            place = id(one) if one.is_meta else one.untyped_storage().data_ptr()
            if place not in seen:
                seen.add(place)
                total += one.nbytes
    return total


def _held(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers, and the scales that bitsandbytes moves into a layer's state."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is not None:
        yield scales


def unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or the inner ones and the scales of a quantised one."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            yield from unwrapped(getattr(tensor, name))
        return
    yield tensor
    state, scales = getattr(tensor, "quant_state", None), getattr(tensor, "SCB", None)
    if scales is not None:
        yield scales
    while state is not None:
        yield from (one for one in (state.absmax, state.code, state.offset) if isinstance(one, Tensor))
        state = state.state2
