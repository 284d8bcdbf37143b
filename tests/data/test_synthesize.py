"""Rows from captions and boxes through an endpoint that is busy, torn, and at times writes nonsense."""

from __future__ import annotations

import json
import re
from threading import Lock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import serving

from vistune.data.fetching.download import Patience
from vistune.data.formats import open_source
from vistune.data.teaching import captioned
from vistune.data.teaching import synthesize as room
from vistune.data.teaching.replies import Malformed, rounds
from vistune.data.teaching.synthesize import read_prompts, synthesize
from vistune.data.teaching.teacher import TeacherError, endpoint
from vistune.data.tokenize import check_marks

SOON = {"timeout": 5, "tries": 4, "wait": 0.001}
GOOD = '{"question": "What is it?", "answer": "A cat."}\n{"question": "Where is it?", "answer": "On a mat."}'
REASON = "Question:\nWhy does it sleep?\n===\nAnswer:\nIt is warm there, and cats like warmth."
DETAIL = "A cat sleeps on a mat in the sun.\n\nThe mat lies in the middle of a room, and a ball lies beside it."


def chat(text: str, finish: str = "stop", **more) -> tuple[int, dict[str, str], bytes]:
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return 200, {"Content-Type": "application/json"}, json.dumps(body | more).encode()


class Fake:
    """Answers by the picture that is asked about: a list of answers, used up one a request, then the good one."""

    def __init__(self, server) -> None:
        self.answers: dict[str, list] = {}
        self.good = chat(GOOD)
        self.requests: list[dict] = []
        self.keys: set[str] = set()
        self.lock = Lock()
        self.url = server.link("/v1")
        server.posts["/v1/chat/completions"] = self.answer

    def answer(self, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        asked = json.loads(body)
        name = re.search(r"cat number (\d+)", asked["messages"][-1]["content"])[1]
        with self.lock:
            self.requests.append(asked)
            self.keys.add(headers.get("Authorization", ""))
            waiting = self.answers.get(name, [])
            return waiting.pop(0) if waiting else self.good


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving() as server:
        yield Fake(server)


@pytest.fixture
def captions(tmp_path):
    def write(count: int, name: str = "captions.jsonl"):
        rows = [
            {
                "image": f"coco/{i:012}.jpg",
                "captions": [f"cat number {i} on a mat", "A cat\nasleep."],
                "boxes": [{"category": "cat", "bbox": [64, 48, 320, 240]}],
                "width": 640,
                "height": 480,
            }
            for i in range(count)
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)) + "\n")
        return tmp_path / name

    return write


def make(fake, rows, out, kind="conversation", **more):
    more = {"patience": Patience(**SOON), "workers": 3} | more
    return synthesize(rows, kind, url=fake.url, model="teacher", out=out, **more)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "reply", "turns"), [("conversation", GOOD, 4), ("reasoning", REASON, 2), ("detail", DETAIL, 2)]
)
def test_rows_open_as_llava_json(fake, captions, tmp_path, kind, reply, turns):
    fake.good = chat(reply)
    report = make(fake, captions(6), tmp_path / "made.jsonl", kind)
    assert (report["written"], report["asked"], report["malformed"]) == (6, 6, 0)
    assert (report["prompt_tokens"], report["completion_tokens"]) == (600, 60)
    (tmp_path / "coco").mkdir()
    reader = open_source(str(tmp_path / "made.jsonl"), images=str(tmp_path))
    samples = sorted((reader[row] for row in range(6)), key=lambda sample: sample.id)
    assert [sample.id for sample in samples] == [f"{i:012}" for i in range(6)]
    for sample in samples:
        check_marks(sample)
        assert len(sample.messages) == turns and len(sample.images) == 1
        assert sample.messages[0].text.startswith("<image>\n")
    if kind == "detail":
        asked = {sample.messages[0].text.removeprefix("<image>\n") for sample in samples}
        assert asked <= set(read_prompts("detail").instructions) and len(asked) > 1
        assert samples[0].messages[1].text == DETAIL
    assert not list(tmp_path.glob("*malformed*"))


def test_what_the_teacher_is_told(fake, captions, tmp_path):
    make(fake, captions(1), tmp_path / "made.jsonl", options={"temperature": None, "top_p": 0.9})
    (request,) = fake.requests
    told = read_prompts("conversation")
    assert request["model"] == "teacher" and request["top_p"] == 0.9 and "temperature" not in request
    assert [message["role"] for message in request["messages"]] == ["system", *["user", "assistant"] * 2, "user"]
    assert request["messages"][0]["content"] == told.system
    assert request["messages"][-1]["content"] == (
        "cat number 0 on a mat\nA cat asleep.\n\ncat: [0.100, 0.100, 0.600, 0.600]"
    )
    assert fake.keys == {""}


def test_options_from_words():
    words = ["temperature=0.2", "max_tokens=null", "reasoning_effort=low", 'stop=["x=y"]']
    assert room.read_options(words) == {
        "temperature": 0.2,
        "max_tokens": None,
        "reasoning_effort": "low",
        "stop": ["x=y"],
    }
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        room.read_options(["temperature"])


def test_the_key_goes_in_the_header_and_nowhere_else(fake, captions, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    fake.answers["1"] = [(400, {}, b"too long")]
    report = make(fake, captions(2), tmp_path / "made.jsonl", api_key_env="MY_KEY")
    assert fake.keys == {"Bearer s3cret"} and report["refused"] == 1
    assert not [path for path in tmp_path.iterdir() if b"s3cret" in path.read_bytes()]


def test_busy_limited_dropped_and_torn_are_asked_again(fake, captions, tmp_path):
    fake.answers = {
        "0": [(503, {}, b""), (500, {}, b"")],
        "1": [(429, {"Retry-After": "0"}, b"slow down")],
        "2": [(200, {"Content-Length": "900"}, b"{"), (200, {}, b"not json"), (200, {}, b'{"choices": []}')],
    }
    report = make(fake, captions(3), tmp_path / "made.jsonl")
    assert (report["written"], report["asked"], len(fake.requests)) == (3, 3, 3 + 2 + 1 + 3)


def test_malformed_is_counted_listed_and_never_a_row(fake, captions, tmp_path):
    fake.answers = {
        "0": [chat("Sure! Here is a conversation about a cat.")],
        "1": [chat(GOOD, finish="length")],
        "2": [chat(GOOD.replace("A cat.", ""))],
        "3": [chat(None)],
        "4": [(400, {}, b'{"error": "context too long"}')],
    }
    report = make(fake, captions(7), tmp_path / "made.jsonl")
    assert (report["written"], report["malformed"], report["refused"]) == (2, 4, 1)
    reasons = {int(line["id"]): line["reason"] for line in lines(tmp_path / "made.malformed.jsonl")}
    assert set(reasons) == {0, 1, 2, 3, 4}
    assert "begins with 'Sure!" in reasons[0] and "cut" in reasons[1] and "empty answer" in reasons[2]
    assert "context too long" in reasons[4]
    assert {row["id"] for row in lines(tmp_path / "made.jsonl")} == {"000000000005", "000000000006"}


def test_a_second_call_pays_for_nothing(fake, captions, tmp_path):
    fake.answers = {"1": [chat("no")]}
    rows = captions(4)
    make(fake, rows, tmp_path / "made.jsonl", limit=3)
    before = (tmp_path / "made.jsonl").read_bytes()
    fake.requests.clear()
    again = make(fake, rows, tmp_path / "made.jsonl", limit=3)
    assert not fake.requests and (tmp_path / "made.jsonl").read_bytes() == before
    assert (again["already_there"], again["from_cache"], again["malformed"]) == (2, 1, 1)
    more = make(fake, rows, tmp_path / "made.jsonl")
    assert (more["written"], more["asked"], len(fake.requests)) == (1, 1, 1)
    # Other rows from the same replies: the cache stands for itself; another prompt is another request.
    (tmp_path / "made.jsonl").rename(tmp_path / "old.jsonl")
    assert make(fake, rows, tmp_path / "made.jsonl")["from_cache"] == 4
    assert make(fake, rows, tmp_path / "new.jsonl", options={"temperature": 0})["asked"] == 4


def test_killed_in_the_middle_of_a_line(fake, captions, tmp_path):
    rows, out = captions(5), tmp_path / "made.jsonl"
    make(fake, rows, out)
    whole = out.read_bytes().splitlines(keepends=True)
    kept = (tmp_path / "made.replies.jsonl").read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole[:3]) + whole[3][:40])
    (tmp_path / "made.replies.jsonl").write_bytes(b"".join(kept[:4]) + kept[4][:9])
    fake.requests.clear()
    report = make(fake, rows, out)
    assert (report["already_there"], report["written"]) == (3, 2)
    assert (report["from_cache"], report["asked"], len(fake.requests)) == (1, 1, 1)
    assert len({row["id"] for row in lines(out)}) == len(lines(out)) == 5


def test_stopped_by_hand_keeps_what_came(fake, captions, tmp_path, monkeypatch):
    real, seen = room._Writing._take, []

    def interrupted(self, job, reply):
        real(self, job, reply)
        seen.append(job)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(room._Writing, "_take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(fake, captions(30), tmp_path / "made.jsonl", workers=2)
    assert len(lines(tmp_path / "made.jsonl")) == 4
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    report = make(fake, captions(30), tmp_path / "made.jsonl")
    assert (report["already_there"], report["written"]) == (4, 26)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {}, b"bad key"), "401 Unauthorized: bad key"),
        ((404, {}, b"no such model"), "404 Not Found: no such model"),
        ((307, {"Location": "http://127.0.0.1:9/v1"}, b""), "307"),
        ((503, {}, b"loading"), "given up after 4 tries.*503 Service Unavailable: loading"),
    ],
)
def test_an_endpoint_that_cannot_be_used_stops_it(fake, captions, tmp_path, answer, said):
    fake.good = answer
    with pytest.raises(TeacherError, match=said):
        make(fake, captions(3), tmp_path / "made.jsonl", workers=1)
    assert len(fake.requests) == (4 if answer[0] == 503 else 1)


def test_a_hopeless_case_is_ended(fake, captions, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "HOPELESS", 5)
    fake.good = chat("I cannot see pictures.")
    with pytest.raises(TeacherError, match="5 replies and not one becomes a row"):
        make(fake, captions(40), tmp_path / "made.jsonl", workers=1)
    fake.good = (400, {}, b"no")
    with pytest.raises(TeacherError, match="20 requests in a row were refused"):
        make(fake, captions(60), tmp_path / "other.jsonl", workers=1)
    assert len(fake.requests) < 45


def test_a_dry_run_asks_nobody(fake, captions, tmp_path, capsys):
    report = make(fake, captions(9), tmp_path / "made.jsonl", dry_run=True)
    assert not fake.requests and not list(tmp_path.glob("made*"))
    out = capsys.readouterr().out
    assert out.startswith("[system]\nYou write practice conversations") and "cat number 0" in out
    assert report["requests"] == 9
    told = read_prompts("conversation")
    characters = len(told.system) + sum(len(a) + len(b) for a, b in told.shots)
    assert report["prompt_tokens_estimated"] == pytest.approx(9 * characters / 4, rel=0.1)
    assert report["completion_tokens_at_most"] == 9 * 1024


def test_prompts_of_ones_own(fake, captions, tmp_path):
    """LLaVA's layout of folders is taken as it is."""
    folder = tmp_path / "prompts" / "complex_reasoning"
    folder.mkdir(parents=True)
    (folder / "system_message.txt").write_text("Be brief.\n")
    (folder / "000_caps.txt").write_text("A dog.")
    (folder / "000_conv.txt").write_text("Question:\nWhy?\n===\nAnswer:\nBecause.")
    fake.good = chat(REASON)
    make(fake, captions(1), tmp_path / "made.jsonl", "reasoning", prompts=tmp_path / "prompts")
    assert [message["content"] for message in fake.requests[0]["messages"][:2]] == ["Be brief.", "A dog."]
    (folder / "001_conv.txt").write_text("alone")
    with pytest.raises(ValueError, match=r"001_conv\.txt: its other half is missing"):
        read_prompts("reasoning", folder)
    with pytest.raises(ValueError, match=r"no system_message\.txt in it or in detail, detail_description"):
        read_prompts("detail", tmp_path / "prompts")
    with pytest.raises(ValueError, match="kind 'poem' is unknown; choose conversation, detail, reasoning"):
        read_prompts("poem")


@pytest.mark.parametrize("kind", ["conversation", "reasoning", "detail"])
def test_our_own_examples_pass_our_own_reading(kind):
    told = read_prompts(kind)
    assert len(told.shots) == 2 and len(told.instructions) >= 10
    for known, written in told.shots:
        assert rounds(kind, written, "stop", known, told.instructions[0])


def test_an_out_file_of_something_else(fake, captions, tmp_path):
    out = tmp_path / "made.jsonl"
    make(fake, captions(1), out)
    with pytest.raises(ValueError, match=r"made\.jsonl:0: a row of kind 'conversation', not 'detail'"):
        make(fake, captions(1), out, "detail")
    other = tmp_path / "theirs.jsonl"
    other.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match=r"theirs\.jsonl:0: not a row that was made here"):
        make(fake, captions(1), other)
    assert other.read_text() == '{"id": 1}\n'


def test_coco_annotations(tmp_path):
    images = [{"id": 7, "file_name": "000000000007.jpg", "width": 100, "height": 50}, {"id": 8, "file_name": "8.jpg"}]
    spoken = [
        {"image_id": 7, "id": 1, "caption": "A dog \n runs"},
        {"image_id": 7, "id": 2, "caption": '"annotations": ['},
    ]
    things = [
        {"image_id": 7, "category_id": 3, "bbox": [10, 5, 50, 25], "iscrowd": 0, "segmentation": [[1, 2], {"a": "]"}]},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 100, 50], "iscrowd": 1},
    ]
    (tmp_path / "c.json").write_text(json.dumps({"info": {}, "images": images, "annotations": spoken}, indent=1))
    (tmp_path / "i.json").write_text(json.dumps({"annotations": things, "categories": [{"id": 3, "name": "dog"}]}))
    (found,) = captioned.pictures(tmp_path / "c.json", tmp_path / "i.json", folder="coco/train2017")
    assert found == captioned.Picture(
        id="000000000007",
        image="coco/train2017/000000000007.jpg",
        captions=("A dog runs", '"annotations": ['),
        boxes=(("dog", (0.1, 0.1, 0.6, 0.6)),),
    )
    with pytest.raises(ValueError, match=r"i\.json: annotation None has no caption"):
        list(captioned.pictures(tmp_path / "i.json"))
    (tmp_path / "torn.json").write_text((tmp_path / "c.json").read_text()[:-30])
    with pytest.raises(ValueError, match=r"torn\.json: annotations: torn near character"):
        list(captioned.pictures(tmp_path / "torn.json"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("[]", 'expected an object with "image"'),
        ('{"image": "a.jpg"', "no JSON"),
        ('{"image": "a.jpg", "captions": []}', "expected a list of sentences"),
        ('{"image": "a.jpg", "captions": ["x", 3]}', "expected a list of sentences"),
        (
            '{"image": "a.jpg", "captions": ["x"], "boxes": [{"category": "b", "bbox": [1, 2, 3, 4]}]}',
            "width and height",
        ),
        (
            '{"image": "a", "captions": ["x"], "width": 9, "height": 9,'
            ' "boxes": [{"category": "b", "bbox": [9, 0, 9, 1]}]}',
            "lies outside the picture of 9 x 9",
        ),
    ],
)
def test_input_that_cannot_be_used_is_named(tmp_path, row, said):
    (tmp_path / "rows.jsonl").write_text('{"image": "ok.jpg", "captions": ["fine"]}\n' + row + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1") as error:
        list(captioned.pictures(tmp_path / "rows.jsonl"))
    assert said in str(error.value)


PAIR = [("Why?", "So.")]


@pytest.mark.parametrize(
    "text",
    [
        REASON.replace("Why does it sleep?", "Why?").replace("It is warm there, and cats like warmth.", "So."),
        "Question: Why?\nAnswer: So.",
        "**Question:** Why?\n\n**Answer:** So.",
        "Q: Why?\nA: So.",
        '{"question": "Why?", "answer": "So."}',
        '```json\n[{"Question": "Why?", "Answer": "So."}]\n```',
        '{"conversation": [{"user": "Why?", "assistant": "So."}]}',
    ],
)
def test_forms_that_are_read(text):
    assert rounds("reasoning", text, "stop", "", "") == PAIR


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("conversation", "Question: a?\nAnswer: b.", "1 rounds, expected 2"),
        ("reasoning", GOOD, "2 rounds, expected 1 to 1"),
        ("conversation", "Question: a?\nQuestion: b?\nAnswer: c.", "do not take turns"),
        ("conversation", "Question: a?\nAnswer: b.\nQuestion: c?", "do not take turns"),
        ("conversation", GOOD + "\nThat was it.", "begins as JSON and is none"),
        ("conversation", GOOD.replace("Where", "What").replace("is it?", "is it?"), "same question twice"),
        ("conversation", GOOD.replace("On a mat.", "<image>"), "has <image> in its text"),
        (
            "conversation",
            GOOD.replace("On a mat.", "The caption says on a mat."),
            "what the teacher was told: 'caption'",
        ),
        ("conversation", GOOD.replace("On a mat.", "At [0.1, 0.2, 0.3, 0.4]."), "what the teacher was told"),
        ("conversation", '[{"question": "a?"}]', "an entry is not"),
        ("detail", "A cat.", "a description of 6 characters"),
        ("detail", GOOD, "a description was expected"),
    ],
)
def test_forms_that_are_refused(kind, text, said):
    with pytest.raises(Malformed, match=re.escape(said)):
        rounds(kind, text, "stop", "A cat on a mat", "Describe it.")


PIECES = st.sampled_from(
    [
        "Question:",
        "Answer:",
        "===",
        "\n",
        "{",
        "}",
        '{"question": "a", "answer": "b"}',
        "[",
        "]",
        "null",
        "```",
        "text",
        "1",
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(PIECES, max_size=12).map(" ".join) | st.text(max_size=60), st.sampled_from(["conversation", "reasoning"])
)
def test_no_reply_breaks_the_reading(text, kind):
    try:
        found = rounds(kind, text, "stop", "", "")
    except Malformed:
        return
    assert found and all(question and answer for question, answer in found)


def test_words_that_the_captions_use_themselves_are_no_leak():
    text = GOOD.replace("On a mat.", "Above the caption.")
    assert len(rounds("conversation", text, "stop", "A comic with a caption below", "")) == 2


@pytest.mark.parametrize(
    ("given", "posted"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("https://a.example/openai/v1/chat/completions?x=1", "https://a.example/openai/v1/chat/completions?x=1"),
    ],
)
def test_addresses(given, posted):
    assert endpoint(given) == posted
    with pytest.raises(ValueError, match="expected an address such as"):
        endpoint("localhost:8000")
