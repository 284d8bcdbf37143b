"""Compiled layers: the same loss and gradients, few graphs whatever the packs, and no run that dies of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from tests.models.test_attention_operator import CPU
from tests.train.test_recompute import Of, llama, run, settings
from vistune import inputs
from vistune.models import attention
from vistune.models.shipped.configuration_llavaonevision1_5 import RiceConfig
from vistune.models.shipped.modeling_llavaonevision1_5 import RiceTransformerPretrainedModel
from vistune.models.towers import rice
from vistune.train.spreading import compiling, recompute

RECIPE = SimpleNamespace(train=SimpleNamespace(compile=True, device="cpu"))


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    """Without generating C++, which takes a compiler half a minute; everything before that is the same."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    compiling.missing.cache_clear()
    yield
    torch._dynamo.reset()
    compiling.missing.cache_clear()


@pytest.mark.parametrize("kind", [pytest.param("none", marks=pytest.mark.slow), "selective", "full"])
def test_compiled_equals_eager(kind):
    plain, compiled = llama(), llama()
    recompute.wrap(compiled, Of(compiled.layers), settings(kind))
    names = list(compiled.state_dict())
    compiling.wrap(compiled, Of(compiled.layers), RECIPE)
    assert list(compiled.state_dict()) == names
    counters.clear()
    (loss, gradients, _), (wanted, theirs, _) = run(compiled, False), run(plain, False)
    torch.testing.assert_close(loss, wanted)
    for mine, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]  # two layers, one graph


@pytest.mark.slow
def test_rice_blocks_compile_once_for_all_pictures():
    torch.manual_seed(0)
    config = RiceConfig(depth=2, embed_dim=32, hidden_size=32, num_heads=2, intermediate_size=48, text_hidden_size=16)
    tower = RiceTransformerPretrainedModel(config)
    attention.use(tower)

    def see(grids):
        patches = sum(rows * columns for _, rows, columns in grids)
        width = config.in_channels * config.patch_size**2
        pixels = torch.randn(patches, width, generator=torch.Generator().manual_seed(0))
        return rice.see(tower, pixels, torch.tensor(grids))

    shown = [[(1, 4, 4)], [(1, 2, 4), (1, 4, 4)], [(1, 2, 2)] * 3, [(1, 4, 6), (1, 2, 4)]]
    with torch.no_grad():
        wanted = [see(grids) for grids in shown]
        compiling.wrap(tower, Of(tower.blocks, "vision"), RECIPE)
        counters.clear()
        for grids, exact in zip(shown, wanted, strict=True):
            torch.testing.assert_close(see(grids), exact, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def broken(graph, examples):
    raise RuntimeError("a backend that cannot")


def test_what_fails_in_compiling_is_said_once_and_the_layers_go_on(monkeypatch, capsys):
    plain, compiled = llama(), llama()
    assert not compiling.missing("cpu")
    monkeypatch.setattr(compiling, "BACKEND", broken)
    compiling.wrap(compiled, Of(compiled.layers), RECIPE)
    (loss, *_), (wanted, *_) = run(compiled, False), run(plain, False)
    assert torch.equal(loss, wanted) and torch.equal(run(compiled, False)[0], wanted)
    assert capsys.readouterr().err.count("layers go on uncompiled") == 1


def test_where_nothing_compiles_it_is_off(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "BACKEND", broken)
    model = llama()
    compiling.wrap(model, Of(model.layers), RECIPE)
    assert "a backend that cannot" in capsys.readouterr().err
    assert all("forward" not in vars(layer) for layer in model.layers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("CppCompileError: fatal error: Python.h: No such file or directory", "Python.h is missing"),
        ("InvalidCxxCompiler: No working C++ compiler found", "there is no C++ compiler"),
        ("Cannot find a working triton installation", "no working triton"),
    ],
)
def test_what_is_missing_is_named(text, said):
    assert said in compiling._reason(RuntimeError(text))


def of(length, compile, pad="least"):
    return SimpleNamespace(data=SimpleNamespace(length=length, pad=pad), train=SimpleNamespace(compile=compile))


def test_compiled_packs_have_few_lengths():
    assert inputs.pad_to(of(2048, False), "cpu", 1) == 1 and inputs.pad_to(of(2048, False), "cuda", 1) == 128
    assert inputs.pad_to(of(2048, True), "cpu", 1) == 256 and inputs.pad_to(of(2048, True), "cuda", 2) == 512
    assert inputs.pad_to(of(6050, True), "cuda", 1) == 768  # a multiple of 128, so 8 lengths hold the room
    assert inputs.pad_to(of(300, True), "cuda", 1) == 128
    assert inputs.pad_to(of(2048, True, "length"), "cuda", 2) == 4096


def test_segments_carry_no_numbers_that_compiled_code_would_be_bound_to():
    segments = attention.segments([3, 4], CPU)
    assert all(isinstance(each, torch.Tensor) for each in segments)
