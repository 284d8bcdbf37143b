"""Rows of a data file as training sees them: prompt, ids and labels; or token by token, with their place in a pack.

Decodes no picture and knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.text import Text

from vistune.chat import ChatError, Encoded, Template, TextEncoder, encode, supervised_text
from vistune.data.formats import Reader
from vistune.data.plan import Plan
from vistune.data.tokenize import Language, Tokens, check_marks, tokenize
from vistune.samples import IMAGE_ID, IMAGE_MARK, NO_LOSS, Image, Message, Sample, SampleError

COLOURS = {"image": "black on cyan", "supervised": "green", "text": "bright_black"}


def rows(reader: Reader, template: Template, encoder: TextEncoder) -> Iterator[dict[str, Any]]:
    """One dict a row: id, prompt, ids, labels, supervised_text; or id and the fault that keeps the row out."""
    for row in range(len(reader)):
        try:
            sample = reader[row]
            encoded = encode(template, encoder, sample.messages, has_images=bool(sample.images))
        except SampleError as error:
            fault = error.fault
            yield {"id": fault.id or str(row), "row": row, "fault": fault.code, "reason": fault.reason}
            continue
        except ChatError as error:
            yield {"id": sample.id, "row": row, "fault": error.code, "reason": str(error)}
            continue
        yield {
            "id": sample.id,
            "row": row,
            "prompt": encoded.prompt,
            "ids": encoded.ids,
            "labels": labels(encoded),
            "supervised_text": supervised_text(encoded, encoder),
            **_fault(sample, template),
        }


def labels(encoded: Encoded) -> list[int]:
    """The ids where there is loss, NO_LOSS elsewhere."""
    return [i if learned else NO_LOSS for i, learned in zip(encoded.ids, encoded.loss_mask, strict=True)]


def _fault(sample: Sample, template: Template) -> dict[str, Any]:
    """What would keep a row out of training though its text can be shown: images and places for them differ."""
    try:
        check_marks(sample, in_answers=template.answer_images)
    except SampleError as error:
        return {"fault": error.fault.code, "reason": error.fault.reason}
    return {}


def coloured(shown: dict[str, Any], encoder: TextEncoder) -> Text:
    """One row for the terminal: green is supervised, gray is not, cyan is an image."""
    text = Text(f"{shown['id']}\n", style="bold")
    if "fault" in shown:
        text.append(f"set aside: {shown['fault']}: {shown['reason']}\n", style="red")
    for kind, piece in _pieces(shown, encoder):
        text.append(piece, style=COLOURS[kind])
    return text


def _pieces(shown: dict[str, Any], encoder: TextEncoder) -> Iterator[tuple[str, str]]:
    """Runs of tokens of one kind with their text. Decoded from the start, since a piece alone loses its first space."""
    ids = shown.get("ids", [])
    kinds = [
        "image" if token == IMAGE_ID else "supervised" if label != NO_LOSS else "text"
        for token, label in zip(ids, shown.get("labels", []), strict=True)
    ]
    end, before = 0, ""
    for kind, run in groupby(kinds):
        end += len(list(run))
        text = encoder.decode(ids[:end])
        yield kind, text[len(before) :]
        before = text


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One token, or all placeholders of one picture, as the page shows it. `kind`: supervised, text or image."""

    kind: str
    text: str
    id: int
    place: int  # in the sample
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One sample as the model will see it; `fault` says why not, when it will not."""

    source: str
    row: int
    id: str
    messages: Sequence[Message] = ()
    images: Sequence[Image] = ()
    pieces: Sequence[Piece] = ()
    supervised: Sequence[str] = ()  # decoded from the ids, span by span
    tokens: int = 0
    targets: int = 0
    shortened: bool = False
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """Rows to show, as (source, row), and the pack they lie in: step and number from 0, `segments` as (source, row,
    tokens) in order, `room` in tokens. Without a plan there are no segments."""

    shown: Sequence[tuple[int, int]]
    step: int = 0
    number: int = 0
    of: int = 0
    segments: Sequence[tuple[int, int, int]] = ()
    room: int = 0

    def place_of(self, place: tuple[int, int]) -> str:
        """Where in the pack the sample at `place` stands."""
        at = 0
        for number, (source, row, tokens) in enumerate(self.segments):
            if (source, row) == place:
                return (
                    f"sample {number + 1} of {len(self.segments)}, positions {at:,} to {at + tokens - 1:,} of the pack"
                )
            at += tokens
        raise AssertionError(f"{place} is not in this pack")


def view(readers: Sequence[Reader], source: int, row: int, language: Language, length: int) -> View:
    """The sample at (source, row) as training tokenizes it. No picture is decoded; a faulty row says its fault."""
    reader = readers[source]
    try:
        sample = reader[row]
    except SampleError as error:
        return View(source=reader.name, row=row, id=error.fault.id, fault=_said(error))
    facts: dict[str, Any] = {"source": reader.name, "row": row, "id": sample.id}
    facts |= {"messages": sample.messages, "images": sample.images}
    try:
        tokens = tokenize(sample, language, length)
    except SampleError as error:
        return View(**facts, fault=_said(error))
    return View(
        **facts,
        pieces=list(_shown_tokens(tokens, language.encoder)),
        supervised=_supervised(tokens, language.encoder),
        tokens=len(tokens.ids),
        targets=tokens.supervised,
        shortened=tokens.shortened,
    )


def rows_in_order(readers: Sequence[Reader], rows: int, wanted: Sequence[tuple[int, int]]) -> Iterator[Shown]:
    """The wanted rows, or the first of every source, `rows` in all."""
    each = max(1, -(-rows // len(readers)))
    first = [(source, row) for source, reader in enumerate(readers) for row in range(min(each, len(reader)))]
    yield Shown(shown=list(wanted) or first[:rows])


def packs_in_order(plan: Plan, rows: int, wanted: Sequence[tuple[int, int]]) -> Iterator[Shown]:
    """The first packs of the run until there are `rows` samples; or those packs that hold the wanted rows."""
    left = set(wanted)
    count = 0
    for step in range(plan.steps_per_epoch):
        packs = plan.step(step)
        for number, pack in enumerate(packs):
            segments = [_segment(plan, position) for position in pack]
            places = [(source, row) for source, row, _ in segments if not wanted or (source, row) in left]
            if places:
                yield Shown(shown=places, step=step, number=number, of=len(packs), segments=segments, room=plan.length)
            left -= set(places)
            count += len(places)
            if not left if wanted else count >= rows:
                return


def _segment(plan: Plan, position: int) -> tuple[int, int, int]:
    columns = plan.index.columns
    tokens = int(columns["text"][position]) + int(columns["image"][position])
    return int(columns["source"][position]), int(columns["row"][position]), tokens


def _said(error: SampleError) -> str:
    fault = error.fault
    return f"{fault.code}: {fault.reason}" + (f": {fault.path}" if fault.path else "")


def _shown_tokens(tokens: Tokens, encoder: TextEncoder) -> Iterator[Piece]:
    """Every token with its text; a picture's placeholders are one piece."""
    ids = tokens.ids.tolist()
    at = 0
    for start, count in [*tokens.images, (len(ids), 0)]:
        for place, text in enumerate(_texts(ids[at:start], encoder), at):
            yield Piece(kind="supervised" if tokens.loss_mask[place] else "text", text=text, id=ids[place], place=place)
        if count:
            yield Piece(kind="image", text=IMAGE_MARK, id=ids[start], place=start, count=count)
        at = start + count


def _texts(ids: list[int], encoder: TextEncoder) -> Iterator[str]:
    """What each token adds to the text. A token that is only part of a character adds none; the last part has it all.

    A token alone may lose its space, so each is decoded together with those that made the piece of text before it.
    """
    before = read = 0
    for at in range(len(ids)):
        known, text = encoder.decode(ids[before:read]), encoder.decode(ids[before : at + 1])
        if text.endswith("\ufffd"):
            yield ""
            continue
        yield text[len(known) :]
        before, read = read, at + 1


def _supervised(tokens: Tokens, encoder: TextEncoder) -> list[str]:
    spans = groupby(zip(tokens.ids.tolist(), tokens.loss_mask.tolist(), strict=True), key=lambda pair: pair[1])
    return [encoder.decode([id for id, _ in span]) for learned, span in spans if learned]
