"""One tiny model folder (or checkpoint) of every family, for what must hold in all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.made import stage0
from tests.tiny import GOLDEN
from tests.tiny_fastvlm import golden_hf
from vistune.models.families import names

ORIGINAL = GOLDEN / "llava" / "tiny-llava-original"

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "llava": stage0,
    "llava_variant": lambda made: ORIGINAL / "llava-linear",
    "llava_next": lambda made: ORIGINAL / "llava-anyres-spatial_unpad",
    "fastvlm": lambda made: golden_hf(made / "fastvlm"),
    "onevision15": lambda made: GOLDEN / "onevision15" / "tiny-stage0",
}

each_family = pytest.mark.parametrize("name", names())


def folders_in(made: Path) -> Callable[[str], Path]:
    """What gives a folder of each family, made once; those that have to be made go into `made`."""

    @functools.cache
    def folder(name: str) -> Path:
        assert name in FOLDERS, f"{name}: a new family needs a tiny folder here; what holds in all is then tested in it"
        return FOLDERS[name](made / name)

    return folder
