"""Tokens around images: added, learned, remembered; and training of what the stock class cannot hold, end to end."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from PIL import Image as Picture

from tests.made import made_data, made_recipe
from tests.tiny import tiny_language, tiny_vision
from vistune import chat, generate, inputs
from vistune.models import weights
from vistune.models.assemble import assemble
from vistune.models.load import describe, load
from vistune.models.proving.verify import verify
from vistune.samples import Image, Message
from vistune.train import metrics, stage

pytestmark = pytest.mark.usefixtures("one_thread")
TALK = [Message(role="user", text="<image>\nWhat is this?"), Message(role="assistant", text="A cup.")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    path = tmp_path_factory.mktemp("ends")
    tiny_vision(path / "clip")
    tiny_language(path / "llama")
    tiny_language(path / "qwen2", "qwen2", tied=True)
    tiny_language(path / "mpt", "mpt", tied=True)
    made_data(path / "data", rows=16)
    return path


@pytest.fixture(scope="module")
def wrapped(parts):
    assemble(parts / "clip", parts / "llama", parts / "wrapped", start_end=True)
    return parts / "wrapped"


@pytest.mark.parametrize("language", ["llama", "qwen2"])
def test_the_tokens_begin_as_the_mean_of_the_old_ones(parts, tmp_path, language):
    """Of every old row; in rows of the model's own where it has more of them than its tokenizer has tokens."""
    template = "qwen_2" if language == "qwen2" else "v1"
    loaded = assemble(parts / "clip", parts / language, tmp_path / "out", start_end=True, template=template)
    old = transformers.AutoModelForCausalLM.from_pretrained(parts / language)
    had = len(transformers.AutoTokenizer.from_pretrained(parts / language))
    model, ids = loaded.model, loaded.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    for mine, theirs in ((model.get_input_embeddings(), old.get_input_embeddings()), (model.lm_head, old.lm_head)):
        for one in ids:
            torch.testing.assert_close(mine.weight[one], theirs.weight[:had].mean(0))
    assert verify(tmp_path / "out", vision=parts / "clip", language=parts / language).ok


def test_training_answering_and_the_exported_template_see_the_same_ids(wrapped):
    loaded = load(wrapped)
    start, end = loaded.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    image = loaded.image_token_id
    assert loaded.start_end and loaded.template.image == "<im_start><image><im_end>"
    trained = chat.encode(inputs.language_of(loaded).template, loaded.encoder, TALK, has_images=True)
    place = trained.ids.index(-200)
    assert trained.ids[place - 1 : place + 2] == [start, -200, end]
    assert not any(trained.loss_mask[: place + 2])

    picture = Picture.new("RGB", (60, 40), (200, 30, 30))
    asked = generate.prompt(loaded, TALK[:1], [Image(path=save(picture, wrapped.parent / "red.png"))])
    processor = transformers.AutoProcessor.from_pretrained(wrapped)
    content = [{"type": "image"}, {"type": "text", "text": "\nWhat is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    exported = processor(text=text, images=[picture], return_tensors="pt")["input_ids"][0].tolist()
    assert exported == asked.ids
    assert asked.ids[: place + 18] == [*trained.ids[: place - 1], start, *[image] * 16, end, asked.ids[place + 17]]
    plain = chat.in_ends(chat.template("plain"))
    assert "".join(s.text for s in chat.render(plain, TALK, has_images=True)) == "<im_start><image><im_end>A cup.\n"
    tagged = chat.in_ends(chat.template("v1_mmtag"))
    assert tagged.image == "<Image><im_start><image><im_end></Image>"


def save(picture, path):
    picture.save(path)
    return str(path)


def test_a_folder_without_its_tokens_and_a_template_without_a_place_for_them_are_refused(wrapped, tmp_path, parts):
    with pytest.raises(ValueError, match="the tokenizer's own and knows nothing of <im_start>"):
        chat.in_ends(chat.template("tokenizer"))
    plain = assemble(parts / "clip", parts / "llama", tmp_path / "plain")
    assert not plain.start_end and "start_end" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    config["vistune"]["start_end"] = True
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"between <im_start> and <im_end>, but its tokenizer has no <im_start>"):
        describe(tmp_path / "plain")


def test_a_first_stage_learns_the_embedding_and_leaves_the_head(parts, wrapped, tmp_path):
    """As the original does: connector and whole input embedding learn, nothing else; the folder remembers."""
    learn = {"connector": 1e-3, "language.embedding": 1e-3}
    stage.run(made_recipe(wrapped, parts / "data" / "data.json", tmp_path / "run", learn=learn, train={"steps": 2}))
    before, after = weights.stored(wrapped), weights.stored(tmp_path / "run" / "model")
    changed = {name for name in before if not torch.equal(before[name].read(), after[name].read())}
    embedding = "language_model.model.embed_tokens.weight"
    assert changed == {embedding} | {name for name in before if "multi_modal_projector" in name}
    moved = (before[embedding].read() != after[embedding].read()).any(1).nonzero().flatten().tolist()
    said = describe(tmp_path / "run" / "model")
    assert said.start_end and set(said.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])) <= set(moved)
    with pytest.raises(ValueError, match=r"learn.language.embeddings: after the part may stand .*language.embedding"):
        wrong = {"language.embeddings": 1e-3}
        stage.run(made_recipe(wrapped, parts / "data" / "data.json", tmp_path / "no", learn=wrong))


VARIANTS = {
    "linear": ("llama", {"connector_type": "linear", "start_end": True}),
    "scales": ("llama", {"s2_scales": "56,112", "connector_type": "mlp3x_gelu"}),
    "mpt": ("mpt", {}),
}


@pytest.mark.parametrize("name", ["linear", *(pytest.param(one, marks=pytest.mark.slow) for one in ("scales", "mpt"))])
@pytest.mark.slow
def test_a_stage_packed_and_unpacked_has_one_loss_and_its_folder_answers(parts, tmp_path, name):
    language, said = VARIANTS[name]
    assemble(parts / "clip", parts / language, tmp_path / "start", **said)
    learn = {"connector": 1e-3, "language": 2e-4, "vision.layers.-2:": 1e-5}
    losses = []
    for pack in (True, False):
        run = tmp_path / f"run-{pack}"
        sections = {"learn": learn, "train": {"steps": 2}, "data": {"pack": pack, "length": 224}}
        stage.run(made_recipe(tmp_path / "start", parts / "data" / "data.json", run, **sections))
        losses.append([row["loss"] for row in metrics.read(run)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5) and losses[0][1] != losses[0][0]
    loaded = load(tmp_path / "run-True" / "model")
    assert loaded.family.name == "llava_variant"
    assert (tmp_path / "run-True" / "model" / "modeling_llava_variant.py").exists()
    picture = Image(path=save(Picture.new("RGB", (60, 40), (200, 30, 30)), tmp_path / "red.png"))
    answers = generate.answer_batch(loaded, [("What is this?", [picture]), ("And now?", [])], max_new_tokens=4)
    alone = "".join(generate.Chat(loaded).ask("What is this?", [picture], max_new_tokens=4))
    assert answers[0] == alone and len(answers) == 2
