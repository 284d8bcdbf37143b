"""Model folders: assembled, proved, saved, opened by the stock classes, and refused when something is wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.tiny import GOLDEN, tiny_language, tiny_vision
from vistune import images
from vistune.models import weights
from vistune.models.assemble import assemble
from vistune.models.assembling import connectors
from vistune.models.load import check_save, load, save, stored_tensors
from vistune.models.proving.verify import verify

ORIGINAL = GOLDEN / "llava" / "tiny-llava-original"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("parts")
    tiny_vision(path / "clip", full=True)
    tiny_vision(path / "siglip", "siglip")
    for kind in ("llama", "qwen2"):
        tiny_language(path / kind, kind, tied=kind == "qwen2")
    return path


@pytest.fixture(scope="module")
def stage0(parts):
    assemble(parts / "clip", parts / "llama", parts / "stage0", image="pad")
    return parts / "stage0"


def copied(folder, path):
    shutil.copytree(folder, path)
    return path


def edited(folder, path, change):
    """A copy of a folder whose weights went through `change`."""
    copied(folder, path)
    tensors = load_file(path / weights.SINGLE)
    change(tensors)
    save_file(tensors, path / weights.SINGLE, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("vision", "language", "template", "image"),
    [("clip", "llama", "v1", "pad"), ("clip", "llama", "v1", "square"), ("siglip", "qwen2", "qwen_2", "square")],
)
def test_the_stock_classes_open_a_folder_and_compute_the_same(parts, tmp_path, vision, language, template, image):
    assemble(parts / vision, parts / language, tmp_path / "out", template=template, image=image)
    ours = load(tmp_path / "out")
    stock = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (44, 81, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked = processor(text=text, images=[picture], return_tensors="pt")

    pixels = images.normalize(torch.from_numpy(ours.layout.prepare(picture))[None], ours.layout, torch.float32)
    assert (pixels - asked["pixel_values"]).abs().max() <= 1e-6
    ids = asked["input_ids"][0]
    hidden = ours.family.hidden(ours.model, ids, torch.arange(len(ids)), [len(ids)], pixels)
    assert (ours.family.head(ours.model)(hidden) - stock(**asked).logits[0]).abs().max() <= 1e-5
    assert (ids == ours.image_token_id).sum() == ours.layout.tokens(81, 44) == 16


def test_the_vocabulary_grows_by_means_and_the_head_stays_tied_or_untied(parts, tmp_path, stage0):
    for folder, language in ((stage0, "llama"), (tmp_path / "q", "qwen2")):
        if language == "qwen2":
            assemble(parts / "clip", parts / "qwen2", folder, template="qwen_2")
        old = transformers.AutoModelForCausalLM.from_pretrained(parts / language)
        new = load(folder).model
        rows, head = new.get_input_embeddings().weight, new.lm_head.weight
        assert len(rows) % 64 == 0 and new.config.text_config.vocab_size == len(rows)
        for mine, theirs in ((rows, old.get_input_embeddings().weight), (head, old.lm_head.weight)):
            assert torch.equal(mine[: len(theirs)], theirs)
            for extra in mine[len(theirs) :]:
                torch.testing.assert_close(extra, theirs.mean(0))
        assert (head is rows) == (language == "qwen2")
        names = set(weights.stored(folder))
        assert ("language_model.lm_head.weight" in names) == (language == "llama")


def test_untying_and_tying(parts, tmp_path):
    assemble(parts / "clip", parts / "qwen2", tmp_path / "out", template="qwen_2", tie=False)
    model = load(tmp_path / "out").model
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="tying would lose it"):
        assemble(parts / "clip", parts / "llama", tmp_path / "no", tie=True)


def test_a_fresh_connector_follows_its_seed(parts, tmp_path):
    read = []
    for seed in (0, 0, 1):
        assemble(parts / "clip", parts / "llama", tmp_path / "out", seed=seed)
        read.append(weights.stored(tmp_path / "out")["multi_modal_projector.linear_1.weight"].read().clone())
    assert torch.equal(read[0], read[1]) and not torch.equal(read[0], read[2])


def test_the_original_connector_file(parts, tmp_path):
    held = torch.load(ORIGINAL / "stage1-mlp2x_gelu" / "mm_projector.bin", weights_only=True)
    parts_of_it = ORIGINAL / "clip-tiny-patch14-56", ORIGINAL / "base-llm"
    language = copied(parts_of_it[1], tmp_path / "llm")
    shutil.copy(GOLDEN / "llava" / "tokenizers" / "llama_like" / "tokenizer.json", language)
    out = tmp_path / "out"
    assemble(parts_of_it[0], language, out, connector=ORIGINAL / "stage1-mlp2x_gelu")
    stored = weights.stored(out)
    for index, layer in (("0", "linear_1"), ("2", "linear_2")):
        for kind in ("weight", "bias"):
            wanted = held[f"model.mm_projector.{index}.{kind}"]
            assert torch.equal(stored[f"multi_modal_projector.{layer}.{kind}"].read(), wanted.float())
    assemble(parts_of_it[0], language, tmp_path / "again", connector=out)
    first = weights.stored(tmp_path / "again")["multi_modal_projector.linear_1.weight"].read()
    assert torch.equal(first, held["model.mm_projector.0.weight"].float())
    with pytest.raises(ValueError, match=r"connector_type: 'identity', but .*stage1-linear holds a linear"):
        linear = ORIGINAL / "stage1-linear"
        assemble(parts_of_it[0], language, tmp_path / "no", connector=linear, connector_type="identity")
    with pytest.raises(ValueError, match=r"linear_1.weight is \[128, 32\]"):
        assemble(parts / "clip", parts / "llama", tmp_path / "no", connector=wide_connector(tmp_path))


def wide_connector(tmp_path):
    shapes = {"0.weight": (128, 32), "0.bias": (128,), "2.weight": (128, 128), "2.bias": (128,)}
    torch.save({f"model.mm_projector.{k}": torch.zeros(v) for k, v in shapes.items()}, tmp_path / "mm_projector.bin")
    return tmp_path / "mm_projector.bin"


def test_a_pickle_that_would_run_something_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"model.mm_projector.0.weight": Trap()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="nothing of it was run"):
        connectors.read(tmp_path / "mm_projector.bin")
    assert not (tmp_path / "sprung").exists()


def test_the_proof_holds_and_names_what_is_wrong(parts, stage0, tmp_path):
    report = verify(stage0, vision=parts / "clip", language=parts / "llama")
    assert report.ok and [row.difference for row in report.rows] == [0.0] * len(report.rows)
    report.show()
    other = tiny_vision(tmp_path / "other", seed=5)
    with torch.no_grad():
        tensors = load_file(other / weights.SINGLE)
        tensors["encoder.layers.1.mlp.fc1.weight"] = tensors["encoder.layers.1.mlp.fc1.weight"] + 1
    save_file(tensors, other / weights.SINGLE, metadata={"format": "pt"})
    wrong = [row.wrong for row in verify(stage0, vision=other, language=parts / "llama").rows if row.wrong]
    assert len(wrong) == 2 and "weights differ, see the row above" in wrong[1]

    def poison(tensors):
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    report = verify(edited(stage0, tmp_path / "nan", poison), vision=parts / "clip", language=parts / "llama")
    assert not report.ok and "layers.1.mlp.up_proj.weight is not finite (and 0 more)" in report.rows[0].wrong
    config = json.loads((copied(stage0, tmp_path / "eps") / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1
    (tmp_path / "eps" / "config.json").write_text(json.dumps(config))
    wrong = [row.wrong for row in verify(tmp_path / "eps", vision=parts / "clip", language=parts / "llama").rows]
    assert any("layers.0: outputs differ; likely cause: config keys differ: rms_norm_eps" in one for one in wrong)


def test_weights_that_do_not_fit_are_refused(stage0, tmp_path):
    gone = "language_model.model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"1 weights are missing(.|\n)*layers.0.mlp.up_proj.weight"):
        load(edited(stage0, tmp_path / "a", lambda t: t.pop(gone)))
    with pytest.raises(ValueError, match=r"1 weights are not of this model(.|\n)*stray"):
        load(edited(stage0, tmp_path / "b", lambda t: t.update(stray=torch.zeros(2))))
    with pytest.raises(ValueError, match=r"is \[5, 64\], not \[176, 64\]"):
        load(edited(stage0, tmp_path / "c", lambda t: t.update({gone: torch.zeros(5, 64)})))
    with pytest.raises(ValueError, match="not finite"):
        load(edited(stage0, tmp_path / "d", lambda t: t[gone].fill_(float("inf"))))
    with pytest.raises(ValueError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no checkpoint format takes"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"not a whole safetensors file|nowhere|header|[Ii]ncomplete"):
        cut = copied(stage0, tmp_path / "e") / weights.SINGLE
        cut.write_bytes(cut.read_bytes()[:-100])
        load(tmp_path / "e")
    with pytest.raises(ValueError, match="one token"):
        load(stage0, template="qwen_2")


def test_bad_parts_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor whole in the local cache"):
        assemble("nobody/nothing", parts / "llama", tmp_path / "out")
    with pytest.raises(ValueError, match="a vision tower can be one of clip"):
        assemble(parts / "llama", parts / "llama", tmp_path / "out")
    with pytest.raises(ValueError, match="no class token"):
        assemble(parts / "siglip", parts / "llama", tmp_path / "out", select="cls_patch")
    with pytest.raises(ValueError, match="one token"):
        assemble(parts / "clip", parts / "llama", tmp_path / "out", template="qwen_2")
    assert not (tmp_path / "out").exists()


def test_saving_keeps_frozen_bytes_and_types(parts, tmp_path, stage0):
    """Start in bf16, hold in fp32, change the connector: the rest comes back byte for byte, tensor by tensor."""
    assemble(parts / "clip", parts / "llama", tmp_path / "start", dtype=torch.bfloat16)
    loaded = load(tmp_path / "start")
    with torch.no_grad():
        for p in loaded.family.parts(loaded.model)["connector"][0].parameters():
            p.add_(1e-4)
    save(loaded, tmp_path / "end", frozen_from=loaded.source, card="# a card", shard_bytes=60_000)
    assert len(list((tmp_path / "end").glob("*.safetensors"))) > 3
    start, end = ({n: e.read() for n, e in weights.stored(tmp_path / f).items()} for f in ("start", "end"))
    assert start.keys() == end.keys()
    for name in start:
        if "projector" in name:
            assert end[name].dtype == torch.float32 and not torch.equal(end[name], start[name].float())
        else:
            assert end[name].dtype == torch.bfloat16 and torch.equal(end[name], start[name])
    assert (tmp_path / "end" / "README.md").read_text() == "# a card"
    assert load(tmp_path / "end").template_name == "v1"
    assert load(tmp_path / "end", image="square").layout.mode == "square"
    again = stored_tensors(loaded)
    wanted = start["language_model.model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(again("model.language_model.layers.0.mlp.up_proj.weight"), wanted)


def test_saving_never_touches_what_is_not_ours(stage0, tmp_path):
    loaded = load(stage0)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="not a vistune model folder"):
        save(loaded, tmp_path / "theirs", frozen_from=None, card="")
    copied(tmp_path / "theirs", tmp_path / "out.tmp")
    with pytest.raises(ValueError, match="in the way and not ours"):
        save(loaded, tmp_path / "out", frozen_from=None, card="")
    assert (tmp_path / "out.tmp" / "thesis.txt").exists()
    copied(tmp_path / "theirs", tmp_path / "mine.old")
    with pytest.raises(ValueError, match="in the way and not ours"):
        save(loaded, tmp_path / "mine", frozen_from=None, card="")
    (tmp_path / "mine.old" / "thesis.txt").rename(tmp_path / "thesis.txt")
    (tmp_path / "mine.old").rmdir()
    save(loaded, tmp_path / "mine", frozen_from=None, card="one")
    save(loaded, tmp_path / "mine", frozen_from=None, card="two")
    assert (tmp_path / "mine" / "README.md").read_text() == "two"
    loaded.layout = None
    with pytest.raises(AttributeError):
        save(loaded, tmp_path / "mine", frozen_from=None, card="three")
    assert (tmp_path / "mine" / "README.md").read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out.tmp", "theirs", "thesis.txt"]


def test_a_generation_config_that_cannot_be_saved(parts, tmp_path):
    vicuna = copied(parts / "llama", tmp_path / "vicuna")
    bad = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "bos_token_id": 1}
    (vicuna / "generation_config.json").write_text(json.dumps(bad))
    assemble(parts / "clip", vicuna, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert "temperature" not in saved and "top_p" not in saved and saved["eos_token_id"] == 2
    loaded = load(tmp_path / "out")
    loaded.model.generation_config.temperature = 0.5
    check_save(loaded, tmp_path / "dry")
    assert not (tmp_path / "dry").exists() and not (tmp_path / "dry.tmp").exists()


def test_nothing_of_this_machine_is_in_a_folder(parts, stage0):
    for file in stage0.glob("*.json"):
        assert str(parts) not in file.read_text()


def test_the_sentencepiece_file_comes_along(parts, tmp_path):
    """Older code opens tokenizer.model alone; the ids stay what they were."""
    language = copied(ORIGINAL / "base-llm", tmp_path / "llm")
    spoken = "the red cup"
    wanted = transformers.AutoTokenizer.from_pretrained(language)(spoken)["input_ids"]
    assemble(ORIGINAL / "clip-tiny-patch14-56", language, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.tokenizer(spoken)["input_ids"] == wanted
    save(loaded, tmp_path / "again", card="")
    model = (language / "tokenizer.model").read_bytes()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == model
    assert load(tmp_path / "again").tokenizer(spoken)["input_ids"] == wanted


def test_a_head_that_is_lost_is_missing_and_not_the_embedding(parts, tmp_path):
    for kind, tied in (("llama", False), ("qwen2", True)):
        template = "v1" if kind == "llama" else "qwen_2"
        assemble(parts / "clip", parts / kind, tmp_path / kind, template=template)
        names = {"language_model.lm_head.weight"} & weights.stored(tmp_path / kind).keys()
        assert bool(names) != tied
        assert (load(tmp_path / kind).model.config.tie_word_embeddings is True) == tied
    gone = edited(tmp_path / "llama", tmp_path / "gone", lambda t: t.pop("language_model.lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 weights are missing(.|\n)*lm_head"):
        load(gone)
