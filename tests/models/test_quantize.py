"""Quantised loading in every family: what is quantised and what is not, counted; bytes against the theory; answers."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch
from PIL import Image as Pillow
from torch import nn

from benchmarks import quantized_memory as memory
from tests.each_family import each_family, folders_in
from vistune import generate
from vistune.models import families, lowbit, quantize
from vistune.models.load import load, save
from vistune.samples import Image

pytest.importorskip("bitsandbytes", reason="extra quant")
KIND = {"8bit": lowbit.Int8Linear, "4bit": lowbit.Nf4Linear}
each_kind = pytest.mark.parametrize("kind", lowbit.KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_in(tmp_path_factory.mktemp("families"))


def linears(model, family):
    """Linear layers of each part by their class; the head apart."""
    head = family.head(model)
    counted = Counter()
    for part, roots in family.parts(model).items():
        for module in {id(one): one for root in roots for one in root.modules() if isinstance(one, nn.Linear)}.values():
            counted["head" if module is head else part, type(module)] += 1
    return counted


@each_kind
@each_family
def test_the_language_model_but_its_head_is_quantised_and_nothing_else(folders, name, kind):
    plain = load(folders(name))
    loaded = quantize.load_quantized(folders(name), kind, dtype=torch.float32)
    expected = {
        (part, KIND[kind] if part == "language" else type_): count
        for (part, type_), count in linears(plain.model, plain.family).items()
    }
    assert linears(loaded.model, loaded.family) == expected
    assert expected["language", KIND[kind]] >= 7 and expected["head", nn.Linear] == 1
    leaves = {
        id(one) for module in loaded.model.modules() if type(module) is KIND[kind] for one in module.leaves().values()
    }
    kept = {n: p for n, p in loaded.model.named_parameters() if id(p) not in leaves}
    same = dict(plain.model.named_parameters())
    assert len(same) - len(kept) == expected["language", KIND[kind]]
    assert all(torch.equal(tensor, same[n]) for n, tensor in kept.items())
    assert not [n for n, tensor in loaded.model.state_dict().items() if tensor.is_meta]


@each_kind
@each_family
def test_every_family_answers_on_the_cpu(folders, name, kind, tmp_path):
    Pillow.effect_noise((50, 40), 80).convert("RGB").save(tmp_path / "a.png")
    question = ("what is this?", [Image(path=str(tmp_path / "a.png"))])
    loaded = quantize.load_quantized(folders(name), kind, dtype=torch.float32)
    with torch.no_grad():
        before = quantize.footprint(loaded.model, loaded.family)
        generate.answer_batch(loaded, [question], max_new_tokens=3)
        assert quantize.footprint(loaded.model, loaded.family) == before  # scales that move are not counted twice


@each_kind
def test_the_terminal_asks_a_quantised_model(start, kind, capsys):
    generate.converse(generate.open_model(start, "cpu", kind), [], "what?", generate.Settings(max_new_tokens=2))
    assert f"loaded in {kind}: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="there are 8bit and 4bit"):
        generate.open_model(start, "cpu", "int4")


@pytest.mark.parametrize(("kind", "double", "most"), [("8bit", False, 0.05), ("4bit", False, 0.4), ("4bit", True, 0.4)])
def test_logits_stay_near_those_of_the_unquantised_model(start, kind, double, most):
    """Relative error of the logits; NF4 on random weights is no measure of quality, only of being wired right."""
    ids = torch.arange(5, 45)[None]
    plain = load(start).model
    loaded = quantize.load_quantized(start, kind, double=double, dtype=torch.float32)
    with torch.no_grad():
        right, ours = (model(input_ids=ids).logits for model in (plain, loaded.model))
    assert 0 < (right - ours).norm() / right.norm() < most


@each_kind
def test_footprint_is_the_bytes_that_are_held(start, kind, capsys):
    plain, loaded = load(start), quantize.load_quantized(start, kind, dtype=torch.float32)
    before, after = (quantize.footprint(one.model, one.family) for one in (plain, loaded))
    assert before["vision"] == after["vision"] and before["connector"] == after["connector"]
    assert sum(before.values()) == sum(
        tensor.nbytes for tensor in [*plain.model.parameters(), *plain.model.buffers()] if tensor.numel()
    )
    weights = [plain.model.get_submodule(path).weight for path in quantize.linear_paths(plain.model, plain.family)]
    count, rows = sum(one.numel() for one in weights), sum(len(one) for one in weights)
    code = 16 * 4 * len(weights)
    blocks = sum(len(one) * -(-one.shape[1] // 64) for one in weights)  # a row's last one is filled up
    held = count + 4 * rows if kind == "8bit" else 32 * blocks + 4 * blocks + code
    assert before["language"] - after["language"] == 4 * count - held
    assert f"loaded in {kind}: " in capsys.readouterr().out


def test_the_unquantised_model_is_never_whole_in_memory(start, monkeypatch):
    """When a matrix is placed, those before it are quantised already, and those after it not read."""
    real, most = quantize.Quantizer.__call__, []

    def watch(self, family, model, name, value):
        real(self, family, model, name, value)
        unquantised = [model.get_submodule(path) for path in self.paths]
        most.append(sum(type(one) is nn.Linear and not one.weight.is_meta for one in unquantised))

    monkeypatch.setattr(quantize.Quantizer, "__call__", watch)
    quantize.load_quantized(start, "4bit")
    assert len(most) > 14 and not any(most)


def test_a_tied_head_stays_the_embedding(folders):
    for name in families.names():
        plain = load(folders(name))
        if plain.model.config.tie_word_embeddings:
            loaded = quantize.load_quantized(folders(name), "4bit", dtype=torch.float32)
            assert loaded.family.head(loaded.model).weight is loaded.model.get_input_embeddings().weight


def test_what_is_refused(start, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'2bit'; there are 8bit and 4bit"):
        quantize.load_quantized(start, "2bit")
    loaded = quantize.load_quantized(start, "8bit")
    with pytest.raises(ValueError, match="14 weights are quantised"):
        save(loaded, tmp_path / "out", card="")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r'needs bitsandbytes .*pip install "vistune\[quant\]"'):
        quantize.load_quantized(start, "8bit")


@pytest.mark.parametrize("kind", memory.KINDS)
def test_a_blocks_bytes_scaled_by_the_layers_are_the_theorys(kind):
    """The arithmetic of the benchmark, on a block narrow enough to be quantised here."""
    narrow = memory.Sizes("narrow", hidden=512, ffn=1408, layers=4, heads=8, vocabulary=1024, vision_layers=2)
    measured, theory = memory.measured(narrow, kind), memory.theory(narrow, kind)
    assert measured == pytest.approx(theory, rel=0.02)


def test_theory_of_the_real_sizes():
    """Decimal GB of LLaVA-1.5's weights, worked out elsewhere for all linear layers but the head; sparing vision and
    connector adds their values once more in 8 bits (0.33 B of them in 13B)."""
    expected = {
        "llava-1.5-7b": {"bf16": 14.1, "8bit": 7.3, "4bit": 4.35, "4bit double": 4.04},
        "llava-1.5-13b": {"bf16": 26.7, "8bit": 13.7, "4bit": 8.0, "4bit double": 7.4},
    }
    for sizes in memory.REAL:
        for kind, gigabytes in expected[sizes.name].items():
            everything = memory.theory(sizes, kind, others=True)
            assert everything / 1e9 == pytest.approx(gigabytes, rel=0.01), (sizes.name, kind)
            spared = sum(rows * columns for rows, columns in memory.counts(sizes)["others"])
            bytes_each = {"bf16": 0, "8bit": 1, "4bit": 1.5 - 4 / 64, "4bit double": 1.5 - 1 / 64}[kind]
            assert memory.theory(sizes, kind) - everything == pytest.approx(spared * bytes_each, rel=0.01)
