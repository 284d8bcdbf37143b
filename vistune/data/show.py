"""Rows of a data file as training sees them: prompt, ids, labels and the text that is supervised.

Opens no picture: one image is one `IMAGE_ID`. Knows no length and no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.text import Text

from vistune.chat import ChatError, Encoded, Template, TextEncoder, encode, supervised_text
from vistune.data.formats import Reader
from vistune.data.tokenize import check_marks
from vistune.samples import IMAGE_ID, NO_LOSS, Sample, SampleError

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
            **_fault(sample),
        }


def labels(encoded: Encoded) -> list[int]:
    """The ids where there is loss, NO_LOSS elsewhere."""
    return [i if learned else NO_LOSS for i, learned in zip(encoded.ids, encoded.loss_mask, strict=True)]


def _fault(sample: Sample) -> dict[str, Any]:
    """What would keep a row out of training though its text can be shown: images and places for them differ."""
    try:
        check_marks(sample)
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
