"""Writes a data file of LLaVA's mix665k's shape: 665,298 rows of ten kinds, about 1 GB, and the pictures they share.

    python benchmarks/made_mix665k.py OUT                  the whole of it, a few minutes
    python benchmarks/made_mix665k.py OUT --rows 2000 --pictures 100

Rows of each kind, folders, and the longest kinds follow the published mixture; rounds and text lengths are estimates of
the real sources. The language is made up (150,000 words drawn by Zipf's law), so is the tokenizer, which is trained on
it: 32,000 pieces, built as Llama's. The same arguments write the same bytes. Knows nothing of vistune.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import made_data
import made_model
import numpy as np

LAYOUT = 4  # raised when other bytes are written
WORDS = 150_000
PIECES = 32_000
CORPUS_WORDS = 3_000_000
_CORE = 8_000
"""Zipf's exponent is 1 up to this rank and 2 behind it, as in large texts of English (Ferrer i Cancho, Sole 2001)."""
_BLOCK = 1 << 18

Rounds = list[tuple[str, str]]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
CAPTION = "\nProvide a one-sentence caption for the provided image."
REGION = "Please provide a short description for this region: "
BOX = "Please provide the bounding box coordinate of the region this sentence describes: "


class Text:
    """An endless text: words by Zipf's law, in sentences with commas and full stops."""

    def __init__(self, seed: int, words: int = WORDS):
        self._rng = np.random.default_rng([seed, 665])
        plain = made_data.Words(replace(made_data.FULL, words=words, seed=seed)).words
        lengths = np.array([len(word) for word in plain]) + self._rng.normal(0, 2, words)
        plain = plain[np.argsort(lengths)].astype(object)  # frequent words are short
        rank = np.arange(1, words + 1)
        weight = 1.0 / (rank + 1.7) * np.minimum(1.0, _CORE / rank)
        self._sum = np.cumsum(weight / weight.sum())
        self._forms = [plain, plain + ",", plain + ".", np.array([word.capitalize() for word in plain], object)]
        self._block: list[str] = []
        self._at = 0

    def take(self, count: int) -> str:
        """The next `count` words."""
        if self._at + count > len(self._block):
            self._block, self._at = self._more(max(count, _BLOCK)), 0
        self._at += count
        return " ".join(self._block[self._at - count : self._at])

    def _more(self, count: int) -> list[str]:
        drawn = np.minimum(np.searchsorted(self._sum, self._rng.random(count)), len(self._sum) - 1)
        form = (self._rng.random(count) < 0.05).astype(np.int64)
        ends = np.cumsum(self._rng.integers(7, 18, count // 7 + 1))
        ends = ends[ends < count - 1]
        form[ends], form[ends + 1] = 2, 3
        made = np.empty(count, object)
        for number, words in enumerate(self._forms):
            made[form == number] = words[drawn[form == number]]
        return made.tolist()


@dataclass(frozen=True)
class Kind:
    """One source of the mixture: how many rows, where its pictures lie ("": none), and what a row says."""

    name: str
    rows: int
    folder: str
    sizes: tuple[tuple[int, int], ...]
    say: Callable[[Text, random.Random], Rounds]


def _drawn(rng: random.Random, mean: float, spread: float, low: int, high: int) -> int:
    return round(min(max(rng.lognormvariate(math.log(mean) - spread * spread / 2, spread), low), high))


def _instruct(text: Text, rng: random.Random) -> Rounds:
    """Conversation 58k, detail 23k, reasoning 77k."""
    kind = rng.choices(("talk", "detail", "reason"), (58, 23, 77))[0]
    if kind == "detail":
        return [(text.take(9) + ".", text.take(_drawn(rng, 105, 0.3, 40, 260)))]
    if kind == "reason":
        return [(text.take(_drawn(rng, 14, 0.3, 6, 40)) + "?", text.take(_drawn(rng, 120, 0.35, 30, 300)))]
    rounds = _drawn(rng, 4.4, 0.3, 2, 9)
    return [
        (text.take(_drawn(rng, 9, 0.3, 4, 25)) + "?", text.take(_drawn(rng, 25, 0.6, 3, 120))) for _ in range(rounds)
    ]


def _talk(text: Text, rng: random.Random) -> Rounds:
    """ShareGPT: text alone, some of it far longer than 2,048 tokens."""
    rounds = _drawn(rng, 5.0, 0.8, 1, 40)
    return [
        (text.take(_drawn(rng, 60, 1.3, 3, 1500)), text.take(_drawn(rng, 210, 0.8, 5, 1200)).replace(". ", ".\n\n"))
        for _ in range(rounds)
    ]


def _short(mean: float, spread: float, most: int, words: float, answer: float = 1.3) -> Callable[..., Rounds]:
    """Several short questions about one picture; the form of the answer is asked for once."""

    def say(text: Text, rng: random.Random) -> Rounds:
        rounds = _drawn(rng, mean, spread, 1, most)
        asked = [text.take(_drawn(rng, words, 0.3, 3, 25)) + "?" for _ in range(rounds)]
        asked[0] += SHORT
        return [(question, text.take(_drawn(rng, answer, 0.5, 1, 12))) for question in asked]

    return say


def _letter(text: Text, rng: random.Random) -> Rounds:
    options = "".join(f"\n{letter}. {text.take(rng.randint(1, 3))}" for letter in "ABCD")
    return [(text.take(_drawn(rng, 9, 0.3, 4, 25)) + "?" + options + LETTER, rng.choice("ABCD"))]


def _caption(text: Text, rng: random.Random) -> Rounds:
    return [
        (
            CAPTION[1:] + "\nReference OCR token: " + text.take(_drawn(rng, 10, 0.8, 1, 60)),
            text.take(_drawn(rng, 12, 0.25, 6, 30)),
        )
    ]


def _boxes(mean: float, most: int) -> Callable[..., Rounds]:
    """Regions: half of them described, half of them found."""

    def say(text: Text, rng: random.Random) -> Rounds:
        made = []
        for _ in range(_drawn(rng, mean, 0.3, 1, most)):
            box = "[" + ", ".join(f"{rng.random():.2f}" for _ in range(4)) + "]"
            phrase = text.take(_drawn(rng, 5, 0.5, 2, 20))
            made.append((REGION + box, phrase) if rng.random() < 0.5 else (BOX + phrase, box))
        return made

    return say


_COCO = ((640, 480), (640, 427), (480, 640), (500, 375), (640, 640))
_COCO_AT = "coco/train2017"
KINDS = (
    Kind("llava_instruct", 157_712, _COCO_AT, _COCO, _instruct),
    Kind("sharegpt", 40_688, "", (), _talk),
    Kind("vqav2", 82_783, _COCO_AT, _COCO, _short(5.4, 0.25, 30, 6)),
    Kind("gqa", 72_140, "gqa/images", ((500, 375), (640, 480), (500, 333)), _short(13.0, 0.3, 40, 8)),
    Kind("okvqa", 8_998, _COCO_AT, _COCO, _short(1.0, 0.1, 2, 8)),
    Kind("ocrvqa", 80_000, "ocr_vqa/images", ((331, 500), (375, 500), (386, 500)), _short(5.0, 0.2, 8, 7, 3.0)),
    Kind("aokvqa", 66_160, _COCO_AT, _COCO, _letter),
    Kind("textcaps", 21_953, "textvqa/train_images", ((1024, 768), (1024, 683), (768, 1024)), _caption),
    Kind("refcoco", 48_447, _COCO_AT, _COCO, _boxes(5.0, 9)),
    Kind("vg", 86_417, "vg/VG_100K", ((500, 375), (800, 600), (500, 333)), _boxes(10.0, 10)),
)
ROWS = sum(kind.rows for kind in KINDS)
assert ROWS == 665_298


@dataclass(frozen=True)
class Made:
    """What lies on the disk."""

    folder: Path
    rows: int
    sources: dict[str, int]

    @property
    def json(self) -> Path:
        return self.folder / "mix665k.json"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"


def make(
    folder: Path, rows: int = ROWS, pictures: int = 2000, seed: int = 0, pieces: int = PIECES, words: int = WORDS
) -> Made:
    """Write everything under `folder`, unless it is there already, whole and of these sizes."""
    face = {"layout": LAYOUT, "rows": rows, "pictures": pictures, "seed": seed, "pieces": pieces, "words": words}
    done = folder / "made.json"
    if not (done.is_file() and json.loads(done.read_text())["face"] == face):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        text = Text(seed, words)
        _tokenizer(folder, text, pieces, CORPUS_WORDS if rows > 10_000 else CORPUS_WORDS // 30)
        named = _pictures(folder / "images", pictures, seed)
        sources = _write(folder / "mix665k.json", rows, text, named, seed)
        done.write_text(json.dumps({"face": face, "sources": sources}, indent=1))
    return Made(folder, rows, json.loads(done.read_text())["sources"])


def _tokenizer(folder: Path, text: Text, pieces: int, words: int) -> None:
    lines = [text.take(200) for _ in range(words // 200)]
    lines += [
        f"{made_model.SYSTEM} USER: {text.take(8)} ASSISTANT: {text.take(8)}{SHORT}" for _ in range(len(lines) // 5)
    ]
    lines += [f"{REGION}[0.{i % 100:02}, 0.{i * 7 % 100:02}]" for i in range(len(lines) // 20)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    made_model.tokenizer(folder, replace(made_data.FULL, pieces=pieces))
    (folder / "corpus.txt").unlink()


def _pictures(folder: Path, count: int, seed: int) -> dict[str, list[str]]:
    """Folder -> names of its pictures, written; as many in each as its rows deserve, and one at least."""
    sizes: dict[str, tuple[tuple[int, int], ...]] = {kind.folder: kind.sizes for kind in KINDS if kind.folder}
    pictured = sum(kind.rows for kind in KINDS if kind.folder)
    named: dict[str, list[str]] = {}
    jobs: list[tuple[Path, int, made_data.Size]] = []
    for place in sizes:
        share = sum(kind.rows for kind in KINDS if kind.folder == place) / pictured
        named[place] = [f"{place}/{len(jobs) + i:012d}.jpg" for i in range(max(1, round(count * share)))]
        (folder / place).mkdir(parents=True)
        jobs += [
            (folder / name, len(jobs) + i, replace(made_data.FULL, pictures=sizes[place], seed=seed))
            for i, name in enumerate(named[place])
        ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: made_data.write_picture(*job), jobs))
    return named


def _write(path: Path, rows: int, text: Text, named: dict[str, list[str]], seed: int) -> dict[str, int]:
    """The JSON list, row by row; returns the rows of each kind."""
    sources = _shares(rows)
    order = np.repeat(np.arange(len(KINDS)), list(sources.values()))
    np.random.default_rng([seed, 1]).shuffle(order)
    beside = path.with_suffix(".tmp")
    with beside.open("w", encoding="utf-8") as out:
        out.write("[")
        for number, row in enumerate(_rows(order, text, named, random.Random(seed))):
            out.write((", " if number else "") + json.dumps(row))
        out.write("]")
    beside.replace(path)
    return sources


def _shares(rows: int) -> dict[str, int]:
    """Rows of each kind for `rows` in all, by largest remainder."""
    exact = {kind.name: kind.rows * rows / ROWS for kind in KINDS}
    given = {name: math.floor(count) for name, count in exact.items()}
    for name in sorted(exact, key=lambda name: given[name] - exact[name])[: rows - sum(given.values())]:
        given[name] += 1
    return given


def _rows(order: np.ndarray, text: Text, named: dict[str, list[str]], rng: random.Random) -> Iterator[dict[str, Any]]:
    for number, which in enumerate(order.tolist()):
        kind = KINDS[which]
        row: dict[str, Any] = {"id": f"{kind.name}_{number:06d}"}
        rounds = kind.say(text, rng)
        if kind.folder:
            row["image"] = rng.choice(named[kind.folder])
            rounds[0] = (f"<image>\n{rounds[0][0]}", rounds[0][1])
        else:
            row["model"] = ""
        turns = [{"from": ("human", "gpt")[i], "value": pair[i]} for pair in rounds for i in (0, 1)]
        yield {**row, "conversations": turns}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--pictures", type=int, default=2000, help="distinct ones; rows share them")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(words)
    made = make(asked.out, asked.rows, asked.pictures, asked.seed)
    print(f"{made.json}: {made.rows:,} rows, {made.json.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
