"""Language models of many kinds: assembled, trained in packs and answering as their stock classes do."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from tests.models.test_llava_family import pack, samples, score
from tests.tiny import tiny_language, tiny_vision
from vistune.models.assemble import assemble
from vistune.models.assembling import parts
from vistune.models.load import load, save
from vistune.models.proving.verify import verify
from vistune.models.shipped import modeling_llava_variant

LLAMA_3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
KINDS = {
    "llama-2": ("llama", {"kv_heads": 4}),
    "llama-3": ("llama", {"tied": True, **LLAMA_3}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "smollm": ("llama", {"tied": True, "kv_heads": 1, "heads": 2}),
    "smollm3": ("smollm3", {"tied": True, "pad_token_id": 0}),
    "phi-2": ("phi", {"kv_heads": 4}),
    "phi-3": ("phi3", {"pad_token_id": 0}),
    "mpt": ("mpt", {"tied": True}),
}
OURS = ("phi-2", "mpt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("languages")
    tiny_vision(path / "clip")
    for name, (kind, more) in KINDS.items():
        language = tiny_language(path / name, kind, **more)
        template = "qwen_2" if kind.startswith("qwen") else "v1"
        assemble(path / "clip", language, path / f"{name}-out", template=template)
    return path


def stock(folder, name):
    """The class's own forward, plain attention: what `transformers` computes of the folder."""
    made = modeling_llava_variant.LlavaVariantForConditionalGeneration if name in OURS else None
    made = made or transformers.LlavaForConditionalGeneration
    return made.from_pretrained(folder, attn_implementation="eager" if name not in OURS else None).eval()


def laid(loaded, ids):
    """Samples with this tokenizer's placeholder in the place of the test's."""
    return [torch.where(one == 1003, loaded.image_token_id, one) for one in ids]


@pytest.mark.parametrize("name", KINDS)
def test_packed_training_equals_the_stock_forward_sample_by_sample(folders, name):
    loaded, whole = load(folders / f"{name}-out"), stock(folders / f"{name}-out", name)
    assert loaded.family.name == ("llava_variant" if name in OURS else "llava")
    ids, pixels = samples()
    ids = laid(loaded, ids)
    expected = torch.cat(
        [
            whole(input_ids=one[None], pixel_values=seen if len(seen) else None).logits[0]
            for one, seen in zip(ids, pixels, strict=True)
        ]
    )
    score(expected).backward()
    got = loaded.family.head(loaded.model)(loaded.family.hidden(loaded.model, *pack(ids, pixels)))
    score(got).backward()

    assert (got - expected).abs().max() <= 1e-5
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for each, gradient in wanted.items():
        assert (found[each] - gradient).abs().max() <= 2e-5 * max(1.0, float(gradient.abs().max())), each


@pytest.mark.parametrize("name", KINDS)
def test_it_answers_as_the_stock_class_and_is_what_it_was_made_of(folders, name, tmp_path):
    """Also after a packed forward, in batches padded on the left, and saved once more."""
    loaded, whole = load(folders / f"{name}-out"), stock(folders / f"{name}-out", name)
    ids, pixels = samples((1, 1))
    ids = laid(loaded, ids)
    loaded.family.hidden(loaded.model, *pack(ids, pixels))
    padded = torch.stack([torch.nn.functional.pad(one, (40 - len(one), 0)) for one in ids])
    mask = (torch.arange(40)[None] >= torch.tensor([40 - len(one) for one in ids])[:, None]).long()
    ask = {"input_ids": padded, "attention_mask": mask, "pixel_values": torch.cat(pixels), "max_new_tokens": 5}
    assert torch.equal(
        loaded.model.generate(**ask, do_sample=False, pad_token_id=0),
        whole.generate(**ask, do_sample=False, pad_token_id=0),
    )
    save(loaded, tmp_path / "again", frozen_from=loaded.source, card="")
    report = verify(tmp_path / "again", vision=folders / "clip", language=folders / name)
    assert report.ok and [row.difference for row in report.rows] == [0.0] * len(report.rows)


def test_the_head_and_its_bias_grow_by_means(folders):
    old = transformers.AutoModelForCausalLM.from_pretrained(folders / "phi-2")
    new = load(folders / "phi-2-out").model
    assert new.config.head_bias and len(new.lm_head.bias) == len(new.lm_head.weight) == 1024
    assert torch.equal(new.lm_head.bias[:1000], old.lm_head.bias)
    torch.testing.assert_close(new.lm_head.bias[1000:], old.lm_head.bias.mean().expand(24))


def test_an_mpt_reads_samples_up_to_its_length_and_no_further(folders):
    loaded = load(folders / "mpt-out")
    ids = torch.arange(300) % 900
    with pytest.raises(ValueError, match=r"a sample has 257 tokens.*made for 256.*lower data.length"):
        loaded.family.hidden(loaded.model, ids, ids, [43, 257], None)
    assert loaded.family.hidden(loaded.model, ids, ids, [44, 256], None).shape == (300, 64)
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight


@pytest.mark.parametrize("name", OURS)
def test_activation_checkpointing_gives_the_same_gradients(folders, name):
    loaded = load(folders / f"{name}-out")
    ids, pixels = samples()
    batch, model = pack(laid(loaded, ids), pixels), loaded.model.train()
    loaded.family.hidden(model, *batch).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    loaded.family.layers(model, "language")[0].register_forward_hook(lambda *_: runs.append(1))
    next(loaded.family.layers(model, "language")[0].children()).register_forward_hook(lambda *_: runs.append(2))
    loaded.family.hidden(model, *batch).square().sum().backward()
    assert runs.count(2) == 2  # forward, and once more in backward
    for each, gradient in wanted.items():
        torch.testing.assert_close(model.get_parameter(each).grad, gradient)


def test_alibi_begins_anew_in_each_sample(folders):
    """What stands in front in the pack changes nothing, however long it is; in half precision neither."""
    loaded = load(folders / "mpt-out")
    ids = torch.arange(240) % 900
    alone = loaded.family.hidden(loaded.model, ids[:40], ids[:40], [40], None)
    behind = loaded.family.hidden(loaded.model, torch.cat([ids[:200], ids[:40]]), ids, [200, 40], None)
    assert (behind[200:] - alone).abs().max() <= 1e-5
    loaded.model.bfloat16()
    half = loaded.family.hidden(loaded.model, torch.cat([ids[:200], ids[:40]]), ids, [200, 40], None)
    assert half.dtype == torch.bfloat16 and (half[200:].float() - alone).abs().max() <= 0.1


def test_tokenizers_without_pad_or_unk_and_with_the_image_token(folders, tmp_path):
    for name, drop in (("bare", ("unk_token", "pad_token")), ("marked", ())):
        language = tiny_language(tmp_path / name, "llama", vocab_size=1008)
        file = language / "tokenizer_config.json"
        said = json.loads(file.read_text())
        for key in drop:
            said.pop(key, None)
        file.write_text(json.dumps(said))
        (language / "special_tokens_map.json").unlink(missing_ok=True)
        if name == "marked":
            tokenizer = transformers.AutoTokenizer.from_pretrained(language)
            tokenizer.add_tokens(["<image>"])
            tokenizer.save_pretrained(language)
            had = tokenizer.convert_tokens_to_ids("<image>")
        loaded = assemble(folders / "clip", language, tmp_path / f"{name}-out")
        assert loaded.tokenizer.pad_token is not None
        assert loaded.tokenizer.pad_token_id != loaded.image_token_id
        again = load(tmp_path / f"{name}-out")
        assert again.image_token_id == loaded.image_token_id
        if name == "marked":
            assert loaded.image_token_id == had and len(loaded.tokenizer) == len(tokenizer)


def test_other_language_models_are_refused_with_the_reason(tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"is a GPT2LMHeadModel; it must have `model.embed_tokens`.*or be an MPT"):
        parts.read_language(tmp_path / "gpt2", "auto")
    shutil.rmtree(tmp_path / "gpt2")
