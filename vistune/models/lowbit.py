"""Frozen linear layers in 8 or 4 bits: plain tensors that can be cut by rows, and a product that turns back one matrix
at a time, in backward once more. The numbers are bitsandbytes'. Knows nothing of models.

Shapes: O outputs, I inputs, B blocks of a row, `ceil(I / 64)`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("8bit", "4bit")
BLOCK, NESTED, PIECE = 64, 256, 1 << 22
"""Values of NF4 that share a scale (arXiv 2305.14314, section 3), scales that share one when they are quantised too,
and values that are quantised at once."""
OUTLIER = 6.0
"""Activations above this are multiplied unquantised in 8 bits (LLM.int8(), arXiv 2208.07339, section 3.2)."""


def library() -> Any:
    """bitsandbytes. ValueError, with what to install, where it is absent or does not load."""
    try:
        import bitsandbytes
    except (ImportError, RuntimeError) as error:
        raise ValueError(f'quantize: needs bitsandbytes ({error}); pip install "vistune[quant]"') from error
    return bitsandbytes


def layer(linear: nn.Linear, kind: str, double: bool = False) -> Quantized:
    """The layer that takes the place of `linear`, whose weight is not looked at and whose bias it keeps. Its tensors
    take no memory yet. ValueError for another kind than 8bit and 4bit, and without bitsandbytes."""
    if kind not in KINDS:
        raise ValueError(f"quantize: {kind!r}; there are {' and '.join(KINDS)}")
    library()
    # It says at every layer of every token that activations are multiplied in fp16, which is how the method works.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return Int8Linear(linear) if kind == "8bit" else Nf4Linear(linear, double)


class Quantized(nn.Linear):
    """A linear layer whose weight is frozen and held otherwise: `pieces` says in which tensors, `matrix` turns back.

    `weight` is made whole again whenever it is asked for. In training the product is that of the matrix turned back, in
    the type of the input (or of autocast); in evaluation, without gradients, that of bitsandbytes' kernels.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)

    def _leaf(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def leaves(self) -> dict[str, nn.Parameter]:
        """The tensors that stand for the weight, by their names here."""
        return {name: held for name, held in self._parameters.items() if name != "bias" and held is not None}

    def spared(self) -> int:
        """How many fewer values its tensors have than the weight."""
        return self.in_features * self.out_features - sum(held.numel() for held in self.leaves().values())

    def pieces(self, weight: Tensor) -> dict[str, Tensor]:
        """The values of `leaves` for the stored weight [O, I], whole, on its device."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        """[O, I] again, of the leaves in their order."""
        raise NotImplementedError

    def infer(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product by bitsandbytes' kernels, which have no gradients to give."""
        raise NotImplementedError

    def fill(self, weight: Tensor) -> Quantized:
        """Itself, with memory for the stored weight's pieces on its device."""
        for name, value in self.pieces(weight).items():
            self._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in self.named_buffers():
            self._buffers[name] = buffer.to(weight.device)
        return self

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [O, I] in fp32, turned back now; an outline on the meta device."""
        leaves = tuple(self.leaves().values())
        if leaves[0].is_meta:
            return torch.empty(self.out_features, self.in_features, device="meta")
        return self.matrix(torch.float32, *leaves)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        x, bias = input.to(dtype), None if self.bias is None else self.bias.to(dtype)
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            return _Product.apply(x, bias, self.matrix, *self.leaves().values())
        return self.infer(x, bias)


class _Product(torch.autograd.Function):
    """x @ weight.T + bias with gradients for x alone. Of all it takes only the quantised tensors are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, matrix: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(*leaves)
        return F.linear(x, matrix(x.dtype, *leaves), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        assert not ctx.needs_input_grad[1], "the bias of a quantised layer is frozen"
        leaves = ctx.saved_tensors  # asked for once: where activations are computed again, that is all there is
        weight = ctx.matrix(gradient.dtype, *leaves)
        return gradient @ weight, None, None, *(None for _ in leaves)


class Nf4Linear(Quantized):
    """NF4: `packed` uint8 [O, 32 B], two values a byte, and `absmax` fp32 [O, B], a scale for every 64.

    `double`: `absmax` are uint8 codes, with a fp32 scale in `nested` for every 256 and what was taken off in `offset`.
    Blocks begin with each row; one that is not a multiple of 64 long is filled up with zeros. Otherwise the bits are
    those of bitsandbytes, whose blocks run through from row to row.
    """

    def __init__(self, linear: nn.Linear, double: bool):
        super().__init__(linear)
        rows, blocks = linear.out_features, -(-linear.in_features // BLOCK)
        self.doubled, self.spare = double, blocks * BLOCK - linear.in_features
        self._leaf("packed", torch.uint8, rows, blocks * BLOCK // 2)
        self._leaf("absmax", torch.uint8 if double else torch.float32, rows, blocks)
        functional = library().functional
        self.register_buffer("code", functional.get_4bit_type("nf4", device="cpu"), persistent=False)
        if double:
            self._leaf("nested", torch.float32, -(-rows * blocks // NESTED))
            self._leaf("offset", torch.float32, 1)
            self.register_buffer("nested_code", functional.create_dynamic_map(), persistent=False)

    def pieces(self, weight: Tensor) -> dict[str, Tensor]:
        """See `Quantized`. Piece by piece: on a CPU it takes tens of bytes of room for each value."""
        functional, rows = library().functional, F.pad(_float(weight), (0, self.spare))
        done = [
            functional.quantize_4bit(one, blocksize=BLOCK, quant_type="nf4") for one in rows.reshape(-1).split(PIECE)
        ]
        absmax = torch.cat([state.absmax for _, state in done])
        found = {"packed": torch.cat([packed for packed, _ in done]).view(len(weight), -1), "absmax": absmax}
        if self.doubled:
            offset = absmax.mean()
            found["absmax"], state = functional.quantize_blockwise(absmax - offset, blocksize=NESTED)
            found |= {"nested": state.absmax, "offset": offset.view(1)}
        return found | {"absmax": found["absmax"].view(len(weight), -1)}

    def matrix(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        state = self._state(dtype, *leaves[1:])
        whole = library().functional.dequantize_4bit(leaves[0].reshape(-1, 1), state)
        return whole[:, : self.in_features] if self.spare else whole

    def infer(self, x: Tensor, bias: Tensor | None) -> Tensor:
        packed, *scales = self.leaves().values()
        state = self._state(x.dtype, *scales)
        return library().matmul_4bit(F.pad(x, (0, self.spare)), packed.reshape(-1, 1).t(), state, bias=bias)

    def _state(self, dtype: torch.dtype, absmax: Tensor, *nested: Tensor) -> Any:
        functional = library().functional
        more: dict[str, Any] = {}
        if nested:
            inner = functional.QuantState(
                absmax=nested[0], code=self.nested_code, blocksize=NESTED, dtype=torch.float32
            )
            more = {"offset": nested[1][0], "state2": inner}
        shape = torch.Size((self.out_features, self.in_features + self.spare))
        more |= {"code": self.code, "blocksize": BLOCK, "quant_type": "nf4", "dtype": dtype}
        return functional.QuantState(absmax=absmax.reshape(-1), shape=shape, **more)


class Int8Linear(Quantized):
    """LLM.int8(): `rows` int8 [O, I], and in `scales` fp32 [O] the largest value of each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self._leaf("rows", torch.int8, linear.out_features, linear.in_features)
        self._leaf("scales", torch.float32, linear.out_features)

    def pieces(self, weight: Tensor) -> dict[str, Tensor]:
        functional, at_once = library().functional, max(1, PIECE // self.in_features)
        done = [functional.int8_vectorwise_quant(one.half())[:2] for one in weight.split(at_once)]
        return {"rows": torch.cat([rows for rows, _ in done]), "scales": torch.cat([scales for _, scales in done])}

    def matrix(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        rows, scales = leaves
        return (rows * (scales / 127).unsqueeze(1)).to(dtype)

    def infer(self, x: Tensor, bias: Tensor | None) -> Tensor:
        bnb, leaves = library(), self.leaves()
        state = bnb.MatmulLtState()
        state.has_fp16_weights, state.is_training = False, False
        state.CB, state.SCB = leaves["rows"].data, leaves["scales"].data
        return bnb.matmul(x, state.CB, bias=bias, state=state, threshold=OUTLIER)


def _float(weight: Tensor) -> Tensor:
    """In a type that bitsandbytes quantises."""
    return weight if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) else weight.float()
