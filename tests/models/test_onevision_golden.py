"""LLaVA-OneVision-1.5 against values recorded from the original code: features, logits, loss, answers; and RICE against
the stock class that has its layout."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from vistune.decoding import Settings, decode, prompt
from vistune.models import attention
from vistune.models.load import Loaded, load
from vistune.models.shipped.configuration_llavaonevision1_5 import Llavaonevision1_5Config, RiceConfig
from vistune.models.shipped.modeling_llavaonevision1_5 import (
    LLaVAOneVision1_5_ForConditionalGeneration,
    RiceTransformerPretrainedModel,
)
from vistune.models.towers import rice
from vistune.samples import Image, Message

GOLDEN = Path(__file__).parent.parent / "golden" / "onevision15"
SAID = json.loads((GOLDEN / "expected.json").read_text())
SAMPLES = sorted(SAID["samples"])
PICTURES = [name for name in SAMPLES if SAID["samples"][name]["images"]]
SEVERAL = [name for name in PICTURES if name.startswith("m")]
CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@cache
def vectors() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "expected.npz") as read:
        return {name: torch.from_numpy(value) for name, value in read.items()}


@cache
def folder(name: str = "tiny-stage0", options: str = "{}") -> Loaded:
    return load(GOLDEN / name, options=json.loads(options))


def images(name: str) -> list[Image]:
    return [Image(path=str(GOLDEN / path)) for path in SAID["samples"][name]["images"]]


def messages(name: str) -> list[Message]:
    said = SAID["samples"][name]
    if "messages" not in said:
        return [Message(role="user", text=said["user"]), Message(role="assistant", text=said["assistant"])]
    turns = [Message(role=turn["role"], text=turn["content"]) for turn in said["messages"]]
    return [Message(role="system", text=said["system"]), *turns] if said["system"] else turns


def seen(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return vectors()[f"{name}/pixel_values"], vectors()[f"{name}/grid_thw"].long()


@torch.no_grad()
def packed(loaded: Loaded, *names: str) -> torch.Tensor:
    """Logits of samples in one row."""
    ids = [vectors()[f"{name}/input_ids"] for name in names]
    given = [seen(name) for name in names if f"{name}/pixel_values" in vectors()]
    pixels, grids = (torch.cat(each) for each in zip(*given, strict=True)) if given else (None, None)
    lengths = [len(one) for one in ids]
    positions = torch.cat([torch.arange(length) for length in lengths])
    hidden = loaded.family.hidden(loaded.model, torch.cat(ids), positions, lengths, pixels, grids)
    return loaded.family.head(loaded.model)(hidden)


@torch.no_grad()
def alone(loaded: Loaded, name: str) -> torch.Tensor:
    """Logits by the class's own forward."""
    more = {}
    if f"{name}/pixel_values" in vectors():
        more = dict(zip(("pixel_values", "image_grid_thw"), seen(name), strict=True))
    return loaded.model(input_ids=vectors()[f"{name}/input_ids"][None], **more).logits[0]


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("how", ["packed", "sdpa", "eager"])
def test_features(name: str, how: str) -> None:
    """Several pictures: each encoded alone."""
    tower = folder().model.visual
    tower.set_attn_implementation(attention.NAME if how == "packed" else how)
    with torch.no_grad():
        found = rice.see(tower, *seen(name)) if how == "packed" else tower.encode(*seen(name))
        torch.testing.assert_close(found, vectors()[f"{name}/vision_pre_merger"], **CLOSE)
        torch.testing.assert_close(tower.merger(found), vectors()[f"{name}/vision_features"], **CLOSE)


@pytest.mark.parametrize("name", SAMPLES)
def test_logits_and_loss(name: str) -> None:
    wanted, labels = vectors()[f"{name}/logits"], vectors()[f"{name}/labels"]
    for logits in (packed(folder(), name), alone(folder(), name)):
        torch.testing.assert_close(logits, wanted, **CLOSE)
        loss = F.cross_entropy(logits[:-1], labels[1:])
        assert loss.item() == pytest.approx(SAID["samples"][name]["loss_mean"], rel=1e-5)


def test_the_forward_gives_the_loss_too() -> None:
    pixels, grids = seen("s02")
    out = folder().model(
        input_ids=vectors()["s02/input_ids"][None],
        labels=vectors()["s02/labels"][None],
        pixel_values=pixels,
        image_grid_thw=grids,
    )
    assert out.loss.item() == pytest.approx(SAID["samples"]["s02"]["loss_mean"], rel=1e-5)


@pytest.mark.parametrize("name", SAMPLES)
def test_prompts_and_answers(name: str) -> None:
    """From the pictures' files: ids and pixels exact, greedy answers of twelve tokens."""
    loaded, said = folder(), SAID["samples"][name]
    turns = messages(name)
    first = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    whole = prompt(loaded, [*turns, Message(role="user", text="")], images(name))
    length = said["n_tokens"]
    assert whole.ids[:length] == vectors()[f"{name}/input_ids"].tolist()[:length]
    ask = [prompt(loaded, turns[:first], images(name)[: sum(t.text.count("<image>") for t in turns[:first])])]
    assert ask[0].ids == whole.ids[: said["prompt_len"]]
    found = decode(loaded, ask, Settings(max_new_tokens=12), endless=True)[0].ids
    safe = said["greedy_safe_len"]
    assert found[:safe] == said["greedy_ids"][:safe]


def test_a_pack_of_three() -> None:
    said, wanted = SAID["pack"], vectors()["pack/logits"]
    logits = packed(folder(), *said["samples"])
    torch.testing.assert_close(logits, wanted, **CLOSE)
    labels = vectors()["pack/labels"]
    ends = vectors()["pack/cu_lengths"].tolist()
    total = sum(
        F.cross_entropy(logits[a : b - 1], labels[a + 1 : b], reduction="sum").item()
        for a, b in itertools.pairwise(ends)
    )
    assert total / said["n_supervised"] == pytest.approx(said["loss_mean"], rel=1e-5)


@pytest.mark.parametrize("name", ["s03", "s05"])
def test_the_epsilons_of_training(name: str) -> None:
    tower = folder(options='{"norm_eps": "training"}').model.visual
    with torch.no_grad():
        found = tower.encode(*seen(name))
        torch.testing.assert_close(found, vectors()[f"{name}/train_eps_vision_pre_merger"], **CLOSE)
        torch.testing.assert_close(tower.merger(found), vectors()[f"{name}/train_eps_vision_features"], **CLOSE)
    assert (tower.pre_layernorm.eps, tower.merger.ln_q.eps, tower.blocks[0].norm1.eps) == (1e-4, 1e-6, 1e-5)


@pytest.mark.parametrize("name", SEVERAL)
def test_the_published_fault_on_demand(name: str) -> None:
    loaded = folder(options='{"legacy_images": true}')
    wrong = vectors()[f"{name}/ref_hf_logits_WRONG"]
    torch.testing.assert_close(alone(loaded, name), wrong, **CLOSE)
    torch.testing.assert_close(packed(loaded, name), wrong, **CLOSE)
    with torch.no_grad():
        features = loaded.model.visual(*seen(name))
    torch.testing.assert_close(features, vectors()[f"{name}/ref_hf_vision_features_WRONG"], **CLOSE)
    assert (alone(folder(), name) - wrong).abs().max() > 0.01


def test_the_published_fault_stays_within_a_sample() -> None:
    loaded, names = folder(options='{"legacy_images": true}'), ("m01", "t01", "s01", "m02")
    alone_each = torch.cat([packed(loaded, name) for name in names])
    torch.testing.assert_close(packed(loaded, *names), alone_each, **CLOSE)


@pytest.mark.parametrize("name", ["s02", "t01"])
def test_a_tied_head(name: str) -> None:
    loaded = folder("tiny-stage0-tied")
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    torch.testing.assert_close(packed(loaded, name), vectors()[f"{name}/tied_logits"], **CLOSE)


def test_a_head_of_its_own_is_kept_whatever_the_flag_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """No flag at all: the default of a release must not tie. A wrong flag: the stored head wins."""
    assert "tie_word_embeddings" not in (GOLDEN / "tiny-stage0" / "config.json").read_text()
    assert not Llavaonevision1_5Config.from_pretrained(GOLDEN / "tiny-stage0").tie_word_embeddings
    for file in (GOLDEN / "tiny-stage0").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    torch.testing.assert_close(packed(loaded, "t01"), vectors()["t01/logits"], **CLOSE)
    assert "a head of its own is stored" in capsys.readouterr().err
    opened = LLaVAOneVision1_5_ForConditionalGeneration.from_pretrained(tmp_path)
    wanted = vectors()["t01/logits"]
    torch.testing.assert_close(opened(vectors()["t01/input_ids"][None]).logits[0], wanted, **CLOSE)
    assert (vectors()["t01/tieflag_true_on_untied_ckpt_ref_logits_WRONG"] - wanted).abs().max() > 0.1


def test_every_module_of_one_sample() -> None:
    with np.load(GOLDEN / "expected_layers_s03.npz") as read:
        wanted = {name.removeprefix("s03/"): torch.from_numpy(value) for name, value in read.items()}
    model, found = folder().model, {}
    vision, watched = model.visual, {}
    watched |= {"vision/patch_embed": vision.patch_embed, "vision/pre_layernorm_with_cls": vision.pre_layernorm}
    for i, block in enumerate(vision.blocks):
        watched |= {f"vision/block{i}_attn_out": block.attn, f"vision/block{i}_mlp_out": block.mlp}
        watched |= {f"vision/block{i}_with_cls": block}
    watched |= {"vision/merger_ln_q": vision.merger.ln_q, "llm/norm": model.model.norm}
    watched |= {f"llm/layer{i}": layer for i, layer in enumerate(model.model.layers)}

    def keep(name: str):
        return lambda module, given, out: found.update({name: (out[0] if isinstance(out, tuple) else out).squeeze(0)})

    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    packed(folder(), "s03")
    for hook in hooks:
        hook.remove()
    found["vision/rope_angles_no_cls"] = vision.angles(seen("s03")[1].tolist(), torch.device("cpu"))
    assert wanted.keys() - found.keys() == {"llm/inputs_embeds"}
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def mlcd(tower: RiceTransformerPretrainedModel) -> transformers.MLCDVisionModel:
    """The stock class with the tower's weights."""
    said = tower.config
    stock = transformers.MLCDVisionModel(
        transformers.MLCDVisionConfig(
            hidden_size=said.embed_dim,
            intermediate_size=said.intermediate_size,
            num_hidden_layers=said.depth,
            num_attention_heads=said.num_heads,
            patch_size=14,
            image_size=560,
        )
    ).eval()
    weights, left = tower.state_dict(), stock.state_dict()
    for name in left:
        leaf = name.removeprefix("vision_model.")
        if leaf.startswith("post_layernorm"):
            continue
        for theirs, ours in (("embeddings.patch_embedding", "patch_embed.proj"), ("embeddings.class", "class")):
            leaf = leaf.replace(theirs, ours)
        leaf = leaf.replace("pre_layrnorm", "pre_layernorm").replace("encoder.layers", "blocks")
        leaf = leaf.replace("layer_norm", "norm").replace("self_attn.out_proj", "attn.proj")
        if ".self_attn." in leaf:
            part = leaf.split(".")[3][0]
            leaf = leaf.replace(f"self_attn.{part}_proj", "attn.qkv")
            left[name].copy_(weights[leaf].chunk(3)["qkv".index(part)])
        else:
            left[name].copy_(weights[leaf])
    return stock


@torch.no_grad()
@pytest.mark.parametrize("grids", [[(6, 4)], [(6, 4), (6, 4)], [(2, 22), (10, 6), (10, 6), (4, 2)]], ids=str)
def test_rice_equals_the_stock_class_of_its_layout(grids: list[tuple[int, int]]) -> None:
    torch.manual_seed(5)
    sizes = {"depth": 3, "embed_dim": 48, "hidden_size": 48, "intermediate_size": 96, "num_heads": 4}
    tower = RiceTransformerPretrainedModel(RiceConfig(**sizes, text_hidden_size=32)).eval()
    for parameter in tower.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    stock, pixels, wanted = mlcd(tower), [], []
    for rows, columns in grids:
        picture = torch.randn(1, 3, rows * 14, columns * 14)
        states = stock(picture, output_hidden_states=True).hidden_states[-1][0, 1:]
        cells = states.view(rows // 2, 2, columns // 2, 2, -1).transpose(1, 2)
        wanted.append(cells.reshape(rows * columns, -1))
        cut = picture.view(3, rows // 2, 2, 14, columns // 2, 2, 14).permute(1, 4, 2, 5, 0, 3, 6)
        pixels.append(cut.reshape(rows * columns, -1))
    three = torch.tensor([(1, *grid) for grid in grids])
    for name in ("sdpa", attention.NAME):
        tower.set_attn_implementation(name)
        found = (
            rice.see(tower, torch.cat(pixels), three)
            if name == attention.NAME
            else tower.encode(torch.cat(pixels), three)
        )
        assert (found - torch.cat(wanted)).abs().max() <= 1e-5
    one = tower.encode(torch.cat(pixels[:1] * 2), torch.tensor([(2, *grids[0])]))  # a video: each frame alone
    assert (one - torch.cat(wanted[:1] * 2)).abs().max() <= 1e-5
