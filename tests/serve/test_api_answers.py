"""An answer on its way from an engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from tests.serve.scripted import SETTINGS, Scripted, says, waits
from vistune.serve.interface import completions
from vistune.serve.interface.completions import Answer, Desk, answer
from vistune.serve.limits import Limits
from vistune.serve.metrics import Metrics
from vistune.serve.refused import Refused
from vistune.serve.shelf import Served
from vistune.serve.work import Ended, Piece, State, Work

WORK = Work(ids=[1, 2, 3], settings=SETTINGS)


def served(script):
    return Served(name="m", engine=Scripted(None, script))  # type: ignore[arg-type]


def counted(metrics, line):
    return float(
        next(said for said in metrics.text({}).decode().splitlines() if said.startswith(line + " ")).split()[-1]
    )


def test_every_piece_in_order_and_the_end():
    async def all_of_it():
        metrics = Metrics()
        found = [said async for said in answer(served(says(*"abcdef")), WORK, metrics)]
        return metrics, found

    metrics, found = asyncio.run(all_of_it())
    assert "".join(said.text for said in found[:-1]) == "abcdef" and all(isinstance(said, Piece) for said in found[:-1])
    assert found[-1] == Ended(reason="stop", tokens=6)
    assert counted(metrics, 'vistune_requests_total{model="m",reason="stop"}') == 1
    assert counted(metrics, 'vistune_prompt_tokens_total{model="m"}') == 3
    assert counted(metrics, 'vistune_generation_tokens_total{model="m"}') == 6
    assert counted(metrics, 'vistune_time_to_first_token_seconds_count{model="m"}') == 1
    assert counted(metrics, 'vistune_inter_token_latency_seconds_count{model="m"}') == 5


def test_what_came_meanwhile_is_one_piece():
    async def late():
        engine = served(lambda ticket: None)
        with Answer(engine, WORK, Metrics()) as one:
            ticket = engine.engine.tickets[0]
            for number, text in enumerate("abc"):
                ticket.hear(Piece(text, number + 1))
            ticket.hear(Ended(reason="length", tokens=3))
            return [await one.next(5), await one.next(5)]

    assert asyncio.run(late()) == [Piece("abc", 3), Ended(reason="length", tokens=3)]


def test_nothing_within_so_many_seconds():
    async def nothing():
        with Answer(served(waits()), WORK, Metrics()) as one:
            return await one.next(0.01)

    assert asyncio.run(nothing()) is None


@pytest.mark.parametrize("way", ["closed", "cancelled"])
def test_who_stops_listening_leaves(way):
    async def some():
        engine = served(waits("a"))
        pieces = answer(engine, WORK, Metrics())
        async with contextlib.aclosing(pieces):
            await anext(pieces)
            if way == "cancelled":
                waiting = asyncio.ensure_future(anext(pieces))
                await asyncio.sleep(0)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
        return engine.engine.tickets[0]

    assert asyncio.run(some()).gone.is_set()


def test_a_loop_that_is_closed_hears_no_more():
    async def begin():
        engine = served(lambda ticket: None)
        Answer(engine, WORK, Metrics())
        return engine.engine.tickets[0]

    ticket = asyncio.run(begin())
    assert not ticket.gone.is_set()
    thread = threading.Thread(target=ticket.hear, args=(Piece("a", 1),))
    thread.start()
    thread.join()
    assert ticket.gone.is_set()


def test_a_place_is_given_back():
    desk, one = Desk(Limits(rows=1, queue=1)), served(waits())
    for _ in range(3):
        with desk.place(one), desk.place(one), pytest.raises(Refused) as found, desk.place(one):
            pytest.fail("a third")
        assert found.value.status == 429
    one.engine.now = State(running=1, waiting=1)
    with pytest.raises(Refused), desk.place(one):
        pytest.fail("no room")


def test_what_is_made_for_nobody_is_told():
    async def leave():
        told: list[threading.Event] = []
        began = threading.Event()

        def make(event):
            told.append(event)
            began.set()
            return event.wait(10)

        going = asyncio.ensure_future(Desk(Limits()).do(make))
        await asyncio.to_thread(began.wait, 10)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        return told[0]

    assert asyncio.run(leave()).is_set()


def test_an_engine_that_forgets_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(completions, "GRACE", 0.01)

    async def late():
        work = Work(ids=[1], settings=SETTINGS, until=0.0)
        return [said async for said in answer(served(waits()), work, Metrics())][-1]

    ended = asyncio.run(late())
    assert ended.error is not None and (ended.error.status, ended.error.code) == (504, "deadline")
