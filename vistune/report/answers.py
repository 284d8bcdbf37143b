"""Sampled answers of a run's evaluations: one card a question, its picture, and what was said after which step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from vistune import pages
from vistune.report.run import Run

MOST = 16
"""Questions of a benchmark on the page."""
_SAID = 6  # answers to a question: the first, and the last ones
_SIDE = 224  # pixels


@dataclass
class Asked:
    """One question over the evaluations; `said` is (step, answer, right or not, or None where nothing is)."""

    benchmark: str
    id: str
    question: str
    truth: str
    image: str
    said: list[tuple[int, str, bool | None]] = field(default_factory=list)
    picture: str = ""
    blank: str = ""

    @property
    def shown(self) -> list[tuple[int, str, bool | None]]:
        """The first and the last ones, latest first; an answer that did not change is said once, when it came."""
        changed = [one for i, one in enumerate(self.said) if i == 0 or one[1:] != self.said[i - 1][1:]]
        return (changed[:1] + changed[max(1, len(changed) - _SAID + 1) :])[::-1]


def asked(run: Run) -> list[Asked]:
    """By benchmark, in the order in which they were asked first; with pictures, or why there is none."""
    known: dict[tuple[str, str, str], Asked] = {}
    for row in run.evaluations:
        for one in row.get("samples") or []:
            name, question, truth, image = (str(one.get(k) or "") for k in ("benchmark", "question", "truth", "image"))
            key = (name, str(one.get("question_id")), question)
            found = known.setdefault(key, Asked(name, key[1], question, truth, image))
            found.said.append((int(row["step"]), str(one.get("answer") or ""), one.get("correct")))
    kept = [one for name in dict.fromkeys(key[0] for key in known) for one in _of(name, known)[:MOST]]
    for one in kept:
        one.picture, one.blank = _picture(one.image, run.folder) if one.image else ("", "")
    return kept


def _of(name: str, known: dict[tuple[str, str, str], Asked]) -> list[Asked]:
    return [one for key, one in known.items() if key[0] == name]


def _picture(path: str, folder: Path) -> tuple[str, str]:
    """As a data URI, or why it cannot be shown. A path counts from where the run was started, or from its folder."""
    place = next((one for one in (Path(path), folder / path) if one.is_file()), None)
    if place is None:
        return "", f"not there: {path}"
    try:
        with PIL.Image.open(place) as opened:
            return pages.data_uri(opened, _SIDE), ""
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        return "", f"cannot be opened: {path}: {error}"
