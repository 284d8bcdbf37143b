"""Token ids of single strings against the slow tokenizers of the reference, and where each token stands in the text."""

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vistune.samples import IMAGE_ID, IMAGE_MARK
from vistune.text_encoder import TextEncoder, open_encoder, prefixes

FOLDER = Path(__file__).parent / "golden" / "llava" / "tokenizers"
STRINGS = json.loads((FOLDER / "strings.json").read_text(encoding="utf-8"))
KINDS = {
    "llama_like_ids_legacy_false": ("llama_like", False),
    "llama_like_ids_legacy_true": ("llama_like", True),
    "qwen2_like_ids": ("qwen2_like", False),
}


@cache
def load(name: str, legacy: bool = False) -> TextEncoder:
    kwargs = {"legacy": True} if legacy else {}
    return TextEncoder(AutoTokenizer.from_pretrained(FOLDER / name, **kwargs))


@pytest.mark.parametrize("kind", KINDS)
def test_every_string_has_the_references_ids(kind: str) -> None:
    encoder = load(*KINDS[kind])
    wrong = {
        text: (ids.tolist(), wanted)
        for text, wanted in zip(STRINGS["strings"], STRINGS[kind], strict=True)
        if (ids := encoder.chunk(text)[0]).tolist() != wanted
    }
    assert not wrong
    assert len(STRINGS["strings"]) == 200


def test_truncation_and_padding_of_the_tokenizer_are_not_taken_over() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "llama_like")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    text = "The museum hall is wide and bright"
    assert TextEncoder(tokenizer).chunk(text)[0].tolist() == load("llama_like").chunk(text)[0].tolist()


def test_what_a_tokenizer_prefixes() -> None:
    assert prefixes(load("llama_like").tokenizer) == "first"
    assert prefixes(load("llama_like", True).tokenizer) == "each"
    assert prefixes(load("qwen2_like").tokenizer) == "none"


texts = st.text(st.sampled_from("ab Z19.,\n\t é́ü图中😀▁<>/s|"), max_size=24)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts, st.sampled_from([("llama_like", False), ("llama_like", True), ("qwen2_like", False)]))
def test_tokens_cover_the_text_in_order(text: str, which: tuple[str, bool]) -> None:
    text = unicodedata.normalize("NFC", text)  # what composes stands where its first character stood
    ids, starts, ends = load(*which).chunk(text)
    real = ends > starts
    assert (np.diff(starts[real]) >= 0).all() and (np.diff(ends[real]) >= 0).all()
    covered = np.zeros(len(text), dtype=bool)
    for start, end in zip(starts[real], ends[real], strict=True):
        covered[start:end] = True
    assert covered.all()
    assert len(ids) == len(starts) == len(ends)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(texts, min_size=1, max_size=4),
    st.sampled_from([("llama_like", False), ("llama_like", True), ("mpt_like_eos", False)]),
)
def test_chunks_stand_alone_around_images(chunks: list[str], which: tuple[str, bool]) -> None:
    encoder = load(*which)
    ids, starts, _ = encoder.encode(IMAGE_MARK.join(chunks), has_images=True)
    bos = [encoder.tokenizer.bos_token_id] if which[0] == "llama_like" else []
    wanted = encoder.chunk(chunks[0])[0].tolist()
    for chunk in chunks[1:]:
        wanted += [IMAGE_ID, *encoder.chunk(chunk)[0].tolist()[len(bos) :]]
    assert ids.tolist() == wanted
    assert starts[ids == IMAGE_ID].tolist() == [
        len(IMAGE_MARK.join(chunks[:number])) for number in range(1, len(chunks))
    ]


def test_a_folder_with_only_a_sentencepiece_model_gives_the_same_ids():
    """Vicuna's folder is such a one."""
    folder = Path(__file__).parent / "golden" / "llava"
    bare = open_encoder(folder / "tiny-llava-original" / "base-llm")
    whole = open_encoder(folder / "tokenizers" / "llama_like")
    text = "USER: What is it?\nASSISTANT: 你好 café  </s>USER: again"
    assert [list(part) for part in bare.chunk(text)] == [list(part) for part in whole.chunk(text)]
