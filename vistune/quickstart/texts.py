"""The quickstart's language: its tokenizer, and texts in which a picture is told in words, patch by patch.

What the language part is pre-trained on. Knows nothing of pixels.
"""

from __future__ import annotations

import json
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaTokenizer

from vistune.chat import TextEncoder, encode, template
from vistune.quickstart import words
from vistune.samples import IMAGE_ID, IMAGE_MARK, NO_LOSS, Message

GRID = 4
"""Patches along a side of a picture; each of its cells is two by two of them."""


def spread(cells: Tensor) -> Tensor:
    """What every patch should know, [N, 16], from what stands in every cell, [N, 4]."""
    grid = cells.view(-1, 2, 2)
    return grid.repeat_interleave(GRID // 2, 1).repeat_interleave(GRID // 2, 2).flatten(1)


def tokenizer(size: int = 640) -> LlamaTokenizer:
    """A Llama-like tokenizer: `<unk>`, `<s>`, `</s>`, 256 bytes, then byte pairs of the quickstart's language."""
    draw = random.Random(0)
    system = template("v1").system
    frame = [f" {system} USER: Describe the picture. ASSISTANT:", system, system.replace("user", "human"), "USER"]
    lines = [*frame, " digit digits", *words.DIGITS, *(f" {digit}" for digit in words.DIGITS)] * 400
    for _ in range(4000):
        cells = _cells(draw)
        lines += [f" {words.caption(cells)}"]
        lines += [text for q in words.questions(cells, draw) for text in (f" {q.text}", q.text, f" {q.answer}")]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    letters = [chr(c) for c in range(33, 127)] + ["▁"]
    learner.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=size - 259, initial_alphabet=letters, show_progress=False)
    )
    found = learner.get_vocab()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate([*first, *sorted(found, key=found.__getitem__)])}
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return LlamaTokenizer(
        vocab=vocab, merges=merges, legacy=False, pad_token="<unk>", add_bos_token=True, model_max_length=512
    )


def _cells(draw: random.Random) -> words.Cells:
    full = set(draw.sample(range(4), draw.randint(1, 4)))
    a, b, c, d = (draw.randrange(10) if cell in full else None for cell in range(4))
    return a, b, c, d


class Texts:
    """Texts of the quickstart's language in which the picture is told in words, one for each patch."""

    def __init__(self, made: LlamaTokenizer, seed: int):
        self.encoder, self.draw = TextEncoder(made), random.Random(f"{seed} language")
        self.told = torch.tensor([self._piece(word) for word in (*words.DIGITS, words.NOTHING)])
        cells = torch.tensor([[self._piece(word) for word in place.split()] for place in words.PLACES])
        self.where = torch.stack([spread(column[None])[0] for column in cells.T], 1)  # [16, 2]

    def _piece(self, word: str) -> int:
        piece = self.encoder.tokenizer.convert_tokens_to_ids(f"▁{word}")
        assert piece != self.encoder.tokenizer.unk_token_id, word
        return piece

    def batch(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and labels [rows, T], padded, and the places of the picture's words [rows, 16]; one kind of text each."""
        kind = self.draw.choices(("caption", "bare", "whole"), (0.3, 0.6, 0.1))[0]
        made = [self._row(kind) for _ in range(rows)]
        width = max(len(ids) for ids, _, _ in made)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in made])
        labels = torch.tensor([labels + [NO_LOSS] * (width - len(labels)) for _, labels, _ in made])
        return ids, labels, torch.tensor([at for _, _, at in made])[:, None] + torch.arange(GRID**2)

    def _row(self, kind: str) -> tuple[list[int], list[int], int]:
        cells = _cells(self.draw)
        if kind == "caption":
            turns = [("", words.caption(cells))]
        else:
            turns = [(q.text, q.answer) for q in words.questions(cells, self.draw)]
            self.draw.shuffle(turns)
            turns = turns[: self.draw.randint(4, 6)]
        talk = [Message(role="system", text="")] if kind == "bare" else []
        for i, (question, answer) in enumerate(turns):
            talk.append(Message(role="user", text=f"{IMAGE_MARK}\n{question}" if i == 0 else question))
            talk.append(Message(role="assistant", text=answer))
        chat = template("plain" if kind == "caption" else "v1")
        made = encode(chat, self.encoder, talk, has_images=True)
        at = made.ids.index(IMAGE_ID)
        told = spread(self.told[[10 if d is None else d for d in cells]])[0].tolist()
        ids = [*made.ids[:at], *told, *made.ids[at + 1 :]]
        mask = [*made.loss_mask[:at], *[False] * len(told), *made.loss_mask[at + 1 :]]
        return ids, [id if learned else NO_LOSS for id, learned in zip(ids, mask, strict=True)], at
