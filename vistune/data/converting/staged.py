"""Files and folders written beside their place, which they take together when everything went well.

Knows nothing of what is written.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vistune import files


class Staged:
    """Places that do not exist yet; `[place]` is where it is written until `commit`."""

    def __init__(self, *places: str | Path):
        """Raises ValueError for a place that is taken, or that is no local path."""
        self._beside: dict[Path, Path] = {}
        for place in map(str, places):
            if files.is_remote(place):
                raise ValueError(f"{place}: only local files are written; write here and copy")
            path = Path(place)
            if path.exists() or path.is_symlink():
                raise ValueError(f"{path}: is there already; choose another name, or remove it")
            self._beside[path] = path.with_name(f".{path.name}.{os.getpid()}")
            self._beside[path].parent.mkdir(parents=True, exist_ok=True)
            _remove(self._beside[path])

    def __getitem__(self, place: str | Path) -> Path:
        return self._beside[Path(place)]

    def commit(self) -> None:
        """Every place that was written takes its name, in the order given."""
        for place, beside in self._beside.items():
            if beside.exists():
                os.rename(beside, place)

    def abandon(self) -> None:
        """What was written is gone; what was there before is untouched."""
        for beside in self._beside.values():
            _remove(beside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
