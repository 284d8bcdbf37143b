"""Packed attention as an operator: gradients, autocast, compiled code, fake tensors; and how its kernel is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, LlamaModel

from vistune.models import attention
from vistune.models.attention import choice, flex, packed, sdpa, varlen
from vistune.models.attention.packs import Heads, Pack
from vistune.models.language import hidden

CPU = torch.device("cpu")
HEADS = Heads(CPU, torch.float32, 16, 2)


def inputs(tokens, query=4, key=2, width=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, width, generator=generator).to(dtype).requires_grad_() for h in (query, key, key)]


def pack_of(lengths, causal=True, window=None):
    starts = attention.segments(lengths, CPU).starts
    return Pack(starts, tuple(lengths), 0.25, causal, window)


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_the_operator_is_consistent(causal, window):
    """torch's own checks: schema, fake tensors, autograd and compiled code give what the operator gives."""
    if window and not causal:
        return
    segments = attention.segments([5, 3, 3], CPU)
    how = (0.25, causal, window)
    torch.library.opcheck(
        torch.ops.vistune.packed_attention.default, (*inputs(11), segments.starts, segments.host.clone(), *how)
    )


def test_what_is_kept_for_backward_is_the_heads_the_result_and_one_number_each():
    kept = []
    q, k, v = inputs(11)
    segments = attention.segments([5, 6], CPU)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        packed.attend(q, k, v, *segments, (0.25, True, 0))
    floats = [one.shape for one in kept if one.is_floating_point()]
    assert sorted(floats) == sorted([q.shape, k.shape, v.shape, q.shape, torch.Size([4, 11])])
    assert sum(one.numel() for one in kept if not one.is_floating_point()) <= 6


def test_under_autocast_heads_of_two_types_become_one():
    """Rotary angles in fp32 leave queries and keys in fp32 while values are half precision."""
    q, k, v = (each.transpose(0, 1)[None] for each in inputs(8))
    module, segments = nn.Module(), attention.segments([8], CPU)
    exact = attention.attend(module, q, k, v.bfloat16().float(), None, segments=segments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = attention.attend(module, q, k, v.bfloat16(), None, segments=segments)[0]
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.bfloat16())


def test_dropout_is_of_the_scores():
    q, k, v = (each.transpose(0, 1)[None] for each in inputs(40))
    module, segments = nn.Module(), attention.segments([15, 25], CPU)
    torch.manual_seed(0)
    runs = [attention.attend(module, q, k, v, None, dropout=0.5, segments=segments)[0] for _ in range(200)]
    whole = attention.attend(module, q, k, v, None, segments=segments)[0]
    assert not torch.equal(runs[0], runs[1])
    assert (torch.stack(runs).mean(0) - whole).abs().mean() < 0.15 * whole.abs().mean()


@pytest.mark.slow
def test_compiled_layers_serve_every_pack():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=5))
    attention.use(model)

    def run(lengths):
        embeds = torch.randn(sum(lengths), 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        places = torch.cat([torch.arange(length) for length in lengths])
        out = hidden(model, embeds, places, lengths)
        return out.detach(), torch.autograd.grad(out.pow(2).sum(), embeds)[0]

    packs = [[5, 3], [4, 4, 8], [16], [2] * 4, [7, 9, 1, 3, 5, 7], [24, 8]]
    wanted = [run(lengths) for lengths in packs]
    torch._dynamo.reset()
    counters.clear()
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    for lengths, (out, gradient) in zip(packs, wanted, strict=True):
        got = run(lengths)
        torch.testing.assert_close(got[0], out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], gradient, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2  # for the first length, and for every other


def test_fake_tensors_have_its_shapes_without_its_work():
    with FakeTensorMode():
        q, k, v = (torch.empty(300, h, 64, device="meta", dtype=torch.bfloat16) for h in (8, 2, 2))
        segments = attention.segments([100, 200], torch.device("meta"))
        out, kept = torch.ops.vistune.packed_attention(q, k, v, *segments, 0.125, True, 0)
        grads = torch.ops.vistune.packed_attention_backward(out, q, k, v, out, kept, *segments, 0.125, True, 0)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.device.type == "meta"
    assert kept.shape == (8, 300) and kept.dtype == torch.float32
    assert [one.shape for one in grads] == [q.shape, k.shape, v.shape]


class Wrong:
    """A kernel whose gradients are off."""

    lacks = staticmethod(lambda heads: "")
    forward = staticmethod(sdpa.forward)

    @staticmethod
    def backward(*given):
        return tuple(1.1 * each for each in sdpa.backward(*given))


def test_a_kernel_must_prove_its_numbers(monkeypatch):
    monkeypatch.setattr(choice, "KERNELS", {"wrong": Wrong, **choice.KERNELS})
    found = choice.chosen(Heads(CPU, torch.float32, 24), "auto")
    assert found.name == "sdpa"
    assert "its numbers are off" in found.others["wrong"] and "accelerators only" in found.others["varlen"]
    choice._chosen.cache_clear()


@pytest.mark.parametrize("name", ["varlen", "flex", "flash"])
def test_a_kernel_that_is_asked_for_and_does_not_run_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=rf"train.attention = {name}: it does not run here .*train.attention = auto"):
        attention.chosen(HEADS, name)
    assert attention.chosen(HEADS, "sdpa").name == "sdpa"


def test_choosing_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    attention.chosen(Heads(CPU, torch.float32, 40), "sdpa")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[300], [5, 3, 200, 130], [128, 128, 256], [1, 600, 2]])
def test_flex_computes_the_blocks_that_samples_need(lengths, causal, window):
    """The blocks against the mask of single positions; and the result, which `flex_attention` gives on a CPU too."""
    if window and not causal:
        return
    pack, tokens = pack_of(lengths, causal, window), sum(lengths)
    mask = flex.block_mask(pack, tokens)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(tokens)
    seen = owner[:, None] == owner[None]
    if causal:
        seen &= place[:, None] >= place[None]
    if window:
        seen &= place[:, None] - place[None] < window
    blocks = -(-tokens // flex.BLOCK)
    padded = torch.zeros(blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    padded[:tokens, :tokens] = seen
    tiles = padded.view(blocks, flex.BLOCK, blocks, flex.BLOCK)
    needed = tiles.any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), needed)
    whole = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        whole[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    assert torch.equal(whole, tiles.all(3).all(1))
    q, k, v = (each.detach() for each in inputs(tokens))
    out = flex_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, scale=pack.scale, enable_gqa=True
    )
    torch.testing.assert_close(out[0].transpose(0, 1), sdpa.attend(q, k, v, pack), rtol=1e-4, atol=1e-5)


def test_kernels_without_a_backward_of_their_own_run_forward_again(monkeypatch):
    """As flex and flash do: with autograd switched off around them, as it is inside an operator."""
    monkeypatch.setattr(flex, "_attend", lambda q, k, v, pack: sdpa.attend(q, k, v, pack))
    monkeypatch.setattr(choice, "kernel", lambda heads: flex)
    segments = attention.segments([5, 6], CPU)
    q, k, v = inputs(11)
    got = torch.autograd.grad(packed.attend(q, k, v, *segments, (0.25, True, 0)).pow(2).sum(), (q, k, v))
    monkeypatch.undo()
    wanted = torch.autograd.grad(packed.attend(q, k, v, *segments, (0.25, True, 0)).pow(2).sum(), (q, k, v))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_varlen_counts_a_window_as_the_others_do():
    assert varlen._how(pack_of([9], window=4))["window_size_left"] == 3  # a window of 4 holds the position itself
    assert varlen._how(pack_of([9])) == {"scale": 0.25, "window_size_left": -1, "window_size_right": 0}
    assert varlen._how(pack_of([9], causal=False))["window_size_right"] == -1
