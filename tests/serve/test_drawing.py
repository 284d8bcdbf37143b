"""How tokens are drawn: as `generate` draws them for one request alone, whatever stands in the rows beside."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig

from tests.made import stage0
from vistune.decoding import Prompt, Settings, decode
from vistune.models.load import load
from vistune.serve.answering.drawing import Draw, Drawing, draw
from vistune.serve.answering.reader import Reader


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(stage0(tmp_path_factory.mktemp("drawing")))


EVERY = [
    Settings(max_new_tokens=12),
    Settings(max_new_tokens=12, temperature=1.0, seed=3),
    Settings(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=3),
    Settings(max_new_tokens=12, temperature=0.7, top_p=0.9, seed=4),
    Settings(max_new_tokens=12, temperature=1.6, top_p=0.5, seed=-5),
    Settings(max_new_tokens=12, temperature=1.0, top_p=0.3, seed=2**63),
]


def drawn_together(loaded, prompts, every):
    """Ids and margins of these prompts, drawn in one batch through a reader."""
    reader, drawing = Reader(loaded), Drawing(loaded)
    kv = reader.kv()
    kv.reserve(len(prompts), 100)
    rows, lengths = [], [len(ids) for ids in prompts]
    for row, ids in enumerate(prompts):
        rows.append(reader.read(kv, [row], reader.embed(ids).unsqueeze(0), [0], [len(ids)]))
    draws = [drawing.begin(settings, ids) for settings, ids in zip(every, prompts, strict=True)]
    logits, found, margins = torch.cat(rows), [[] for _ in prompts], [math.inf] * len(prompts)
    for step in range(12):
        drawn = draw(logits, draws)
        for row, one in enumerate(drawn):
            found[row].append(one.token)
            margins[row] = min(margins[row], one.margin)
        logits = reader.step(kv, [one.token for one in drawn], [length + step for length in lengths])
    return found, margins


def test_rows_draw_what_one_request_alone_draws(loaded):
    prompts = [[1, 40 + i, *range(60, 70 + 3 * i)] for i in range(len(EVERY))]
    found, margins = drawn_together(loaded, prompts, EVERY)
    state = torch.random.get_rng_state()
    for ids, settings, said, margin in zip(prompts, EVERY, found, margins, strict=True):
        alone = decode(loaded, [Prompt(ids)], settings, endless=True)[0]
        assert said == alone.ids
        assert (math.isinf(margin) and settings.temperature) or margin == pytest.approx(alone.margin, abs=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found[2] != found[3]  # seeds matter


def test_a_folders_own_rules_hold_as_in_generate(loaded, monkeypatch):
    """Qwen's folders ask for a penalty for repetition."""
    ruled = GenerationConfig(eos_token_id=2, repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=4)
    monkeypatch.setattr(loaded.model, "generation_config", ruled)
    assert Drawing(loaded).ruled
    prompts = [[1, 40 + i, *range(60, 70)] for i in range(3)]
    every = [EVERY[0], EVERY[2], EVERY[0]]
    found, _ = drawn_together(loaded, prompts, every)
    for ids, settings, said in zip(prompts, every, found, strict=True):
        alone = decode(loaded, [Prompt(ids)], settings)[0].ids
        assert said[: len(alone)] == alone and len(alone) >= 4
    monkeypatch.setattr(loaded.model, "generation_config", GenerationConfig(eos_token_id=2))
    assert drawn_together(loaded, prompts, every)[0] != found


def test_settings_that_are_overridden_are_no_rules(loaded):
    assert not Drawing(loaded).ruled


def test_the_margin_is_the_gap_between_the_two_best():
    logits = torch.tensor([[0.0, 3.0, 2.5, -1.0], [1.0, 1.0, 0.0, 0.0]])
    first, second = draw(logits, [Draw(Settings(), None)] * 2)
    assert (first.token, first.margin) == (1, 0.5) and second.margin == 0


def test_numbers_that_are_none_are_told_and_harm_nobody():
    warm = Settings(temperature=1.0, seed=1)
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    each = lambda: [Draw(warm, torch.Generator().manual_seed(1)) for _ in range(4)]  # noqa: E731
    whole = draw(logits.clone(), each())
    logits[1, 3], logits[2] = math.nan, math.inf
    drawn = draw(logits, each())
    assert [math.isnan(one.margin) for one in drawn] == [False, True, True, False]
    assert (drawn[0], drawn[3]) == (whole[0], whole[3])


def test_a_temperature_of_next_to_nothing_is_none(loaded):
    draws = [Drawing(loaded).begin(Settings(temperature=1e-30), [1])]
    assert draw(torch.tensor([[1.0, 9.0, 3.0]]), draws)[0].token == 1
