"""A run folder as it lies on disk, finished, going on or cut short: recipe, steps, faults, checkpoints, evaluations.

Reads files; knows nothing of models, and needs none of the libraries that a run needs.
"""

from __future__ import annotations

import json
import re
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vistune import recipe as recipes

ALIVE = 30.0
"""Seconds since the last sign of life (`running.json`, every 5 s) within which a run is taken to be at work."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole: after which step, how much of the disk it takes, and what was counted by then."""

    step: int
    folder: Path
    size: int
    state: dict[str, Any]


@dataclass
class Run:
    """What a run folder holds; what is not there is empty. `torn` counts lines that are none (of a killed run)."""

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    best: dict[str, Any]
    checkpoints: list[Checkpoint]
    alive: bool
    torn: int = 0
    name: str = ""
    _series: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """The last step of which something is known."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @cached_property
    def steps(self) -> int:
        """Steps of the whole run; 0 where no step says it."""
        if not self.rows:
            return int(self.summary.get("steps", 0) or self.recipe.get("train", {}).get("steps") or 0)
        last = self.rows[-1]
        if not last.get("seconds"):
            return self.done
        # A row's eta_s is seconds / step * (steps - step), which is the one place where a run says how many there are.
        left = last.get("eta_s", 0.0) * self.done / last["seconds"]
        return self.done + round(left)

    @property
    def state(self) -> str:
        """finished, going, stopped or not begun."""
        if self.summary and self.done >= self.steps:
            return "finished"
        return "going" if self.alive else "stopped" if self.rows else "not begun"

    @cached_property
    def at(self) -> np.ndarray:
        """float64 [rows]: the steps."""
        return np.array([row["step"] for row in self.rows], np.float64)

    def series(self, *keys: str) -> np.ndarray:
        """float64 [rows]: one number of every row, `keys` one within the other; nan where it has none."""
        if keys not in self._series:
            self._series[keys] = _numbers(self.rows, keys)
        return self._series[keys]


def open_run(folder: Path) -> Run:
    """ValueError for what is no run folder."""
    folder = Path(folder)
    if not (folder / "recipe.toml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise ValueError(_no_run(folder))
    metrics, torn = json_lines(folder / "metrics.jsonl")
    evaluations, torn_evaluations = json_lines(folder / "evaluations.jsonl")
    faults, torn_faults = json_lines(folder / "quarantine.jsonl")
    recipe = _recipe(folder / "recipe.toml")
    return Run(
        folder=folder,
        recipe=recipe,
        environment=_json(folder / "environment.json"),
        summary=_json(folder / "summary.json"),
        rows=_last_of_each(metrics),
        faults=faults,
        evaluations=_last_of_each(evaluations),
        best=_json(folder / "best.json"),
        checkpoints=_checkpoints(folder),
        alive=_alive(folder / "running.json"),
        torn=torn + torn_evaluations + torn_faults,
        name=str(recipe.get("name") or folder.resolve().name),
    )


def json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file that grows line by line, and how many lines are none; nothing when it is not there."""
    if not path.is_file():
        return [], 0
    rows, torn = [], 0
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError:
                row = line
            if isinstance(row, dict):
                rows.append(row)
            else:
                torn += row is not None
    return rows, torn


def _last_of_each(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By step; a run that was taken up repeats the steps it redoes, and then the last counts."""
    known = {int(row["step"]): row for row in rows if isinstance(row.get("step"), int | float)}
    return [known[step] for step in sorted(known)]


def _numbers(rows: list[dict[str, Any]], keys: Sequence[str]) -> np.ndarray:
    found: list[Any] = rows
    for key in keys:
        found = [one.get(key) if isinstance(one, dict) else None for one in found]
    try:
        return np.array(found, np.float64)  # None becomes nan
    except (TypeError, ValueError):  # something else than a number in some row
        return np.array([one if isinstance(one, int | float) else np.nan for one in found], np.float64)


def _no_run(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such run folder; `vistune train` made it as the recipe's `run` says"
    below = sorted(path.parent for path in folder.glob("*/recipe.toml"))
    hint = f" Below it lie runs: {', '.join(map(str, below[:4]))}." if below else ""
    return f"{folder}: no run folder, it has neither recipe.toml nor metrics.jsonl.{hint}"


def _recipe(path: Path) -> dict[str, Any]:
    """With all its defaults; as it stands where this version does not know all its keys."""
    if not path.is_file():
        return {}
    try:
        return recipes.read(path).model_dump(mode="json")
    except ValueError:
        return _plain(path)


def _plain(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8", errors="replace"))
    except tomllib.TOMLDecodeError:
        return {}


def _json(path: Path) -> dict[str, Any]:
    """The object of a small file; empty when it is not there or was cut short."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoints(run: Path) -> list[Checkpoint]:
    """Whole checkpoints, oldest first."""
    found = []
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if re.fullmatch(r"step-\d{8}", folder.name) and (folder / "run.json").is_file():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            state = _json(folder / "run.json").get("state", {})
            found.append(Checkpoint(int(folder.name.removeprefix("step-")), folder, size, state))
    return found


def _alive(path: Path) -> bool:
    return path.is_file() and time.time() - path.stat().st_mtime < ALIVE
