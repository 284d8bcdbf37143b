"""Samples into packs, packs onto ranks. Knows lengths, pictures and costs, nothing of what they belong to."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict
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
    stock = _Stock(lengths, images)
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

    def __init__(self, lengths: np.ndarray, images: np.ndarray):
        self.gone = [False] * len(lengths)
        self._lengths, self._images = lengths.tolist(), images.tolist()
        self._kinds = sorted(set(self._images))  # numbers of pictures
        kinds = {count: kind for kind, count in enumerate(self._kinds)}
        self._kind = [kinds[count] for count in self._images]
        # [kind][length]: places with just so many pictures, of which some may be gone
        self._places: list[defaultdict[int, list[int]]] = [defaultdict(list) for _ in self._kinds]
        for place in range(len(lengths) - 1, -1, -1):
            self._places[self._kind[place]][self._lengths[place]].append(place)
        # [kind]: of the samples with at most so many pictures, how many there are of each length, and the lengths
        upto = [lengths[images <= count].tolist() for count in self._kinds]
        self._counts = [Counter(some) for some in upto]
        self._sizes = [sorted(counts) for counts in self._counts]

    def take(self, place: int) -> None:
        """Mark a place as packed."""
        self.gone[place] = True
        length = self._lengths[place]
        for kind in range(self._kind[place], len(self._kinds)):
            self._counts[kind][length] -= 1
            if not self._counts[kind][length]:
                sizes = self._sizes[kind]
                del sizes[bisect_left(sizes, length)]

    def filling(self, left: int, allowed: int) -> Iterator[int]:
        """Places, taken one after the other, that fill `left` tokens with at most `allowed` pictures well."""
        while (kind := bisect_right(self._kinds, allowed) - 1) >= 0:
            sizes = self._sizes[kind]
            at = bisect_right(sizes, left) - 1
            if at < 0:
                return
            place = self._take_one(kind, self._first_of_pair(left, allowed, sizes[at]) or sizes[at])
            left, allowed = left - self._lengths[place], allowed - self._images[place]
            yield place

    def _first_of_pair(self, left: int, allowed: int, single: int) -> int:
        """Length of one of the two samples that together fill `left` better than `single` does; 0 if none do.

        The other of the two is then the longest that fits.
        """
        best, first = single, 0
        for kind, pictures in enumerate(self._kinds):
            if 2 * pictures > allowed or best == left:
                break
            other = bisect_right(self._kinds, allowed - pictures) - 1
            both, one = self._best_pair(kind, other, left)
            if both > best:
                best, first = both, one
        return first

    def _best_pair(self, kind: int, other: int, left: int) -> tuple[int, int]:
        """The greatest sum up to `left` of a length of `kind` and one of `other` (which has all of `kind`), and the
        first of the two; the lengths are walked from both ends, until a pair fits exactly."""
        ones, others = self._sizes[kind], self._sizes[other]
        if not ones:
            return 0, 0
        best = first = 0
        end = bisect_right(others, left - ones[0]) - 1
        for at, one in enumerate(ones):
            while end >= 0 and one + others[end] > left:
                end -= 1
            if end < 0 or (kind == other and at > end):
                break
            both = one + others[end]
            if both > best and (one != others[end] or self._counts[other][one] > 1):
                best, first = both, one
                if both == left:
                    break
        return best, first

    def _take_one(self, kind: int, length: int) -> int:
        """A place of this length with as many pictures as may be, up to those of `kind`."""
        while True:
            stack = self._places[kind][length]
            while stack:
                if not self.gone[place := stack.pop()]:
                    self.take(place)
                    return place
            kind -= 1


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
