"""Samples into packs, packs onto ranks. Knows lengths and costs, nothing of what they belong to."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

import numpy as np


def best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Best-fit decreasing: every place of `lengths` in one pack, no pack above `room`; equal input, equal output.

    Open packs are kept by the room they have left, so that a sample costs one bisection over the distinct rooms.
    """
    packs: list[list[int]] = []
    if not len(lengths):
        return packs
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    sizes = lengths[order].tolist()
    if sizes[0] > room:
        raise ValueError(f"a sample of {sizes[0]} tokens does not fit a pack of {room}")
    smallest = sizes[-1]
    rooms: list[int] = []  # sorted, of the packs that can take something yet
    having: defaultdict[int, list[int]] = defaultdict(list)  # room left -> packs
    for place, size in zip(order.tolist(), sizes, strict=True):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            pack, left = len(packs), room - size
            packs.append([place])
        else:
            space = rooms[at]
            stack = having[space]
            pack, left = stack.pop(), space - size
            packs[pack].append(place)
            if not stack:
                del rooms[at]
        if left >= smallest:
            if not having[left]:
                insort(rooms, left)
            having[left].append(pack)
    return packs


def deal(costs: np.ndarray, world: int, packs_per_micro: int) -> list[list[list[int]]]:
    """[micro-batch][rank] -> packs: as many micro-batches on every rank, of at most `packs_per_micro` packs each.

    Ranks wait for each other in every micro-batch, so packs of like cost meet in one (dearest first), and within it
    the next pack goes to the rank that has had least so far. The last micro-batch may be empty on some ranks.
    """
    order = np.argsort(-costs, kind="stable").tolist()
    had = [0.0] * world
    dealt = []
    for start in range(0, len(order), world * packs_per_micro):
        micro: list[list[int]] = [[] for _ in range(world)]
        for pack in order[start : start + world * packs_per_micro]:
            open_ranks = [rank for rank in range(world) if len(micro[rank]) < packs_per_micro]
            rank = min(open_ranks, key=lambda rank: (len(micro[rank]), had[rank], rank))
            micro[rank].append(pack)
            had[rank] += float(costs[pack])
        dealt.append(micro)
    return dealt
