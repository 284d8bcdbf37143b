"""A OneVision folder that vistune wrote: opened without vistune, by both ways to name weights, with pixels and prompts
as trained; nothing in it is left as the memory happened to be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.tiny import GOLDEN
from vistune.generate import prompt
from vistune.images import normalize, open_image
from vistune.models.families import family
from vistune.models.load import load, save
from vistune.models.shipped.modeling_llavaonevision1_5 import LLaVAOneVision1_5_ForConditionalGeneration
from vistune.models.shipped.processing_llavaonevision1_5 import (
    LLaVAOneVision1_5_ImageProcessor,
    LLaVAOneVision1_5_Processor,
)
from vistune.native import NativeLayout
from vistune.samples import Image, Message

ONEVISION = GOLDEN / "onevision15"
START = ONEVISION / "tiny-stage0"

OUTSIDE = """
import json, sys

class NoVistune:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vistune":
            raise ImportError("no vistune here")

sys.meta_path.insert(0, NoVistune())
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder, golden, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
said = json.load(open(golden + "/expected.json"))["samples"]
found = {}
for name in ("s02", "m01", "m02", "t02"):
    one = said[name]
    turns = one.get("messages") or [
        {"role": "user", "content": one["user"]}, {"role": "assistant", "content": one["assistant"]}
    ]
    turns = ([{"role": "system", "content": one["system"]}] if one.get("system") else []) + turns
    pictures = [Image.open(golden + "/" + path) for path in one["images"]] or None
    given = processor(images=pictures, text=processor.apply_chat_template(turns), return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits[0]
    found[name + "/ids"], found[name + "/logits"] = given["input_ids"][0].numpy(), logits.numpy()
    if pictures:
        found[name + "/pixels"] = given["pixel_values"].numpy()
        first = [turn for turn in turns if turn["role"] != "assistant"]
        ask = processor(
            images=pictures,
            text=processor.apply_chat_template(first, add_generation_prompt=True),
            return_tensors="pt",
        )
        new = model.generate(**ask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        found[name + "/greedy"] = new[0, -12:].numpy()
np.savez(out, modules=[type(model).__module__, type(processor).__module__], **found)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    loaded = load(START)
    folder = tmp_path_factory.mktemp("export") / "model"
    save(loaded, folder, frozen_from=loaded.source, card="")
    return folder


@pytest.mark.slow
def test_a_process_without_vistune(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.npz"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OUTSIDE, str(written), str(ONEVISION), str(out)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((ONEVISION / "expected.json").read_text())["samples"]
    with np.load(out) as found, np.load(ONEVISION / "expected.npz") as wanted:
        assert all(str(name).startswith("transformers_modules.") for name in found["modules"])
        for name in ("s02", "m01", "m02", "t02"):
            length = said[name]["n_tokens"]
            assert found[f"{name}/ids"][:length].tolist() == wanted[f"{name}/input_ids"].tolist()
            np.testing.assert_allclose(found[f"{name}/logits"][:length], wanted[f"{name}/logits"], 1e-4, 2e-4)
            if f"{name}/pixels" in found:
                np.testing.assert_allclose(found[f"{name}/pixels"], wanted[f"{name}/pixel_values"], atol=1e-6)
                assert found[f"{name}/greedy"].tolist() == said[name]["greedy_ids"]


def test_the_folder_is_whole_and_equal(written: Path) -> None:
    """Same tensors byte for byte; settings where older releases look; the code but for the place of its parts."""
    one, other = load_file(START / "model.safetensors"), load_file(written / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (START, written))
    for section in ("text_config", "vision_config"):
        left = {key for key, value in before[section].items() if after[section].get(key, "none") != value}
        assert left <= {"_name_or_path"}, section
        assert after[section].keys() - before[section].keys() <= {"dtype", "tie_word_embeddings", "torch_dtype"} | {
            "pad_token_id"
        }
    assert after["tie_word_embeddings"] is after["text_config"]["tie_word_embeddings"] is False
    assert {**after, **before, "text_config": 0, "vision_config": 0} == {
        **after,
        "text_config": 0,
        "vision_config": 0,
    } | {"transformers_version": before["transformers_version"]}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        old, new = (json.loads((folder / name).read_text()) for folder in (START, written))
        assert {key: value for key, value in new.items() if old.get(key) != value and key in old}.keys() <= {
            *("size", "max_pixels", "temporal_patch_size")
        }
    for file in written.glob("*llavaonevision1_5.py"):
        code = file.read_text()
        assert "vistune.models" not in code
        ours = Path(sys.modules[f"vistune.models.shipped.{file.stem}"].__file__).read_text()
        assert code == ours.replace("from vistune.models.shipped.", "from .")
    assert len(list(written.glob("*.py"))) == 3 and load(written).layout == load(START).layout
    tokens = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (START, written)]
    if transformers.__version__ >= "5.2":  # before, they are in tokenizer.json alone
        assert tokens[0]["additional_special_tokens"] == tokens[1]["additional_special_tokens"]
    for key in ("processor_class", "eos_token", "pad_token", "tokenizer_class"):
        assert tokens[0][key] == tokens[1][key]


def renamed(folder: Path, out: Path) -> Path:
    """The folder with the weights' other names, as newer published code holds them."""
    shutil.copytree(folder, out)
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        inner = "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)
        weights[name if name.startswith("lm_head") else inner] = value
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_both_ways_to_name_the_weights(tmp_path: Path) -> None:
    folder = renamed(START, tmp_path / "other")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted = load(START).model(ids).logits
        assert torch.equal(load(folder).model(ids).logits, wanted)
        for source in (START, folder):
            opened, info = LLaVAOneVision1_5_ForConditionalGeneration.from_pretrained(source, output_loading_info=True)
            assert not any(info.values())
            assert torch.equal(opened(ids).logits, wanted)
            opened.save_pretrained(tmp_path / "again")
            assert load_file(tmp_path / "again" / "model.safetensors").keys() == load(START).source.keys()


def test_nothing_is_left_uninitialised(tmp_path: Path) -> None:
    """No buffer of the tower's can be: it has none. What a file lacks is drawn anew by the class, refused by `load`."""
    opened = LLaVAOneVision1_5_ForConditionalGeneration.from_pretrained(START)
    assert not list(opened.visual.buffers())
    lacking = ("visual.class_embedding", "visual.class_pos_emb", "visual.patch_embed.proj.weight")
    shutil.copytree(START, tmp_path / "less")
    weights = load_file(START / "model.safetensors")
    left = {name: value for name, value in weights.items() if name not in lacking}
    save_file(left, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    opened = LLaVAOneVision1_5_ForConditionalGeneration.from_pretrained(tmp_path / "less")
    for name in lacking:
        value = opened.get_parameter(name)
        assert torch.isfinite(value).all() and 0 < value.abs().max() < 0.2, name
    with pytest.raises(ValueError, match=r"3 weights are missing[^$]*visual\.class_embedding"):
        load(tmp_path / "less")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([None, 30, 112, 300]))
def test_its_pictures_are_those_of_training(width: int, height: int, cap: int | None) -> None:
    layout = NativeLayout(max_pixels=120_000, image_resolution=cap)
    images = LLaVAOneVision1_5_ImageProcessor(max_pixels=120_000, image_resolution=cap)
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    try:
        grid = layout.grid(width, height)
    except ValueError:
        with pytest.raises(ValueError, match="200 times"):
            images(pixels)
        return
    made = images(pixels)
    assert made["image_grid_thw"].tolist() == [list(grid)]
    wanted = normalize(torch.from_numpy(layout.prepare(PIL.Image.fromarray(pixels))), layout, torch.float32)
    assert (made["pixel_values"] - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize("name", ["p0", "p1", "p2", "p3", "p4"])
def test_recorded_pictures(name: str) -> None:
    """p4 has transparency, which is dropped, not laid on white."""
    said = json.loads((ONEVISION / "preprocess.json").read_text())["patches"][name]
    with np.load(ONEVISION / "preprocess.npz") as read:
        wanted = next(
            torch.from_numpy(read[key])
            for key in read
            if key.startswith(name) and read[key].ndim == 2 and read[key].shape[1] == 588
        )
    read = json.loads((ONEVISION / "processor" / "preprocessor_config.json").read_text())
    limits = {key: said[key] for key in ("min_pixels", "max_pixels") if key in said}
    images = LLaVAOneVision1_5_ImageProcessor(**{**read, **limits})
    for picture in (str(ONEVISION / said["file"]), PIL.Image.open(ONEVISION / said["file"])):
        assert (images([picture])["pixel_values"] - wanted).abs().max() <= 1e-6


def test_messages_with_pictures_and_videos(written: Path) -> None:
    """Content as a list of parts; a video is its frames, in the video's tokens, each seen alone."""
    processor = LLaVAOneVision1_5_Processor.from_pretrained(written)
    loaded = load(written)
    path = str(ONEVISION / "images" / "s02.png")
    parts = [{"type": "image", "image": path}, {"type": "text", "text": "What is it?"}]
    found = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    turns = [Message(role="user", text="<image>What is it?")]
    assert found["input_ids"][0].tolist() == prompt(loaded, turns, [Image(path=path)]).ids

    frame = open_image(Image(path=path))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}, parts[1]]}])
    video = processor(text=text, videos=[[frame] * 3], return_tensors="pt")
    one = processor.image_processor(frame)
    assert video["video_grid_thw"].tolist() == [[3, *one["image_grid_thw"][0].tolist()[1:]]]
    assert (video["input_ids"] == loaded.config.video_token_id).sum() == 3 * one["image_grid_thw"].prod() // 4
    with torch.no_grad():
        features = loaded.model.visual(video["pixel_values_videos"], video["video_grid_thw"])
        single = loaded.model.visual(one["pixel_values"], one["image_grid_thw"])
        assert torch.isfinite(loaded.model(**video).logits).all()
    torch.testing.assert_close(features, single.repeat(3, 1), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"1 pictures or videos for 0 <\|image_pad\|>"):
        processor(text="no place", images=[frame])


def test_several_answers_to_prompts_with_pictures(written: Path) -> None:
    """Beams repeat every row's own pictures: as many prompts asked alone."""
    loaded, (path, other) = load(written), (str(ONEVISION / "images" / f"{name}.png") for name in ("s01", "s02"))
    turns = [Message(role="user", text="<image><image>Which?"), Message(role="user", text="<image>What?")]
    asked = [prompt(loaded, turns[:1], [Image(path=path)] * 2), prompt(loaded, turns[1:], [Image(path=other)])]

    def answers(*made):
        longest = max(len(one.ids) for one in made)
        ids = torch.tensor([[0] * (longest - len(one.ids)) + one.ids for one in made])
        mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in made])
        pixels = [normalize(each, loaded.layout, torch.float32) for one in made for each in one.pixels]
        more = family("onevision15").inputs(pixels, [grid for one in made for grid in one.grids])
        out = loaded.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **more,
            num_beams=3,
            num_return_sequences=2,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return out[:, longest:].tolist()

    assert answers(*asked) == [*answers(asked[0]), *answers(asked[1])]
