"""Which worker is asked: by how much it has to do, and by what it was given before."""

from __future__ import annotations

from pathlib import Path

from vistune.serve.workers.alike import PIECE, Alike
from vistune.serve.workers.worker import WORTH, Worker, chosen


def test_the_least_busy_one_is_asked_and_equals_take_turns() -> None:
    workers = [Worker(number, Path("nowhere")) for number in range(3)]
    for worker in workers:
        worker.ready = True
    assert [chosen(workers, turn, [], {}).number for turn in (0, 1, 2, 3)] == [0, 1, 2, 0]  # type: ignore[union-attr]
    workers[0].busy = 1
    assert chosen(workers, 0, [], {}) is workers[1]
    workers[1].ready = False
    assert chosen(workers, 0, [], {}) is workers[2]
    assert chosen(workers, 0, [workers[2]], {}) is workers[0]
    assert chosen(workers, 0, [workers[0], workers[2]], {}) is None


def test_of_equals_the_one_that_knows_the_beginning_is_asked_and_a_picture_is_worth_a_wait() -> None:
    workers = [Worker(number, Path(f"/nowhere/{number}")) for number in range(3)]
    for one in workers:
        one.ready, one.busy = True, 8
    assert chosen(workers, 0, [], {2: 1}) is workers[2] and chosen(workers, 0, [], {1: 1, 2: 3}) is workers[2]
    workers[2].busy = 9
    assert chosen(workers, 1, [], {2: WORTH - 1}) is workers[1]
    workers[2].busy = 11  # 3 more than the least busy: a quarter of its 8 and one
    assert chosen(workers, 1, [], {2: WORTH}) is workers[2]
    workers[2].busy = 12
    assert chosen(workers, 1, [], {2: WORTH}) is workers[1]
    workers[2].ready = False
    assert chosen(workers, 0, [], {2: WORTH}) is workers[0]


def test_beginnings_of_bodies_are_known_piece_by_piece_and_the_oldest_are_forgotten() -> None:
    alike, talk = Alike(held=8), bytes(range(256)) * 2 * 5  # five pieces
    alike.give(talk, 1)
    alike.give(talk[: 2 * PIECE] + b"x" * PIECE, 2)
    assert alike.known(talk + b"more") == {1: 5, 2: 2} and alike.known(talk[: PIECE - 1]) == {}
    assert alike.known(b"x" + talk) == {}
    for number in range(3):
        alike.give(bytes([number]) * 2 * PIECE, 0)
    assert alike.known(talk) == {1: 2, 2: 2}
    alike.give(b"y" * 10 * PIECE, 3)
    assert alike.known(talk) == {} and alike.known(b"y" * 10 * PIECE) == {3: 8}
