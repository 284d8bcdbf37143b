"""A blank picture beside a micro-batch, of every layout: no target, no sample, a row of whole multiples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vistune.anyres import AnyresLayout, standard_pinpoints
from vistune.data.batch import Item, collate, nothing_to_see
from vistune.data.tokenize import Language, Tokens
from vistune.images import FixedLayout
from vistune.native import NativeLayout

LAYOUTS = {
    "fixed": FixedLayout(size=56, resize=56),
    "fastvlm": FixedLayout(mode="pad", size=256, patch=64, resize=256),
    "native": NativeLayout(),
    "capped": NativeLayout(image_resolution=112),
    "anyres": AnyresLayout(size=56, patch=14, pinpoints=standard_pinpoints(56)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_blank_picture_beside_text(name):
    layout = LAYOUTS[name]
    language = Language(None, None, layout, image_token_id=7)  # type: ignore[arg-type]
    ids, learned = np.arange(10, 21, dtype=np.int32), np.ones(11, np.bool_)
    text = Item((0, 3), Tokens(ids, learned, []), [])
    alone, beside = collate([text], 16), collate([text], 16, [nothing_to_see(language)])
    placeholders = int((beside.ids == 7).sum())
    assert placeholders == layout.tokens(56, 56) and beside.images == 1
    assert beside.lengths[:2] == [11, placeholders] and sum(beside.lengths) == len(beside.ids)
    assert len(beside.ids) % 16 == 0
    assert torch.equal(beside.rows, alone.rows) and torch.equal(beside.targets, alone.targets)
    assert (beside.tokens, beside.samples, beside.keys) == (alone.tokens, alone.samples, alone.keys)
    if beside.grids is not None:
        assert beside.grids.tolist() == [list(layout.grid(56, 56))]
    empty = collate([], 16, [nothing_to_see(language)])
    assert empty.images == 1 and not len(empty.targets) and empty.samples == 0
