"""The best checkpoint of a run so far: `best.json`, which names it, what it is best by, and its value there."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from vistune.train.keeping import checkpoint

FILE = "best.json"
LOSS = "held_out_loss"
"""What is better when it is lower; every score is better when it is higher."""


@dataclass(frozen=True)
class Best:
    step: int
    by: str
    value: float
    checkpoint: str

    def folder(self, run: Path) -> Path:
        """Where it stands, also when the run was moved."""
        return checkpoint.folder_of(run, self.step)


def read(run: Path) -> Best | None:
    """What `best.json` says; None when there is none, or its checkpoint was removed."""
    path = run / FILE
    if not path.exists():
        return None
    found = Best(**json.loads(path.read_text(encoding="utf-8")))
    return found if checkpoint.is_whole(found.folder(run)) else None


def write(run: Path, step: int, by: str, value: float) -> None:
    """Name the checkpoint of `step`, which stands. Beside, then renamed."""
    found = Best(step, by, value, str(checkpoint.folder_of(run, step)))
    beside = run / f"{FILE}.tmp"
    with checkpoint.disk_errors(run / FILE):
        beside.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
        beside.replace(run / FILE)


def is_better(by: str, value: float | None, than: Best | None) -> bool:
    """Whether a value is the best so far. What was best by something else does not compare."""
    if value is None or not math.isfinite(value):
        return False
    if than is None or than.by != by:
        return True
    return value < than.value if by == LOSS else value > than.value
