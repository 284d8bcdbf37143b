"""Model and loss as one module: what a step runs forward and backward, and what sharding wraps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vistune.data.batch import Batch
from vistune.images import Layout, normalize
from vistune.models.families import Family
from vistune.train.loss import cross_entropy_sum


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
        pixels = None if batch.pixels is None else normalize(batch.pixels, self.layout, self.dtype)
        hidden_TD = self.family.hidden(self.model, batch.ids, batch.positions, batch.lengths, pixels, batch.grids)
        return cross_entropy_sum(hidden_TD[batch.rows], self.family.head(self.model), batch.targets)
