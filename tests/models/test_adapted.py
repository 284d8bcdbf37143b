"""Adapters on one loaded model: each answers as the model merged with it, and the model itself stays what it was."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.each_family import each_family, folders_in
from tests.made import made_recipe, stage0
from tests.original_llava import BASE, ORIGINAL, copied
from vistune.models import adapted, lowbit, merge
from vistune.models.load import load
from vistune.models.quantize import load_quantized
from vistune.train import stage
from vistune.train.keeping.merge import merge as merge_run

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
KINDS = {
    "plain": {},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 11}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "connector": {"modules_to_save": ["multi_modal_projector"]},
    "vision": {"target_modules": r".*(vision_tower.*q_proj|multi_modal_projector.linear_1)"},
}
CONNECTOR = "model.multi_modal_projector.linear_2.weight"


def trained(folder, start, seed=0, **config):
    """What peft saves of an adapter on `start` in which everything has learned something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    said = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, "target_modules": LANGUAGE} | config
    model = get_peft_model(load(start).model, LoraConfig(**said))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.peft_config["default"].base_model_name_or_path = str(start)
    model.save_pretrained(folder)
    return folder


class Made:
    """An adapter of every kind, and for each the merged model; made when they are asked for."""

    def __init__(self, start, folder):
        self.start, self.folder = start, folder

    @functools.cache  # noqa: B019 - it lives as long as the module's tests
    def __truediv__(self, name):
        return trained(self.folder / name, self.start, list(KINDS).index(name), **KINDS[name])

    @functools.cache  # noqa: B019
    def merged(self, name):
        return logits(load(merge_run(self / name, self.folder / "merged" / name, base=self.start)).model)


@pytest.fixture(scope="module")
def made(start, tmp_path_factory):
    return Made(start, tmp_path_factory.mktemp("adapters"))


@torch.no_grad()
def logits(model, pictures=True):
    """Of texts with a picture of 16 tokens in them, or of texts alone."""
    torch.manual_seed(0)
    ids = torch.randint(5, 900, (2, 24))
    if not pictures:
        return model(input_ids=ids).logits
    ids[:, 4:20] = model.config.image_token_id
    return model(input_ids=ids, pixel_values=torch.randn(2, 3, 56, 56).to(model.dtype)).logits


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", [("dora", "connector"), pytest.param(tuple(KINDS), marks=pytest.mark.slow)])
def test_each_adapter_is_the_merged_model_and_none_is_the_model_itself(start, made, kinds):
    loaded = load(start)
    own = logits(loaded.model)
    shelf = adapted.Adapters(loaded)
    for name in kinds:
        shelf.add(name, made / name)
    assert shelf.names == kinds and torch.equal(logits(loaded.model), own)
    for name in [*kinds, *reversed(kinds)]:
        shelf.wear(name)
        assert shelf.worn == name
        near(logits(loaded.model), made.merged(name))
        assert not torch.allclose(logits(loaded.model), own, atol=1e-3)
    shelf.wear("")
    assert torch.equal(logits(loaded.model), own)


def test_taken_off_the_model_has_its_own_modules_and_tensors_again(start, made):
    loaded = load(start)
    before = {name: id(one) for name, one in [*loaded.model.named_modules(), *loaded.model.named_parameters()]}
    shelf = adapted.Adapters(loaded)
    for name in ("dora", "connector"):
        shelf.add(name, made / name)
        shelf.wear(name)
        shelf.wear("")
        assert {
            name: id(one) for name, one in [*loaded.model.named_modules(), *loaded.model.named_parameters()]
        } == before


def test_pictures_are_shared_where_nothing_that_sees_has_learned(start, made):
    shelf = adapted.Adapters(load(start))
    for name in ("plain", "connector", "vision"):
        shelf.add(name, made / name)
    assert [shelf.sees(name) for name in ("", "plain", "connector", "vision")] == ["", "", "connector", "vision"]


def test_bytes_are_those_of_what_stands_beside(start, made):
    shelf = adapted.Adapters(load(start))
    held = load_file(made / "plain" / "adapter_model.safetensors")
    assert shelf.add("plain", made / "plain").nbytes == sum(one.nbytes for one in held.values()) == shelf.nbytes
    assert shelf.add("connector", made / "connector").nbytes > shelf.nbytes / 2


def test_one_that_is_removed(start, made):
    loaded = load(start)
    own = logits(loaded.model)
    shelf = adapted.Adapters(loaded)
    shelf.add("plain", made / "plain")
    shelf.wear("plain")
    shelf.remove("plain")
    near(logits(loaded.model), made.merged("plain"))
    shelf.wear("")
    assert shelf.names == () and torch.equal(logits(loaded.model), own)
    with pytest.raises(KeyError):
        shelf.wear("plain")
    assert torch.equal(logits(loaded.model), own)
    shelf.add("plain", made / "dora")
    shelf.wear("plain")
    near(logits(loaded.model), made.merged("dora"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(start, made, dtype):
    """The adapter's product is rounded apart, so it is only near; and what comes out has the model's type."""
    loaded = load(start, dtype=dtype)
    shelf = adapted.Adapters(loaded)
    for name in ("plain", "dora"):
        shelf.add(name, made / name)
        shelf.wear(name)
        ours, right = logits(loaded.model), made.merged(name)
        assert ours.dtype == dtype and (ours.float() - right).norm() / right.norm() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_on_a_quantised_model_an_adapter_adds_what_peft_adds(start, made, kind):
    """The logits by the product that QLoRA trains with, and every layer by the one that answers: LLM.int8() rounds
    activations, so that there a last bit of one layer is more in the next."""
    pytest.importorskip("bitsandbytes", reason="extra quant")
    ours = load_quantized(start, kind, dtype=torch.float32)
    shelf, own = adapted.Adapters(ours), logits(ours.model)
    for name in ("rslora", "dora", "connector"):
        shelf.add(name, made / name)
        shelf.wear(name)
        theirs = of_peft(load_quantized(start, kind, dtype=torch.float32), made / name)
        layers = [(path, one) for path, one in ours.model.named_modules() if isinstance(one, adapted.Adapted)]
        assert len(layers) == 6
        for path, layer in layers:
            x = torch.randn(5, layer.linear.in_features)
            near(layer(x), theirs.get_submodule(path)(x))
        near(logits(as_in_training(ours.model, True)), logits(as_in_training(theirs, True)))
        as_in_training(ours.model, False)
    shelf.wear("")
    assert torch.equal(logits(ours.model), own)


def as_in_training(model, on):
    for module in model.modules():
        if isinstance(module, lowbit.Quantized):
            module.train(on)
    return model


def of_peft(loaded, folder):
    """peft's own layers in every place at once, and what else learned copied in."""
    learned = merge.read_adapter(folder)
    for path, parts in learned.adapters.items():
        parent, _, leaf = path.rpartition(".")
        given = {kind: entry.read() for kind, entry in parts.items()}
        layer = merge.around(loaded.model.get_submodule(path), given, learned.config, path).eval()
        setattr(loaded.model.get_submodule(parent), leaf, layer)
    loaded.model.load_state_dict({name: entry.read() for name, entry in learned.whole.items()}, strict=False)
    return loaded.model


def test_what_learned_whole_where_the_model_is_quantised(start, made, tmp_path):
    pytest.importorskip("bitsandbytes", reason="extra quant")
    name = "model.language_model.layers.0.self_attn.k_proj.weight"
    folder = with_learned(made / "plain", tmp_path / "whole", {name: torch.zeros(32, 64)})
    loaded = load_quantized(start, "4bit", dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"1 tensors learned whole, where it is quantised:\n  {name}"):
        adapted.Adapters(loaded).add("one", folder)


def with_learned(adapter, folder, tensors):
    shutil.copytree(adapter, folder)
    save_file(tensors, folder / merge.LEARNED)
    return folder


@pytest.mark.slow
def test_a_run_of_ours_with_its_connector(start, data, tmp_path):
    recipe = made_recipe(
        *(start, data, tmp_path / "run"),
        learn={"connector": 1e-2, "language": 1e-2},
        lora={"r": 4, "alpha": 8},
        train={"steps": 2, "batch": 4},
    )
    stage.run(recipe)
    loaded = load(start)
    shelf = adapted.Adapters(loaded)
    assert adapted.place_of(tmp_path / "run") == tmp_path / "run" / "adapter"
    assert adapted.base_of(tmp_path / "run") == str(start)
    for name, folder in (("run", "run"), ("adapter", "run/adapter"), ("step", "run/checkpoints/step-00000002")):
        shelf.add(name, tmp_path / folder)
        shelf.wear(name)
        near(logits(loaded.model), logits(load(tmp_path / "run" / "model").model))
        assert shelf.sees(name) == name


def test_llavas_pair_on_a_whole_llava(tmp_path):
    base, pair = ORIGINAL / "llava-mlp2x_gelu", copied("llava-lora-mlp2x_gelu", tmp_path)
    loaded = load(base)
    own = logits(loaded.model)
    shelf = adapted.Adapters(loaded)
    shelf.add("pair", pair)
    shelf.wear("pair")
    near(logits(loaded.model), logits(load(pair, base=base).model))
    connector = loaded.model.state_dict()[CONNECTOR]
    assert torch.equal(connector, load(pair, base=BASE).model.state_dict()[CONNECTOR])
    shelf.wear("")
    assert torch.equal(logits(loaded.model), own)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("mm_vision_select_layer", -1, "mm_vision_select_layer is -1 instead of -2"),
        ("image_aspect_ratio", "square", "image_aspect_ratio is 'square' instead of 'pad'"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end is True instead of False"),
        ("mm_projector_type", "linear", "mm_projector_type is 'linear' instead of 'mlp2x_gelu'"),
    ],
)
def test_a_pair_that_sees_otherwise_is_refused(tmp_path, key, value, said):
    loaded = load(ORIGINAL / "llava-mlp2x_gelu")
    with pytest.raises(ValueError, match=f"sees otherwise than .*: {said}"):
        adapted.Adapters(loaded).add("pair", copied("llava-lora-mlp2x_gelu", tmp_path, **{key: value}))


def test_half_a_pair(tmp_path):
    folder = copied("llava-lora-mlp2x_gelu", tmp_path)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"has an adapter but no non_lora_trainables\.bin"):
        adapted.Adapters(load(ORIGINAL / "llava-mlp2x_gelu")).add("pair", folder)


def spoilt(adapter, folder, change):
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)
    return folder


def test_a_wrong_adapter_is_refused_by_name_and_nothing_is_attached(start, made, tmp_path):
    loaded = load(start)
    own, shelf = logits(loaded.model), adapted.Adapters(loaded)
    name = "base_model.model.model.language_model.layers.1.mlp.down_proj.lora_B.weight"
    layer = r"model\.language_model\.layers\.1\.mlp\.down_proj"

    def deeper(held):
        for key in [key for key in held if "layers.1." in key]:
            held[key.replace("layers.1.", "layers.7.")] = held.pop(key)

    wrong = {
        rf"1 tensors have another shape:\n  {layer}\.lora_B is \[128, 3\], \[64, 3\] would fit": lambda held: (
            held.update({name: torch.zeros(128, 3)})
        ),
        r"3 tensors are not in it:\n  .*layers\.7\.mlp\.down_proj\.weight": deeper,
        rf"{layer} has lora_A; lora_A and lora_B belong together": lambda held: held.pop(name),
        rf"1 tensors are not finite:\n  {layer}\.lora_B": lambda held: held[name].fill_(float("nan")),
    }
    for i, (said, change) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=said):
            shelf.add("wrong", spoilt(made / "plain", tmp_path / str(i), change))
    with pytest.raises(ValueError, match="no adapter"):
        shelf.add("wrong", start)
    assert shelf.names == () and torch.equal(logits(loaded.model), own)


def test_other_kinds_and_rows_that_grew(start, made, tmp_path):
    shelf = adapted.Adapters(load(start))
    for key, value, said in (
        ("peft_type", "IA3", "only LoRA"),
        ("init_lora_weights", "pissa", "changes the base too"),
        ("use_dora", True, "use_dora is True, but its tensors say otherwise"),
        ("trainable_token_indices", [3], "trainable_token_indices makes another computation"),
    ):
        shutil.copytree(made / "plain", tmp_path / key)
        file = tmp_path / key / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        with pytest.raises(ValueError, match=said):
            shelf.add("one", tmp_path / key)
    grown = {"model.language_model.embed_tokens.weight": torch.zeros(1100, 64)}
    with pytest.raises(ValueError, match=r"other rows than its vocabulary \(merge it into a folder of its own\)"):
        shelf.add("one", with_learned(made / "plain", tmp_path / "grown", grown))


@pytest.mark.slow
def test_biases_and_a_tied_embedding(tmp_path):
    """Of a layer that is adapted too; and the head follows the embedding."""
    start = stage0(tmp_path, "qwen2", "qwen_2")
    trained(tmp_path / "bias", start, bias="lora_only")
    loaded = load(start)
    shelf, own = adapted.Adapters(loaded), logits(loaded.model, False)
    shelf.add("bias", tmp_path / "bias")
    shelf.wear("bias")
    near(logits(loaded.model, False), logits(load(merge_run(tmp_path / "bias", base=start)).model, False))
    shelf.wear("")
    assert torch.equal(logits(loaded.model, False), own)


@pytest.mark.slow
@each_family
def test_every_family(name, tmp_path_factory):
    """Adapters in vision, connector and language at once, and a connector that learned besides."""
    folder = tmp_path_factory.mktemp(name)
    start = folders_in(folder)(name)
    loaded = load(start)
    linears = [path for path, one in loaded.model.named_modules() if isinstance(one, torch.nn.Linear)]
    trained(folder / "adapter", start, target_modules=[path for path in linears if path != "lm_head"])
    merged = load(merge_run(folder / "adapter", folder / "merged", base=start)).model
    shelf = adapted.Adapters(loaded)
    shelf.add("one", folder / "adapter")
    shelf.wear("one")
    hidden = loaded.family.hidden
    ids = torch.randint(5, 50, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, right = (hidden(one, ids, torch.arange(24), [24], None, None) for one in (loaded.model, merged))
    near(ours, right)
    assert shelf.sees("one") == "one"
