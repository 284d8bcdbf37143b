"""The report is drawn, shows right and wrong in their colours, and says what to do without matplotlib."""

import builtins

import numpy as np
import pytest
from PIL import Image

from vistune.quickstart import picture


def draw(folder, answers):
    shown = folder / "shown.png"
    Image.new("RGB", (96, 96), (250, 250, 250)).save(shown)
    path = folder / "report.png"
    picture.report(
        path,
        losses={"align": [3.0, 2.0, 1.0], "instruct": [1.0] * 40},
        scores=[picture.Score("captions", 0.9, 0.1), picture.Score("questions", 0.95, 0.2)],
        examples=[picture.Example(shown, "Which digit is the largest?", answer, "seven") for answer in answers],
    )
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def has(pixels, color: str) -> bool:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels - wanted).max(2) < 4).sum() > 200)


def test_colours_follow_the_answers(tmp_path):
    pytest.importorskip("matplotlib")
    right, wrong = draw(tmp_path, ["seven"] * 8), draw(tmp_path, ["", "one"])
    assert (has(right, picture._RIGHT), has(right, picture._WRONG)) == (True, False)
    assert (has(wrong, picture._RIGHT), has(wrong, picture._WRONG)) == (False, True)


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"pip install 'vistune\[report\]'"):
        draw(tmp_path, ["seven"])
