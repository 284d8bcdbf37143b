"""What a model computes for several requests at once, in every family: as its own class computes it for one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers

from tests.each_family import each_family, folders_in
from tests.made import noise_in
from tests.tiny import tiny_language, tiny_vision
from vistune.decoding import Prompt, Settings, decode, shown, together
from vistune.models.assemble import assemble
from vistune.models.load import load
from vistune.models.quantize import load_quantized
from vistune.serve.answering.reader import Reader, context, kv_token_bytes

SIZES = ((60, 40), (40, 80), (90, 50), (60, 40))
PICTURES = ((0,), (), (1, 2), (3,))
"""Pictures of each prompt, by their number."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_in(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return noise_in(tmp_path_factory.mktemp("pictures"), SIZES)


def asks(loaded, pictures, each=PICTURES):
    """What is shown, and a prompt for each tuple of pictures."""
    seen = [shown(loaded, one) for one in pictures]
    found = []
    for number, taken in enumerate(each):
        ids = [3 + number, 4]
        for one in taken:
            ids += [loaded.image_token_id] * seen[one].tokens + [7, 9]
        ids += list(range(20, 23 + number))
        grids = [seen[one].grid for one in taken if seen[one].grid]
        found.append(Prompt(ids, [seen[one].pixels for one in taken], grids))
    return seen, found


def embedded(reader, seen, prompts, each=PICTURES):
    """All pictures in one call, where they do not depend on each other."""
    if reader.alone:
        features = reader.see(seen)
        return [reader.embed(p.ids, [features[one] for one in taken]) for p, taken in zip(prompts, each, strict=True)]
    return [
        reader.embed(p.ids, reader.see([seen[one] for one in taken])) for p, taken in zip(prompts, each, strict=True)
    ]


@torch.no_grad()
def stock(loaded, prompts):
    """Logits at the last position of each prompt, one at a time, by the class's own forward."""
    return torch.stack([loaded.model(**together(loaded, [one])).logits[0, -1] for one in prompts])


def whole(reader, embeds):
    """All prompts in one call, padded: logits, and what was remembered."""
    kv, lengths = reader.kv(), [len(one) for one in embeds]
    kv.reserve(len(embeds), max(lengths) + 20)
    together = torch.nn.utils.rnn.pad_sequence(embeds, batch_first=True)
    return reader.read(kv, range(len(embeds)), together, [0] * len(embeds), lengths), kv


def greedy(reader, embeds, steps):
    """Ids that all rows say, together."""
    logits, kv = whole(reader, embeds)
    said = [logits.argmax(-1).tolist()]
    for _ in range(steps - 1):
        said.append(reader.step(kv, said[-1], kv.lengths).argmax(-1).tolist())
    return [list(row) for row in zip(*said, strict=True)]


@each_family
def test_prompts_with_pictures_of_several_sizes_are_read_as_the_class_reads_them(folders, pictures, name):
    plain, loaded = load(folders(name)), load(folders(name))
    reader = Reader(loaded)
    seen, prompts = asks(plain, pictures)
    wanted, embeds = stock(plain, prompts), embedded(reader, seen, prompts)
    logits, kv = whole(reader, embeds)
    assert logits.dtype == torch.float32 and (logits - wanted).abs().max() <= 1e-5
    assert kv.nbytes == reader.kv_token_bytes * kv.rows * kv.room
    for piece in (1, 5, 16):
        kv.free(0)
        embed = embeds[2][None]
        for start in range(0, embed.shape[1], piece):
            part = embed[:, start : start + piece]
            logits = reader.read(kv, [0], part, [start], [part.shape[1]])
        assert (logits[0] - wanted[2]).abs().max() <= 1e-5


@each_family
def test_greedy_ids_of_rows_that_go_on_together_are_those_of_generate(folders, pictures, name):
    plain, reader = load(folders(name)), Reader(load(folders(name)))
    seen, prompts = asks(plain, pictures)
    found = greedy(reader, embedded(reader, seen, prompts), 12)
    for prompt, ids in zip(prompts, found, strict=True):
        one = decode(plain, [prompt], Settings(max_new_tokens=12), endless=True)[0]
        assert ids == one.ids and one.margin > 1e-4


@each_family
def test_a_pictures_features_are_those_of_training(folders, pictures, name):
    """Of several in one call, and of each alone: what is remembered of one is good for every request about it."""
    loaded = load(folders(name))
    reader = Reader(loaded)
    seen, prompts = asks(loaded, pictures)
    features = reader.see(seen)
    assert [len(one) for one in features] == [one.tokens for one in seen]
    assert len({one.untyped_storage().data_ptr() for one in features}) == len(features)
    for one, known in zip(seen, features, strict=True):
        assert (reader.see([one])[0] - known).abs().max() <= 1e-5
    logits, _ = whole(reader, [reader.embed(prompts[2].ids, features[1:3])])
    ids = torch.tensor(prompts[2].ids)
    given = together(loaded, [prompts[2]])
    pixels = given.pop("pixel_values")
    grids = torch.tensor(prompts[2].grids) if prompts[2].grids else None
    if name == "llava_next":  # the class's own forward takes tiles of each picture up to the most of one
        pixels = torch.cat([one[: grid[0]] for one, grid in zip(pixels, prompts[2].grids, strict=True)])
    with torch.no_grad():
        hidden = loaded.family.hidden(loaded.model, ids, torch.arange(len(ids)), [len(ids)], pixels, grids)
        wanted = loaded.family.head(loaded.model)(hidden[-1])
    assert (logits[0] - wanted).abs().max() <= 1e-5


def test_legacy_pictures_of_one_request_are_seen_together(folders, pictures):
    """Which of its row they are changes what the published code makes of them."""
    options = {"legacy_images": True}
    plain, loaded = (load(folders("onevision15"), options=options) for _ in range(2))
    reader = Reader(loaded)
    assert not reader.alone and Reader(load(folders("onevision15"))).alone
    seen, prompts = asks(plain, pictures)
    logits, _ = whole(reader, embedded(reader, seen, prompts))
    assert (logits - stock(plain, prompts)).abs().max() <= 1e-5
    apart = reader.embed(prompts[2].ids, [reader.see([seen[one]])[0] for one in (1, 2)])
    assert (apart - embedded(reader, seen, prompts)[2]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("language", ["mistral", "mpt", "phi3"])
def test_other_language_models_answer_as_their_class_does(tmp_path, pictures, language):
    more = {"mistral": {"sliding_window": 11}, "phi3": {"pad_token_id": 0}}.get(language, {})
    made = tiny_language(tmp_path / "language", language, **more)
    assemble(tiny_vision(tmp_path / "clip"), made, tmp_path / "model", template="v1")
    plain, reader = load(tmp_path / "model"), Reader(load(tmp_path / "model"))
    seen, prompts = asks(plain, pictures)
    embeds = embedded(reader, seen, prompts)
    assert (whole(reader, embeds)[0] - stock(plain, prompts)).abs().max() <= 1e-5
    ids = greedy(reader, embeds, 8)
    assert ids == [one.ids for one in decode(plain, prompts, Settings(max_new_tokens=8), endless=True)]


@pytest.mark.parametrize("kind", [pytest.param("8bit", marks=pytest.mark.slow), "4bit"])
def test_quantised_models_answer_as_generate_does(folders, pictures, kind):
    """In 8 bits only one by one: what is multiplied unquantised is chosen for all rows of a product at once."""
    pytest.importorskip("bitsandbytes", reason="extra quant")
    plain, loaded = (load_quantized(folders("llava"), kind, dtype=torch.float32) for _ in range(2))
    reader = Reader(loaded)
    seen, prompts = asks(plain, pictures)
    embeds = embedded(reader, seen, prompts)
    found = greedy(reader, embeds, 4) if kind == "4bit" else [greedy(reader, [one], 4)[0] for one in embeds]
    assert found == [decode(plain, [one], Settings(max_new_tokens=4), endless=True)[0].ids for one in prompts]


@pytest.mark.slow
@each_family
def test_in_bf16_it_stays_near_the_class(folders, pictures, name):
    plain, loaded = (load(folders(name), dtype=torch.bfloat16) for _ in range(2))
    reader = Reader(loaded)
    seen, prompts = asks(plain, pictures)
    embeds, exact = embedded(reader, seen, prompts), stock(load(folders(name)), prompts)
    logits, kv = whole(reader, embeds)
    assert logits.dtype == torch.float32 and kv.nbytes == reader.kv_token_bytes * kv.rows * kv.room
    assert (logits - exact).abs().mean() <= 1.5 * (stock(plain, prompts).float() - exact).abs().mean()
    assert reader.step(kv, [5, 6, 7, 8], kv.lengths).isfinite().all()


def test_placeholders_and_pictures_that_do_not_match_are_refused(folders, pictures):
    loaded = load(folders("llava"))
    reader = Reader(loaded)
    seen, prompts = asks(loaded, pictures)
    features = reader.see(seen)
    assert reader.see([]) == []
    for ids, given in [(prompts[0].ids, []), (prompts[1].ids, features[:1]), (prompts[2].ids, features[:1])]:
        with pytest.raises(ValueError, match="image placeholders in the prompt"):
            reader.embed(ids, given)


def test_the_context_is_what_the_model_was_made_for():
    mpt = transformers.MptConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=256)
    assert context(mpt) == 256 and kv_token_bytes(mpt, torch.bfloat16) == 2 * 2 * 64 * 2
    llama = transformers.LlamaConfig(max_position_embeddings=4096, num_hidden_layers=3, hidden_size=64)
    assert context(llama) == 4096
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, **factors}
    # Angles of all rows change once one of them is longer than this, so none may be.
    assert context(SimpleNamespace(model_type="phi3", max_position_embeddings=512, rope_parameters=rope)) == 64
    layers = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    assert context(SimpleNamespace(model_type="phi3", max_position_embeddings=512, rope_parameters=layers)) == 64
