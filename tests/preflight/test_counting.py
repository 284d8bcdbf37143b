"""The bytes that a pretended GPU counts, against those that real tensors take in the same step, and closed forms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.preflight.tiny import micro, recipe, subject
from vistune.preflight import counting, parts, pretend
from vistune.preflight.counting import GRADIENTS, OPTIMIZER, WEIGHTS, Spread
from vistune.preflight.pretend import CUDA, Ledger, pretended
from vistune.train.spreading import recompute
from vistune.train.step import StepModule


class _Real(TorchDispatchMode):
    """Counts the storages of real tensors in the same way."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor):
                self.ledger.take(one)
        return out


@contextmanager
def counted(device: torch.device) -> Iterator[Ledger]:
    if device.type == "cuda":
        with pretended() as ledger:
            yield ledger
    else:
        ledger = Ledger()
        with _Real(ledger):
            yield ledger


def peak_of_step(said: Any, device: torch.device) -> int:
    """The most bytes of one forward and backward, fp32, weights and batch among them."""
    one = subject()
    model, _ = counting.outline(one, said)
    recompute.wrap(model, one.family, said.train)
    with counted(device) as ledger:
        for module in model.modules():
            for kind in (module._parameters, module._buffers):
                for name, held in list(kind.items()):
                    if held is None:
                        continue
                    made = torch.zeros(held.shape, dtype=held.dtype, device=device)
                    kind[name] = nn.Parameter(made, held.requires_grad) if kind is module._parameters else made
        batch = micro().batch(device) if device.type == "cuda" else real_batch()
        step = StepModule(model, one.family, one.layout, torch.float32).train()
        loss = step(batch)
        loss.backward()
        assert any(p.grad is not None for p in model.parameters())
        return ledger.peak


def real_batch() -> Any:
    batch = micro().batch(torch.device("cpu"))
    image, start = subject().config.image_token_id, 0
    batch.ids.zero_()
    for length in batch.lengths[:3]:
        batch.ids[start : start + 16] = image
        start += length
    batch.positions.copy_(torch.cat([torch.arange(n) for n in batch.lengths]))
    batch.rows.copy_(torch.arange(len(batch.rows)))
    batch.targets.zero_()
    return batch


@pytest.mark.parametrize("again", ["none", "full"])
@pytest.mark.parametrize("keys", [{"connector": 1e-3}, {"connector": 1e-3, "language": 1e-3, "vision": 1e-3}])
def test_a_pretended_step_takes_what_a_real_one_takes(
    again: str, keys: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretend, "_rooms", lambda *_: 0)  # a GPU's kernel alone takes them
    said = recipe(learn=keys, train={"checkpointing": again, "precision": "fp32"})
    pretending, real = peak_of_step(said, CUDA), peak_of_step(said, torch.device("cpu"))
    assert pretending == pytest.approx(real, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("again", "spread"), [("full", Spread()), ("none", Spread(shards=4)), ("full", Spread(shards=4, zero3=True))]
)
def test_a_few_layers_tell_of_all(again: str, spread: Spread) -> None:
    deep = subject(language=6, vision=5)
    said = recipe(train={"checkpointing": again}, learn={"connector": 1e-3, "language": 1e-3, "vision": 1e-3})
    few = counting.moments(deep, said, micro(), spread)
    every = counting.moments(deep, said, micro(), spread, full=True)
    most = max(one.total() for one in every.most.values())
    assert max(one.total() for one in few.most.values()) == pytest.approx(most, rel=1e-3)


def test_weights_gradients_and_optimizer_in_closed_form() -> None:
    said = recipe(learn={"connector": 1e-3, "language": 1e-3})
    model, learned = counting.outline(subject(), said)
    values = sum(one.parameter.numel() for one in learned)
    vectors = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.ndim == 1)
    matrices = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.ndim > 1)
    buffers = sum(b.nbytes for b in model.buffers())
    found = parts.memory(subject(), said, micro())
    grains = 512 * (len(list(model.parameters())) + len(list(model.buffers())))
    assert 0 <= found.parts[WEIGHTS] - (4 * values + 4 * vectors + 2 * matrices + buffers) < grains
    assert 0 <= found.parts[OPTIMIZER] - 8 * values < 2 * grains
    assert 0 <= found.parts[GRADIENTS] - 4 * values < grains


@pytest.mark.parametrize(
    ("words", "bytes_each"),
    [
        ({}, 8.0),
        ({"train": {"precision": "bf16_true"}}, 12.0),
        ({"train": {"precision": "bf16_stochastic"}}, 8.0),
        ({"optimizer": {"name": "adamw8bit"}}, 2 * (1 + 4 / 64)),
    ],
)
def test_what_the_optimizer_keeps_of_a_matrix(words: dict[str, Any], bytes_each: float) -> None:
    weight = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta")
    assert parts.state(recipe(**words), weight, 1) == bytes_each * weight.numel()
    assert parts.state(recipe(**words), weight, 8) == bytes_each * weight.numel() / 8


@pytest.mark.slow
def test_more_care_takes_less() -> None:
    def needed(gpus: int = 1, **words: Any) -> int:
        said = recipe(learn={"connector": 1e-3, "language": 1e-3}, **words)
        return parts.memory(subject(language=4, vision=1), said, micro(8), gpus=gpus).peak

    train = [needed(train={"checkpointing": kind}) for kind in ("none", "selective", "full")]
    assert train[0] > train[1] > train[2]
    shards = [needed(8, parallel={"shard": kind}) for kind in ("none", "zero2", "zero3")]
    assert shards[0] > shards[1] > shards[2]
    offloaded = needed(8, parallel={"shard": "zero3", "offload": True})
    assert offloaded < shards[2]
    # What lies on the host is gathered for its use, from however many ranks.
    assert needed(1, parallel={"shard": "zero3", "offload": True}) == pytest.approx(offloaded, rel=0.01)
    assert needed(2, parallel={"shard": "zero3"}) > shards[2]


@pytest.mark.slow
def test_longer_packs_take_more() -> None:
    sizes = [parts.memory(subject(), recipe(), micro(count)).peak for count in (1, 2, 4)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_adapters_and_quantised_matrices() -> None:
    learn, lora = {"connector": 1e-3, "language": 1e-3}, {"r": 4, "alpha": 8.0}
    said = {kind: recipe(learn=learn, lora=lora | {"quantize": kind}) for kind in ("none", "8bit", "4bit")}
    held = {kind: parts.standing(subject(), one, Spread())[0][WEIGHTS] for kind, one in said.items()}
    whole = parts.standing(subject(), recipe(learn=learn), Spread())[0][WEIGHTS]
    assert whole > held["none"] > held["8bit"] > held["4bit"]
    again = said["4bit"].model_copy(update={"train": said["4bit"].train.model_copy(update={"checkpointing": "full"})})
    seen = counting.moments(subject(), again, micro(), Spread(accumulates=False))
    assert max(one.total() for one in seen.most.values()) > 0


def test_autocast_computes_in_half_precision_and_is_put_back() -> None:
    weight = torch.ones(3, 3)
    with pretended() as ledger, torch.autocast("cuda", torch.bfloat16):
        x = torch.empty(4, 8, device=CUDA)
        product = torch.nn.functional.linear(x, torch.empty(5, 8, device=CUDA))
        assert product.dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(product, (5,)).dtype == torch.float32
        assert ledger.total
    assert (weight @ weight).dtype == torch.float32
