"""LLaVA's clients, workers and controllers, each as its own code speaks, against ours."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.responses import StreamingResponse

from tests.made import stage0
from tests.serve.served import Serving, listening, picture, serving, until
from vistune.decoding import Settings, decode, laid, shown
from vistune.models.load import load
from vistune.samples import IMAGE_MARK, Image
from vistune.serve.door.options import Options, guarded
from vistune.serve.door.probes import opening
from vistune.serve.limits import Limits
from vistune.serve.llava import answering, routes
from vistune.serve.llava.registering import Registering
from vistune.serve.llava.status import Status
from vistune.serve.waiting import waiting
from vistune.speech import spoken

PICTURES = [picture(0), picture(1, (56, 40))]
HTTP = httpx.Client(timeout=60, verify=False)
SYSTEM = "A chat between a curious human and an artificial intelligence assistant."


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(stage0(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = stage0(tmp_path_factory.mktemp("served"))
    with serving(f"llava-tiny={folder}", options={"llava": True, "llava_allow": ("gpu7.lab",)}, rows=4) as made:
        yield made


class Page:
    """What LLaVA's Gradio server does: asks the controller for models and an address, the worker for an answer."""

    def __init__(self, controller: str):
        self.controller = controller
        self.http = HTTP

    def say(self, path: str, **fields: Any) -> Any:
        return self.http.post(self.controller + path, json=fields) if fields else self.http.post(self.controller + path)

    def models(self) -> list[str]:
        assert self.say("/refresh_all_workers").status_code == 200
        return sorted(self.say("/list_models").json()["models"])

    def worker(self, model: str) -> str:
        return self.say("/get_worker_address", model=model).json()["address"]

    def lines(self, address: str, **params: Any) -> list[dict[str, Any]]:
        asked = {"temperature": 0.0, "top_p": 0.7, "max_new_tokens": 8, "stop": "</s>", **params}
        found: list[dict[str, Any]] = []
        rest = b""
        with self.http.stream("POST", f"{address}/worker_generate_stream", json=asked) as answer:
            for piece in answer.iter_bytes():
                *whole, rest = (rest + piece).split(b"\0")
                found += [json.loads(one.decode("utf-8")) for one in whole if one]
        assert rest == b""
        self.status = answer.status_code
        return found

    def ask(self, model: str, prompt: str, images: list[bytes], **params: Any) -> str:
        lines = self.lines(self.worker(model), model=model, prompt=prompt, images=coded(images), **params)
        assert all(one["error_code"] == 0 and one["text"].startswith(prompt) for one in lines), lines
        assert [len(one["text"]) for one in lines] == sorted(len(one["text"]) for one in lines)
        return lines[-1]["text"][len(prompt) :].strip()


def coded(images: list[bytes]) -> list[str]:
    return [base64.b64encode(one).decode() for one in images]


def templated(question: str) -> str:
    return f"{SYSTEM} USER: {question} ASSISTANT:"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_page_gets_what_one_request_generate_gives(server: Serving, loaded: Any, count: int) -> None:
    """The prompt is templated as the reference does; its answer is that of the same ids, one request alone."""
    page = Page(server.url)
    assert page.models() == ["llava-tiny"] and page.worker("llava-tiny") == server.url
    prompt = templated("What?" if not count else "".join(f"{IMAGE_MARK}\n" for _ in range(count)) + "What?")
    got = page.ask("llava-tiny", prompt, PICTURES[:count])
    ids = loaded.encoder.encode(prompt, has_images=bool(count), whole=loaded.template.own)[0].tolist()
    alone = laid(loaded, ids, [shown(loaded, Image(data=one)) for one in PICTURES[:count]])
    assert got == spoken(loaded, decode(loaded, [alone], Settings(max_new_tokens=8))[0].ids)


def test_a_worker_says_how_it_is(server: Serving) -> None:
    assert HTTP.post(f"{server.url}/worker_get_status").json() == {
        "model_names": ["llava-tiny"],
        "speed": 1.0,
        "queue_length": 0.0,
    }


def test_errors_say_their_reason(server: Serving) -> None:
    page, at = Page(server.url), {"model": "llava-tiny"}

    def failed(**params: Any) -> tuple[int, str]:
        (only,) = page.lines(server.url, **{**at, **params})
        assert "HIGH TRAFFIC" not in only["text"]
        return only["error_code"], only["text"]

    assert failed(prompt="a <image>", images=[]) == (1, "0 pictures for 1 `<image>` in the prompt; give one for each")
    assert page.status == 400
    code, text = failed(prompt="a <image>", images=["no base64!"])
    assert code == 1 and "base64" in text and "no base64!" not in text
    code, text = failed(prompt="a <image>", images=coded([b"\x89PNG\r\n\x1a\n"]))
    assert code == 1 and "picture" in text
    assert failed(prompt="hi", temperature="warm")[0] == 1
    assert failed(prompt=None) == (1, "prompt: Input should be a valid string")
    code, text = failed(prompt="hi", model="gpt")
    assert code == 2 and "llava-tiny" in text and page.status == 404
    (broken,) = HTTP.post(f"{server.url}/worker_generate_stream", content=b"[1]").content.rstrip(b"\0").split(b"\0")
    assert json.loads(broken)["error_code"] == 1
    assert server.idle()


def test_what_leaves_no_room_is_said_in_the_reference_s_words(server: Serving) -> None:
    page = Page(server.url)
    for params in ({"prompt": "word " * 5000}, {"prompt": "hi", "max_new_tokens": 0}):
        (only,) = page.lines(server.url, model="llava-tiny", **params)
        prompt = params["prompt"]
        assert only == {
            "text": f"{prompt}Exceeds max token length. Please start a new conversation, thanks.",
            "error_code": 0,
        }
        assert page.status == 200


@pytest.mark.slow
def test_settings_are_read_as_the_reference_reads_them(server: Serving) -> None:
    page = Page(server.url)
    greedy = page.ask("llava-tiny", templated("What?"), [])
    assert page.ask("llava-tiny", templated("What?"), [], temperature=0.001) == greedy
    assert (
        page.ask("llava-tiny", templated("What?"), [], temperature="0", top_p="1", max_new_tokens="8", stop=None)
        == greedy
    )
    assert page.ask("llava-tiny", templated("What?"), [], temperature=1.0, top_p=0) == greedy
    drawn = {page.ask("llava-tiny", templated("What?"), [], temperature=1.0, top_p=1.0) for _ in range(4)}
    assert len(drawn) > 1
    word = next(piece for piece in greedy.split() if len(piece) > 1) if len(greedy.split()) > 1 else greedy[1:3]
    cut = page.ask("llava-tiny", templated("What?"), [], stop=word)
    assert word not in cut and greedy.startswith(cut)
    lines = page.lines(server.url, prompt=templated("What?"), user="an old client's own")  # no model: the first
    assert lines[-1]["text"].endswith(greedy)


def test_a_long_silence_is_broken(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's page gives up after ten seconds without a byte, its controller after five."""
    monkeypatch.setattr(answering, "SILENT", 0.05)
    held = threading.Event()
    engine = server.engine
    submit = engine.submit

    def slow(work: Any, hear: Any) -> Any:
        def later(said: Any) -> None:
            held.wait(10)
            hear(said)

        return submit(work, later)

    monkeypatch.setattr(engine, "submit", slow)
    with HTTP.stream(
        "POST",
        f"{server.url}/worker_generate_stream",
        json={"model": "llava-tiny", "prompt": "hi", "max_new_tokens": 2},
    ) as answer:
        pieces = answer.iter_bytes()
        first = json.loads(next(pieces).split(b"\0")[0])
        assert first == {"text": "hi", "error_code": 0}
        held.set()
        rest = b"".join(pieces).split(b"\0")
    assert json.loads(rest[-2])["error_code"] == 0
    assert server.idle()


def test_lines_come_no_faster_than_the_page_shows_them(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 30 ms and more for each, and would fall behind; the end waits for nothing."""
    page, asked = Page(server.url), {"model": "llava-tiny", "prompt": templated("What?"), "max_new_tokens": 48}
    monkeypatch.setattr(answering, "PACE", 0.0)
    each = page.lines(server.url, **asked)
    monkeypatch.setattr(answering, "PACE", 60.0)
    began = time.monotonic()
    few = page.lines(server.url, **asked)
    assert time.monotonic() - began < 30
    assert few[-1] == each[-1] and len(few) <= 3 and all(each[-1]["text"].startswith(one["text"]) for one in few)


def test_a_client_that_goes_leaves(server: Serving) -> None:
    asked = {"model": "llava-tiny", "prompt": "hi", "max_new_tokens": 1000}
    with HTTP.stream("POST", f"{server.url}/worker_generate_stream", json=asked) as answer:
        next(answer.iter_bytes())
    assert server.idle()


def test_without_the_option_there_is_nothing(tmp_path: Any) -> None:
    with serving(str(stage0(tmp_path))) as plain:
        assert HTTP.post(f"{plain.url}/list_models").status_code == 404


def test_the_message_of_test_message(server: Serving) -> None:
    """Its client splits at the separator, and asks the controller first."""
    page, sep = Page(server.url), "###"
    assert page.models() == ["llava-tiny"]
    prompt = f"{SYSTEM}{sep}Human: Tell me a story{sep}Assistant:"
    lines = page.lines(
        page.worker("llava-tiny"), model="llava-tiny", prompt=prompt, max_new_tokens=32, temperature=0.7, stop=sep
    )
    assert lines[-1]["error_code"] == 0 and lines[-1]["text"].split(sep)[-1].startswith("Assistant:")


class OldWorker:
    """LLaVA's model_worker as others see it: one model, lines with NUL between, beats when it is told to."""

    def __init__(self, name: str):
        self.name, self.asked, self.alive = name, [], True
        self.app = FastAPI()

        @self.app.post("/worker_get_status")
        async def status() -> Any:
            return {"model_names": [self.name], "speed": 1, "queue_length": 3} if self.alive else ["gone"]

        @self.app.post("/worker_generate_stream")
        async def stream(request: Request) -> StreamingResponse:
            params = await request.json()
            self.asked.append(params)

            async def lines() -> Any:
                for text in ("", " four", " four score"):
                    yield json.dumps({"text": params["prompt"] + text, "error_code": 0}).encode() + b"\0"
                if "break" in params["prompt"]:
                    raise RuntimeError("out of memory")

            return StreamingResponse(lines())

    def register(self, server: str, at: str, **more: Any) -> httpx.Response:
        status = {"model_names": [self.name], "speed": 1, "queue_length": 0}
        said = {"worker_name": at, "check_heart_beat": True, "worker_status": status, **more}
        return HTTP.post(f"{server}/register_worker", json=said)


@pytest.mark.slow
def test_an_old_worker_registers_and_is_asked_through_us(server: Serving) -> None:
    page, old = Page(server.url), OldWorker("llava-v1.5-7b")
    with listening(old.app) as at:
        beat = {"worker_name": at, "queue_length": 0}
        assert HTTP.post(f"{server.url}/receive_heart_beat", json=beat).json() == {"exist": False}
        answer = old.register(server.url, at)
        assert answer.status_code == 200 and answer.json() is None
        assert HTTP.post(f"{server.url}/receive_heart_beat", json=beat).json() == {"exist": True}
        assert page.models() == ["llava-tiny", "llava-v1.5-7b"]
        assert page.worker("llava-v1.5-7b") == at and page.worker("nobody's") == ""
        status = HTTP.post(f"{server.url}/worker_get_status").json()
        assert status == {"model_names": ["llava-tiny", "llava-v1.5-7b"], "speed": 2.0, "queue_length": 3.0}
        lines = page.lines(server.url, model="llava-v1.5-7b", prompt="USER: hi", images=["as it came"])
        assert [one["text"] for one in lines] == ["USER: hi", "USER: hi four", "USER: hi four score"]
        assert old.asked[0]["images"] == ["as it came"] and old.asked[0]["top_p"] == 0.7
        lines = page.lines(server.url, model="llava-v1.5-7b", prompt="break")
        assert lines[-1]["error_code"] == 3 and "broke off" in lines[-1]["text"]
        old.alive = False
        assert page.models() == ["llava-tiny"]  # what says nothing that can be used is forgotten
        old.alive = True
        answer = old.register(server.url, at, worker_status=None)  # as register_worker.py does: we ask it
        assert answer.status_code == 200 and page.models() == ["llava-tiny", "llava-v1.5-7b"]
    lines = page.lines(server.url, model="llava-v1.5-7b", prompt="hi")
    assert lines[0]["error_code"] == 3 and page.status == 502
    assert page.models() == ["llava-tiny"]


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("http://10.0.0.7:40000", 403),
        ("http://gpu8.lab:40000", 403),
        ("http://169.254.169.254", 403),
        ("http://localhost.evil.org:40000", 403),
        ("http://127.0.0.1@evil.org", 400),
        ("ftp://localhost/x", 400),
        ("http://localhost:99999", 400),
        ("http://localhost/?a=b", 400),
        ("", 400),
        (7, 400),
        ("http://gpu7.lab:40000", 200),
        ("https://[::1]:40000/prefix/", 200),
        ("http://127.9.9.9:1", 200),
    ],
)
def test_only_allowed_hosts_register(
    server: Serving, address: Any, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = OldWorker("elsewhere").register(server.url, address)
    assert answer.status_code == status
    said = capsys.readouterr().err  # the worker itself says no more than AssertionError
    assert ("is not registered" in said) == (status != 200) and ("--llava-allow" in said) == (status == 403)
    assert status == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert Page(server.url).worker("elsewhere") == (address.rstrip("/") if status == 200 else "")
    HTTP.post(f"{server.url}/refresh_all_workers")
    assert Page(server.url).worker("elsewhere") == ""


@pytest.mark.parametrize(
    "status",
    [
        {"model_names": "llava", "speed": 1, "queue_length": 0},
        {"model_names": ["m"], "speed": 0, "queue_length": 0},
        {"model_names": ["m"], "speed": 1, "queue_length": -1},
        {"model_names": ["m"], "speed": "fast", "queue_length": 0},
        {"model_names": [7], "speed": 1, "queue_length": 0},
    ],
)
def test_a_status_that_is_none_is_refused(server: Serving, status: Any) -> None:
    assert OldWorker("m").register(server.url, "http://localhost:1", worker_status=status).status_code == 400


def test_one_registered_with_itself_is_not_asked_for_ever(server: Serving) -> None:
    OldWorker("loop").register(server.url, server.url)
    (only,) = Page(server.url).lines(server.url, model="loop", prompt="hi")
    assert only["error_code"] == 2 and "itself" in only["text"]


def test_a_beat_that_comes_while_the_models_are_read_does_not_end_the_worker() -> None:
    """The reference's takes an error for its own, and never sends another beat."""
    reading, options = True, Options(llava=True, log=False)
    with listening(guarded(waiting(opening, options, lambda: reading), Limits(), options)) as at:
        beat = {"worker_name": "http://localhost:1", "queue_length": 0}
        assert HTTP.post(f"{at}/receive_heart_beat", json=beat).json() == {"exist": True}
        assert HTTP.post(f"{at}/list_models").status_code == 503
        reading = False
        assert HTTP.post(f"{at}/receive_heart_beat", json=beat).status_code == 503


class OldController:
    """LLaVA's controller as its workers see it."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.said: list[tuple[str, Any]] = []
        self.broken = True
        self.app = FastAPI()

        @self.app.post("/register_worker")
        async def register(request: Request) -> None:
            if self.broken:
                raise RuntimeError("starting")
            said = await request.json()
            self.said.append(("register", said))
            self.known[said["worker_name"]] = said["worker_status"]

        @self.app.post("/receive_heart_beat")
        async def beat(request: Request) -> dict[str, bool]:
            said = await request.json()
            self.said.append(("beat", said))
            return {"exist": said["worker_name"] in self.known}


@pytest.mark.slow
def test_we_register_with_an_old_controller_and_again_when_it_forgets_us() -> None:
    old = OldController()
    with listening(old.app) as at:
        ours = Registering(f"{at}/", "http://here:1/", lambda: Status(("a", "b"), 1.0, 5.0), beat=0.02, again=0.02)
        ours.start()
        try:
            assert not until(lambda: old.said, 0.2)  # it answers with errors
            old.broken = False
            assert until(lambda: [kind for kind, _ in old.said][:2] == ["register", "beat"])
            assert old.said[0][1] == {
                "worker_name": "http://here:1",
                "check_heart_beat": True,
                "worker_status": {"model_names": ["a", "b"], "speed": 1.0, "queue_length": 5.0},
            }
            assert old.said[1][1] == {"worker_name": "http://here:1", "queue_length": 5.0}
            old.known.clear()
            assert until(lambda: [kind for kind, _ in old.said].count("register") == 2)
        finally:
            ours.stop()
    assert not ours._thread.is_alive()


def test_what_we_say_of_ourselves(server: Serving) -> None:
    assert routes.own_status(server.shelf) == Status(("llava-tiny",), 1.0, 0.0)
