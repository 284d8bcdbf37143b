"""The written pictures show what their rows say, on the right side of the split, the same bytes every time."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vistune.quickstart import digits, scenes, words

SIZES = scenes.Sizes(align=5, instruct=4, captions=3, questions=3, turns=3)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        scenes.write(tmp_path / name, seed, SIZES)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_rows_and_pictures_belong_together(tmp_path):
    paths = scenes.write(tmp_path, 0, SIZES)
    for path, count in zip(paths[1:], (5, 4, 3, None), strict=True):
        rows = json.loads(path.read_text())
        assert count in (None, len(rows))
        for row in rows:
            with Image.open(paths.images / row["image"]) as image:
                assert image.size == (scenes.SIDE, scenes.SIDE) and image.mode == "RGB"
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
    asked = json.loads(paths.questions.read_text())
    assert {row["id"].rsplit("-", 1)[1] for row in asked} <= set(words.KINDS)
    assert len({row["id"] for row in asked}) == len(asked) > 3


def test_held_out_scans_stay_out_of_training(tmp_path, monkeypatch):
    shown: list[set[int]] = []
    draw = scenes.picture

    def spy(scene, *rest):
        shown.append({scan for scan in scene.scans if scan is not None})
        return draw(scene, *rest)

    monkeypatch.setattr(scenes, "picture", spy)
    scenes.write(tmp_path, 0, SIZES)
    train, held_out = (set(part.tolist()) for part in digits.split())
    assert len(shown) == 15 and all(shown)
    assert set().union(*shown[:9]) <= train
    assert set().union(*shown[9:]) <= held_out


@pytest.mark.parametrize("cell", range(4))
def test_a_scan_is_drawn_upright_in_its_cell(cell):
    images, labels = digits.load()
    scan = 7 * cell + 1
    scans = tuple(scan if i == cell else None for i in range(4))
    cells = tuple(int(labels[scan]) if i == cell else None for i in range(4))
    still = scenes.Jitter(size=(40.0, 40.0), turn=0.0, shear=0.0, shift=0.0)
    drawn = scenes.picture(scenes.Scene(scans, cells), images, random.Random(0), still).convert("L")
    ink = 255.0 - np.asarray(drawn, np.float64)
    ink -= ink.min()
    row, column = divmod(cell, 2)
    ours = ink[row * 48 : row * 48 + 48, column * 48 : column * 48 + 48]
    assert ours.sum() > 0.999 * ink.sum()
    small = ours[4:44, 4:44].reshape(8, 5, 8, 5).mean((1, 3)).ravel()  # 8 x 8 scan enlarged five times
    likeness = [np.corrcoef(small, other.ravel())[0, 1] for other in images]
    assert int(np.argmax(likeness)) == scan and likeness[scan] > 0.95
