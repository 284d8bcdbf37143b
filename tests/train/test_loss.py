"""The loss against torch's own cross-entropy, its gradients, and the rows the head multiplies."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vistune.train import loss


def made(bias: bool, frozen: bool = False, vocabulary: int = 211):
    torch.manual_seed(0)
    head = nn.Linear(24, vocabulary, bias=bias)
    head.requires_grad_(not frozen)
    hidden = torch.randn(37, 24, requires_grad=True)
    return hidden, head, torch.randint(0, vocabulary, (37,))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [1, 5, 37, 100])
def test_equals_torch_with_every_gradient(bias, chunk_rows, monkeypatch):
    hidden, head, targets = made(bias)
    monkeypatch.setattr(loss, "CHUNK_BYTES", chunk_rows * 4 * head.out_features)
    ours = loss.cross_entropy_sum(hidden, head, targets)
    (ours / 37).backward()
    got = [hidden.grad, *(p.grad for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    oracle = F.cross_entropy(head(hidden), targets, reduction="sum")
    (oracle / 37).backward()
    torch.testing.assert_close(ours, oracle, rtol=1e-6, atol=1e-5)
    for mine, theirs in zip(got, [hidden.grad, *(p.grad for p in head.parameters())], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_frozen_head_gets_no_gradient_and_hidden_does():
    hidden, head, targets = made(bias=False, frozen=True)
    loss.cross_entropy_sum(hidden, head, targets).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_under_autocast_products_are_half_and_the_sum_is_fp32():
    hidden, head, targets = made(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss.cross_entropy_sum(hidden, head, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, F.cross_entropy(head(hidden), targets, reduction="sum"), rtol=5e-3, atol=0.1)


def test_logits_exist_for_one_chunk_only(monkeypatch):
    hidden, head, targets = made(bias=False)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 4 * head.out_features)

    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == head.out_features:
                Largest.rows = max(Largest.rows, out.shape[0])
            return out

    with Largest():
        loss.cross_entropy_sum(hidden, head, targets)
    assert 0 < Largest.rows <= 24  # 4 rows of logits, 24 of the weight's own gradient [V, D] transposed
