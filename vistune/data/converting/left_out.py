"""The ledger of rows that a conversion does not write: `left_out.jsonl`, with the reason of each."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class LeftOut:
    """The ledger of rows that are not written: a line each, in a file that is there when there are any."""

    def __init__(self, out: Path):
        self.out = out
        self.reasons: Counter[str] = Counter()
        self.first = ""
        self._beside = out.with_name(f".{out.name}.left_out.jsonl")

    def add(self, row: int, id: str, code: str, reason: str) -> None:
        line = {"row": row, "id": id, "code": code, "reason": reason}
        mode = "a" if self.reasons else "w"
        with open(self._beside, mode, encoding="utf-8") as lines:
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.first = self.first or f"row {row}: {code}: {reason}"
        self.reasons[code] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if kind is not None:
            self._beside.unlink(missing_ok=True)

    def place(self) -> str:
        """Takes its place once `out` is there; "" when no row was left out."""
        if not self.reasons:
            return ""
        place = self.out / "left_out.jsonl" if self.out.is_dir() else Path(f"{self.out}.left_out.jsonl")
        self._beside.rename(place)
        return str(place)

    def report(self) -> dict[str, Any]:
        named = {f"left_out_{code}": n for code, n in sorted(self.reasons.items())}
        return {"left_out": self.reasons.total(), **named}
