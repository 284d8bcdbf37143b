"""The proof of a conversion: the same pictures and the same text through two checkpoints, and how far they differ.

One model is in memory at a time, in fp32. Knows no format: whatever can be loaded can be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vistune import chat, console, images
from vistune.models.load import Loaded, load
from vistune.samples import IMAGE_ID, IMAGE_MARK, Message

TOLERANCE = 1e-4
"""Relative to the greatest value, or absolute below 1: fp32 sums added in another order stay well below."""

_QUESTIONS = {
    "text": ("How many legs has a spider?", ()),
    "one picture": (f"{IMAGE_MARK}\nWhat is in this picture?", (0,)),
    "two pictures": (f"{IMAGE_MARK}\n{IMAGE_MARK}\nWhat is different?", (0, 1)),
}
_SIZES = ((140, 97), (60, 200))


@dataclass(frozen=True)
class Row:
    """One check: the greatest difference, and what is wrong (empty: nothing)."""

    check: str
    difference: float
    wrong: str = ""


@dataclass
class Report:
    """What was compared. `ok` when nothing is wrong."""

    source: str
    target: str
    tolerance: float
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(row.wrong for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "target": self.target,
            "tolerance": self.tolerance,
            "ok": self.ok,
            "rows": [asdict(row) for row in self.rows],
        }

    def show(self) -> None:
        """A table on stdout; what is wrong on stderr."""
        title = f"{self.source} and {self.target}: the same pictures and text (tolerance {self.tolerance:g})"
        rows = [(row.check, f"{row.difference:.2g}", "no" if row.wrong else "yes") for row in self.rows]
        console.table(title, ["check", "greatest difference", "holds"], rows)
        for row in self.rows:
            if row.wrong:
                console.err.print(f"{row.check}: {row.wrong}", markup=False)


@dataclass
class Seen:
    """What one checkpoint makes of the pictures and questions."""

    pixels: list[Tensor]
    """Of each picture, normalized."""
    ids: dict[str, list[int]]
    """Of each question, an image as one IMAGE_ID."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """Of each question with pictures, what the connector gives."""
    logits: dict[str, Tensor] = field(default_factory=dict)
    """Of each question, at the positions of its text: [positions, vocabulary]."""


def compare(
    a: Path | str,
    b: Path | str,
    *,
    tolerance: float = TOLERANCE,
    bases: tuple[Path | None, Path | None] = (None, None),
    **said: Any,
) -> Report:
    """The checkpoints `a` and `b`, of any format, side by side. `bases`: the other halves of what is only an adapter.

    `said`: template, image and options of `vistune.models.load.load`, for both. Raises ValueError for what cannot be
    opened at all.
    """
    report = Report(str(a), str(b), tolerance)
    with _opened(a, bases[0], said) as loaded:
        one = look(loaded)
        answer(loaded, one, one)
    with _opened(b, bases[1], said) as loaded:
        other = look(loaded)
        report.rows.append(_row("preprocessing", _greatest(one.pixels, other.pixels), tolerance))
        report.rows.append(_tokens(one, other))
        # From here on what the source made of pictures and text, so that each row says one thing.
        answer(loaded, other, one)
    for check, features in one.features.items():
        difference = _greatest([features], [other.features[check]])
        report.rows.append(_row(f"vision features, {check}", difference, tolerance))
    for check, logits in one.logits.items():
        words = min(logits.shape[1], other.logits[check].shape[1])
        difference = _greatest([logits[:, :words]], [other.logits[check][:, :words]])
        report.rows.append(_row(f"logits, {check}", difference, tolerance))
    return report


@contextmanager
def _opened(folder: Path | str, base: Path | None, said: dict[str, Any]) -> Iterator[Loaded]:
    loaded = load(folder, base=base, **said)
    try:
        yield loaded
    finally:
        del loaded.model


def pictures() -> list[PIL.Image.Image]:
    """Two RGB pictures, one wide and one tall: colours that run across, and noise."""
    rng, made = np.random.default_rng(0), []
    for width, height in _SIZES:
        across, down = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
        smooth = np.stack([across, down, 200 - across], axis=-1)
        made.append(PIL.Image.fromarray((smooth + rng.integers(0, 56, smooth.shape)).astype(np.uint8)))
    return made


def look(loaded: Loaded) -> Seen:
    """What a checkpoint's own processor and tokenizer make of pictures and questions."""
    prepared = [torch.from_numpy(loaded.layout.prepare(picture)) for picture in pictures()]
    pixels = [images.normalize(one, loaded.layout, torch.float32) for one in prepared]
    return Seen(pixels, {name: _ids(loaded, text, bool(shown)) for name, (text, shown) in _QUESTIONS.items()})


def _ids(loaded: Loaded, text: str, has_images: bool) -> list[int]:
    if loaded.template.caption and not has_images:  # it has no place for text alone
        return loaded.encoder.encode(text, has_images=False)[0].tolist()
    messages = [Message(role="user", text=text)]
    return list(chat.encode(loaded.template, loaded.encoder, messages, has_images=has_images, open_turn=True).ids)


@torch.no_grad()
def answer(loaded: Loaded, seen: Seen, given: Seen) -> None:
    """Fill the features and logits of `seen` with what the model makes of the pixels and ids of `given`."""
    family, model, sizes = loaded.family, loaded.model, [picture.size for picture in pictures()]
    for name, (_, shown) in _QUESTIONS.items():
        each = iter(sizes[number] for number in shown)
        spread = [
            [loaded.image_token_id] * loaded.layout.tokens(*next(each)) if one == IMAGE_ID else [one]
            for one in given.ids[name]
        ]
        ids = torch.tensor(list(itertools.chain.from_iterable(spread)))
        grids = [grid for number in shown if (grid := loaded.layout.grid(*sizes[number])) is not None]
        pixels = [given.pixels[number] for number in shown]
        with _heard(family.parts(model)["connector"][0]) as heard:
            hidden = family.hidden(
                model,
                ids,
                torch.arange(len(ids)),
                [len(ids)],
                (torch.cat(pixels) if grids else torch.stack(pixels)) if pixels else None,
                torch.tensor(grids) if grids else None,
            )
        if heard and shown:
            seen.features[name] = heard[0]
        seen.logits[name] = family.head(model)(hidden[ids != loaded.image_token_id])


@contextmanager
def _heard(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What `module` gives while this lasts."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, out: found.append(out))
    try:
        yield found
    finally:
        hook.remove()


def _tokens(one: Seen, other: Seen) -> Row:
    for name, ids in one.ids.items():
        if ids != other.ids[name]:
            shown = f"{ids[:12]} and {other.ids[name][:12]}"
            return Row(
                "token ids", 1.0, f"{name}: other ids ({shown}); likely cause: another tokenizer or chat template"
            )
    return Row("token ids", 0.0)


def _greatest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Greatest difference, relative to the greatest value; infinite where shapes differ, NaN where one holds that."""
    worst = 0.0
    for ours, theirs in zip(one, other, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        difference = ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1.0)).item()
        worst = difference if not difference <= worst else worst
    return worst


def _row(check: str, difference: float, tolerance: float) -> Row:
    if difference <= tolerance:
        return Row(check, difference)
    if difference == float("inf"):
        return Row(check, difference, "shapes differ")
    return Row(check, difference, f"differs by {difference:.2g}, more than {tolerance:g}")
