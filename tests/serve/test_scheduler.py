"""Who is answered when, with a reader that computes next to nothing: everybody once, in order, whole, within
the memory."""

from __future__ import annotations

import gc
import math
import time
import weakref
from itertools import chain
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.toy import (
    PICTURE,
    Heard,
    ToyAdapters,
    ToyReader,
    expected,
    handed_in,
    never_ends,
    picture,
    run,
    scheduler,
    work,
)
from vistune.decoding import Settings
from vistune.serve.refused import Refused
from vistune.serve.work import Work

STEMS = ([], list(range(25)), [*range(9), *range(20)])
"""How prompts begin: many of them alike, for a while or to their ends."""


def begun(stem: int, length: int, ids: list[int], most: int, numbers: list[int], place: int, adapter: str) -> Work:
    ids = [*STEMS[stem][:length], *ids]
    place = min(place, len(ids))
    return work([*ids[:place], *[PICTURE] * len(numbers), *ids[place:]], most, numbers, adapter=adapter)


asked = st.builds(
    begun,
    st.integers(0, 2),
    st.integers(5, 30),
    st.lists(st.integers(0, 25), min_size=1, max_size=40),
    most=st.integers(1, 12),
    numbers=st.lists(st.integers(1, 3), max_size=3),
    place=st.integers(1, 9),
    adapter=st.sampled_from(["", "", "red", "blue"]),
)
happens = st.lists(
    st.one_of(asked, st.integers(0, 30).map(lambda who: ("leaves", who)), st.integers(1, 3)), min_size=1, max_size=40
)


def check(one: Any, reader: ToyReader) -> None:
    lanes = list(one.lanes.values())
    assert sum(lane.held for lane in lanes) <= one.kv_tokens
    state = one.state()
    assert state.kv_used <= state.kv_tokens and state.running <= one.limits.rows
    for lane in lanes:
        assert [ticket.row for ticket in lane.rows] == list(range(len(lane.rows)))
        assert all(not ticket.left for ticket in lane.rows[: lane.running])
        assert lane.rows[lane.running :] == sorted(lane.rows[lane.running :], key=lambda t: lane.rows.index(t))
        assert [ticket.number for ticket in lane.reading] == sorted(ticket.number for ticket in lane.reading)
        for row, ticket in enumerate(lane.rows):
            assert lane.kv.lengths[row] == ticket.place <= ticket.need
        assert not any(lane.kv.lengths[len(lane.rows) :])
    assert one.reading.prefixes.tokens <= one.reading.prefixes.most * 4


@settings(max_examples=60, deadline=None)
@given(
    happens, st.integers(1, 5), st.integers(90, 300), st.integers(16, 40), st.booleans(), st.sampled_from([0, 20, 999])
)
def test_everybody_is_answered_once_in_order_and_within_the_memory(events, rows, kv_tokens, most, alone, prefixes):
    reader = ToyReader(alone=alone)
    one = scheduler(reader, kv_tokens, ToyAdapters(), rows=rows, pictures_held=40, prefixes=prefixes)
    one.reading.most = most
    here, order = [], []
    for event in [*events, 400]:
        if isinstance(event, Work):
            here.append((event, *handed_in(one, event)))
        elif isinstance(event, tuple) and here:
            here[event[1] % len(here)][1].leave()
        for _ in range(event if isinstance(event, int) else 0):
            before = list(one.waiting)
            one.step()
            one.reading.most = most
            order += [ticket.number for ticket in before if ticket not in one.waiting and not ticket.gone.is_set()]
            check(one, reader)
    assert not one.busy and order == sorted(order)
    assert one.state().running == one.state().waiting == one.state().kv_used == 0
    assert one.reading.bytes_out == sum(each.nbytes for each, _, _ in here)
    for each, ticket, heard in here:
        assert len(heard.ended) == 1
        whole, ended = expected(each), heard.ended[0]
        if ended.reason == "left":
            assert ticket.gone.is_set() and whole.startswith(heard.text)
        else:
            assert heard.text == whole and ended.reason == ("length" if ended.tokens == len(whole) else "stop")


breaks = st.tuples(
    st.sampled_from(["see", "embed", "read", "step", "lay", "cut"]),
    st.sampled_from([torch.OutOfMemoryError, RuntimeError]),
    st.integers(1, 3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(asked, asked, breaks, st.integers(1, 4)), min_size=3, max_size=30), st.integers(1, 5))
def test_whatever_fails_everybody_ends_once_and_who_is_answered_is_answered_whole(events, rows):
    reader = ToyReader()
    one = scheduler(reader, 300, ToyAdapters(), rows=rows, pictures_held=40, prefixes=99)
    here = []
    for event in [*events, 500]:
        if isinstance(event, Work):
            here.append((event, handed_in(one, event)[1]))
        elif isinstance(event, tuple):
            reader.fails.setdefault(event[0], []).extend([event[1]("gone")] * event[2])
        for _ in range(event if isinstance(event, int) else 0):
            one.step()
            check(one, reader)
    assert not one.busy
    for each, heard in here:
        (ended,) = heard.ended
        whole = expected(each)
        assert whole.startswith(heard.text) if ended.reason == "error" else heard.text == whole


def test_a_request_joins_those_that_run_at_the_next_step():
    reader = ToyReader()
    one = scheduler(reader)
    handed_in(one, work([1, 2], 50))
    for _ in range(3):
        one.step()
    _, late = handed_in(one, work([3, 4, 5], 50))
    one.step()
    assert late.pieces and one.state().running == 2


def test_identical_pictures_are_encoded_once_also_for_those_who_wait():
    reader = ToyReader()
    one = scheduler(reader, rows=2)
    for _ in range(5):
        handed_in(one, work([1, PICTURE, 2, PICTURE], 3, [7, 8]))
    run(one)
    assert sorted(chain(*reader.seen)) == [7, 8]
    assert (one.state().pictures_seen, one.state().pictures_again) == (2, 8)
    assert one.state().pictures_held == 2 * 3 * 4


def test_a_picture_that_is_remembered_is_not_encoded_behind_one_that_is_not():
    reader = ToyReader()
    one = scheduler(reader)
    handed_in(one, work([PICTURE, 1], 2, [1]))
    run(one)
    for number in (2, 1, 3):
        handed_in(one, work([PICTURE, 1], 2, [number]))
    run(one)
    assert sorted(chain(*reader.seen)) == [1, 2, 3]
    assert (one.state().pictures_seen, one.state().pictures_again) == (3, 1)


def test_nothing_is_remembered_where_nothing_may_be_but_who_is_here_shares():
    reader = ToyReader()
    one = scheduler(reader, pictures_held=0)
    heard = [handed_in(one, work([1, PICTURE], 3, [7]))[1] for _ in range(3)]
    run(one)
    assert reader.seen == [[7]] and one.state().pictures_held == 0
    handed_in(one, work([1, PICTURE], 3, [7]))
    run(one)
    assert reader.seen == [[7], [7]] and len({each.text for each in heard}) == 1


def test_each_pair_of_eyes_sees_for_itself():
    reader = ToyReader()
    one = scheduler(reader, adapters=ToyAdapters())
    for adapter in ("", "red", "blue", "blue"):
        handed_in(one, work([1, PICTURE], 3, [7], adapter=adapter))
    run(one)
    assert reader.seen == [[7], [7]]  # the model's own, which serve "red" too, and those of "blue"


def test_pictures_that_are_not_seen_alone_go_together():
    reader = ToyReader(alone=False)
    one = scheduler(reader)
    for numbers in ([7, 8], [8, 7], [7, 8]):
        handed_in(one, work([1, PICTURE, PICTURE], 3, numbers))
    run(one)
    assert reader.seen == [[7, 8], [8, 7]]


def test_pictures_without_a_digest_are_never_taken_for_each_other():
    reader = ToyReader()
    one = scheduler(reader)
    for number in (7, 8):
        plain = work([1, PICTURE], 3, [number])
        given = Work(ids=plain.ids, settings=plain.settings, pictures=plain.pictures)
        _, heard = handed_in(one, given)
    run(one)
    assert sorted(chain(*reader.seen)) == [7, 8] and heard.text == expected(work([1, PICTURE], 3, [8]))


# Leaving, lateness and failures.


def test_who_leaves_is_gone_before_the_next_step_wherever_it_is():
    reader = ToyReader()
    one = scheduler(reader, rows=2)
    one.reading.most = 16
    tickets = [handed_in(one, never_ends(seed, 50)) for seed in range(2)]
    one.step()
    waiting = handed_in(one, work([1, 2], 50))
    for ticket, heard in (*tickets, waiting):
        said = len(heard.pieces)
        ticket.leave()
        one.step()
        assert heard.ended[0].reason == "left" and len(heard.pieces) == said
    assert not one.busy and not one.lanes


def test_who_leaves_while_being_read_frees_its_row():
    one = scheduler(ToyReader(), rows=3)
    handed_in(one, never_ends(1, 60))
    one.step()
    one.reading.most = 16
    ticket, heard = handed_in(one, work([3] * 100, 4))
    _, other = handed_in(one, work([4] * 100, 4))
    for _ in range(3):
        one.step()
        one.reading.most = 16
    assert ticket.row is not None and ticket.left
    ticket.leave()
    run(one)
    assert heard.ended[0].reason == "left" and other.text == expected(work([4] * 100, 4))


def test_deadlines_end_who_waits_and_who_runs_and_what_was_said_stands():
    one = scheduler(ToyReader(), rows=1)
    soon = time.monotonic() + 0.05
    late = work([1], 1, until=soon)
    running, waiting = never_ends(1, 400), handed_in(one, late)[1]
    one.waiting.clear()
    _, runs = handed_in(one, Work(ids=running.ids, settings=running.settings, until=soon))
    _, waiting = handed_in(one, late)
    one.step()
    while not runs.ended:
        one.step()
    one.step()
    for heard in (runs, waiting):
        error = heard.ended[0].error
        assert heard.ended[0].reason == "error" and error is not None
        assert (error.status, error.code) == (504, "deadline")
    assert runs.text and expected(running).startswith(runs.text) and not one.busy


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory")


def test_where_the_memory_is_too_small_for_a_step_the_newest_end_and_the_others_go_on():
    reader = ToyReader()
    one = scheduler(reader)
    each = [never_ends(seed, 30) for seed in range(5)]
    heard = [handed_in(one, asked)[1] for asked in each]
    for _ in range(4):
        one.step()
    reader.fails["step"] = [out_of_memory()]
    run(one)
    assert [one.text == expected(asked) for one, asked in zip(heard, each, strict=True)] == [True] * 4 + [False]
    error = heard[4].ended[0].error
    assert error is not None and (error.status, error.code) == (503, "out_of_memory")


def test_where_the_memory_is_too_small_for_a_piece_smaller_ones_are_read():
    reader = ToyReader()
    one = scheduler(reader)
    reader.fails["read"] = [out_of_memory(), out_of_memory()]
    asked = work([3] * 300, 4)
    _, heard = handed_in(one, asked)
    run(one)
    assert heard.text == expected(asked) and reader.reads[0] == [75]


def test_where_the_memory_is_too_small_for_pictures_they_are_seen_one_by_one():
    reader = ToyReader()
    one = scheduler(reader)
    handed_in(one, work([PICTURE], 2, [1]))
    run(one)
    reader.fails["see"] = [out_of_memory()]
    asked = work([PICTURE, 3, PICTURE], 4, [4, 5])
    _, heard = handed_in(one, asked)
    run(one)
    assert heard.text == expected(asked) and reader.seen == [[1], [4], [5]]
    reader.fails["see"] = [out_of_memory()]
    _, heard = handed_in(one, work([PICTURE], 4, [6]))
    run(one)
    error = heard.ended[0].error
    assert error is not None and error.code == "out_of_memory"


def test_a_failure_ends_those_whom_it_concerns():
    reader = ToyReader()
    one = scheduler(reader)
    runs = never_ends(1, 30)
    _, running = handed_in(one, runs)
    one.step()
    reader.fails["read"] = [RuntimeError("no such kernel")]
    _, read = handed_in(one, work([3] * 20, 4))
    _, seen = handed_in(one, work([PICTURE, 3], 4, [99]))
    good = work([PICTURE, 3], 4, [5])
    _, beside = handed_in(one, good)
    run(one)
    assert running.text == expected(runs) and beside.text == expected(good)
    said = [heard.ended[0].error for heard in (read, seen)]
    assert [(e.status, e.code) for e in said if e] == [(500, "engine_error")] * 2
    assert "RuntimeError: no such kernel" in str(said[0]) and "poison" in str(said[1])
    assert one.failures == 0  # others have been answered since


def test_a_requests_own_fault_is_no_failure_of_the_model():
    reader = ToyReader()
    one = scheduler(reader)
    for _ in range(5):
        handed_in(one, work([PICTURE], 4, [99]))
        run(one)
    assert one.failures == 0
    reader.fails["read"] = [RuntimeError("gone")] * 3
    for _ in range(3):
        handed_in(one, work([1, 2], 4))
        run(one)
    assert one.failures == 3


def test_numbers_that_are_none_end_the_row_they_are_in():
    reader = ToyReader()
    one = scheduler(reader)
    each = [never_ends(seed, 30) for seed in range(3)]
    heard = [handed_in(one, asked)[1] for asked in each]
    for _ in range(3):
        one.step()
    step: Any = reader.step

    def broken(*given: Any) -> torch.Tensor:
        logits = step(*given)
        logits[1] = math.nan
        reader.step = step  # type: ignore[method-assign]
        return logits

    reader.step = broken  # type: ignore[method-assign]
    run(one)
    assert [one.ended[0].reason for one in heard].count("error") == 1
    assert sum(one.text == expected(asked) for one, asked in zip(heard, each, strict=True)) == 2


def test_an_asker_that_cannot_hear_does_not_end_the_others():
    one = scheduler(ToyReader())
    asked = never_ends(1, 20)
    _, heard = handed_in(one, asked)
    deaf, _ = handed_in(one, never_ends(2, 20))

    def raises(said: Any) -> None:
        raise OSError("closed")

    deaf.hear = raises
    run(one)
    assert heard.text == expected(asked) and deaf.over


def test_nothing_of_a_request_is_kept():
    reader = ToyReader()
    one = scheduler(reader)
    asked = work([1, PICTURE, 2], 6, [7])
    ticket, heard = handed_in(one, asked)
    gone = [weakref.ref(ticket), weakref.ref(heard), weakref.ref(asked), weakref.ref(asked.pictures[0].pixels)]
    run(one)
    del ticket, heard, asked
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4 and not one.lanes
    assert one.state().kv_used == 0


def test_rows_that_are_not_needed_are_given_back():
    one = scheduler(ToyReader(), rows=16)
    handed_in(one, never_ends(0, 100))
    for _ in range(15):
        handed_in(one, work([1, 2, 3], 3))
    one.step()
    assert one.lanes[""].kv.rows == 16
    while one.state().running > 1:
        one.step()
    assert one.lanes[""].kv.rows <= 4


def test_a_stop_ends_an_answer_and_frees_its_row():
    one = scheduler(ToyReader())
    plain = never_ends(3, 40)
    whole = expected(plain)
    _, heard = handed_in(one, Work(ids=plain.ids, settings=Settings(max_new_tokens=40), stops=(whole[10:13],)))
    run(one)
    assert heard.text == whole[: whole.index(whole[10:13])] and heard.ended[0].reason == "stop"
    assert heard.ended[0].tokens == whole.index(whole[10:13]) + 3


def test_errors_are_refusals():
    assert isinstance(Refused(500, "x").body(), dict) and Heard().text == "" and picture(3).tokens == 3
