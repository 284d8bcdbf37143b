"""Samples into packs, packs onto ranks. Knows lengths, pictures and costs, nothing of what they belong to."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

_OPEN_UNTIL = 2.25
"""A pack takes samples as they come until it has room for so many more of mean length; then the best pair is looked
for. Measured on lengths like those of LLaVA's mixture: 2 to 2.5 fill best, 1.5 and 3 lose a point."""
_MANY = 4096


def pack(lengths: np.ndarray, room: int, images: np.ndarray | None = None, most: int = 0) -> list[list[int]]:
    """Every place of `lengths` in one pack; no pack above `room` tokens, nor, with `most`, above so many `images`.

    Few samples are packed in both ways below, and the one with fewer packs is taken; of many, the first is the better.
    Equal input gives equal output. Raises ValueError for a sample that fits no pack.
    """
    if not len(lengths):
        return []
    if (longest := int(lengths.max())) > room:
        raise ValueError(f"a sample of {longest} tokens does not fit a pack of {room}")
    if images is None or not most or not images.any():
        images, most = np.zeros(len(lengths), np.int64), 0
    elif (pictures := int(images.max())) > most:
        raise ValueError(f"a sample of {pictures} pictures does not fit a pack of {most} pictures")
    packs = completed(lengths, room, images, most)
    return packs if len(lengths) > _MANY else min(packs, best_fit(lengths, room, images, most), key=len)


def best_fit(lengths: np.ndarray, room: int, images: np.ndarray, most: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sample first, each into the fullest pack that can take it.

    Open packs are kept by the pictures and the room they have left, so that a sample costs a bisection or a few.
    """
    packs: list[list[int]] = []
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    sizes = lengths[order].tolist()
    rooms: list[list[int]] = [[] for _ in range(most + 1)]  # by pictures left: sorted, of the packs still open
    having: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # (pictures left, room left) -> packs
    for place, size, pictures in zip(order.tolist(), sizes, images[order].tolist(), strict=True):
        space, shelf, at = room + 1, most, -1
        for left in range(pictures, most + 1):
            here = bisect_left(rooms[left], size)
            if here < len(rooms[left]) and rooms[left][here] < space:
                space, shelf, at = rooms[left][here], left, here
        if at < 0:
            number, space = len(packs), room
            packs.append([place])
        else:
            stack = having[shelf, space]
            number = stack.pop()
            packs[number].append(place)
            if not stack:
                del rooms[shelf][at]
        space, shelf = space - size, shelf - pictures
        if space >= sizes[-1]:
            if not having[shelf, space]:
                insort(rooms[shelf], space)
            having[shelf, space].append(number)
    return packs


def completed(lengths: np.ndarray, room: int, images: np.ndarray, most: int) -> list[list[int]]:
    """Packs begun with samples as they come, and completed with the one or two that fill what is left best.

    As every pack begins with a random draw, long and short samples run out together, and there is choice to the end:
    that is what sorting them first gives away.
    """
    stock = _Stock(lengths, images, room)
    sizes, pictures = lengths.tolist(), images.tolist()
    enough = _OPEN_UNTIL * float(lengths.mean())
    packs: list[list[int]] = []
    coming = 0
    while True:
        here: list[int] = []
        left, allowed = room, most
        while left >= enough or not here:
            while coming < len(sizes) and stock.gone[coming]:
                coming += 1
            if coming == len(sizes) or sizes[coming] > left or pictures[coming] > allowed:
                break
            stock.take(coming)
            here.append(coming)
            left, allowed = left - sizes[coming], allowed - pictures[coming]
        if not here:
            return packs
        for place in stock.filling(left, allowed):
            here.append(place)
        packs.append(here)


class _Stock:
    """Samples in no pack yet, found by their length and their number of pictures."""

    def __init__(self, lengths: np.ndarray, images: np.ndarray, room: int):
        self.gone = [False] * len(lengths)
        self._lengths, self._images = lengths.tolist(), images.tolist()
        self._smallest = int(lengths.min())
        self._kinds = sorted(set(self._images))
        # [kind][length]: places that may be gone already, and how many are not
        self._places: list[dict[int, list[int]]] = [defaultdict(list) for _ in self._kinds]
        self._counts = [[0] * (room + 1) for _ in self._kinds]
        kinds = {count: kind for kind, count in enumerate(self._kinds)}
        self._kind = [kinds[count] for count in self._images]
        for place in range(len(lengths) - 1, -1, -1):
            self._places[self._kind[place]][self._lengths[place]].append(place)
            self._counts[self._kind[place]][self._lengths[place]] += 1
        # of every kind, int64 [room + 1]: the greatest length up to this one of which there are samples with at most
        # so many pictures, 0 if there is none
        self._below: list[np.ndarray] = []
        for count in self._kinds:
            there = np.unique(lengths[images <= count])
            row = np.zeros(room + 1, np.int64)
            row[there] = there
            self._below.append(np.maximum.accumulate(row))

    def take(self, place: int) -> None:
        """Mark a place as packed."""
        self.gone[place] = True
        kind, length = self._kind[place], self._lengths[place]
        self._counts[kind][length] -= 1
        if self._counts[kind][length]:
            return
        for wider in range(kind, len(self._kinds)):
            if not any(self._counts[other][length] for other in range(wider + 1)):
                below = self._below[wider]
                below[length : int(below.searchsorted(length, side="right"))] = below[length - 1]

    def filling(self, left: int, allowed: int) -> Iterator[int]:
        """Places, taken one after the other, that fill `left` tokens with at most `allowed` pictures well."""
        while True:
            kind = bisect_right(self._kinds, allowed) - 1
            single = int(self._below[kind][left]) if kind >= 0 else 0
            if not single:
                return
            place = self._take_one(kind, self._first_of_pair(left, allowed, single) or single)
            left, allowed = left - self._lengths[place], allowed - self._images[place]
            yield place

    def _first_of_pair(self, left: int, allowed: int, single: int) -> int:
        """Length of one of the two samples that together fill `left` better than `single` does; 0 if none do.

        The other of the two is then the longest that fits.
        """
        best, first = single, 0
        if left < 2 * self._smallest:
            return 0
        for kind, pictures in enumerate(self._kinds):
            if 2 * pictures > allowed:
                break
            other = bisect_right(self._kinds, allowed - pictures) - 1
            last = left // 2 if other == kind else left - self._smallest
            shorter = self._below[kind][self._smallest : last + 1]
            both = self._below[other].take(left - shorter)
            both += shorter
            at = int(both.argmax())
            if both[at] > best and self._are_two(kind, other, int(shorter[at]), int(both[at] - shorter[at])):
                best, first = int(both[at]), int(shorter[at])
        return first

    def _are_two(self, kind: int, other: int, one: int, two: int) -> bool:
        """Whether two lengths that were found are those of two samples, not of one found twice."""
        return one > 0 and (one != two or sum(self._counts[k][one] for k in range(max(kind, other) + 1)) > 1)

    def _take_one(self, kind: int, length: int) -> int:
        """A place of this length with as many pictures as may be, up to those of `kind`."""
        while not self._counts[kind][length]:
            kind -= 1
        stack = self._places[kind][length]
        while self.gone[place := stack.pop()]:
            continue
        self.take(place)
        return place


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
