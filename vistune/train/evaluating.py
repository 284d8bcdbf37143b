"""Evaluation inside training: held-out loss and benchmarks every so many steps, and the best checkpoint kept.

The steps between are the same with it and without. Rows go to `evaluations.jsonl`, the best to `best.json`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vistune import console, ranks
from vistune.evaluate.answering import Said
from vistune.models.load import Loaded
from vistune.recipe import Evaluate, Recipe
from vistune.train.keeping import best, checkpoint
from vistune.train.keeping.saving import Saver, prune
from vistune.train.loop import Loop, State
from vistune.train.measuring import benchmarks, held_out
from vistune.train.measuring.answers import answers
from vistune.train.measuring.benchmarks import Chosen, Scored
from vistune.train.measuring.held_out import HeldOut
from vistune.train.measuring.rounds import Rounds, Stopped
from vistune.train.measuring.unchanged import unchanged

FILE = "evaluations.jsonl"
Row = dict[str, Any]
Save = Callable[[State, Callable[[], None] | None], None]


@dataclass(frozen=True)
class Asked:
    """What a run is evaluated by. `by` is what its best checkpoint is kept by; empty: by nothing."""

    held_out: list[HeldOut]
    benchmarks: list[Chosen]
    by: str


def read(recipe: Recipe, loaded: Loaded, folder: Path) -> Asked | None:
    """Read what [evaluate] names, before any weight; None when it names nothing. ValueError for what cannot be done."""
    settings = recipe.evaluate
    if not (settings.held_out or settings.benchmarks):
        return None
    ranks.on_first(lambda: benchmarks.read(settings))
    chosen = benchmarks.read(settings)
    by = _by(settings, chosen)
    return Asked(held_out.read(recipe, loaded, folder), chosen, by)


def _by(settings: Evaluate, chosen: list[Chosen]) -> str:
    """What the best checkpoint is kept by, as a row calls it: held_out_loss, BENCHMARK or BENCHMARK.SCORE."""
    scored = {one.name: one for one in chosen if one.scores}
    possible = [best.LOSS] * bool(settings.held_out) + list(scored)
    if not settings.best:
        return possible[0] if possible else ""
    if settings.best in possible:
        return settings.best
    name, _, score = settings.best.partition(".")
    if name in scored and score in scored[name].scores:
        return settings.best
    possible += [f"{one.name}.{score}" for one in scored.values() for score in one.scores]
    raise ValueError(
        f"evaluate.best = {settings.best!r}: this recipe's evaluations do not give it; "
        f"there is {', '.join(possible) or 'nothing that is a number'}"
    )


def value_of(row: Row, by: str) -> float | None:
    """The figure of a row that `by` names; None when it could not be made."""
    if by == best.LOSS:
        return row[best.LOSS]
    name, _, score = by.partition(".")
    return row["scores"].get(name, {}).get(score) if score else row["headline"].get(name)


class Evaluator:
    """The evaluations of one run. Made and used by all ranks alike.

    `save` begins a checkpoint of a state, and calls what it is given when that is whole; `tell` hears the figures.
    """

    def __init__(self, asked: Asked, rounds: Rounds, loop: Loop, saver: Saver, save: Save, tell: Callable[[Row], None]):
        self.asked, self.rounds, self.loop, self.saver, self.save, self.tell = asked, rounds, loop, saver, save, tell
        self.settings, self.run = rounds.recipe.evaluate, Path(rounds.recipe.run)
        self.best: best.Best | None = ranks.from_first(best.read(self.run) if ranks.is_first() else None)

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        return step == self.loop.steps or bool(self.settings.every and step and step % self.settings.every == 0)

    def make_up(self) -> None:
        """The evaluation of the step that the run was taken up at, where it stopped before that was done."""
        state = self.loop.state
        if not self.due(state.step):
            return
        row = ranks.from_first(read_rows(self.run).get(state.step) if ranks.is_first() else None)
        if row is None:
            self.evaluate(state)
        elif self.asked.by and best.is_better(self.asked.by, value := value_of(row, self.asked.by), self.best):
            assert value is not None
            self._keep(state, value)  # it stopped between the row and the checkpoint's name

    def evaluate(self, state: State) -> None:
        """Measure, write it down, and keep the checkpoint of this step if it is the best so far."""
        started = time.monotonic()
        try:
            with unchanged(self.rounds.module, self.rounds.device):
                row = self._row(state.step)
        except Stopped:
            console.say(f"evaluation at step {state.step}: left, since the run was asked to stop")
            return
        row["seconds"] = time.monotonic() - started
        for warning in row["warnings"]:
            console.warn(f"evaluation at step {state.step}: {warning}")
        value = value_of(row, self.asked.by) if self.asked.by else None
        row["best"] = best.is_better(self.asked.by, value, self.best)
        if ranks.is_first():
            self._write(row)
            console.say(line(row))
            self.tell(figures(row))
        if row["best"]:
            assert value is not None
            self._keep(state, value)

    def _row(self, step: int) -> Row:
        self.rounds.warnings = []
        losses = held_out.losses(self.asked.held_out, self.rounds)
        found = {one.name: scored for one in self.asked.benchmarks if (scored := self._scored(one)) is not None}
        return {
            "step": step,
            "seconds": 0.0,
            best.LOSS: held_out.mean(losses),
            "held_out": {name: loss for name, (loss, _) in losses.items()},
            "scores": {name: one.scores for name, one in found.items() if one.scores},
            "headline": {name: one.headline for name, one in found.items() if one.headline is not None},
            "partial": {name: one.share for name, one in found.items() if one.share < 1},
            "samples": [sample for one in found.values() for sample in one.samples],
            "warnings": self.rounds.warnings,
        }

    def _scored(self, chosen: Chosen) -> Scored | None:
        said = answers(chosen.name, chosen.questions, chosen.tokens, self.rounds)
        if said is None:
            return None
        if wrong := [(q.id, one.error) for q, one in zip(chosen.questions, said, strict=True) if one.error]:
            text = f"{len(wrong)} question(s) without an answer, the first: {wrong[0][0]}: {wrong[0][1]}"
            self.rounds.warnings.append(f"{chosen.name}: {text}")
        scored, warning = ranks.from_first(self._score(chosen, said) if ranks.is_first() else None)
        self.rounds.warnings += [warning] if warning else []
        return scored

    def _score(self, chosen: Chosen, said: list[Said]) -> tuple[Scored | None, str]:
        try:
            return benchmarks.scored(chosen, said, self.settings.samples), ""
        except ValueError as error:
            return None, f"{chosen.name}: {error}"

    def _write(self, row: Row) -> None:
        path = self.run / FILE
        with checkpoint.disk_errors(path):
            torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" * torn + json.dumps(row, ensure_ascii=False) + "\n")

    def _keep(self, state: State, value: float) -> None:
        """The checkpoint of this step is the best: written if it is not there, and named when it is whole."""
        folder = checkpoint.folder_of(self.run, state.step)
        name = partial(self._name, state.step, value)
        self.best = best.Best(state.step, self.asked.by, value, str(folder))
        self.saver.wait()
        if ranks.from_first(checkpoint.is_whole(folder)):
            ranks.on_first(name)
        else:
            self.save(state, name)

    def _name(self, step: int, value: float) -> None:
        """On rank 0: the checkpoint that stands is the best, and the one that was need not stay."""
        best.write(self.run, step, self.asked.by, value)
        prune(self.run, self.rounds.recipe.checkpoint.keep)


def read_rows(run: Path) -> dict[int, Row]:
    """The rows of `evaluations.jsonl` by step; of a step that was done twice, the last. A torn line is left out."""
    path, rows = run / FILE, dict[int, Row]()
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:  # a killed run may have left half a line
            continue
        rows[row["step"]] = row
    return rows


def figures(row: Row) -> dict[str, Any]:
    """A row for trackers: `evaluate/held_out_loss`, `evaluate/pope`, and by source and score."""
    found: dict[str, Any] = {best.LOSS: row[best.LOSS]} if row[best.LOSS] is not None else {}
    found |= {f"{best.LOSS}/{name}": loss for name, loss in row["held_out"].items()} if len(row["held_out"]) > 1 else {}
    found |= row["headline"]
    found |= {f"{name}/{score}": value for name, scores in row["scores"].items() for score, value in scores.items()}
    return {"step": row["step"], "evaluate": found}


def line(row: Row) -> str:
    """One console line."""
    said = [] if row[best.LOSS] is None else [f"held-out loss {row[best.LOSS]:.4f}"]
    for name, value in row["headline"].items():
        share = row["partial"].get(name)
        said.append(f"{name} {value:.4g}" + (f" (of {share:.1%} of its questions)" if share else ""))
    text = ", ".join(said) or "nothing could be measured"
    return f"evaluation at step {row['step']}: {text}  {row['seconds']:.1f} s" + (
        "  the best so far" if row["best"] else ""
    )


def summary(run: Path) -> dict[str, Any]:
    """The last figures of a run and its best checkpoint, for `summary.json`; empty when nothing was asked."""
    rows = read_rows(run)
    if not rows:
        return {}
    last, known = rows[max(rows)], best.read(run)
    return {
        "evaluation": {key: last[key] for key in ("step", best.LOSS, "held_out", "scores", "headline", "partial")},
        "best": None if known is None else asdict(known),
    }


def how_to_use(known: dict[str, Any]) -> str:
    """Where the best checkpoint is (`best.json`'s words), for a run whose last one is another."""
    return (
        f"best {known['by']}: {known['value']:.4g} at step {known['step']}, in {known['checkpoint']}; "
        f"`vistune merge {known['checkpoint']} --out FOLDER` makes a model folder of it, "
        "`vistune chat` and `vistune evaluate` open it as it is"
    )
