"""The ledger of rows set aside: `quarantine.jsonl` in the run folder, its cap, and the stop above it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vistune import console, ranks
from vistune.samples import Fault, faults_allowed


class Ledger:
    """Every faulty row once. Above `max(10, cap * samples)` rows, or with `strict` at the first, the run stops."""

    def __init__(self, run: Path, samples: int, cap: float, strict: bool):
        self.path = run / "quarantine.jsonl"
        self.limit = faults_allowed(samples, cap)
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
        # Sorted, so that the order does not depend on which rank met them; the first of two pictures stands for both.
        met = sorted(faults, key=lambda f: (f.source, f.row, f.code, f.path), reverse=True)
        found = {(f.source, f.row, f.code): f for f in met}
        new = [fault for key, fault in sorted(found.items()) if key not in self.faults]
        self.faults |= {(f.source, f.row, f.code): f for f in new}
        if new and ranks.is_first():
            torn = self.path.exists() and self.path.stat().st_size > 0 and self.path.read_bytes()[-1:] != b"\n"
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n" if torn else "")
                file.writelines(map(_json, new))
            console.warn(f"{len(new)} row(s) set aside, {len(self.faults)} in all; the first: {_line(new[0])}")
        self._judge()

    def restore(self, saved: Iterable[dict[str, Any]]) -> None:
        """The ledger as a checkpoint has it (`state`). What was met after it is met again, unless it was mended."""
        faults = [Fault(**one) for one in saved]
        self.faults = {(f.source, f.row, f.code): f for f in faults}
        if ranks.is_first():
            beside = self.path.with_name(f".{self.path.name}")
            beside.write_text("".join(map(_json, faults)), encoding="utf-8", errors="backslashreplace")
            os.replace(beside, self.path)
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

    def state(self) -> list[dict[str, Any]]:
        """What goes into a checkpoint."""
        return [asdict(f) for f in self.faults.values()]


def _json(fault: Fault) -> str:
    return json.dumps(asdict(fault), ensure_ascii=False) + "\n"


def _line(fault: Fault) -> str:
    where = f"{fault.source}:{fault.row}" + (f" (id {fault.id})" if fault.id else "")
    path = f": {fault.path}" if fault.path and fault.path not in fault.reason else ""
    return f"{where}: {fault.code}: {fault.reason}{path}"
