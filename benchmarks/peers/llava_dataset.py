"""A plain dataset as LLaVA's training has it, written from facts about it: the whole JSON in memory, Pillow, the stock
CLIP processor, the v1 conversation tokenized whole and again round by round to find its mask, padding to the longest.

`Preparer`, `collate` and `measured` serve the energon loader too. It needs torch, transformers and Pillow only.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil
from transformers.utils import logging

IMAGE, IMAGE_ID, NO_LOSS, SIDE = "<image>", -200, -100, 336
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
ANSWER, STOP = " ASSISTANT: ", "</s>"

Row = dict[str, Any]


class Preparer:
    """One row -> ids, labels and pixels."""

    def __init__(self, tokenizer: str):
        logging.set_verbosity_error()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        side = {"height": SIDE, "width": SIDE}
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)
        # Tokens more that a turn takes alone than after a stop token: 1 in the reference, which Llama's pieces decide.
        self.more_alone = len(self.encode("USER: a", False)) - len(self.encode(f"{STOP}USER: a", False)) + 1
        self.background = tuple(int(channel * 255) for channel in self.processor.image_mean)

    def __call__(self, row: Row, picture: Image.Image | None) -> Row:
        ids, labels = self.tokens(row["conversations"], picture is not None)
        pixels = torch.zeros(3, SIDE, SIDE) if picture is None else self.pixels(picture)
        return {"ids": ids, "labels": labels, "pixels": pixels, "has_image": picture is not None}

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """Padded to a square of the mean colour, then the stock processor: float32 [3, 336, 336]."""
        width, height = picture.size
        if width != height:
            side = max(width, height)
            square = Image.new(picture.mode, (side, side), self.background)
            square.paste(picture, ((side - width) // 2, (side - height) // 2))
            picture = square
        return self.processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]

    def tokens(self, turns: list[dict[str, str]], has_image: bool) -> tuple[torch.Tensor, torch.Tensor]:
        text = SYSTEM + " "
        for turn in turns:
            value = turn["value"]
            if has_image and IMAGE in value:
                value = f"{IMAGE}\n{value.replace(IMAGE, '').strip()}".strip()
            text += f"{ROLES[turn['from']]}: {value}" + (" " if turn["from"] == "human" else STOP)
        ids = torch.tensor(self.encode(text, has_image))
        labels = ids.clone()
        at = 1
        labels[:at] = NO_LOSS
        for number, part in enumerate(text.split(STOP)):
            pieces = part.split(ANSWER)
            if len(pieces) != 2:
                break
            later = self.more_alone if number else 0
            asked = len(self.encode(pieces[0] + ANSWER, has_image)) - 2 - later
            labels[at : at + asked] = NO_LOSS
            at += len(self.encode(part, has_image)) - later
        labels[at:] = NO_LOSS
        if at != len(ids):
            labels[:] = NO_LOSS  # the reference's "tokenization mismatch"
        return ids, labels

    def encode(self, text: str, has_image: bool) -> list[int]:
        """Text between images is tokenized piece by piece."""
        if not has_image:
            return self.tokenizer(text).input_ids
        first, *others = [self.tokenizer(piece).input_ids for piece in text.split(IMAGE)]
        for other in others:
            first = [*first, IMAGE_ID, *other[1:]]
        return first


def collate(samples: list[Row]) -> Row:
    """Padded to the longest, pixels stacked, rows without a picture as zeros."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "ids": pad([one["ids"] for one in samples], batch_first=True, padding_value=0),
        "labels": pad([one["labels"] for one in samples], batch_first=True, padding_value=NO_LOSS),
        "lengths": [len(one["ids"]) for one in samples],
        "pixels": torch.stack([one["pixels"] for one in samples]),
        "images": torch.tensor([one["has_image"] for one in samples]),
    }


class Rows(torch.utils.data.Dataset):
    def __init__(self, job: Row):
        self.rows = json.loads(Path(job["data"]).read_text())
        self.images, self.prepare = Path(job["images"]), Preparer(job["tokenizer"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        row = self.rows[number]
        return self.prepare(row, Image.open(self.images / row["image"]).convert("RGB") if "image" in row else None)


def measured(open_batches: Callable[[], Iterable[Row]]) -> Row:
    """Costs of going through all batches, and sums by which the contenders' work can be compared."""
    gc.collect()
    began, used = time.perf_counter(), _used()
    sums = {"samples": 0, "images": 0, "text_tokens": 0, "supervised": 0, "pixel_squares": 0.0}
    batches = open_batches()
    for batch in batches:
        sums["samples"] += len(batch["lengths"])
        sums["images"] += int(batch["images"].sum())
        sums["text_tokens"] += sum(batch["lengths"]) - int((batch["ids"] == IMAGE_ID).sum())
        sums["supervised"] += int((batch["labels"][:, 1:] != NO_LOSS).sum())
        few = batch["pixels"][batch["images"], :, ::48, ::48].double()
        sums["pixel_squares"] += float((few * few).sum())
    del batches, batch
    gc.collect()  # ends the workers, whose CPU time counts once they are gone
    return {**sums, "wall_s": time.perf_counter() - began, "cpu_s": _used() - used}


def _used() -> float:
    return sum(os.times()[:4])


def main(given: str, got: str) -> None:
    job = json.loads(Path(given).read_text())
    torch.set_num_threads(job["threads"])
    rows = Rows(job)

    def batches() -> Iterable[Row]:
        return torch.utils.data.DataLoader(
            rows, batch_size=job["batch"], num_workers=job["workers"], collate_fn=collate
        )

    Path(got).write_text(json.dumps(measured(batches)))


if __name__ == "__main__":
    main(*sys.argv[1:])
