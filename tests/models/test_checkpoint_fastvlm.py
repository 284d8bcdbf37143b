"""Apple's original FastVLM checkpoints: read, written back to the byte, and carried through a model folder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_fastvlm import FASTVLM, golden_hf, golden_original, tiny_fastvlm
from vistune.models import checkpoints
from vistune.models.checkpoints import fastvlm
from vistune.models.convert import convert
from vistune.models.families import family
from vistune.models.load import load, save

FAMILY = family("fastvlm")
TOWER = "model.vision_tower.vision_tower.model."


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return golden_original(tmp_path_factory.mktemp("apple") / "original")


def change_config(folder, **said):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    return folder


def written(checkpoint, name, folder):
    folder.mkdir()
    checkpoints.named(name).write(checkpoint, folder)
    return folder


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def test_names_go_both_ways_as_recorded():
    recorded = json.loads((FASTVLM / "key_map.json").read_text())
    for table in (recorded["map"], json.loads((FASTVLM / "mobileclip_l_keys.json").read_text())["reference_to_hf"]):
        assert len(table) in (193, 629)
        for apple, folder in table.items():
            assert fastvlm.published(apple) == folder
            if folder is not None:
                assert fastvlm.original(folder) == apple


def test_what_is_read_computes_what_was_recorded(source):
    golden, facts = load_file(FASTVLM / "expected.safetensors"), json.loads((FASTVLM / "expected.json").read_text())
    loaded = load(source)
    model, image = loaded.model, loaded.image_token_id
    assert image == 320 and loaded.layout.mode == "pad" and loaded.layout.size == 256
    seen = golden["input_ids"][0][golden["attention_mask"][0].bool()]
    ids = torch.cat([torch.full((16,), image) if one == -200 else one[None] for one in seen])
    with torch.no_grad():
        hidden = FAMILY.hidden(model, ids, torch.arange(len(ids)), [len(ids)], golden["pixel_values_256"][:1])
        logits = FAMILY.head(model)(hidden)[:, :320]
        wanted = golden["logits_256"][0][golden["spliced_attention_mask_256"][0].bool()]
        assert (logits - wanted).norm() / wanted.norm() <= 1e-5
        model.lm_head.weight[320:] = 0
    case = facts["greedy_256"][1]
    prompt = [[image] * 16 if one == -200 else [one] for one in case["prompt_ids"]]
    ids = torch.tensor([[one for piece in prompt for one in piece]])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=golden["pixel_values_256"][1:],
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )
    assert out[0, ids.shape[1] :].tolist() == case["generated"]


@pytest.mark.parametrize("pickled", [False, True])
def test_to_a_model_folder_and_back_to_the_byte(source, tmp_path, pickled):
    if pickled:
        source = golden_original(tmp_path / "pickled")
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    hf = written(checkpoints.read(source), "hf", tmp_path / "hf")
    assert "head.proj" not in "".join(load_file(hf / "model.safetensors"))
    assert load(hf).config.text_config.vocab_size == 384
    back = written(checkpoints.read(hf), "fastvlm", tmp_path / "back")
    file = back / ("pytorch_model.bin" if pickled else "model.safetensors")
    original = load_file(FASTVLM / "original" / "model.safetensors")
    same_tensors(torch.load(file, weights_only=True) if pickled else load_file(file), original)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_what_was_trained_in_a_model_folder_goes_back_too(source, tmp_path):
    """What only Apple's format has (the tower's head) is gone then, and nothing else."""
    loaded = load(source)
    with torch.no_grad():
        loaded.model.lm_head.weight.add_(1.0)
    save(loaded, tmp_path / "trained", card="")
    back = written(checkpoints.read(tmp_path / "trained"), "fastvlm", tmp_path / "back")
    original, now = (load_file(folder / "model.safetensors") for folder in (source, back))
    original.pop(TOWER + "head.proj")
    original["lm_head.weight"] += 1.0
    same_tensors(now, original)
    assert load(back).image_token_id == 320


def test_the_recorded_model_folder_is_the_same_model(source, tmp_path):
    hf = golden_hf(tmp_path / "hf")
    apple, stock = checkpoints.read(source), checkpoints.read(hf)
    assert apple.tensors.keys() == stock.tensors.keys()
    for name, entry in stock.tensors.items():
        assert torch.equal(apple.tensors[name].read()[: entry.shape[0]] if entry.shape else entry.read(), entry.read())
    back = load_file(written(stock, "fastvlm", tmp_path / "apple") / "model.safetensors")
    original = load_file(FASTVLM / "original" / "model.safetensors")
    original.pop(TOWER + "head.proj")
    same_tensors(back, original)


def test_a_model_that_did_not_come_from_apple_opens_after_the_way_there(tmp_path):
    tied = tiny_fastvlm(tmp_path / "tied", tied=True)
    apple = written(checkpoints.read(tied, options={"resolution": 512}), "fastvlm", tmp_path / "apple")
    config = json.loads((apple / "config.json").read_text())
    assert config["architectures"] == ["LlavaQwen2ForCausalLM"] and config["mm_vision_tower"] == "mobileclip_l_512"
    assert config["unfreeze_mm_vision_tower"] is True and "lm_head.weight" not in load_file(apple / "model.safetensors")
    again = load(apple)
    assert again.layout.size == 512 and again.image_token_id == 1003
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight
    for name, value in load(tied).model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_the_tower_is_taken_whatever_config_says_of_training_it(source, tmp_path):
    """With this flag false Apple's own code leaves the stored tower and makes a random one."""
    folder = change_config(golden_original(tmp_path / "frozen"), unfreeze_mm_vision_tower=False)
    trap, plain = load(folder).model.state_dict(), load(source).model.state_dict()
    assert all(torch.equal(trap[name], plain[name]) for name in plain)
    back = written(checkpoints.read(folder), "fastvlm", tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["unfreeze_mm_vision_tower"] is True


def test_options_override_what_the_name_of_the_tower_says(source):
    said = checkpoints.read(source, options={"resolution": 1024}, image="square").said
    assert (said.layout.size, said.layout.mode, said.layout.tokens(1, 1)) == (1024, "square", 256)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
        ({"mm_vision_tower": "mobileclip_l"}, "not mobileclip_l_<pixels>"),
        ({"mm_vision_tower": "mobileclip_l_100"}, "256 to 1536 pixels"),
        ({"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}, "built on Qwen2"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    ],
)
def test_what_is_no_fastvlm_is_refused(tmp_path, change, error):
    with pytest.raises(ValueError, match=error):
        checkpoints.read(change_config(golden_original(tmp_path / "m"), **change))


def test_a_checkpoint_without_its_tower_or_tokenizer_is_refused(tmp_path):
    folder = golden_original(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "vision_tower" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="the vision tower is not in it"):
        load(folder)
    save_file({k: v for k, v in tensors.items() if "network.4.1.convffn.fc1" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"2 weights are missing. The first:\n  .*stages.2.blocks.1.mlp.fc1.bias"):
        load(folder)
    save_file(
        tensors | {TOWER + "network.0.0.token_mixer.rbr_skip.weight": torch.ones(8)}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match="training form"):
        load(folder)
    save_file(tensors, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no tokenizer in it"):
        load(folder)


def test_another_family_cannot_be_written(tmp_path, source):
    checkpoint = checkpoints.read(source)
    checkpoint.said.family = family("llava")
    with pytest.raises(ValueError, match="holds FastVLM alone"):
        checkpoints.named("fastvlm").write(checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_converted_there_and_back_with_proof(source, tmp_path):
    for out, to in (("hf", "hf"), ("back", "fastvlm")):
        done = convert(source if to == "hf" else tmp_path / "hf", tmp_path / out, to, verify=True)
        assert (done.family, done.tensors) == ("fastvlm", 192) and done.report.ok
        assert max(row.difference for row in done.report.rows) <= 1e-4
    same_tensors(*(load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back")))
