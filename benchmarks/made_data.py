"""Made-up LLaVA data: pictures, captions and conversations, and what a stock processor makes of them.

Everything follows from a seed; nothing is downloaded. Knows no contender.
"""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import made_model
import numpy as np
from made_model import HEAD_ROWS, IMAGE, SYSTEM, TEMPLATES
from PIL import Image as Pillow
from PIL import ImageDraw
from stages import Stage, data_of

STAGES = (1, 2)


@dataclass(frozen=True)
class Size:
    """How much of everything. `pictures` are (width, height); token numbers are means over the samples."""

    name: str
    samples: int = 1000
    text_only: float = 0.068
    words: int = 30_000
    corpus_lines: int = 6000
    pictures: tuple[tuple[int, int], ...] = ((640, 480), (640, 427), (480, 640), (500, 375), (640, 640))
    pieces: int = 8000
    image_size: int = 224
    vision: tuple[int, int, int, int] = (192, 768, 6, 3)  # width, mlp, layers, heads: 2.83M parameters
    language: tuple[int, int, int, int] = (256, 688, 8, 4)  # 6.33M without embedding and head
    seed: int = 0


FULL = Size("full")
QUICK = Size(
    "quick",
    samples=24,
    words=1500,
    corpus_lines=300,
    pictures=((96, 72), (64, 96)),
    pieces=700,
    image_size=56,
    vision=(32, 64, 3, 2),
    language=(32, 64, 2, 2),
)


@dataclass(frozen=True)
class Made:
    """What lies on the disk. `counts[stage][row]` is (tokens, supervised, images), by the stock processor."""

    folder: Path
    size: Size
    counts: dict[int, list[tuple[int, int, int]]]

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def data(self, stage: Stage) -> Path:
        return self.folder / f"stage{data_of(stage)}.json"

    def template(self, stage: Stage) -> Path:
        return self.folder / f"chat_template_stage{data_of(stage)}.jinja"

    def model(self, vocab: str) -> Path:
        return self.folder / f"model-{vocab}"


def make(folder: Path, size: Size = FULL) -> Made:
    """Write data and model folders under `folder` unless they are there already, whole and of this size."""
    face = {**json.loads(json.dumps(asdict(size))), "layout": 3}
    done = folder / "made.json"
    if not (done.is_file() and json.loads(done.read_text())["size"] == face):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _write(folder, size)
        processor = made_model.processor(folder / "model-8k")
        counts = {str(s): _count(processor, folder, s, size) for s in STAGES}
        done.write_text(json.dumps({"size": face, "counts": counts}))
    made = json.loads(done.read_text())
    counts = {int(s): [tuple(c) for c in rows] for s, rows in made["counts"].items()}
    return Made(folder, size, counts)


def turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of LLaVA JSON as the messages that a stock processor takes."""
    messages = []
    for turn in row["conversations"]:
        text = turn["value"].replace(IMAGE, "").strip("\n")
        content = [{"type": "image"}] if IMAGE in turn["value"] else []
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
    return messages


def _write(folder: Path, size: Size) -> None:
    words = Words(size)
    (folder / "corpus.txt").write_text(words.corpus(), encoding="utf-8")
    tokenizer = made_model.tokenizer(folder, size)
    share = len(tokenizer.encode(words.text(1000))) / 1000
    (folder / "images").mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: write_picture(folder / "images" / f"{i:06d}.jpg", i, size), range(size.samples)))
    (folder / "stage1.json").write_text(json.dumps([_caption(i, words, share) for i in range(size.samples)], indent=0))
    rows = [_chat(i, words, share, size) for i in range(size.samples)]
    (folder / "stage2.json").write_text(json.dumps(rows, indent=0))
    for stage, text in TEMPLATES.items():
        (folder / f"chat_template_stage{stage}.jinja").write_text(text, encoding="utf-8")
    for vocab, rows_of_head in HEAD_ROWS.items():
        made_model.model(
            folder / f"model-{vocab}", folder, rows_of_head if size.name == "full" else rows_of_head // 8, size
        )


class Words:
    """Made-up language: words of made-up syllables, drawn by Zipf's law, set in sentences."""

    def __init__(self, size: Size):
        self.lines = size.corpus_lines
        self.rng = np.random.default_rng(size.seed)
        onsets = [*"bcdfghlmnprstvz", "st", "br", "tr", "pl", "gr", "sh"]
        starts = [onset + vowel for onset in onsets for vowel in "aeiou"]
        ends = ["", "n", "r", "s", "l", "nd", "st", "m", "ck", "th"]
        made: dict[str, None] = {}
        while len(made) < size.words:
            count = 1 + int(self.rng.integers(0, 4))
            picked = self.rng.integers(0, len(starts), count)
            made["".join(starts[i] for i in picked) + ends[int(self.rng.integers(0, len(ends)))]] = None
        self.words = np.array(list(made))
        weight = 1.0 / (np.arange(len(self.words)) + 2.7)
        self.weight = weight / weight.sum()

    def text(self, count: int) -> str:
        """`count` words in sentences of about a dozen words."""
        picked = [str(w) for w in self.rng.choice(self.words, count, p=self.weight)]
        sentences = []
        while picked:
            n = int(self.rng.integers(7, 18))
            sentences.append(" ".join(picked[:n]).capitalize())
            picked = picked[n:]
        return ". ".join(sentences) + "."

    def corpus(self) -> str:
        lines = [self.text(60) for _ in range(self.lines)]
        lines += [f"{SYSTEM} USER: {self.text(8)} ASSISTANT: {self.text(8)}" for _ in range(self.lines // 20)]
        return "\n".join(lines)


def _drawn(rng: np.random.Generator, mean: float, spread: float, low: float, high: float) -> float:
    """From a log-normal law with this mean."""
    value = rng.lognormal(math.log(mean) - spread * spread / 2, spread)
    return float(min(max(value, low), high))


def _caption(i: int, words: Words, share: float) -> dict[str, Any]:
    """Stage 1: one picture, one caption of about 33 tokens."""
    caption = words.text(max(2, round(_drawn(words.rng, 32.0, 0.32, 10, 90) / share)))
    human = {"from": "human", "value": f"Give a short account of the picture.\n{IMAGE}"}
    return {
        "id": f"c{i:06d}",
        "image": f"{i:06d}.jpg",
        "conversations": [human, {"from": "gpt", "value": caption}],
    }


def _chat(i: int, words: Words, share: float, size: Size) -> dict[str, Any]:
    """Stage 2: one to four rounds, about 92 supervised tokens; some rows have no picture."""
    rng = words.rng
    rounds = int(rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.2, 0.15]))
    answer = _drawn(rng, 87.0, 0.75, 8, 420) / rounds
    question = _drawn(rng, 72.0, 0.6, 12, 300) / rounds
    pictured = (i * 7919) % size.samples >= round(size.text_only * size.samples)  # spread over the file
    conversations = []
    for k in range(rounds):
        asked = words.text(max(2, round(question / share)))
        value = f"{IMAGE}\n{asked}" if pictured and k == 0 else asked
        conversations.append({"from": "human", "value": value})
        conversations.append({"from": "gpt", "value": words.text(max(1, round(answer / share)))})
    row: dict[str, Any] = {"id": f"t{i:06d}", "conversations": conversations}
    return {**row, "image": f"{i:06d}.jpg"} if pictured else row


def write_picture(path: Path, i: int, size: Size) -> None:
    """A JPEG that compresses like a photograph: soft light, a few objects with edges, texture, grain."""
    rng = np.random.default_rng([size.seed, i])
    width, height = size.pictures[i % len(size.pictures)]
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(1, 8):
        small = rng.integers(0, 256, (2**octave, 2**octave, 3), dtype=np.uint8)
        layer = Pillow.fromarray(small).resize((width, height), Pillow.Resampling.BICUBIC)
        total += np.asarray(layer, np.float32) * 0.62**octave
    total = (total - total.min()) / (np.ptp(total) + 1e-6) * 255
    picture = Pillow.fromarray(total.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 9))):
        x, y = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(8, width // 2), rng.integers(8, height // 2)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((int(x), int(y), int(x + w), int(y + h)), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    grain = rng.normal(0, 5, (height, width, 1)).astype(np.float32)
    pixels = np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8)
    Pillow.fromarray(pixels).save(path, quality=90)


def _count(processor: Any, folder: Path, stage: int, size: Size) -> list[tuple[int, int, int]]:
    """(tokens, supervised, images) of each row, images expanded."""
    rows = json.loads((folder / f"stage{stage}.json").read_text())
    return [_count_row(processor.tokenizer, row, stage, (size.image_size // made_model.PATCH) ** 2) for row in rows]


def _count_row(tokenizer: Any, row: dict[str, Any], stage: int, per_image: int) -> tuple[int, int, int]:
    encoded = tokenizer.apply_chat_template(
        turns(row),
        chat_template=TEMPLATES[stage],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    images = int("image" in row)
    return len(encoded["input_ids"]) + images * (per_image - 1), sum(encoded["assistant_masks"]), images
