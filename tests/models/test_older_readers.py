"""What written folders say to readers older than our `transformers`, while ours reads in them what it read before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers

from tests.each_family import each_family, folders_in
from tests.original_llava import ORIGINAL, copied
from tests.tiny import TOKENIZERS, tiny_language, tiny_vision
from vistune.models import older
from vistune.models.assemble import assemble
from vistune.models.convert import convert
from vistune.models.load import describe, load, save

STRINGS = json.loads((TOKENIZERS / "strings.json").read_text(encoding="utf-8"))
OF_THE_MACHINE = ("backend", "is_local", "local_files_only", "name_or_path", "_name_or_path")
DYNAMIC = {"rope_theta": 3e5, "rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS = {
    # language model: its rope_parameters, chat template, class of the tokenizer's file, class after it was opened there
    "llama": (LLAMA3, "v1", "LlamaTokenizer", "LlamaTokenizer"),
    "mistral": ({"rope_theta": 1e6, "rope_type": "default"}, "mistral_instruct", "LlamaTokenizer", "LlamaTokenizer"),
    "qwen2": (YARN, "qwen_2", "Qwen2Tokenizer", "PreTrainedTokenizerFast"),
    "qwen3": ({"rope_theta": 1e6, "rope_type": "default"}, "qwen_2", "Qwen2Tokenizer", "PreTrainedTokenizerFast"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def said(folder: Path, name: str = "tokenizer_config.json") -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def changed(folder: Path, name: str, **keys) -> None:
    now = {key: value for key, value in (said(folder, name) | keys).items() if value != "gone"}
    (folder / name).write_text(json.dumps(now))


def ids(folder: Path) -> list[list[int]]:
    """As the stock tokenizer makes them; of an original checkpoint as that which we open there."""
    original = (folder / "config.json").exists() and "mm_vision_tower" in said(folder, "config.json")
    tokenizer = describe(folder).tokenizer if original else transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in STRINGS["strings"]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_vision(tmp_path_factory.mktemp("older") / "clip")


@pytest.fixture(scope="module")
def folder_of(clip):
    """What gives a folder assembled around a language model of each kind."""

    def made(kind: str) -> Path:
        out = clip.parent / "made" / kind
        if not out.exists():
            rope, template, *_ = KINDS[kind]
            language = tiny_language(clip.parent / kind, kind, rope_parameters=rope)
            assemble(clip, language, out, template=template)
        return out

    return made


@each_kind
def test_angles_and_types_stand_in_both_words(folder_of, kind):
    rope = KINDS[kind][0]
    config = said(folder_of(kind), "config.json")
    text = config["text_config"]
    assert text["rope_parameters"] == rope and text["rope_theta"] == rope["rope_theta"]
    scaled = rope["rope_type"] != "default"
    assert text.get("rope_scaling") == ({k: v for k, v in rope.items() if k != "rope_theta"} if scaled else None)
    for section in (config, text, config["vision_config"]):
        assert section["torch_dtype"] == section["dtype"] == "float32"
    # Ours reads the same with the older words and without.
    opened = transformers.AutoConfig.from_pretrained(folder_of(kind))
    for section in (config, text, config["vision_config"]):
        for key in ("rope_theta", "rope_scaling", "torch_dtype"):
            section.pop(key, None)
    assert opened.to_diff_dict() == transformers.LlavaConfig.from_dict(config).to_diff_dict()


def test_angles_of_every_kind():
    assert older.angles({}) == older.angles({"rope_parameters": None}) == {}
    assert older.angles({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}) == {}
    assert older.angles({"rope_parameters": DYNAMIC}, kind="type") == {
        "rope_theta": 3e5,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},  # 4.37 takes these two keys and no other
    }
    partly = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.4}
    assert older.angles({"rope_parameters": partly}) == {"rope_theta": 1e4, "partial_rotary_factor": 0.4}
    long = {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    phi3 = {"original_max_position_embeddings": 64, "rope_parameters": long | {"original_max_position_embeddings": 64}}
    assert older.angles(phi3)["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


@each_kind
def test_a_tokenizer_in_words_that_every_release_knows(folder_of, tmp_path, kind):
    first = folder_of(kind)
    save(load(first), tmp_path / "again", card="")
    language = first.parent.parent / kind
    for folder, name in zip((first, tmp_path / "again"), KINDS[kind][2:], strict=True):
        now = said(folder)
        assert now["tokenizer_class"] == name
        assert not now.keys() & {*OF_THE_MACHINE, "extra_special_tokens"}
        listed = {token["id"]: token["content"] for token in said(folder, "tokenizer.json")["added_tokens"]}
        assert {int(id): token["content"] for id, token in now["added_tokens_decoder"].items()} == listed
        assert "<image>" in listed.values() and {*now["added_tokens_decoder"]["0" if 0 in listed else "1000"]} == {
            *("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        }
        for file in ("tokenizer.model", "vocab.json", "merges.txt"):
            assert (folder / file).exists() == (language / file).exists()
            assert not (folder / file).exists() or (folder / file).read_bytes() == (language / file).read_bytes()
        if name == "LlamaTokenizer":
            assert (now["legacy"], now["add_bos_token"], now["add_eos_token"]) == (False, True, False)
            assert now.get("add_prefix_space", True)  # null is "no" to a tokenizer in Python alone
        else:
            assert now["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    marked = [number for number, text in enumerate(STRINGS["strings"]) if "<image>" in text]
    for number, (before, now, again) in enumerate(zip(ids(language), ids(first), ids(tmp_path / "again"), strict=True)):
        assert now == again and (now == before or number in marked)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_llamas_tokenizer_says_what_it_does(clip, tmp_path, legacy, silent):
    """`legacy` and the tokens at the ends, also of a folder of ours that did not say them yet."""
    language = tiny_language(tmp_path / "llama")
    changed(language, "tokenizer_config.json", legacy=legacy)
    assemble(clip, language, tmp_path / "out")
    if silent:
        gone = dict.fromkeys(("legacy", "add_bos_token", "add_eos_token"), "gone")
        changed(tmp_path / "out", "tokenizer_config.json", **gone, tokenizer_class="TokenizersBackend")
    save(load(tmp_path / "out"), tmp_path / "again", card="")
    assert said(tmp_path / "again")["legacy"] is legacy
    assert said(tmp_path / "again")["tokenizer_class"] == "LlamaTokenizer"
    convert(tmp_path / "again", tmp_path / "original", "llava")
    now = said(tmp_path / "original")
    assert (now["tokenizer_class"], now["legacy"], now["add_bos_token"]) == ("LlamaTokenizer", legacy, True)
    # The slow tokenizer of the original's code goes by it, and so does ours, which opens what was written for it.
    chunk, wanted = describe(tmp_path / "original").encoder.chunk, STRINGS[f"llama_like_ids_legacy_{legacy}".lower()]
    marked = [number for number, text in enumerate(STRINGS["strings"]) if "<image>" in text]
    for number, (text, reference) in enumerate(zip(STRINGS["strings"], wanted, strict=True)):
        assert number in marked or chunk(text)[0].tolist() == reference, text


def test_what_the_folder_of_the_tokenizer_says_is_carried(clip, tmp_path):
    language = tiny_language(tmp_path / "qwen2", "qwen2")
    changed(language, "tokenizer_config.json", add_bos_token=False)
    assemble(clip, language, tmp_path / "out", template="qwen_2")
    save(load(tmp_path / "out"), tmp_path / "again", card="")
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert said(folder)["add_bos_token"] is False and "legacy" not in said(folder)


def test_a_llama_that_begins_with_nothing(clip, tmp_path):
    """tokenizer.json decides in ours; 4.x would put a BOS before every text where nothing is said."""
    language = tiny_language(tmp_path / "llama")
    changed(language, "tokenizer.json", post_processor=None)
    changed(language, "tokenizer_config.json", add_bos_token=False)
    assemble(clip, language, tmp_path / "out", template="plain")
    save(load(tmp_path / "out"), tmp_path / "again", card="")
    assert said(tmp_path / "again")["add_bos_token"] is False and ids(tmp_path / "again")[1][0] != 1


def test_a_class_without_its_own_files_is_named_fast(clip, tmp_path):
    """Else a reader that asks for the tokenizer in Python alone finds no file to make it of."""
    language = tiny_language(tmp_path / "llama")
    (language / "tokenizer.model").unlink()
    assemble(clip, language, tmp_path / "out")
    assert said(tmp_path / "out")["tokenizer_class"] == "LlamaTokenizerFast"
    mpt = tiny_language(tmp_path / "mpt", "mpt", vocab="mpt_like", tied=True)
    assemble(clip, mpt, tmp_path / "variant", template="mpt")
    assert said(tmp_path / "variant")["tokenizer_class"] == "PreTrainedTokenizerFast"
    for folder, before in ((tmp_path / "out", language), (tmp_path / "variant", mpt)):
        assert ids(folder)[:54] == ids(before)[:54]


def test_an_old_style_normalizer_is_no_llamas_tokenizer(folder_of, tmp_path):
    """Made anew as a Llama's it would lose the space before each piece, which its tokenizer.json puts there."""
    folder = shutil.copytree(folder_of("llama"), tmp_path / "folder")
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    changed(folder, "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps}, pre_tokenizer=None)
    save(load(folder), tmp_path / "again", card="")
    assert said(tmp_path / "again")["tokenizer_class"] == "PreTrainedTokenizerFast"
    convert(tmp_path / "again", tmp_path / "original", "llava")
    assert ids(folder) == ids(tmp_path / "again") == ids(tmp_path / "original")


@each_family
def test_every_familys_folder(name, tmp_path, caplog):
    """Opened, written and opened again: nothing of the machine, no word of ours alone, no warning, the same answers."""
    start = folders_in(tmp_path)(name)
    transformers.utils.logging.enable_propagation()
    try:
        convert(start, tmp_path / "out", "hf")
        caplog.clear()
        opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
        transformers.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert not [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    finally:
        transformers.utils.logging.disable_propagation()
    before = describe(tmp_path / "out")
    assert processor.image_processor.to_dict().get("size") == said(tmp_path / "out", "preprocessor_config.json")["size"]
    if (tmp_path / "out" / "processor_config.json").exists():  # which 4.49 would take for the processor's argument
        assert "image_processor" not in said(tmp_path / "out", "processor_config.json")
    for file in tmp_path.glob("out/*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8")
    config = said(tmp_path / "out", "config.json")
    for section in (config, *(one for one in config.values() if isinstance(one, dict))):
        assert section.get("torch_dtype") == section.get("dtype")
        if "rope_theta" in (section.get("rope_parameters") or {}):
            assert section["rope_theta"] == section["rope_parameters"]["rope_theta"]
    now = said(tmp_path / "out")
    assert not now.keys() & {*OF_THE_MACHINE, "extra_special_tokens"}
    assert now["tokenizer_class"] != "TokenizersBackend"
    assert before.tokenizer.get_vocab() == opened.get_vocab()
    assert {int(id): one["content"] for id, one in now["added_tokens_decoder"].items()} == {
        id: token.content for id, token in opened.added_tokens_decoder.items()
    }


@pytest.mark.parametrize("name", ["llava-mlp2x_gelu", "llava-anyres-spatial_unpad"])
def test_small_files_that_came_with_a_checkpoint_stay_as_they_were(name, tmp_path):
    convert(ORIGINAL / name, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "llava")
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (ORIGINAL / name / file).read_bytes()
    assert not (tmp_path / "back" / "tokenizer.json").exists()


def test_merges_as_text_are_the_same_merges(folder_of, tmp_path):
    """`tokenizers` below 0.20 reads no pairs, which LLaVA's own code runs on."""
    convert(folder_of("qwen2"), tmp_path / "original", "llava")
    merges = said(tmp_path / "original", "tokenizer.json")["model"]["merges"]
    assert all(isinstance(one, str) for one in merges)
    assert ids(tmp_path / "original") == ids(folder_of("qwen2"))
    file = tmp_path / "original" / "tokenizer.json"
    model = {"model": {"type": "BPE", "vocab": {}, "merges": [["a b", "c"], ["d", "e"]]}}
    file.write_text(json.dumps(model))
    older.say_in_merges(tmp_path / "original")
    assert json.loads(file.read_text()) == model  # a space of its own would be taken for the one between
    assert said(tmp_path / "original", "config.json")["rope_scaling"]["type"] == "yarn"


def test_a_mistrals_tokenizer_of_sentencepiece_alone(tmp_path):
    """As LLaVA-1.6 Mistral is published, without tokenizer.json: a space before the text, as the slow one puts it."""
    folder = copied("llava-mlp2x_gelu", tmp_path, model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"])
    wanted = describe(copied("llava-mlp2x_gelu", tmp_path / "llama")).encoder
    chunk = describe(folder).encoder.chunk
    assert [chunk(text)[0].tolist() for text in STRINGS["strings"]] == [
        wanted.chunk(text)[0].tolist() for text in STRINGS["strings"]
    ]
