"""What is wrong with one row, its pictures' pixels apart: structure, marks, files, tokens; measured chunk by chunk.

Training's own functions judge wherever they can, so that the check and a run agree.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from vistune.chat import TEMPLATES, ChatError, render
from vistune.data.checking import pictures
from vistune.data.checking.findings import Finding, finding, of_fault
from vistune.data.formats import Reader
from vistune.data.tokenize import Language, check_marks, tokenize
from vistune.samples import Image, Sample, SampleError

CHUNK = 1024  # rows of one piece of work
_WHOLE = 1 << 30  # tokens: longer than any sample
COLUMNS: dict[str, type] = {
    "tokens": np.int32,  # of the whole row, before anything is shortened; 0: not known
    "kept": np.int32,  # of these, what a sample has room for
    "supervised": np.int32,  # targets among the kept
    "images": np.uint16,
    "faulty": np.bool_,
    "shortened": np.bool_,
    "nameless": np.bool_,  # its id is its number
    "content": np.uint64,  # of messages and pictures; 0: not known
    "id": np.uint64,
}


@dataclass(slots=True)
class Rows:
    """One chunk: columns of its rows, its findings, and `keys`, `row`, `nth` of every picture that is there."""

    columns: dict[str, np.ndarray]
    findings: list[Finding]
    keys: np.ndarray  # uint64 [pictures]
    at: np.ndarray  # int32 [pictures, 2]: row within the chunk, which of its pictures


@dataclass(frozen=True, slots=True)
class RowJudge:
    """Judges chunks of rows, here or in another process. Without a language nothing is tokenized."""

    readers: tuple[Reader, ...]
    language: Language | None
    length: int

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(source, first row, one past the last), in order."""
        for source, reader in enumerate(self.readers):
            for start in range(0, len(reader), CHUNK):
                yield source, start, min(start + CHUNK, len(reader))

    def __call__(self, chunk: tuple[int, int, int]) -> Rows:
        source, start, stop = chunk
        columns: dict[str, Any] = {name: np.zeros(stop - start, kind) for name, kind in COLUMNS.items()}
        rows = Rows(columns, [], np.zeros(0, np.uint64), np.zeros((0, 2), np.int32))
        keys: list[tuple[int, int, int]] = []
        for i, row in enumerate(range(start, stop)):
            one = judge_row(self.readers[source], source, row, self.language, self.length)
            for name, value in one.values.items():
                columns[name][i] = value
            columns["faulty"][i] = any(found.severity == "error" for found in one.findings)
            rows.findings += one.findings
            keys += [(key, i, nth) for nth, key in one.keys]
        rows.keys = np.array([key for key, _, _ in keys], np.uint64)
        rows.at = np.array([place for _, *place in keys], np.int32).reshape(-1, 2)
        return rows


@dataclass(slots=True)
class Judged:
    """One row: values of its columns, findings, and (which, key) of its pictures that are there."""

    values: dict[str, Any]
    findings: list[Finding]
    keys: list[tuple[int, int]]


def judge_row(reader: Reader, number: int, row: int, language: Language | None, length: int) -> Judged:
    """Everything that can be said of one row without opening a picture."""
    judged = Judged({}, [], [])
    try:
        sample = reader[row]
    except SampleError as error:
        judged.findings.append(of_fault(error.fault, number))
        return judged
    except (ValueError, OSError) as error:  # of the container, not of the row
        judged.findings.append(finding(reader.name, number, row, "", "source_unreadable", str(error)))
        return judged

    def say(code: str, message: str, path: str = "", found: str = "") -> None:
        said = finding(reader.name, number, row, sample.id, code, message, path)
        judged.findings.append(replace(said, found=found))

    there = _judge_files(sample, pictures.folders_of(reader), judged, say)
    judged.values |= {"images": min(len(sample.images), 65535), "id": _hash(sample.id), "content": _content(sample)}
    if _lacks_id(reader, sample):
        judged.values["nameless"] = True
        if hasattr(reader, "raw"):
            say("id_missing", WITHOUT_ID)
    try:
        if language is None:
            check_marks(sample)
            # Any template tells whether the turns are in order; v1 takes what most do.
            render(TEMPLATES["v1"], sample.messages, has_images=bool(sample.images))
        elif there is None and language.layout.needs_size:  # without its pictures nothing can be measured
            check_marks(sample, in_answers=language.template.answer_images)
            _prompt(sample, language)
        else:
            _measure(there or sample, language, length, judged, say)
    except SampleError as error:
        if error.fault.code not in ("image_missing", "image_broken"):  # found above, or when its header is looked into
            say(error.fault.code, error.fault.reason, error.fault.path)
    except ChatError as error:
        say(error.code, error.reason)
    return judged


WITHOUT_ID = "the row has no id; it is called by its number"


def _judge_files(sample: Sample, folders: tuple[str, ...], judged: Judged, say: Any) -> Sample | None:
    """The sample with every picture where it really is; None when one is nowhere."""
    images: list[Image] = []
    for nth, image in enumerate(sample.images):
        located = pictures.locate(image) if image.data is not None else _locate(image, folders)
        if located.code:
            say(located.code, located.message, image.path, located.image.path if located.image else "")
        if located.image is not None:
            images.append(located.image)
            judged.keys.append((nth, pictures.key(located.image)))
    return replace(sample, images=tuple(images)) if len(images) == len(sample.images) else None


_locate = lru_cache(maxsize=1 << 14)(pictures.locate)  # rows share pictures


def _measure(sample: Sample, language: Language, length: int, judged: Judged, say: Any) -> None:
    """Tokens as training counts them; raises what training would set the row aside for."""
    whole = tokenize(sample, language, _WHOLE, look=False)
    judged.values["tokens"] = len(whole.ids)
    kept = whole
    if len(whole.ids) > length:
        kept = tokenize(sample, language, length, look=False)
        say("shortened", f"{len(whole.ids)} tokens, {len(kept.ids)} of them are kept")
    judged.values |= {"kept": len(kept.ids), "supervised": kept.supervised, "shortened": kept.shortened}
    if lost := _lost(sample, language, whole.ids):
        say("round_trip", lost)


def _lost(sample: Sample, language: Language, ids: np.ndarray) -> str:
    """What the tokenizer does not give back of the prompt, white space apart; empty when it gives all."""
    prompt = _prompt(sample, language)
    wanted = "".join((prompt.replace("<image>", "") if sample.images else prompt).split())
    got = "".join(language.encoder.decode(ids[ids != language.image_token_id].tolist()).split())
    if wanted in got:
        return ""
    lost = Counter(wanted) - Counter(got)
    if not lost:
        return "the tokens decode to the same characters in another order"
    some = " ".join(f"{character!r}" for character in list(lost)[:8])
    return f"{lost.total()} character(s) are lost or changed, such as {some}"


def _prompt(sample: Sample, language: Language) -> str:
    segments = render(
        language.template,
        sample.messages,
        has_images=bool(sample.images),
        tokenizer=language.encoder.tokenizer,
    )
    return "".join(segment.text for segment in segments)


def _lacks_id(reader: Reader, sample: Sample) -> bool:
    """Whether the row is called by its number because it has no id; where the row itself cannot be asked, when it
    looks so."""
    if sample.id != str(sample.row):
        return False
    raw = getattr(reader, "raw", None)
    return raw is None or json.loads(raw(sample.row)).get("id") is None


def _content(sample: Sample) -> int:
    parts: Sequence[str] = [part for message in sample.messages for part in (message.role, message.text)]
    parts = [*parts, *(str(pictures.key(image)) for image in sample.images)]
    return _hash("\0".join(parts)) or 1


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
