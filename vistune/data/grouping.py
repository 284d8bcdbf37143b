"""Orders that put samples of like length, and of one modality, into one step. Pure functions of lengths and generators.

The arithmetic is that of LLaVA's trainer (`group_by_modality_length`), its oddities included.
"""

from __future__ import annotations

from heapq import heapify, heapreplace

import numpy as np
import torch


def length_grouped(lengths: np.ndarray, batch: int, world: int, generator: torch.Generator) -> np.ndarray:
    """int64: all places, in steps of `world` times `batch` samples drawn at random and laid out by length.

    Within a step the samples go, longest first, to the micro-batch with the fewest tokens that still has room, so that
    its `world` micro-batches of `batch` samples are alike. A step that does not divide by `world` is dealt out in turn.
    """
    drawn = torch.randperm(len(lengths), generator=generator).numpy()
    step = world * batch
    steps = (drawn[start : start + step] for start in range(0, len(drawn), step))
    laid = [_balanced(np.asarray(lengths), places, world) for places in steps]
    return np.concatenate(laid) if laid else drawn


def modality_grouped(
    lengths: np.ndarray,
    batch: int,
    world: int,
    generator: torch.Generator,
    of_steps: torch.Generator | None = None,
) -> np.ndarray:
    """int64: all places; each step of `world` times `batch` has pictures only or text only, but for a tail.

    The sign of a length is its modality: above 0 with pictures, below 0 text alone. `generator` draws the samples of
    both modalities, `of_steps` (or `generator`, if there is none) then the order of the steps, and everything where
    there is one modality only. As in LLaVA, the last step of either modality goes to the mixed tail, even a full one,
    where places ascend; and with text alone the lengths stay negative, so that the shortest come first. Raises
    ValueError for a length of 0.
    """
    lengths = np.asarray(lengths)
    if not lengths.all():
        raise ValueError(f"sample {int(np.flatnonzero(lengths == 0)[0])} has no length")
    if (lengths > 0).all() or (lengths < 0).all():
        return length_grouped(lengths, batch, world, of_steps or generator)
    steps: list[np.ndarray] = []
    tail: list[np.ndarray] = []
    for members in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        order = members[length_grouped(np.abs(lengths[members]), batch, world, generator)]
        *whole, last = (order[start : start + world * batch] for start in range(0, len(order), world * batch))
        steps += whole
        tail.append(last)
    drawn = torch.randperm(len(steps), generator=of_steps or generator).tolist()
    return np.concatenate([*(steps[step] for step in drawn), np.sort(np.concatenate(tail))])


def _balanced(lengths: np.ndarray, places: np.ndarray, world: int) -> np.ndarray:
    """The places of one step, micro-batch after micro-batch."""
    longest_first = places[np.argsort(-lengths[places].astype(np.int64), kind="stable")]
    if len(places) % world:
        return np.concatenate([longest_first[micro::world] for micro in range(world)])
    micros: list[list[int]] = [[] for _ in range(world)]
    loads = [(0, micro) for micro in range(world)]
    heapify(loads)
    room = len(places) // world
    for place, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        load, micro = loads[0]
        micros[micro].append(place)
        heapreplace(loads, (load + length, micro) if len(micros[micro]) < room else (_FULL, micro))
    return np.asarray([place for micro in micros for place in micro], np.int64)


_FULL = 1 << 62
