"""How the ranks go through an evaluation together: what failed on one is known to all, and so is a wish to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vistune import ranks
from vistune.models.load import Loaded
from vistune.recipe import Recipe
from vistune.train.guarding.out_of_memory import ran_out
from vistune.train.spreading import parallel, precision
from vistune.train.step import StepModule

FAILURES = (ValueError, OSError, RuntimeError, MemoryError)
"""What may go wrong while a model is asked, and is no reason to end its training."""


class Stopped(Exception):
    """A rank was asked to stop: what is being measured is left as it is."""


@dataclass
class Rounds:
    """The model that trains, as it is measured, on one rank of all.

    `beat` is called before each forward, or a few of them, with what is at work; `stopping` says that this rank was
    asked to stop.
    """

    recipe: Recipe
    loaded: Loaded
    module: StepModule
    device: torch.device
    dtype: torch.dtype
    beat: Callable[[str], None] = lambda what: None
    stopping: Callable[[], bool] = lambda: False
    warnings: list[str] = field(default_factory=list)

    @property
    def sharded(self) -> bool:
        """Then a forward is one of all ranks: each takes part in all, or none gets to its end."""
        return parallel.sharded(self.recipe)

    def autocast(self) -> Any:
        return precision.autocast(self.recipe.train.precision, self.dtype, self.device)

    def leave_if_asked(self) -> None:
        """Raises Stopped when this rank was asked to stop; with shards, when any was."""
        if any(ranks.gather(self.stopping())) if self.sharded else self.stopping():
            raise Stopped

    def together(self, what: str, work: Callable[[], Any]) -> list[Any] | None:
        """What `work` returns (picklable, small) on every rank, in rank order; None, with a warning, where it failed
        on any. With shards a failure ends the run: the others would wait for this rank's part.

        `work` has no collectives unless weights lie in shards. Raises Stopped on every rank alike.
        """
        found, failure, stopped = None, "", False
        try:
            found = work()
        except Stopped:
            stopped = True
        except FAILURES as error:
            if self.sharded and ran_out(error):
                raise ValueError(f"{what}: {_sentence(error)}") from error
            if self.sharded:
                raise
            failure = _sentence(error)
        told = ranks.gather((found, failure, stopped))
        if any(stop for _, _, stop in told):
            raise Stopped
        if wrong := [said for _, said, _ in told if said]:
            self.warnings.append(f"{what}: {wrong[0]}")
            return None
        return [each for each, _, _ in told]


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    if ran_out(error):
        return f"out of memory ({lines[0][:200]}); a smaller evaluate.batch or train.micro_batch needs less"
    return lines[0][:300] if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[0][:300]}"
