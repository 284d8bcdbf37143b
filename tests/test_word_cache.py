"""Words one by one give what the whole text gives: ids, and the place of every token. The backend is the oracle."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from vistune import word_cache
from vistune.text_encoder import TextEncoder
from vistune.word_cache import fits

TOKENIZERS = Path(__file__).parent / "golden" / "llava" / "tokenizers"
PIECES = [
    "a",
    "The",
    " ",
    "  ",
    "▁",
    "\n",
    "\t",
    "</s>",
    "<s>",
    "<unk>",
    "<image>",
    "é",
    "日本",
    "😀",
    "\x00",
    ".",
    "0.25",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)


@cache
def encoders(legacy: bool) -> tuple[TextEncoder, TextEncoder]:
    """The encoder as it is, and one without the cache."""
    both = []
    for cached in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "llama_like")
        tokenizer.legacy = legacy
        encoder = TextEncoder(tokenizer)
        assert encoder.legacy == legacy and encoder._by_word is not None
        if not cached:
            encoder.__dict__["_by_word"] = None
        both.append(encoder)
    return both[0], both[1]


def same(text: str, legacy: bool) -> None:
    for found, wanted in zip(*(encoder.chunk(text) for encoder in encoders(legacy)), strict=True):
        assert found.dtype == wanted.dtype == np.int64
        assert found.tolist() == wanted.tolist()


@settings(max_examples=400, deadline=None, derandomize=True)
@given(texts, st.booleans())
def test_words_in_a_row_are_the_text(text, legacy):
    same(text, legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_reference_s_strings(legacy):
    strings = json.loads((TOKENIZERS / "strings.json").read_text())
    found = {text for text in _strings(strings) if not any("\ud800" <= char <= "\udfff" for char in text)}
    assert len(found) > 20
    for text in sorted(found):
        same(text, legacy)


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def test_a_full_cache_starts_anew_and_a_text_too_long_for_it_goes_to_the_backend(monkeypatch):
    monkeypatch.setattr(word_cache, "_HELD", 60)
    monkeypatch.setattr(word_cache, "_TEXT", 2000)
    encoder, plain = (TextEncoder(AutoTokenizer.from_pretrained(TOKENIZERS / "llama_like")) for _ in range(2))
    plain.__dict__["_by_word"] = None
    for number in range(40):
        text = f"row {number} says word{number} and thing{number * 7}" * (1 + number)
        assert encoder.chunk(text)[0].tolist() == plain.chunk(text)[0].tolist()
    assert not encoder._by_word.takes(text) and encoder._by_word.takes("short")


def takes(one: dict) -> bool:
    return fits(Tokenizer.from_str(json.dumps(one)), one)


def spec(**changes) -> dict:
    made = json.loads(encoders(False)[0]._by_chunk.to_str())
    return made | {"model": made["model"] | changes.pop("model", {})} | changes


def test_only_what_is_proven_is_cached():
    assert takes(spec())
    merges = spec()["model"]["merges"]
    pieces = spec()["model"]["vocab"] | {"a▁": 9000}
    assert not takes(spec(model={"vocab": pieces, "merges": [*merges, ["a", "▁"]]}))
    assert not takes(spec(model={"dropout": 0.1}))
    assert not takes(spec(model={"ignore_merges": True}))
    assert not takes(spec(model={"byte_fallback": False}))
    assert not takes(spec(normalizer={"type": "NFKC"}))
    stripping = [token | {"lstrip": True} for token in spec()["added_tokens"]]
    assert not takes(spec(added_tokens=stripping))
    for other in ("mpt_like", "mpt_like_eos", "qwen2_like"):
        encoder = TextEncoder(AutoTokenizer.from_pretrained(TOKENIZERS / other))
        assert encoder._by_word is None and len(encoder.chunk("The text is still cut.")[0])
