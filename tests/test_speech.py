"""New tokens to text: pieces join to what the whole decodes to, whatever the ids; nothing is said that is not certain;
a token's cost does not grow with the answer."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vistune.speech import Speech, Tongue, spoken

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = {
    "llama": GOLDEN / "llava" / "tokenizers" / "llama_like",
    "sentencepiece": GOLDEN / "llava" / "tiny-llava-original" / "llava-linear",
    "qwen2": GOLDEN / "llava" / "tokenizers" / "qwen2_like",
    "mpt": GOLDEN / "llava" / "tokenizers" / "mpt_like",
    "mpt_eos": GOLDEN / "llava" / "tokenizers" / "mpt_like_eos",
    "qwen3": GOLDEN / "onevision15" / "processor",
}
TEXTS = [
    "</s>",
    "<|im_end|>",
    "###",
    "a </ s",
    "  two  spaces \n\n and lines ",
    "你好，世界 🙂👩‍👩‍👧 naïve �� \x1c é",
    "it 's here . , ? !",
]


@functools.cache
def folder(name: str, stop: str = "</s>") -> Any:
    """What speaking needs of a loaded model."""
    generation = SimpleNamespace(eos_token_id=None)
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS[name])
    return SimpleNamespace(
        tokenizer=tokenizer,
        template=SimpleNamespace(stop_string=stop),
        model=SimpleNamespace(generation_config=generation),
    )


@functools.cache
def vocabulary(name: str) -> dict[str, list[int]]:
    """Ids of kinds that matter: all, also ones that the tokenizer lacks; single bytes and halves of characters; those
    that are not said; those of awkward texts."""
    tokenizer = folder(name).tokenizer
    every = list(range(len(tokenizer) + 4))
    halves = [one for one in every if "\ufffd" in tokenizer.decode([one])]
    singles = [one for one in every if (tokenizer.convert_ids_to_tokens(one) or "").startswith("<0x")]
    awkward = [one for text in TEXTS for one in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return {
        "every": every,
        "broken": (halves + singles) or every,
        "awkward": awkward,
        "unheard": tokenizer.all_special_ids,
    }


@st.composite
def answers(draw: st.DrawFn) -> tuple[str, list[int]]:
    name = draw(st.sampled_from(sorted(FOLDERS)))
    kinds = vocabulary(name)
    one = st.sampled_from(sorted(kinds)).flatmap(lambda kind: st.sampled_from(kinds[kind]))
    texts = st.sampled_from(TEXTS).map(lambda text: folder(name).tokenizer(text, add_special_tokens=False)["input_ids"])
    runs = st.tuples(one, st.integers(1, 40)).map(lambda pair: [pair[0]] * pair[1])
    parts = draw(st.lists(st.one_of(st.lists(one, max_size=6), texts, runs), max_size=8))
    return name, [one for part in parts for one in part]


def heard(loaded: Any, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """A piece for each token and one for the end, and how many tokens were heard until the answer had ended."""
    speech, pieces, count = Speech(Tongue(loaded), stops), [], 0
    for one in ids:
        count += not speech.ended
        pieces.append(speech.add(one))
    return [*pieces, speech.close()], count


@settings(max_examples=70, deadline=None)
@given(answers(), st.sampled_from(["</s>", "<|im_end|>", "###", ""]))
def test_pieces_join_to_the_whole_for_any_ids(answer, stop):
    name, ids = answer
    loaded = folder(name, stop)
    pieces, _ = heard(loaded, ids)
    assert "".join(pieces) == spoken(loaded, ids)
    said = ""
    for count, piece in enumerate(pieces[:-1], 1):
        said += piece
        if piece:
            assert said == said.strip() and spoken(loaded, ids[:count]).startswith(said)


@settings(max_examples=60, deadline=None)
@given(answers(), st.data())
def test_own_stops_cut_the_text_before_the_first_that_is_complete(answer, data):
    name, ids = answer
    loaded = folder(name, "</s>")
    uncut = loaded.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    spans = st.tuples(st.integers(0, len(uncut)), st.integers(1, 9)).map(lambda at: uncut[at[0] : at[0] + at[1]])
    stops = tuple(data.draw(st.lists(spans | st.sampled_from(["zz", "\n\n", " . "]), max_size=4)))
    pieces, count = heard(loaded, ids, stops)
    ids = ids[:count]  # single bytes that a stop ended are no longer what they would have become
    first = next((i for i, one in enumerate(ids) if one in Tongue(loaded).ends), len(ids))
    whole = loaded.tokenizer.decode(ids[:first], skip_special_tokens=True).lstrip()
    found = [(whole.find(stop) + len(stop), -len(stop)) for stop in {*stops, "</s>"} if stop and stop in whole]
    end, length = min(found, default=(len(whole), 0))
    assert "".join(pieces) == whole[: end + length].rstrip()


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_stop_ends_the_answer_with_the_token_that_completes_it(name):
    loaded = folder(name, "")
    ids = loaded.tokenizer("the red cup stands on a table", add_special_tokens=False)["input_ids"]
    speech, pieces = Speech(Tongue(loaded), ["d cup s", "never"]), []
    while not speech.ended:
        pieces.append(speech.add(ids[len(pieces)]))
    assert "".join(pieces) == "the re"
    whole = loaded.tokenizer.decode(ids[: len(pieces)])
    assert "d cup s" in whole and "d cup s" not in loaded.tokenizer.decode(ids[: len(pieces) - 1])
    assert speech.add(ids[0]) == speech.close() == ""


def test_a_border_inside_a_window_says_nothing_twice():
    """Tokens that end with the first byte of a character, over and over."""
    loaded = folder("qwen3", "")
    token = next(one for one in vocabulary("qwen3")["broken"] if loaded.tokenizer.decode([one])[0] != "\ufffd")
    for count in range(1, 60):
        assert "".join(heard(loaded, [token] * count)[0]) == spoken(loaded, [token] * count)


def test_a_stop_spelt_in_single_bytes_ends_the_answer_at_once():
    loaded = folder("llama")
    ids = loaded.tokenizer.convert_tokens_to_ids(["▁red", *(f"<0x{letter:02X}>" for letter in b"</s>!!")])
    speech = Speech(Tongue(loaded))
    said = [speech.add(one) for one in ids[:5]]
    assert speech.ended and "".join(said) == "red"


def test_text_comes_when_it_is_certain_and_not_later():
    loaded = folder("qwen2", "")
    text = "naïve 你好 x"
    ids = loaded.tokenizer(text)["input_ids"]
    pieces, _ = heard(loaded, ids)
    for count in range(1, len(ids)):
        sure = loaded.tokenizer.decode(ids[:count]).rstrip("\ufffd ")
        assert "".join(pieces[:count]) == sure


class Counted(Tongue):
    """One that counts how many ids it was given to decode."""

    ids = 0

    def text(self, ids: Any) -> str:
        self.ids += len(ids)
        return super().text(ids)


@pytest.mark.parametrize("name", sorted(FOLDERS))
@pytest.mark.parametrize("kind", ["awkward", "broken", "every", "one"])
def test_a_tokens_cost_does_not_grow(name, kind):
    """Also of an answer that is nothing but halves of characters, spaces or single bytes."""
    counted = Counted(folder(name))
    ids = vocabulary(name)["broken" if kind == "one" else kind]
    ids = ids[:1] * 3000 if kind == "one" else (ids * (3000 // len(ids) + 1))[:3000]
    ids = [one for one in ids if one not in counted.ends]
    speech = Speech(counted)
    for one in ids:
        speech.add(one)
    assert counted.ids < 60 * len(ids)


def test_a_tokenizer_that_rewrites_spaces_is_waited_for():
    """One whose finished text loses spaces before marks: a token may change what stands before it."""
    words = ["[UNK]", "it", "'", "s", "here", ".", ",", "no"]
    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    rust.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="[UNK]", clean_up_tokenization_spaces=True)
    loaded: Any = SimpleNamespace(**{**vars(folder("llama", "")), "tokenizer": tokenizer})
    ids = [1, 2, 3, 4, 5, 7, 6, 1, 2, 7, 5, 5] * 3
    whole = spoken(loaded, ids)
    assert "it's here." in whole
    pieces, _ = heard(loaded, ids)
    assert "".join(pieces) == whole and sum(map(bool, pieces)) > 3
