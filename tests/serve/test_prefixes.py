"""What was read is not read again: names of beginnings, blocks that are remembered, and requests that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.serve.toy import PICTURE, ToyAdapters, ToyReader, expected, handed_in, run, scheduler, work
from vistune.serve.answering.prefixes import Prefixes
from vistune.serve.work import Ended, Work

digest = st.sampled_from([b"", b"a", b"ab", b"b"])
prompt = st.tuples(
    st.sampled_from(["", "red"]),
    st.lists(st.integers(0, 2), max_size=14),
    st.lists(st.tuples(st.integers(0, 13), digest), max_size=3, unique_by=lambda one: one[0]).map(sorted),
)


def beginning(one: tuple[str, list[int], list[Any]], tokens: int) -> Any:
    """All that the keys and values of so many tokens depend on."""
    whose, ids, pictures = one
    return whose, ids[:tokens], [each for each in pictures if each[0] < tokens]


@given(prompt, prompt)
def test_blocks_have_the_same_name_where_all_up_to_their_ends_is_the_same(one, other):
    held = Prefixes(100, block=4)
    first, second = held.names(*one), held.names(*other)
    for names, asked in ((first, one), (second, other)):
        blind = min([place for place, seen in asked[2] if not seen], default=99)
        assert len(names) == min(len(asked[1]), blind) // 4
    for i in range(min(len(first), len(second))):
        same = beginning(one, 4 * (i + 1)) == beginning(other, 4 * (i + 1))
        assert (first[i] == second[i]) == same


@given(prompt, st.integers(0, 14))
def test_names_go_on_from_those_of_a_beginning(one, tokens):
    held, (whose, ids, pictures) = Prefixes(100, block=4), one
    known = held.names(whose, ids[:tokens], pictures)
    assert held.names(whose, ids, pictures, known) == held.names(whose, ids, pictures)


def numbered(ids: Sequence[int]) -> Any:
    """Keys and values by which a block can be told."""
    return lambda start, stop: torch.tensor(ids[start:stop], dtype=torch.float32).view(1, 1, -1, 1)


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 1), max_size=20)), max_size=30),
    st.integers(0, 40),
)
def test_what_is_found_is_what_was_put_in_and_no_more_is_held_than_may_be(events, limit):
    held, known = Prefixes(limit, block=4), set()
    for puts, ids in events:
        names = held.names("", ids, [])
        if puts:
            held.put("", names, numbered(ids))
            known |= {tuple(ids[: 4 * (i + 1)]) for i in range(len(names))}
        found = held.find(names)
        assert torch.cat([one.view(-1) for one in found] or [torch.empty(0)]).tolist() == ids[: 4 * len(found)]
        assert all(tuple(ids[: 4 * (i + 1)]) in known for i in range(len(found)))
        assert not puts or len(found) == min(len(names), limit // 4)
        assert held.tokens <= limit


def test_ends_are_forgotten_before_beginnings_and_who_was_asked_for_last_stays():
    held, ids = Prefixes(16, block=4), list(range(16))
    names = {n: held.names("", [n, *ids[1:]], []) for n in range(4)}
    held.put("", names[0], numbered(ids))
    held.put("", names[1][:1], numbered(ids))
    assert len(held.find(names[0])) == 3 and len(held.find(names[1])) == 1
    held.put("", names[2][:3], numbered(ids))
    assert [len(held.find(names[n])) for n in range(3)] == [0, 1, 3]


def test_without_memory_for_a_copy_all_is_forgotten_and_nothing_breaks():
    held, ids = Prefixes(64, block=4), list(range(16))
    held.put("", held.names("", ids, []), numbered(ids))

    def fails(start: int, stop: int) -> Any:
        raise torch.OutOfMemoryError("gone")

    held.put("", held.names("", [5, *ids], []), fails)
    assert held.tokens == 0


def answered(one: Any, asked: Work) -> Ended:
    """Alone: it says what it has to."""
    _, heard = handed_in(one, asked)
    run(one)
    assert heard.text == expected(asked)
    return heard.ended[0]


FIRST = [1, 2, 3, PICTURE, 4, 5, 6, 7]
"""10 tokens, of which the picture is from the fourth to the sixth."""


def test_a_conversation_that_goes_on_is_read_from_where_it_was():
    reader = ToyReader()
    one = scheduler(reader, prefixes=1000)
    asked = work(FIRST, 6, [7])
    assert answered(one, asked).reused == 0
    answer = [ord(letter) - 97 for letter in expected(asked)]
    assert len(answer) == 6
    more = work([*FIRST, *answer, 8, 9, 10], 3, [7])
    ended = answered(one, more)
    assert ended.reused == (10 + 5) // 4 * 4  # what was drawn last was never read
    assert reader.seen == [[7]] and sum(map(sum, reader.reads)) == 10 + len(more.ids) - ended.reused
    assert one.state().tokens_again == ended.reused
    assert one.state().prefix_tokens == (len(more.ids) + ended.tokens - 1) // 4 * 4


def test_the_last_token_is_always_read():
    reader = ToyReader()
    one = scheduler(reader, prefixes=1000)
    for _ in range(2):
        ended = answered(one, work([1, 2, 3, 4, 5, 6, 7, 8], 1))
    assert ended.reused == 4 and reader.reads == [[8], [4]]


def test_a_picture_that_lies_in_what_is_known_is_not_seen():
    reader = ToyReader()
    one = scheduler(reader, prefixes=1000, pictures_held=0)
    answered(one, work(FIRST, 1, [7]))
    assert answered(one, work([*FIRST[:6], 9, 9, 9], 5, [7])).reused == 8
    assert reader.seen == [[7]] and (one.state().pictures_seen, one.state().pictures_again) == (1, 1)


def test_of_a_picture_that_is_known_in_part_the_rest_is_read():
    reader = ToyReader()
    one = scheduler(reader, prefixes=1000, pictures_held=0)
    answered(one, work([1, PICTURE], 1, [7]))  # four tokens: one block
    for tail, known in ([2], 4), ([PICTURE, 2], 4):
        asked = work([1, PICTURE, *tail], 5, [7, 8][: 1 + tail.count(PICTURE)])
        assert answered(one, asked).reused == known
    answered(one, work([1, 2, PICTURE], 1, [7]))
    assert answered(one, work([1, 2, PICTURE, 3, PICTURE], 5, [7, 8])).reused == 4
    assert reader.seen == [[7], [8], [7], [7, 8]]


def test_where_pictures_are_not_seen_alone_all_of_them_are_the_beginning():
    reader = ToyReader(alone=False)
    one = scheduler(reader, prefixes=1000)
    first = [1, 2, PICTURE, 3, 4, 5, 6, PICTURE, 7]
    answered(one, work(first, 1, [7, 8]))
    assert answered(one, work([*first, 9], 5, [7, 8])).reused == 12
    assert answered(one, work([*first, 9], 5, [7, 9])).reused == 0
    assert answered(one, work([1, 2, PICTURE, 3, 4, 5, 6, 9], 5, [7])).reused == 0


def test_another_picture_another_adapter_and_one_that_nobody_named_are_read_anew():
    one = scheduler(ToyReader(), adapters=ToyAdapters(), prefixes=1000)
    asked = work(FIRST, 2, [7])
    answered(one, asked)
    assert answered(one, work(FIRST, 2, [8])).reused == 0
    assert answered(one, work(FIRST, 2, [7], adapter="red")).reused == 0
    assert answered(one, Work(ids=asked.ids, settings=asked.settings, pictures=asked.pictures)).reused == 0
    assert answered(one, asked).reused == 8
    one.reading.prefixes.forget("red")
    assert answered(one, work(FIRST, 2, [7], adapter="red")).reused == 0 < answered(one, asked).reused


def test_of_one_that_leaves_what_was_read_is_kept_and_of_one_that_fails_nothing():
    reader = ToyReader()
    one = scheduler(reader, prefixes=1000, prefill_ms=1e-6)
    one.reading.most = 16
    asked = work([n % 20 for n in range(60)], 3)
    ticket, _ = handed_in(one, asked)
    one.step()
    read = ticket.place
    assert 0 < read < 60
    ticket.leave()
    run(one)
    assert answered(one, asked).reused == read // 4 * 4
    other = work([19 - n % 20 for n in range(60)], 3)
    _, heard = handed_in(one, other)
    reader.fails["read"] = [RuntimeError("gone")]
    run(one)
    assert heard.ended[0].reason == "error" and answered(one, other).reused == 0


def test_those_who_wait_know_what_was_read_meanwhile():
    reader = ToyReader()
    one = scheduler(reader, prefixes=1000, prefill_ms=1e-6)
    one.reading.most = 16
    stem = [n % 20 for n in range(40)]
    heard = [handed_in(one, work([*stem, n, n], 2))[1] for n in range(3)]
    run(one)
    assert [each.text for each in heard] == [expected(work([*stem, n, n], 2)) for n in range(3)]
    assert sorted(each.ended[0].reused for each in heard) == [0, 40, 40]


def test_a_copy_that_fails_costs_nobody_an_answer(capsys):
    reader = ToyReader()
    one = scheduler(reader, prefixes=1000)
    asked, other = work([1, 2, 3, 4], 6), work([5, 6, 7, 8], 9)
    _, heard = handed_in(one, asked)
    _, second = handed_in(one, other)
    one.step()
    reader.fails["cut"] = [RuntimeError("gone")]
    run(one)
    assert (heard.text, second.text) == (expected(asked), expected(other))
    assert not reader.fails["cut"] and "RuntimeError: gone" in capsys.readouterr().err
    assert answered(one, asked).reason in ("stop", "length")


def test_nothing_is_remembered_where_nothing_may_be():
    one = scheduler(ToyReader())
    for _ in range(2):
        assert answered(one, work(FIRST, 2, [7])).reused == 0
    assert one.state().prefix_tokens == 0
