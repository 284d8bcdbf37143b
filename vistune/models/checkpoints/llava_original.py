"""LLaVA's original checkpoints: for now the connector alone, `mm_projector.bin` of a first stage.

Knows the published file (a pickle, read without unpickling anything but tensors), nothing of model folders.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from vistune.models import weights

# The stock connector's two layers by the index they have in the original's nn.Sequential.
_LAYERS = {"0": "linear_1", "2": "linear_2"}


def read_connector(path: Path | str) -> dict[str, Tensor]:
    """The connector of an `mm_projector.bin` under the stock names: linear_1.weight, ..., linear_2.bias.

    Any prefix before "mm_projector." is taken; other tensors (embeddings) are left. ValueError for a file that is no
    such pickle, or holds another kind of connector than mlp2x_gelu.
    """
    held = weights.pickled(Path(path))
    found = {key.rpartition("mm_projector.")[2]: value for key, value in held.items() if "mm_projector." in key}
    if set(found) == {"weight", "bias"}:
        raise ValueError(f"{path}: a linear connector; only mlp2x_gelu (two linear layers) can be used")
    connector = {}
    for key, value in found.items():
        match = re.fullmatch(r"([02])\.(weight|bias)", key)
        if not match:
            raise ValueError(f"{path}: mm_projector.{key} does not belong to mlp2x_gelu; its keys are {sorted(found)}")
        connector[f"{_LAYERS[match[1]]}.{match[2]}"] = value
    if len(connector) != 4:
        raise ValueError(f"{path}: holds {sorted(held)[:10]}, not the four tensors of an mlp2x_gelu connector")
    return connector
