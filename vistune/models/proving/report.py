"""What a proof says: rows of checks with the greatest difference, and what is wrong with its likely cause."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from vistune import console

# Relative to the largest value. Hidden states come out bit-equal; the head's product may add in another order.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Row:
    """One check: of what, on how many modules, the greatest difference, and what is wrong (empty: nothing)."""

    part: str
    check: str
    modules: int
    difference: float
    wrong: str = ""


@dataclass
class Report:
    """What was proved. `ok` when nothing is wrong."""

    folder: str
    rows: list[Row] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(row.wrong for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        return {"folder": self.folder, "ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def show(self) -> None:
        """A table on stdout; what is wrong on stderr."""
        cells = [(r.part, r.check, r.modules, f"{r.difference:.2g}", "no" if r.wrong else "yes") for r in self.rows]
        console.table(
            f"{self.folder}: is it what it was made of", ["part", "check", "of", "difference", "holds"], cells
        )
        for row in self.rows:
            if row.wrong:
                console.err.print(f"{row.part}: {row.wrong}", markup=False)


def difference(one: Tensor, other: Tensor) -> float:
    """Greatest difference relative to the greatest value; NaN when either holds one."""
    scale = one.float().abs().max().clamp_min(1.0)
    return float(((one.float() - other.float()).abs().max() / scale).item())
