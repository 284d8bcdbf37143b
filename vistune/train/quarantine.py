"""The ledger of rows set aside: `quarantine.jsonl` in the run folder, its cap, and the stop above it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from vistune import console, ranks
from vistune.samples import Fault


class Ledger:
    """Every faulty row once. Above `max(10, cap * samples)` rows, or with `strict` at the first, the run stops."""

    def __init__(self, run: Path, samples: int, cap: float, strict: bool):
        self.path = run / "quarantine.jsonl"
        self.limit = max(10, int(cap * samples))
        self.strict = strict
        self.faults: dict[tuple[str, int, str], Fault] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                fault = Fault(**json.loads(line))
            except (json.JSONDecodeError, TypeError):  # a killed run may have left half a line
                continue
            self.faults[fault.source, fault.row, fault.code] = fault

    def add(self, faults: Iterable[Fault]) -> None:
        """Write the new ones down. Raises ValueError above the cap; then the run stops with exit code 2."""
        new = [f for f in faults if (f.source, f.row, f.code) not in self.faults]
        for fault in new:
            self.faults[fault.source, fault.row, fault.code] = fault
        if new and ranks.is_first():
            torn = self.path.exists() and self.path.stat().st_size > 0 and self.path.read_bytes()[-1:] != b"\n"
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" if torn else "")
                file.writelines(json.dumps(asdict(f), ensure_ascii=False) + "\n" for f in new)
            console.warn(f"{len(new)} row(s) set aside, {len(self.faults)} in all; the first: {_line(new[0])}")
        self._judge()

    def _judge(self) -> None:
        if self.strict and self.faults:
            first = next(iter(self.faults.values()))
            raise ValueError(f"data.strict: {_line(first)}. All of them: {self.path}")
        if len(self.faults) > self.limit:
            first = next(iter(self.faults.values()))
            raise ValueError(
                f"{len(self.faults)} rows are faulty, more than the {self.limit} that data.quarantine_cap allows; "
                f"the first: {_line(first)}. All of them: {self.path}. Mend them, or raise data.quarantine_cap."
            )

    def state(self) -> list[dict]:
        return [asdict(f) for f in self.faults.values()]


def _line(fault: Fault) -> str:
    where = f"{fault.source}:{fault.row}" + (f" (id {fault.id})" if fault.id else "")
    path = f": {fault.path}" if fault.path and fault.path not in fault.reason else ""
    return f"{where}: {fault.code}: {fault.reason}{path}"
