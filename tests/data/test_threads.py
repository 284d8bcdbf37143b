"""Work over threads: every item once, the first error heard, nobody waited for who hangs."""

from __future__ import annotations

from itertools import count
from threading import Event
from time import monotonic, sleep

import pytest

from vistune.data.fetching.threads import IN_FLIGHT, Stopped, spread


def test_every_item_once():
    assert sorted(spread(lambda n: n * n, range(100), 4, Event())) == [n * n for n in range(100)]
    assert list(spread(lambda n: n, [], 4, Event())) == []


def test_endless_items_are_handed_out_as_results_are_taken():
    seen = []
    stop = Event()
    results = spread(lambda n: n, (seen.append(n) or n for n in count()), 2, stop)
    assert len([next(results) for _ in range(10)]) == 10
    results.close()
    assert stop.is_set() and len(seen) <= 10 + IN_FLIGHT * 2


def test_the_error_is_heard_and_not_its_echo():
    stop = Event()

    def work(n: int) -> int:
        if n == 3:
            raise KeyError("three")
        if stop.wait(0.2):
            raise Stopped
        return n

    with pytest.raises(KeyError, match="three"):
        list(spread(work, range(50), 4, stop))
    assert stop.is_set()


def test_stopped_from_outside():
    stop = Event()
    with pytest.raises(Stopped):
        for n in spread(lambda n: n, count(), 2, stop):
            if n == 20:
                stop.set()


def test_one_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr("vistune.data.fetching.threads.FAREWELL", 0.05)
    begun = monotonic()
    with pytest.raises(KeyboardInterrupt):
        for _ in spread(lambda n: sleep(n), [0, 3], 2, Event()):
            raise KeyboardInterrupt
    assert monotonic() - begun < 2
