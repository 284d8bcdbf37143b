"""Megatron core checkpoints of LLaVA-OneVision-1.5: against the reference's own converter, and round trips."""

from __future__ import annotations

import argparse
import enum
import io
import pickle
import random
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vistune.models import checkpoints, weights
from vistune.models.checkpoints.mcore import FILE, FORMAT, LATEST, Mcore
from vistune.models.checkpoints.mcore_layout import Sizes, rules, share, stages, whole
from vistune.models.folders import beside

GOLDEN = Path(__file__).parents[1] / "golden" / "onevision15"
STAGE0, MCORE = GOLDEN / "tiny-stage0", GOLDEN / "mcore"
SIZES = Sizes(layers=2, heads=4, groups=2, vision_layers=3, vision_heads=4, vocabulary=500)


def models(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every rank's tensors, by the name of its folder."""
    found = {}
    for file in sorted(folder.rglob(FILE)):
        held = torch.load(file, weights_only=False)  # written by ourselves or golden
        pieces = [held[key] for key in held if key.startswith("model")]
        tensors = [{name: value for name, value in piece.items() if isinstance(value, Tensor)} for piece in pieces]
        found |= {f"{file.parent.name}/{i}": each for i, each in enumerate(tensors)}
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def read(entries: Any) -> dict[str, Tensor]:
    return {name: entry.read() for name, entry in entries.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_layout_is_the_reference_converters(ranks: int) -> None:
    ours = weights.stored(STAGE0)
    theirs = models(MCORE / f"tp{ranks}")
    [stage] = stages([2])
    table = list(rules(SIZES, stage))
    for rank in range(ranks):
        made = {rule.theirs: share(rule, ours, rank, ranks, SIZES) for rule in table}
        same(read(made), theirs[f"mp_rank_{rank:02d}/0"])
        assert all(entry.shape == entry.read().shape for entry in made.values())
    back: dict[str, Any] = {}
    for rule in table:
        shares = [weights.held(theirs[f"mp_rank_{rank:02d}/0"][rule.theirs]) for rank in range(ranks)]
        back |= whole(rule, shares, SIZES)
    same(read(back), read(ours))


def written(settings: Mcore, checkpoint: Any, folder: Path) -> Path:
    folder.mkdir(parents=True)
    settings.write(checkpoint, folder)
    return folder


def held(folder: Path) -> dict[str, Any]:
    return torch.load(folder, weights_only=False)


@pytest.mark.parametrize("name", ["tp1", "tp2", "raw_tp1", "tp2/release"])
def test_golden_checkpoints_are_read_by_their_contents(name: str) -> None:
    found = checkpoints.read(MCORE / name, base=STAGE0)
    assert found.format == "mcore" and found.why
    same(read(found.tensors), read(weights.stored(STAGE0)))
    assert found.said.origin["mcore"]["tensor_parallel"] == (2 if "tp2" in name else 1)
    assert not found.kept


@pytest.mark.parametrize("name", ["tp1", "tp2", "raw_tp1"])
def test_golden_checkpoints_are_written_back(name: str, tmp_path: Path) -> None:
    out = written(FORMAT, checkpoints.read(MCORE / name, base=STAGE0), tmp_path / "out")
    ours, theirs = models(out), models(MCORE / name)
    assert ours.keys() == theirs.keys()
    for rank in theirs:
        same(ours[rank], theirs[rank])
    assert (out / LATEST).read_text().strip() == "release"
    one, other = (held(folder / "release" / "mp_rank_00" / FILE) for folder in (out, MCORE / name))
    assert list(one) == ["model", "checkpoint_version", "iteration", "args"] and type(one["args"]) is type(
        other["args"]
    )
    assert one["model"].keys() == other["model"].keys()  # the states of Transformer Engine, where they were
    args, wanted = (each if isinstance(each, dict) else vars(each) for each in (one["args"], other["args"]))
    sizes = set(args) & set(wanted) - {"max_position_embeddings"}  # the converter's is of its settings file
    assert len(sizes) > 12
    assert {key: args[key] for key in sizes} == {key: wanted[key] for key in sizes}


def test_through_a_model_folder_and_back(tmp_path: Path) -> None:
    hf = checkpoints.named("hf")
    with beside(tmp_path / "hf") as new:
        hf.write(checkpoints.read(MCORE / "tp2", base=STAGE0), new)
    out = written(FORMAT, checkpoints.read(tmp_path / "hf"), tmp_path / "out")
    for rank, tensors in models(MCORE / "tp2").items():
        same(models(out)[rank], tensors)


def test_a_model_folder_becomes_what_the_converter_makes(tmp_path: Path) -> None:
    out = written(Mcore(tensor_parallel=2), checkpoints.read(STAGE0), tmp_path / "out")
    for rank, tensors in models(MCORE / "tp2").items():
        same(models(out)[rank], tensors)
    blob = held(out / "release" / "mp_rank_01" / FILE)["model"]["adapter.linear_fc1._extra_state"]
    assert isinstance(blob, io.BytesIO)
    blob.seek(0)
    assert torch.load(blob) is None
    assert isinstance(held(out / "release" / "mp_rank_01" / FILE)["args"], argparse.Namespace)


def test_a_tied_head_is_stored_once_more_and_tied_again(tmp_path: Path) -> None:
    tied = GOLDEN / "tiny-stage0-tied"
    out = written(FORMAT, checkpoints.read(tied), tmp_path / "out")
    [theirs] = models(out).values()
    embedding = theirs["language_model.embedding.word_embeddings.weight"]
    assert torch.equal(theirs["language_model.output_layer.weight"], embedding)
    same(read(checkpoints.read(out, base=tied).tensors), read(weights.stored(tied)))
    apart = read(checkpoints.read(out, base=STAGE0).tensors)  # a base that is not tied
    assert torch.equal(apart["lm_head.weight"], apart["model.embed_tokens.weight"])


def deep(layers: int, tmp_path: Path) -> Any:
    """tiny-stage0 with more layers, each with numbers of its own."""
    found = checkpoints.read(STAGE0)
    found.said.config.text_config.num_hidden_layers = layers
    found.said.config.text_config.layer_types = ["full_attention"] * layers
    tensors = dict(found.tensors)
    for name, entry in found.tensors.items():
        if name.startswith("model.layers.0."):
            for layer in range(layers):
                value = entry.read() + layer
                tensors[name.replace(".0.", f".{layer}.", 1)] = weights.held(value)
    base = tmp_path / "base"
    found.tensors = tensors
    with beside(base) as new:
        checkpoints.named("hf").write(found, new)
    return base


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (Mcore(pipeline_parallel=2), ["mp_rank_00_000/0", "mp_rank_00_001/0"]),
        (Mcore(tensor_parallel=2, pipeline_parallel=3), None),
        (Mcore(pipeline_parallel=2, pipeline_layers=(2, 4)), None),
        (Mcore(pipeline_parallel=3, virtual_pipeline=2), None),
        (Mcore(tensor_parallel=2, virtual_pipeline=3, pipeline_parallel=2), None),
    ],
)
def test_pipelines_round_trip(settings: Mcore, names: list[str] | None, tmp_path: Path) -> None:
    base = deep(6, tmp_path)
    source = checkpoints.read(base)
    out = written(settings, source, tmp_path / "out")
    ranks = models(out)
    assert names is None or list(ranks) == names
    with_vision = {rank for rank, tensors in ranks.items() if any(name.startswith("vision_model") for name in tensors)}
    assert with_vision == {rank for rank in ranks if rank.endswith("_000/0")}
    again = checkpoints.read(out, base=base)
    same(read(again.tensors), read(source.tensors))
    once_more = written(FORMAT, again, tmp_path / "again")  # as it came
    assert models(once_more).keys() == ranks.keys()
    for rank, tensors in models(once_more).items():
        same(tensors, ranks[rank])


def test_interleaved_pieces_go_round_the_ranks(tmp_path: Path) -> None:
    """Megatron's order: the first piece of every rank, then the second of every rank."""
    base = deep(4, tmp_path)
    out = written(Mcore(pipeline_parallel=2, virtual_pipeline=2), checkpoints.read(base), tmp_path / "out")
    norm = "language_model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    layers = weights.stored(base)
    where = {rank: tensors[norm] for rank, tensors in models(out).items()}
    order = ["mp_rank_00_000/0", "mp_rank_00_001/0", "mp_rank_00_000/1", "mp_rank_00_001/1"]
    for layer, rank in enumerate(order):
        assert torch.equal(where[rank], layers[f"model.layers.{layer}.input_layernorm.weight"].read())
    assert set(held(out / "release" / "mp_rank_00_001" / FILE)) >= {"model0", "model1"}


def trained(folder: Path, change: Any, **more: Any) -> Path:
    """A checkpoint as training leaves it: an iteration, an optimizer, odd types."""
    place = folder / "iter_0000012" / "mp_rank_00"
    place.mkdir(parents=True)
    payload = held(MCORE / "raw_tp1" / "release" / "mp_rank_00" / FILE)
    change(payload)
    torch.save(payload | more, place / FILE)
    (folder / LATEST).write_text("12")
    return folder


def megatrons(monkeypatch: pytest.MonkeyPatch, module: str, name: str, kinds: tuple[type, ...]) -> Any:
    """An enumeration as Megatron has it, which only the writing of a test file can import."""
    made = enum.Enum(name, {"first": "first"}, module=module, qualname=name, type=kinds[0] if kinds else None)
    for i in range(module.count(".") + 1):
        part = ".".join(module.split(".")[: i + 1])
        monkeypatch.setitem(sys.modules, part, sys.modules.get(part) or types.ModuleType(part))
    setattr(sys.modules[module], name, made)
    return made("first")


def test_a_training_checkpoint_gives_its_weights_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(), "torch": torch.zeros(3)}
    more: dict[str, Any] = {
        "optimizer": {"state": torch.zeros(2)},
        "opt_param_scheduler": {"lr": 1.0},
        "rng_state": [state],
    }
    with monkeypatch.context() as megatron:
        mode = megatrons(megatron, "megatron.core.rerun_state_machine", "RerunMode", (str,))
        odd = {
            "attention_backend": megatrons(megatron, "megatron.core.transformer.enums", "AttnBackend", ()),
            "exit_signal": signal.SIGTERM,
            "params_dtype": torch.bfloat16,
        }
        more["rerun_state_machine"] = {"mode": mode, "sharded": {"current_iteration": 12}}
        folder = trained(tmp_path / "run", lambda payload: vars(payload["args"]).update(odd), **more)
    assert "megatron" not in sys.modules
    found = checkpoints.read(folder, base=STAGE0)
    same(read(found.tensors), read(weights.stored(STAGE0)))
    assert "left behind" in capsys.readouterr().out


def test_rows_of_padding_that_learned_are_kept(tmp_path: Path) -> None:
    name = "language_model.output_layer.weight"

    def learn(payload: dict[str, Any]) -> None:
        payload["model"][name][500:] += torch.arange(12)[:, None]

    found = checkpoints.read(trained(tmp_path / "run", learn), base=STAGE0)
    assert list(found.kept) == [f"{name}.padding"]
    [back] = models(written(FORMAT, found, tmp_path / "out")).values()
    [source] = models(tmp_path / "run").values()
    assert torch.equal(back[name], source[name])
    with beside(tmp_path / "hf") as new:
        checkpoints.named("hf").write(found, new)
    [detour] = models(written(FORMAT, checkpoints.read(tmp_path / "hf"), tmp_path / "detour")).values()
    assert torch.equal(detour[name], source[name])
    two = models(written(Mcore(tensor_parallel=2), found, tmp_path / "two"))
    assert torch.equal(torch.cat([each[name] for each in two.values()]), source[name])


class Boom:
    """What it would do is seen in a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("where", ["args", "model", "top"])
def test_a_pickle_with_something_else_is_refused_and_nothing_is_run(where: str, tmp_path: Path) -> None:
    def plant(payload: dict[str, Any]) -> None:
        boom = Boom(tmp_path / "ran")
        if where == "args":
            payload["args"].boom = boom
        else:
            (payload["model"] if where == "model" else payload)["boom"] = boom

    folder = trained(tmp_path / "run", plant)
    with pytest.raises(ValueError, match="nothing of it was run"):
        checkpoints.read(folder, base=STAGE0)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "iter_0000012" / "mp_rank_00" / FILE, weights_only=True)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--base"):
        checkpoints.read(MCORE / "tp1")
    missing = tmp_path / "missing"
    (missing / "mp_rank_01").mkdir(parents=True)
    (missing / "mp_rank_01" / FILE).write_bytes((MCORE / "tp2/release/mp_rank_01" / FILE).read_bytes())
    with pytest.raises(ValueError, match="1 ranks are missing: mp_rank_00"):
        checkpoints.read(missing, base=STAGE0)
    cut = tmp_path / "cut" / "mp_rank_00"
    cut.mkdir(parents=True)
    (cut / FILE).write_bytes((MCORE / "tp1/release/mp_rank_00" / FILE).read_bytes()[:100_000])
    with pytest.raises(ValueError, match=FILE):
        checkpoints.read(cut.parent, base=STAGE0)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / LATEST).write_text("7")
    with pytest.raises(ValueError, match="iter_0000007, which is not there"):
        checkpoints.read(tmp_path / "gone", base=STAGE0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["model"].pop("adapter.layernorm.bias"), r"1 weights are missing.*\n.*adapter\.layernorm\.bias"),
        (lambda p: p["model"].update(odd=torch.zeros(1)), r"1 weights are not of this model.*\n.*odd"),
        (lambda p: p["model"].pop("language_model.output_layer.weight"), "missing"),
        (lambda p: p["model"].update({"adapter.layernorm.bias": torch.zeros(3)}), "of another shape"),
        (lambda p: setattr(p["args"], "num_experts", 8), "mixture of experts"),
        (lambda p: p["model"].update({"language_model.mlp.experts.0.x": torch.zeros(1)}), "mixture of experts"),
        (lambda p: p.pop("model"), "but no model"),
    ],
)
def test_checkpoints_that_do_not_fit_the_base_are_refused(change: Any, said: str, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", lambda payload: (change(payload), None)[1])
    with pytest.raises(ValueError, match=said):
        checkpoints.read(folder, base=STAGE0)


def test_expert_ranks_and_distributed_files_are_refused(tmp_path: Path) -> None:
    expert = tmp_path / "mp_rank_00_000_001"
    expert.mkdir()
    (expert / FILE).touch()
    with pytest.raises(ValueError, match="mixture of experts"):
        checkpoints.read(tmp_path, base=STAGE0)
    folder = tmp_path / "other"
    (folder / "release").mkdir(parents=True)
    (folder / "release" / "__0_0.distcp").touch()
    (folder / LATEST).write_text("release")
    with pytest.raises(ValueError, match="--ckpt-format torch"):
        checkpoints.read(folder, base=STAGE0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Mcore(tensor_parallel=3), "2 key-value heads do not divide over 3"),
        (Mcore(pipeline_parallel=4), "2 layers do not divide into 4"),
        (Mcore(pipeline_parallel=2, pipeline_layers=(1, 2)), r"\[1, 2\] are not 2 pieces of 2 layers"),
    ],
)
def test_a_division_that_does_not_go_is_refused_before_anything_is_written(
    settings: Mcore, said: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=said):
        settings.write(checkpoints.read(STAGE0), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_ranks_that_disagree_are_not_one_checkpoint(tmp_path: Path) -> None:
    out = written(Mcore(tensor_parallel=2), checkpoints.read(STAGE0), tmp_path / "out")
    file = out / "release" / "mp_rank_01" / FILE
    payload = held(file)
    payload["model"]["adapter.layernorm.bias"] += 1
    torch.save(payload, tmp_path / "new")
    file.unlink()
    (tmp_path / "new").rename(file)
    found = checkpoints.read(out, base=STAGE0)
    with pytest.raises(ValueError, match=r"adapter\.layernorm\.bias: the ranks do not hold the same"):
        read(found.tensors)


@pytest.mark.parametrize(
    ("vocabulary", "ranks", "rows"), [(151936, 1, 151936), (151936, 2, 152064), (151936, 8, 152576)]
)
def test_published_vocabularies_are_padded_as_megatron_does(vocabulary: int, ranks: int, rows: int) -> None:
    sizes = Sizes(layers=36, heads=32, groups=8, vision_layers=24, vision_heads=16, vocabulary=vocabulary)
    assert sizes.padded(ranks) == rows


def test_a_4b_model_has_698_tensors_which_are_590_of_megatrons() -> None:
    """36 x 11 + 24 x 12 + 14 of ours; three of ours become one in a layer's attention, two in its MLP."""
    sizes = Sizes(layers=36, heads=32, groups=8, vision_layers=24, vision_heads=16, vocabulary=151936)
    table = list(rules(sizes, stages([36])[0]))
    assert sum(len(rule.ours) for rule in table) == 698
    assert len(table) == len({rule.theirs for rule in table}) == 698 - 36 * 3
