"""The loss against torch's own cross-entropy, its gradients, and the rows the head multiplies."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", chunk_rows * 4 * head.out_features)
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
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * 4 * head.out_features)

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


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.now, self.top = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in torch.utils._pytree.tree_leaves(out):
            storage = made.untyped_storage() if isinstance(made, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.top = max(self.top, self.now)
                weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, key):
        self.now -= self.held.pop(key, 0)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_vocabulary_of_152k_has_no_logits_in_memory(frozen):
    """8,192 supervised rows would be 4.6 GiB of fp32 logits."""
    vocabulary, width, rows = 152_064, 64, 8_192
    with FakeTensorMode():
        head = nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16).requires_grad_(not frozen)
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64)
        with Live() as live:
            loss.cross_entropy_sum(hidden, head, targets).backward()
    weight = 0 if frozen else (4 + 4 + 2) * vocabulary * width  # its gradient: the sum, a chunk's product, the result
    chunk = loss.CHUNK_BYTES["cpu"]
    assert chunk < live.top <= 2.1 * chunk + weight + 4 * rows * width


def test_the_chunks_gradients_of_a_bf16_weight_add_up_in_fp32(monkeypatch):
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).bfloat16()
    hidden, targets = torch.randn(512, 16).bfloat16(), torch.randint(0, 50, (512,))
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 2 * 4 * 50)
    loss.cross_entropy_sum(hidden, head, targets).backward()
    exact = head.weight.detach().float().requires_grad_()
    F.cross_entropy(hidden.float() @ exact.T, targets, reduction="sum").backward()
    off = (head.weight.grad.float() - exact.grad).abs().max() / exact.grad.abs().max()
    assert head.weight.grad.dtype == torch.bfloat16 and off < 6e-3


@pytest.mark.parametrize("frozen", [True, False])
def test_no_rows_give_a_loss_of_zero_with_gradients_of_zero(frozen):
    _, head, _ = made(bias=False, frozen=frozen)
    hidden = torch.randn(0, 24, requires_grad=True)
    found = loss.cross_entropy_sum(hidden, head, torch.zeros(0, dtype=torch.int64))
    found.backward()
    assert found == 0 and hidden.grad.shape == (0, 24)
    assert frozen or not head.weight.grad.any()


@pytest.mark.parametrize("dora", [False, True])
def test_a_head_with_adapters_is_run_as_it_is(dora, monkeypatch):
    hidden, head, targets = made(bias=False)
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"], use_dora=dora), nn.Sequential(head))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    learned = [p for p in model.parameters() if p.requires_grad]
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 5 * 4 * head.out_features)
    got = torch.autograd.grad(loss.cross_entropy_sum(hidden, model[0], targets), [hidden, *learned])
    wanted = torch.autograd.grad(F.cross_entropy(model(hidden), targets, reduction="sum"), [hidden, *learned])
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_sharded_roots_head_is_gathered_in_bf16(tmp_path):
    """As in a step: the root gathers the head for the products, and gets its gradient in the shard's type."""
    torch.manual_seed(0)
    root = Root(nn.Linear(24, 211, bias=False))
    hidden, targets = torch.randn(37, 24), torch.randint(0, 211, (37,))
    weight = root.head.weight.detach().bfloat16().float().requires_grad_()
    wanted = F.cross_entropy(hidden.bfloat16().float() @ weight.T, targets, reduction="sum")
    wanted.backward()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(root, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
        with torch.autocast("cpu", torch.bfloat16):
            found = root(hidden, targets)
        found.backward()
        gradient = root.head.weight.grad.full_tensor()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=0)
    assert gradient.dtype == torch.float32
    assert (gradient - weight.grad).abs().max() <= 1e-2 * weight.grad.abs().max()


class Root(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, hidden, targets):
        return loss.cross_entropy_sum(hidden, self.head, targets)
