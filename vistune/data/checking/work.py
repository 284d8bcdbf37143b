"""What a check keeps on disk while it runs, piece by piece, each whole or not there. Judges nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from vistune.data.checking.findings import Finding
from vistune.data.checking.pictures import Verdict
from vistune.data.checking.rows import Rows


def rows_file(work: Path, number: int) -> Path:
    return work / f"rows-{number:07d}.npz"


def pictures_file(work: Path, start: int) -> Path:
    return work / f"pictures-{start:09d}.json"


def keep_rows(work: Path, number: int, rows: Rows) -> None:
    text = json.dumps([asdict(found) for found in rows.findings]).encode()
    arrays = {**rows.columns, "keys": rows.keys, "at": rows.at, "findings": np.frombuffer(text, np.uint8)}
    beside = work / f"new-rows-{number}.npz"
    np.savez(beside, **arrays)  # type: ignore[arg-type]
    os.replace(beside, rows_file(work, number))


def kept_rows(work: Path, number: int) -> Rows:
    with np.load(rows_file(work, number)) as arrays:
        columns = {name: arrays[name] for name in arrays.files if name not in ("keys", "at", "findings")}
        findings = [Finding(**one) for one in json.loads(arrays["findings"].tobytes())]
        return Rows(columns, findings, arrays["keys"], arrays["at"])


def keep_pictures(work: Path, start: int, keys: Sequence[int], verdicts: Sequence[Verdict]) -> None:
    lines = [[key, asdict(verdict)] for key, verdict in zip(keys, verdicts, strict=True)]
    beside = work / f"new-pictures-{start}"
    beside.write_text(json.dumps(lines), encoding="utf-8")
    os.replace(beside, pictures_file(work, start))


@dataclass
class KeptPictures:
    """`bad`: key (as uint64) -> (code, message) pairs of every picture with something wrong; how many have which
    format; the most pixels."""

    bad: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    most_pixels: int = 0


def kept_pictures(work: Path) -> KeptPictures:
    kept = KeptPictures()
    for file in sorted(work.glob("pictures-*.json")):
        for key, verdict in json.loads(file.read_text(encoding="utf-8")):
            name = verdict["format"] or "unknown"
            kept.formats[name] = kept.formats.get(name, 0) + 1
            kept.most_pixels = max(kept.most_pixels, verdict["width"] * verdict["height"])
            if verdict["found"]:
                kept.bad[int(np.int64(key).view(np.uint64))] = [(code, message) for code, message in verdict["found"]]
    return kept
