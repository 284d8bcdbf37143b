"""Quantised layers beside bitsandbytes' own: bits, products, gradients, what backward keeps; rows of any length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vistune.models import lowbit

bnb = pytest.importorskip("bitsandbytes", reason="extra quant")
KINDS = [("8bit", False), ("4bit", False), ("4bit", True)]
each = pytest.mark.parametrize(("kind", "double"), KINDS)


def made(kind, double, shape=(96, 128), bias=True, dtype=torch.float32):
    """A quantised layer and the weight and bias that it stands for."""
    torch.manual_seed(0)
    weight, linear = torch.randn(shape, dtype=dtype) * 0.1, nn.Linear(*reversed(shape), bias=bias, dtype=dtype)
    linear.requires_grad_(False)
    return lowbit.layer(linear, kind, double).fill(weight), weight, linear.bias


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_has_the_bits_of_bitsandbytes(monkeypatch, double, dtype):
    monkeypatch.setattr(lowbit, "PIECE", 1024)
    layer, weight, _ = made("4bit", double, dtype=dtype)
    theirs = bnb.nn.Params4bit(weight.clone(), compress_statistics=double, quant_type="nf4", requires_grad=False)
    theirs = theirs.to("cpu")
    state, held = theirs.quant_state, layer.leaves()
    assert torch.equal(held["packed"].view(-1, 1), theirs.data)
    assert torch.equal(held["absmax"].view(-1), state.absmax)
    if double:
        assert torch.equal(held["nested"], state.state2.absmax) and torch.equal(held["offset"][0], state.offset)
    assert torch.equal(layer.matrix(dtype, *held.values()), bnb.functional.dequantize_4bit(theirs.data, state))
    assert [tuple(one.shape) for one in held.values()] == [(96, 64), (96, 2)] + ([(1,), (1,)] if double else [])


def test_int8_has_the_bits_of_bitsandbytes(monkeypatch):
    monkeypatch.setattr(lowbit, "PIECE", 1024)
    layer, weight, _ = made("8bit", False)
    rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(layer.rows, rows) and torch.equal(layer.scales, scales)
    torch.testing.assert_close(layer.weight, bnb.functional.int8_vectorwise_dequant(rows, scales), rtol=1e-6, atol=0)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_products_and_gradients_are_those_of_linear4bit(double, training):
    layer, weight, bias = made("4bit", double)
    stock = bnb.nn.Linear4bit(128, 96, compute_dtype=torch.float32, compress_statistics=double, quant_type="nf4")
    stock.weight = bnb.nn.Params4bit(weight.clone(), compress_statistics=double, quant_type="nf4", requires_grad=False)
    stock.bias = bias
    stock = stock.to("cpu").train(training)
    layer.train(training)
    given, signal = torch.randn(2, 5, 128), torch.randn(2, 5, 96)
    ours, theirs = (given.clone().requires_grad_() for _ in range(2))
    out, expected = layer(ours), stock(theirs)
    out.backward(signal)
    expected.backward(signal)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(given), stock.eval()(given), rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("inputs", [128, 100, 176, 7])
def test_the_product_is_that_of_the_weight_turned_back(kind, double, inputs):
    """Rows of any length; in fp32, where nothing is rounded, and under autocast."""
    layer, weight, bias = made(kind, double, (96, inputs))
    turned = layer.weight
    assert turned.shape == weight.shape and 0 < (turned - weight).norm() / weight.norm() < (
        0.02 if kind == "8bit" else 0.15
    )
    x = torch.randn(3, inputs)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer.train()(ours), F.linear(plain, turned, bias)
    (out**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    with torch.autocast("cpu", torch.bfloat16):
        half, low = layer(x.clone().requires_grad_()), F.linear(x, turned, bias)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, low, rtol=0.02, atol=0.02)
    with torch.no_grad():
        near = layer.eval()(x)
    assert (near - expected).norm() / expected.norm() < (0.02 if kind == "8bit" else 1e-5)


@each
def test_backward_keeps_the_quantised_tensors_alone(kind, double):
    """Neither the activation nor the matrix turned back."""
    layer, _, _ = made(kind, double)
    layer.train()
    held = []

    def hold(tensor):
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        layer(torch.randn(4, 128, requires_grad=True)).sum().backward()
    ours = {one.data_ptr() for one in layer.leaves().values()}
    assert held and {one.data_ptr() for one in held} <= ours


@each
def test_an_outline_takes_no_memory_and_says_its_shapes(kind, double):
    with torch.device("meta"):
        linear = nn.Linear(200, 64)
    layer = lowbit.layer(linear, kind, double)
    assert layer.weight.is_meta and layer.weight.shape == (64, 200) and all(p.is_meta for p in layer.parameters())
    outline = {name: (one.shape, one.dtype) for name, one in layer.leaves().items()}
    pieces = layer.pieces(torch.randn(64, 200, dtype=torch.float64).to(torch.bfloat16))
    assert outline == {name: (one.shape, one.dtype) for name, one in pieces.items()}
    assert not any(one.requires_grad for one in layer.leaves().values())


@each
def test_it_can_be_compiled_in_one_piece(kind, double):
    layer, _, _ = made(kind, double)
    layer.train()
    x = torch.randn(4, 128, requires_grad=True)
    compiled = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, layer(x))
    (got,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(layer(x).sum(), x)[0])
