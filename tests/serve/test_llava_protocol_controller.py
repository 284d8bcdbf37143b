"""A controller's rules, by the clock: who is asked, who is forgotten, and what a request of LLaVA's clients may say."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from vistune.serve.llava.asked import Asked, read
from vistune.serve.llava.controller import EXPIRES, MOST, Controller
from vistune.serve.llava.lines import FAILED, line
from vistune.serve.llava.status import Status
from vistune.serve.refused import Refused

HERE = "http://here"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def controller(own: Status | None = None, method: str = "shortest_queue") -> tuple[Controller, Clock]:
    clock = Clock()
    return Controller(lambda: own or Status((), 1.0, 0.0), method, clock, random.Random(0)), clock


def test_the_shortest_queue_for_its_speed_is_asked_and_counted_on_until_it_speaks() -> None:
    made, _ = controller()
    made.register("http://slow", Status(("m",), 1.0, 2.0), True)
    made.register("http://fast", Status(("m",), 4.0, 4.0), True)
    made.register("http://other", Status(("n",), 1.0, 0.0), True)
    # 4/4, 5/4, 6/4, 7/4 are less than 2/1; then they are equal, and take turns
    assert [made.choose("m", HERE) for _ in range(4)] == ["http://fast"] * 4
    assert {made.choose("m", HERE) for _ in range(2)} == {"http://fast", "http://slow"}
    made.beat("http://slow", 0.0)
    assert made.choose("m", HERE) == "http://slow"
    assert made.choose("nothing", HERE) == ""


def test_equal_ones_take_turns() -> None:
    made, _ = controller(Status(("m",), 1.0, 0.0))
    made.register("http://a", Status(("m",), 1.0, 0.0), False)
    chosen = [made.choose("m", HERE) for _ in range(6)]
    assert HERE in chosen and "http://a" in chosen


def test_our_own_models_are_asked_for_at_our_own_address() -> None:
    made, _ = controller(Status(("m",), 1.0, 3.0))
    assert made.choose("m", HERE) == HERE
    made.register("http://a", Status(("m", "x"), 1.0, 1.0), False)
    assert made.choose("m", HERE) == "http://a"
    assert made.models() == ["m", "x"]
    assert made.whole() == Status(("m", "x"), 2.0, 4.0)


def test_a_lottery_draws_by_speed() -> None:
    made, _ = controller(method="lottery")
    made.register("http://slow", Status(("m",), 1.0, 0.0), True)
    made.register("http://fast", Status(("m",), 3.0, 99.0), True)
    drawn = Counter(made.choose("m", HERE) for _ in range(4000))
    assert 0.70 < drawn["http://fast"] / 4000 < 0.80
    with pytest.raises(ValueError, match="--llava-dispatch fair: one of shortest_queue, lottery"):
        controller(method="fair")


def test_who_is_silent_for_too_long_is_forgotten_where_it_promised_beats() -> None:
    made, clock = controller()
    made.register("http://beats", Status(("m",), 1.0, 0.0), True)
    made.register("http://quiet", Status(("n",), 1.0, 0.0), False)
    clock.now += EXPIRES
    assert made.beat("http://beats", 1.0) and made.models() == ["m", "n"]
    clock.now += EXPIRES + 0.1
    assert made.models() == ["n"] and not made.beat("http://beats", 1.0)
    assert made.choose("m", HERE) == ""


def test_there_is_an_end_to_registering() -> None:
    made, _ = controller()
    for number in range(MOST):
        made.register(f"http://w{number}", Status((), 1.0, 0.0), False)
    made.register("http://w0", Status(("m",), 1.0, 0.0), False)
    with pytest.raises(Refused, match="registered already"):
        made.register("http://more", Status((), 1.0, 0.0), False)


def test_a_request_as_the_reference_reads_it() -> None:
    asked = read(b'{"prompt": "p", "extra": 1}')
    assert asked == Asked(prompt="p", temperature=1.0, top_p=1.0, max_new_tokens=256, stop=[], images=[])
    assert asked.settings(4096, 7).max_new_tokens == 256
    asked = read(b'{"prompt": "p", "max_new_tokens": 5000, "stop": "</s>", "images": null, "model": null}')
    assert asked.stop == ["</s>"] and asked.settings(4096, 7).max_new_tokens == 1024
    assert asked.settings(500, 7).max_new_tokens == 500
    assert read(b'{"prompt": "p", "stop": ""}').stop == read(b'{"prompt": "p", "stop": null}').stop == []
    drawn = read(b'{"prompt": "p", "temperature": 0.0011, "top_p": "0.5"}').settings(10, 7)
    assert (drawn.temperature, drawn.top_p, drawn.seed, drawn.max_new_tokens) == (0.0011, 0.5, 7, 10)
    assert read(b'{"prompt": "p", "temperature": 0.001}').settings(10, 7).temperature == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"prompt": 5}',
        b'{"prompt": "secret", "temperature": -1}',
        b'{"prompt": "secret", "temperature": NaN}',
        b'{"prompt": "secret", "top_p": 1.1}',
        b'{"prompt": "secret", "max_new_tokens": "secret"}',
        b'{"prompt": "secret", "images": "secret"}',
        b'{"prompt": "secret", "stop": [7]}',
        b'{"prompt": "secret", "stop": [' + b'"x",' * 16 + b'"x"]}',
    ],
)
def test_a_request_that_is_none_is_refused_without_repeating_it(body: bytes) -> None:
    with pytest.raises(Refused) as wrong:
        read(body)
    assert wrong.value.status == 400 and "secret" not in str(wrong.value.body())


def test_a_line_is_json_and_ends_with_nul() -> None:
    assert line("a\0ü") == b'{"text": "a\\u0000\\u00fc", "error_code": 0}\0'


def test_a_reason_can_be_read_where_it_is_taken_for_html() -> None:
    """The reference's page does; an answer is left as it is."""
    assert (
        line("1 <image> and <|pad|>, 2 < 3", FAILED)
        == b'{"text": "1 `<image>` and `<|pad|>`, 2 < 3", "error_code": 1}\0'
    )
    assert line("1 <image>") == b'{"text": "1 <image>", "error_code": 0}\0'
