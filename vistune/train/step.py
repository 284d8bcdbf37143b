"""Model and loss as one module: what a step runs forward and backward, and what sharding wraps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vistune.data.batch import Batch
from vistune.images import Layout, normalize
from vistune.models.families import Family
from vistune.train.loss import cross_entropy_sum


def followed(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that move with the data: the statistics of batch norms that learn, by name."""
    norms = {path: one for path, one in model.named_modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)}
    learning = {path: one for path, one in norms.items() if any(p.requires_grad for p in one.parameters())}
    return {f"{path}.{name}": held for path, one in learning.items() for name, held in one.named_buffers(recurse=False)}


class StepModule(nn.Module):
    """Model and loss as one module: forward(batch) is the summed loss. It is the root that sharding wraps, so that the
    head's weight is gathered where it is used."""

    def __init__(self, model: nn.Module, family: Family, layout: Layout, dtype: torch.dtype):
        super().__init__()
        self.model = model
        self.family = family
        self.layout = layout
        self.dtype = dtype

    def forward(self, batch: Batch) -> Tensor:
        """Summed cross-entropy over the batch's supervised tokens: fp32 scalar."""
        kept = [(held, held.clone()) for held in followed(self.model).values()] if batch.blank else []
        pixels = None if batch.pixels is None else normalize(batch.pixels, self.layout, self.dtype)
        hidden_TD = self.family.hidden(self.model, batch.ids, batch.positions, batch.lengths, pixels, batch.grids)
        for held, before in kept:  # nobody's picture is no part of the statistics
            held.data.copy_(before)
        return cross_entropy_sum(hidden_TD.index_select(0, batch.rows), self.family.head(self.model), batch.targets)

    def lend(self, work: Callable[[], Any]) -> Any:
        """Call `work`, which runs the model without this module; where weights lie in shards, with those gathered that
        are in no layer, as a forward has them."""
        return work()
