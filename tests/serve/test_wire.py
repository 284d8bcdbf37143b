"""Every field of OpenAI's chat completions: honoured, taken when it says nothing, or refused with its name."""

from __future__ import annotations

import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import completion_create_params

from tests.serve.served import data_url, picture
from vistune.samples import IMAGE_MARK
from vistune.serve.interface import wire
from vistune.serve.interface.turns import conversation, links
from vistune.serve.limits import Limits
from vistune.serve.refused import Refused

HI = [{"role": "user", "content": "Hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def read(**fields):
    return wire.read(json.dumps({"model": "m", "messages": HI} | fields).encode())


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def talk(*messages, **limits):
    return conversation(read(messages=list(messages)), Limits(**limits))


def refused(*messages, **limits):
    with pytest.raises(Refused) as found:
        talk(*messages, **limits)
    assert found.value.status == 400
    return found.value


HONOURED = {
    "max_tokens": [1, 100, None],
    "max_completion_tokens": [1, 100, None],
    "temperature": [0, 0.5, 2, None],
    "top_p": [0, 0.3, 1, None],
    "seed": [0, -5, 2**63 - 1, None],
    "stream": [True, False, None],
    "model": ["", "m"],
}
SAY_NOTHING = {
    # what is taken, and what is refused
    "n": ([1, None], [2, 0, True, "1"]),
    "frequency_penalty": ([0, 0.0, None], [0.1, -1, "0", False]),
    "presence_penalty": ([0, 0.0, None], [0.1, -1]),
    "logit_bias": ([{}, None], [{"50256": -100}, []]),
    "logprobs": ([False, None], [True, 0]),
    "top_logprobs": ([0, None], [1, 20]),
    "response_format": (
        [{"type": "text"}, None],
        [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    ),
    "tools": ([[], None], [[{"type": "function", "function": {"name": "f"}}]]),
    "functions": ([[], None], [[{"name": "f"}]]),
    "tool_choice": (["none", "auto", None], ["required", {"type": "function", "function": {"name": "f"}}]),
    "function_call": (["none", "auto", None], [{"name": "f"}]),
    "parallel_tool_calls": ([True, False, None], ["yes"]),
    "audio": ([None], [{"voice": "alloy", "format": "wav"}]),
    "modalities": ([["text"], None], [["text", "audio"], []]),
    "store": ([False, None], [True]),
    "metadata": ([{}, None], [{"a": "b"}]),
    "prediction": ([None], [{"type": "content", "content": "x"}]),
    "reasoning_effort": (["none", None], ["low", "high"]),
    "verbosity": (["medium", None], ["low", "high"]),
    "service_tier": (["auto", "default", None], ["priority", "flex"]),
    "web_search_options": ([None], [{}]),
    "moderation": ([None], [{}]),
    "prompt_cache_options": ([{}, None], [{"mode": "explicit"}]),
    "prompt_cache_retention": (["in_memory", None], ["24h"]),
    "stream_options": ([None], [{"include_usage": True}]),  # without a stream
    "user": (["somebody", None], [5, "x" * 513]),
    "safety_identifier": (["somebody", None], [5]),
    "prompt_cache_key": (["key", None], [{}]),
}


def test_no_documented_field_is_forgotten():
    documented = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert documented == {"messages", "stop"} | set(HONOURED) | set(SAY_NOTHING)
    assert documented == set(wire.Asked.model_fields)


@pytest.mark.parametrize("name", HONOURED)
def test_honoured(name):
    for value in HONOURED[name]:
        assert getattr(read(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("said", "stops"), [(None, ()), ([], ()), ("###", ("###",)), (["a", "b", "c", "d"], ("a", "b", "c", "d"))]
)
def test_stops(said, stops):
    assert read(stop=said).stop == stops


@pytest.mark.parametrize("name", SAY_NOTHING)
def test_taken_only_when_it_says_nothing(name):
    taken, wrong = SAY_NOTHING[name]
    for value in taken:
        read(**{name: value})
    for value in wrong:
        with pytest.raises(Refused) as found:
            read(**{name: value})
        assert (found.value.status, found.value.param) == (400, name) and found.value.code
        assert name in found.value.message or name == "stream_options"


WRONG = {
    "max_tokens": [0, -1, 1.5, "5", True],
    "temperature": [-0.1, 2.1, "1", True, float("nan"), float("inf")],
    "top_p": [-0.1, 1.1, "1"],
    "stop": ["", ["a"] * 5, [""], [1], 5, {"a": 1}, "x" * 257],
    "seed": [0.5, "7", True, 2**63, -(2**63) - 1],
    "stream": ["true", 1],
    "model": [5, None, "m" * 257],
    "messages": [None, [], "Hi", {}, [5], [None]],
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_cannot_be(name):
    for value in WRONG[name]:
        with pytest.raises(Refused) as found:
            read(**{name: value})
        assert found.value.status == 400 and (found.value.param or name).startswith(name) and found.value.code


def test_unknown_fields_are_named_and_cut():
    with pytest.raises(Refused) as found:
        read(top_k=5)
    assert (found.value.param, found.value.code) == ("top_k", "unknown_parameter")
    with pytest.raises(Refused) as found:
        read(**{"a\n\x1b[31m" + "b" * 5000: 1})
    assert len(found.value.message) < 300 and found.value.message.isprintable()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b"null", b'{"messages": "\\ud800"}', b"[" * 5000, b'{"a":' * 5000],
)
def test_bodies_that_are_no_request(body):
    with pytest.raises(Refused) as found:
        wire.read(body)
    assert found.value.status == 400 and len(found.value.message) < 200


PART = '{"type": "text", "text": ""}'


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": [' + ", ".join([PART] * 200_000) + "]}]}",
        '{"metadata": [' + "1," * 1_000_000 + "1]}",
        '{"metadata": [' + "{}," * 1_000_000 + "1]}",
        '{"metadata": ' + "[" * 1_000_000,
        '{"a": "\\\\", "metadata": [' + "1," * 1_000_000 + "1]}",
        '{"a": "' + '\\"' * 1_000_000 + '"}',
        "{" + ", ".join(f'"{i}": 0' for i in range(200_000)) + "}",
    ],
    ids=["parts", "numbers", "objects", "depth", "escaped", "quotes", "names"],
)
def test_millions_of_values_are_refused_before_they_are_parsed(body, monkeypatch):
    monkeypatch.setattr(wire.Asked, "model_validate_json", lambda _: pytest.fail("parsed"))
    with pytest.raises(Refused) as found:
        wire.read(body.encode())
    assert (found.value.status, found.value.code) == (400, "too_many_values")


@pytest.mark.parametrize("words", ['say "[{,' * 10_000, "[{," * 200_000, '\\"\\,' * 20_000, "\\", '\\"', '",' * 1000])
def test_what_stands_in_strings_is_not_counted(words):
    assert read(messages=[{"role": "user", "content": words}] * 2).messages[1].content == words


def test_both_limits_of_tokens_must_agree():
    assert read(max_tokens=5, max_completion_tokens=5).tokens == 5
    assert read(max_completion_tokens=7).tokens == 7 and read().tokens is None
    with pytest.raises(Refused, match="differ"):
        read(max_tokens=5, max_completion_tokens=6)


def test_options_of_a_stream():
    assert read(stream=True, stream_options={"include_usage": True}).usage
    assert not read(stream=True, stream_options={"include_usage": None, "include_obfuscation": False}).usage
    for options in ({"include_obfuscation": True}, {"continuous_usage_stats": True}):
        with pytest.raises(Refused) as found:
            read(stream=True, stream_options=options)
        assert found.value.param == f"stream_options.{next(iter(options))}"


def test_what_is_greedy():
    assert read(temperature=0).greedy and read(temperature=1e-6).greedy and read(top_p=0).greedy
    assert not read().greedy and not read(temperature=0.01).greedy


def test_parts_become_text_with_marks_where_pictures_stand():
    assert [m.text for m in talk(user(IMAGE, text("What?")))] == [f"{IMAGE_MARK}\nWhat?"]
    assert [m.text for m in talk(user(text("What?"), IMAGE))] == [f"What?\n{IMAGE_MARK}"]
    whole = talk(user(text("From "), IMAGE, text(" to "), IMAGE, IMAGE, text("and"), text("so on")))
    assert whole[0].text == f"From {IMAGE_MARK} to {IMAGE_MARK}\n{IMAGE_MARK}\nand\nso on"
    assert [m.text for m in talk(user(text("a"), text(""), text("b")))] == ["a\nb"]


def test_roles():
    found = talk(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [text("Be kind.")]},
        user(IMAGE, text("What?")),
        {"role": "assistant", "content": "A cup.", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": "Sure?", "name": None},
    )
    assert [m.role for m in found] == ["system", "user", "assistant", "user"]
    assert found[0].text == "Be brief.\n\nBe kind."


def test_what_answers_carry_may_come_back():
    message = openai.types.chat.ChatCompletionMessage(role="assistant", content="A cup.")
    assert len(talk(*HI, message.model_dump(), *HI)) == 3


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "assistant", "content": "a"}, *HI], "messages[0].role"),
        ([*HI, *HI], "messages[1].role"),
        ([*HI, {"role": "assistant", "content": "a"}], "messages[1].role"),
        ([*HI, {"role": "system", "content": "a"}], "messages[1].role"),
        ([{"role": "system", "content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a", "tool_call_id": "x"}], "messages[0]"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": "a", "name": "Bob"}], "messages[0].name"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([user({"type": "input_audio", "input_audio": {}})], "messages[0].content[0]"),
        ([user(text("a"), {"type": "text"})], "messages[0].content[1].text"),
        ([user(text("a"), {"type": "image_url"})], "messages[0].content[1].image_url"),
        ([user({"type": "image_url", "image_url": {}})], "messages[0].content[0].image_url.url"),
        (
            [user({"type": "image_url", "image_url": {"url": "x", "detail": "low"}})],
            "messages[0].content[0].image_url.detail",
        ),
        ([user({"type": "image_url", "image_url": {"url": "x", "size": 5}})], "messages[0].content[0].image_url.size"),
        ([user({"type": "image_url", "image_url": 5})], "messages[0].content[0].image_url"),
        ([{"role": "system", "content": [IMAGE]}, *HI], "messages[0].content[0]"),
    ],
)
def test_wrong_messages_are_named(messages, param):
    assert refused(*messages).param.startswith(param)


def test_pictures_in_any_form():
    url = data_url(picture())
    bare, whole = (
        {"type": "image_url", "image_url": url},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
    )
    asked = read(messages=[user(text("a"), bare), {"role": "assistant", "content": "b"}, user(whole)])
    assert links(asked) == [
        ("messages[0].content[1].image_url", url),
        ("messages[2].content[0].image_url.url", url),
    ]


def test_a_mark_in_the_text():
    assert talk({"role": "user", "content": f"What is {IMAGE_MARK}?"})[0].text == f"What is {IMAGE_MARK}?"
    assert refused(user(IMAGE, text(f"What is {IMAGE_MARK}?"))).param == "messages[0].content[1]"
    later = [user(IMAGE), {"role": "assistant", "content": "a"}, {"role": "user", "content": IMAGE_MARK}]
    assert refused(*later).param == "messages[2].content"


def test_caps():
    assert refused(user(IMAGE, IMAGE, IMAGE), pictures=2).code == "too_many_pictures"
    assert refused(*HI, {"role": "assistant", "content": "a"}, *HI, messages=2).code == "too_many_messages"


SECRET = "s3cr3t"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(SECRET),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "url", "role"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(wire.Asked.model_fields)), json_values))
def test_any_json_is_read_or_refused_without_its_contents(fields):
    try:
        conversation(read(**fields), Limits())
    except Refused as error:
        assert error.status == 400 and SECRET not in json.dumps(error.body()) and len(error.message) < 400
