"""OpenAI's own client, which checks every answer and chunk against its types: what it gets is what one request gets."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serve.served import picture, serving, shows, until
from vistune.decoding import Settings, decode, prompt
from vistune.generate import Chat
from vistune.models.load import load
from vistune.samples import IMAGE_MARK, Image, Message
from vistune.speech import spoken

KEY = "sk-tests"
SHOWN = [picture(0), picture(1, (56, 56)), picture(2, (30, 90))]
NEAR = 1e-4
"""Two logits nearer than that may change places when several requests are computed at once."""


@pytest.fixture(scope="module")
def serve(start):
    with serving(start, options={"keys": (KEY,)}, deadline=60) as found:
        yield found


@pytest.fixture(scope="module")
def loaded(start):
    return load(start)


@pytest.fixture(scope="module")
def client(serve):
    with strict(serve) as found:
        yield found


def strict(serve, key=KEY):
    return openai.OpenAI(
        base_url=f"{serve.url}/v1", api_key=key, max_retries=0, timeout=60, _strict_response_validation=True
    )


def alone(loaded, text, pictures=(), tokens=12):
    return "".join(Chat(loaded).ask(text, [Image(data=data) for data in pictures], max_new_tokens=tokens))


def said(client, messages, tokens=12, **more):
    """The one choice of an answer."""
    found = client.chat.completions.create(
        model="stage0", messages=messages, max_tokens=tokens, **({"temperature": 0} | more)
    )
    assert len(found.choices) == 1 and found.choices[0].message.role == "assistant"
    return found


def streamed(client, messages, tokens=12, **more):
    """Text, reason and usage of a stream."""
    asked = {"temperature": 0, "stream_options": {"include_usage": True}} | more
    chunks = list(
        client.chat.completions.create(model="stage0", messages=messages, max_tokens=tokens, stream=True, **asked)
    )
    *told, last = chunks
    assert told[0].choices[0].delta.role == "assistant" and last.choices == [] and last.usage
    text = "".join(one.choices[0].delta.content or "" for one in told)
    reasons = [one.choices[0].finish_reason for one in told]
    assert not any(reasons[:-1])
    return text, reasons[-1], last.usage


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("pictures", [[], SHOWN[:1], SHOWN])
def test_answers_are_those_of_one_request(client, loaded, pictures):
    wanted = alone(loaded, "What is it?", pictures)
    messages = [shows("What is it?", *pictures)]
    whole = said(client, messages)
    text, reason, usage = streamed(client, messages)
    assert whole.choices[0].message.content == text == wanted and len(wanted) > 5
    assert whole.choices[0].finish_reason == reason
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    ids = prompt(
        loaded,
        [Message(role="user", text=f"{IMAGE_MARK}\n" * len(pictures) + "What is it?")],
        [Image(data=one) for one in pictures],
    ).ids
    assert usage.prompt_tokens == len(ids) and usage.total_tokens == len(ids) + usage.completion_tokens
    again = (len(ids) - 1) // 32 * 32  # the last token is read for every answer
    assert usage.prompt_tokens_details.cached_tokens == again >= whole.usage.prompt_tokens_details.cached_tokens


@pytest.mark.slow
def test_several_turns(client, loaded):
    chat, messages = Chat(loaded), []
    for text, pictures in (("What is it?", SHOWN[:1]), ("Sure?", []), ("And these?", SHOWN[1:])):
        wanted = "".join(chat.ask(text, [Image(data=data) for data in pictures], max_new_tokens=8))
        messages.append(shows(text, *pictures) if pictures else {"role": "user", "content": text})
        found = said(client, messages, 8).choices[0].message
        assert found.content == wanted
        messages.append(found.model_dump())


def test_length_and_its_reason(client, loaded):
    for tokens in (1, 5):
        whole = said(client, ask("Tell me."), tokens)
        text, reason, usage = streamed(client, ask("Tell me."), tokens)
        assert whole.choices[0].message.content == text == alone(loaded, "Tell me.", tokens=tokens)
        assert whole.choices[0].finish_reason == reason == "length"
        assert whole.usage.completion_tokens == usage.completion_tokens == tokens


def test_a_stop_ends_the_answer(client, loaded):
    whole = alone(loaded, "Tell me of it.", SHOWN[:1], 24)
    stop = whole[len(whole) // 2 :][:2]
    wanted = whole.partition(stop)[0]
    messages = [shows("Tell me of it.", SHOWN[0])]
    for stops in (stop, [stop], ["never there", stop]):
        found = said(client, messages, 24, stop=stops).choices[0]
        text, reason, _ = streamed(client, messages, 24, stop=stops)
        assert found.message.content.rstrip() == text.rstrip() == wanted.rstrip()
        assert found.finish_reason == reason == "stop"


def test_a_seed_draws_what_generate_draws(client, loaded):
    asked = prompt(loaded, [Message(role="user", text="Tell me.")], [])
    for temperature, top_p, seed in ((0.8, 1.0, 5), (1.5, 0.6, 11)):
        settings = Settings(max_new_tokens=12, temperature=temperature, top_p=top_p, seed=seed)
        wanted = spoken(loaded, decode(loaded, [asked], settings)[0].ids)
        how = {"temperature": temperature, "top_p": top_p, "seed": seed}
        assert said(client, ask("Tell me."), **how).choices[0].message.content == wanted
        assert streamed(client, ask("Tell me."), **how)[0] == wanted
    drawn = {said(client, ask("Tell me."), temperature=2).choices[0].message.content for _ in range(3)}
    assert len(drawn) > 1


def questions():
    return [(f"What is number {i}, and why?" + " Really?" * (i % 5), SHOWN[i % 3 : i % 3 + i % 2]) for i in range(12)]


def test_twelve_at_once(client, loaded):
    def one(number):
        text, pictures = questions()[number]
        messages = [shows(text, *pictures)] if pictures else ask(text)
        if number % 3:
            return streamed(client, messages, 10)[0]
        return said(client, messages, 10).choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, range(12)))
    for (text, pictures), answer in zip(questions(), found, strict=True):
        if answer != alone(loaded, text, pictures, 10):
            assert margin(loaded, text, pictures) < NEAR, text


def margin(loaded, text, pictures):
    """The smallest gap between the two best logits of the answer's steps."""
    asked = prompt(
        loaded,
        [Message(role="user", text=f"{IMAGE_MARK}\n" * len(pictures) + text)],
        [Image(data=data) for data in pictures],
    )
    return decode(loaded, [asked], Settings(max_new_tokens=10))[0].margin


def test_asynchronously(serve, loaded):
    async def all_of_them():
        async with openai.AsyncOpenAI(
            base_url=f"{serve.url}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
        ) as client:
            assert [one.id async for one in client.models.list()] == ["stage0"]
            asked = {"model": "stage0", "messages": [shows("What is it?", SHOWN[0])], "temperature": 0, "max_tokens": 8}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert whole.choices[0].message.content == text
            return text

    assert asyncio.run(all_of_them()) == alone(loaded, "What is it?", SHOWN[:1], 8)


@pytest.mark.slow
def test_characters_are_never_cut(client, loaded):
    """Random models say many bytes that are no characters yet."""
    for i in range(3):
        text = f"¿Qué {i} 你好?"
        found, _, _ = streamed(client, ask(text), 40)
        assert found == alone(loaded, text, tokens=40)


def test_models(client):
    (about,) = client.models.list().data
    assert about.id == "stage0" and about.owned_by == "vistune" and client.models.retrieve("stage0") == about


@pytest.mark.parametrize(
    ("wrong", "kind", "param"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "model"),
        ({"n": 2}, openai.BadRequestError, "n"),
        ({"extra_body": {"top_k": 5}}, openai.BadRequestError, "top_k"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"max_tokens": 4000}, openai.BadRequestError, "messages"),
        ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": ask("a " * 30_000)}, openai.BadRequestError, "messages"),
        ({"messages": [shows("a", b"no picture")]}, openai.BadRequestError, "messages[0].content[0].image_url.url"),
        ({"messages": [shows("a", SHOWN[0][:200])]}, openai.BadRequestError, "messages[0].content[0].image_url.url"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(client, wrong, kind, param, stream):
    asked = {"model": "stage0", "messages": ask("Hi"), "stream": stream}
    with pytest.raises(kind) as found:
        client.chat.completions.create(**(asked | wrong))
    assert found.value.param == param and found.value.code


def test_keys(serve):
    with strict(serve, "sk-wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.slow
def test_the_queue_is_full(start):
    with serving(start, rows=1, queue=1, new_tokens=1500) as serve, strict(serve) as client:
        asked = {"model": "stage0", "messages": ask("Hi"), "max_tokens": 1500, "stream": True, "temperature": 0}
        held = [client.chat.completions.create(**asked) for _ in range(1)]
        thread = threading.Thread(target=lambda: held.append(client.chat.completions.create(**asked)))
        thread.start()
        state = serve.engine.state
        assert until(lambda: state().waiting >= 1)
        with pytest.raises(openai.RateLimitError) as found:
            client.chat.completions.create(**asked)
        assert int(found.value.response.headers["retry-after"]) >= 1 and found.value.code == "queue_full"
        held[0].close()
        thread.join(30)
        held[1].close()
        assert serve.idle()


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_who_goes_frees_the_row(start, stream):
    with serving(start, new_tokens=1900) as serve, strict(serve) as client:
        asked = {"model": "stage0", "messages": ask("Tell me."), "max_tokens": 1900, "temperature": 0}
        if stream:
            going = client.chat.completions.create(**asked, stream=True)
            assert until(lambda: serve.engine.state().running == 1)
            going.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.3).chat.completions.create(**asked)
        assert serve.idle(5)
        assert said(client, ask("Hi"), 2).usage.completion_tokens == 2
