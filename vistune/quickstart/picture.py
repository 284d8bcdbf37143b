"""The quickstart's one-page picture: both loss curves, the scores beside their controls, a few held-out pictures.

Draws what it is handed; knows nothing of models. matplotlib is an optional extra (`pip install vistune[report]`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

MISSING = "no report.png: matplotlib is not installed; `pip install 'vistune[report]'` brings it"

_INK, _FAINT, _LINE, _PAPER = "#1f2430", "#8a90a0", "#e3e6ec", "#fbfbfd"
_ALIGN, _INSTRUCT, _CONTROL = "#2f6fbb", "#7a4bb0", "#c3c8d2"
_RIGHT, _WRONG = "#1e8a5a", "#c8372d"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _LINE,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
}


class NoMatplotlib(ValueError):
    """matplotlib is not installed; the message says how to get it."""


class Example(NamedTuple):
    """A held-out picture (its file), what was asked, what the model said, and what is true."""

    image: Path
    question: str
    answer: str
    truth: str


class Score(NamedTuple):
    """A share of right answers and that of its control, the same questions with the pictures shuffled; 0 to 1."""

    name: str
    real: float
    shuffled: float


def report(
    path: Path,
    *,
    losses: Mapping[str, Sequence[float]],
    scores: Sequence[Score],
    examples: Sequence[Example],
    subtitle: str = "",
) -> None:
    """Draw `path` (PNG). `losses` are per step, by stage; at most eight examples are shown.

    Raises NoMatplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlib(MISSING) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.2, 9.2), dpi=120)
        figure.text(0.045, 0.948, "A small LLaVA, from parts to answers", size=20, weight="bold")
        figure.text(0.046, 0.918, subtitle, size=10.5, color=_FAINT)
        top = figure.add_gridspec(1, 3, left=0.06, right=0.965, top=0.84, bottom=0.6, wspace=0.24)
        colors = (_ALIGN, _INSTRUCT)
        for column, ((stage, values), color) in enumerate(zip(losses.items(), colors, strict=False)):
            _curve(figure.add_subplot(top[0, column]), stage, values, color)
        _bars(figure.add_subplot(top[0, 2]), scores)
        figure.text(0.045, 0.508, "Pictures of scans that no part has ever seen", size=11.5, weight="bold")
        figure.text(0.362, 0.508, "each with its question and the answer; mistakes come last", color=_FAINT)
        _examples(figure, examples[:8])
        figure.savefig(path)


def _curve(axes: Any, stage: str, values: Sequence[float], color: str) -> None:
    """The loss of every step, faint, and its moving mean over a thirtieth of the stage."""
    from matplotlib.ticker import LogLocator

    steps = range(1, len(values) + 1)
    axes.plot(steps, values, color=color, alpha=0.28, linewidth=1.0)
    axes.plot(steps, _smooth(values, max(1, len(values) // 30)), color=color, linewidth=2.2)
    axes.set_title(f"Loss of {stage}")
    axes.set_xlabel("step")
    axes.set_yscale("log")
    axes.set_xlim(0, len(values) + 1)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color=_LINE, linewidth=0.8)
    axes.tick_params(length=0)
    if values:
        last = values[-1] if len(values) < 30 else sum(values[-10:]) / 10
        axes.text(
            0.97, 0.93, f"{values[0]:.2f} → {last:.3f}", transform=axes.transAxes, ha="right", va="top", color=color
        )


def _smooth(values: Sequence[float], width: int) -> list[float]:
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _bars(axes: Any, scores: Sequence[Score]) -> None:
    axes.set_title("Exact match on held-out pictures")
    colors = (_ALIGN, _INSTRUCT)
    for number, (score, color) in enumerate(zip(scores, colors, strict=False)):
        row = 1.3 * number
        for shift, share, shade, label in (
            (-0.2, score.real, color, "its own picture"),
            (0.17, score.shuffled, _CONTROL, "another picture"),
        ):
            axes.barh(row + shift, 100 * share, height=0.32, color=shade)
            axes.text(100 * share + 1.5, row + shift, f"{100 * share:.1f} %  {label}", va="center", size=9, color=_INK)
        axes.text(0, row - 0.41, score.name, ha="left", va="bottom", size=9.5, color=_FAINT)
    axes.set_xlim(0, 152)
    axes.set_ylim(1.3 * len(scores) - 0.75, -0.75)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 100)
    axes.tick_params(length=0)


def _examples(figure: Any, examples: Sequence[Example]) -> None:
    """Two rows of four: the picture, and beside it the question and the answer, green when it is right."""
    grid = figure.add_gridspec(2, 4, left=0.045, right=0.975, top=0.478, bottom=0.035, wspace=0.06, hspace=0.12)
    for place, example in enumerate(examples):
        cell = grid[place // 4, place % 4].subgridspec(1, 2, width_ratios=(1.36, 1), wspace=0.08)
        shown = figure.add_subplot(cell[0, 0])
        shown.imshow(Image.open(example.image), interpolation="bilinear")
        right = example.answer == example.truth
        for spine in shown.spines.values():
            spine.set(visible=True, color=_RIGHT if right else _WRONG, linewidth=1.6)
        shown.set(xticks=[], yticks=[])
        told = figure.add_subplot(cell[0, 1])
        told.set_axis_off()
        told.set(xlim=(0, 1), ylim=(0, 1))
        text = told.text(0, 0.97, _wrapped(example.question, 15), va="top", size=9.5, linespacing=1.35)
        height = 0.105 * (text.get_text().count("\n") + 1)
        answer = _wrapped(example.answer or "(nothing)", 12)
        told.text(0, 0.9 - height, answer, va="top", size=11.5, weight="bold", color=_RIGHT if right else _WRONG)
        if not right:
            below = 0.9 - height - 0.125 * (answer.count("\n") + 1)
            told.text(0, below, _wrapped(f"truth: {example.truth}", 16), va="top", size=9, color=_FAINT)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
