"""Made-up rows and indexes, a layout of four placeholders an image, and the reference's tokenizers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from transformers import AutoTokenizer

from vistune.chat import TextEncoder, template
from vistune.data.index import CODES, COLUMNS, Index
from vistune.data.tokenize import Language

GOLDEN = Path(__file__).parents[1] / "golden" / "llava"
IMAGE_TOKEN = 5000


@dataclass(frozen=True)
class ToyLayout:
    """Four placeholders an image whatever its size, or one for every 10 pixels of its width."""

    needs_size: bool = False
    size: int = 8
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def tokens(self, width: int, height: int) -> int:
        return width // 10 if self.needs_size else 4

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        return np.asarray(image.resize((self.size, self.size))).transpose(2, 0, 1).copy()

    def grid(self, width: int, height: int) -> None:
        """None: every image has the same pixels."""

    def blank(self, width: int = 0, height: int = 0) -> np.ndarray:
        return np.full((3, self.size, self.size), 127, np.uint8)


@cache
def make_language(tokenizer: str = "llama_like", name: str = "v1", needs_size: bool = False) -> Language:
    encoder = TextEncoder(AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / tokenizer))
    return Language(template(name), encoder, ToyLayout(needs_size), IMAGE_TOKEN)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def make_index(lengths: Any, images: Any = None, bad: Any = (), sources: Any = None, length: int = 0) -> Index:
    """An index of made-up lengths."""
    lengths = np.asarray(lengths)
    columns = {name: np.zeros(len(lengths), kind) for name, kind in COLUMNS.items()}
    columns["row"][:] = np.arange(len(lengths))
    columns["text"][:] = lengths
    columns["supervised"][:] = np.maximum(1, lengths // 3)
    if images is not None:
        columns["images"][:] = images
    if sources is not None:
        columns["source"][:] = sources
    columns["fault"][list(bad)] = 1 + CODES.index("empty_answer")
    return Index(columns, [], "made-up", length or int(lengths.max()))
