"""Whom an evaluation asks: how, what it is known by, and where its results go. Knows nothing of benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vistune import generate, ranks
from vistune.evaluate.answering import Answerer, Local
from vistune.evaluate.judge import Judge
from vistune.evaluate.remote import Remote, is_url
from vistune.evaluate.written import weights_hash

T = TypeVar("T")

DAY = 86400.0
"""Seconds that ranks wait for each other: shares are of equal work, but not of equal luck."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is asked. Empty and 0 are the default: all questions, the protocol's number of tokens, the folder's
    own template, bf16 on a GPU and fp32 on a CPU."""

    batch: int = 16
    limit: int = 0
    max_new_tokens: int = 0
    quantize: str = ""
    base: str = ""
    template: str = ""
    device: str = "auto"
    precision: str = ""
    served: str = ""
    key: str = "OPENAI_API_KEY"
    images: Path | None = None
    judge: Judge | None = None


class Subject:
    """Whom is asked: known by its files or its server, opened when the first question is left to ask."""

    def __init__(self, model: str, settings: Settings):
        """Every rank makes one. ValueError for a device, a model or a server that is not there."""
        self.model, self.settings, self.remote = model, settings, is_url(model)
        self._opened: Answerer | None = None
        if self.remote:
            ranks.start("cpu", timeout=DAY)
            self._opened = Remote(model, settings.served, settings.key, settings.batch)
            self.name, self.precision = self._opened.name, "as served"
        else:
            device = ranks.start(settings.device, timeout=DAY)
            self.name, self.precision = name_of(model), generate.precision_on(device, settings.precision)
        self.identity: dict[str, Any] = from_first(self._identity)

    def _identity(self) -> dict[str, Any]:
        """What answers depend on, beside the questions."""
        given = self.settings
        if self.remote:
            return {"model": self.model, "served": self.name}
        base = {"base": weights_hash(given.base)} if given.base else {}
        return {
            "model": self.model,
            "weights": weights_hash(self.model),
            **base,
            "precision": self.precision,
            "quantize": given.quantize or "none",
            "template": given.template or "the model's",
        }

    def open(self) -> Answerer:
        if self._opened is None:
            given = self.settings
            loaded = generate.open_model(
                self.model,
                given.device,
                given.quantize,
                given.base or None,
                template=given.template,
                precision=given.precision,
            )
            self._opened = Local(loaded, given.batch, self.name)
        return self._opened


def name_of(model: str) -> str:
    """A model's name among others: its folder's, or its run's."""
    path = Path(model)
    return (path.parent.name if path.name == "model" and path.parent.name else path.name) or path.resolve().name


def default_out(model: str) -> Path:
    """Where an evaluation goes that is not told: evaluation/ of the run, else evaluation/<the model's name> here."""
    if is_url(model):
        return Path("evaluation") / model.partition("//")[2].strip("/").replace("/", "-").replace(":", "-")
    path = Path(model)
    run = path.parent if path.name == "model" else path
    return run / "evaluation" if (run / "recipe.toml").is_file() else Path("evaluation") / name_of(model)


def everywhere(work: Callable[[], T]) -> T:
    """What every rank makes for itself; rank 0 first, so that what is wrong is said once."""
    mine: list[T] = []
    ranks.on_first(lambda: mine.append(work()))
    return mine[0] if mine else work()


def from_first(work: Callable[[], T]) -> T:
    """What rank 0 makes, on every rank."""
    made: list[T] = []
    ranks.on_first(lambda: made.append(work()))
    return ranks.from_first(made[0] if made else None)
