"""Mixture arithmetic: how many samples of each source come in one epoch. Numbers alone, no rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What is asked of one source. A `weight` above 0 stands instead of `epochs`; `cap` holds with either."""

    epochs: float = 1.0
    weight: float = 0.0
    cap: int = 0


def samples_each(good: Sequence[int], shares: Sequence[Share]) -> list[int]:
    """Samples of each source in one epoch, from how many usable ones each has.

    With weights an epoch has as many samples as there are usable ones, split by weight to the last sample (largest
    remainders). Without, a source comes `epochs` times, rounded. A cap only takes away: the others get no more.
    Raises ValueError for a missing share, for weights on some sources only, and for a weight on nothing.
    """
    if len(shares) < len(good):
        raise ValueError(f"the index has {len(good)} sources, shares are given for {len(shares)}")
    shares = shares[: len(good)]
    weighted = [share.weight > 0 for share in shares]
    if any(weighted):
        if not all(weighted):
            raise ValueError(f"data.sources: source {weighted.index(False)} has no weight, others have one")
        for source, count in enumerate(good):
            if not count:
                raise ValueError(f"data.sources: source {source} has a weight and no sample that can be used")
        wanted = _split(sum(good), [share.weight for share in shares])
    else:
        wanted = [_nearest(count * share.epochs) for count, share in zip(good, shares, strict=True)]
    return [min(n, share.cap) if share.cap else n for n, share in zip(wanted, shares, strict=True)]


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole numbers, as near to the weights as can be."""
    exact = total * np.asarray(weights, np.float64) / sum(weights)
    parts = np.floor(exact).astype(np.int64)
    missing = total - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:missing]] += 1
    return [int(part) for part in parts]


def _nearest(number: float) -> int:
    return int(np.floor(number + 0.5))
