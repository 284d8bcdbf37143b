"""Training rows written by a text model from captions and boxes: conversations, descriptions, reasoning.

The way LLaVA's own instructions were made, through any OpenAI-compatible endpoint. Every reply is kept on disk before
it is read, so nothing is paid for twice; a reply that is malformed is counted and listed, and never becomes a row.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import IO, Any

from vistune import console
from vistune.data.fetching.download import Patience
from vistune.data.fetching.threads import spread
from vistune.data.teaching.captioned import Picture, pictures
from vistune.data.teaching.replies import Kind, Malformed, rounds
from vistune.data.teaching.teacher import Messages, Reply, RequestRefused, Teacher, TeacherError, teacher

PROMPTS = Path(__file__).parent / "prompts"
KINDS: dict[Kind, tuple[str, ...]] = {  # and what LLaVA calls its folders of prompts
    "conversation": ("conversation",),
    "detail": ("detail", "detail_description"),
    "reasoning": ("reasoning", "complex_reasoning"),
}
OPTIONS: dict[str, Any] = {"temperature": 0.7, "max_tokens": 1024}
IN_A_ROW = 20  # requests that are refused, one after the other, before it is the endpoint and not the pictures
HOPELESS = 50  # malformed replies without one good one, after which asking on is a waste
CHARACTERS_A_TOKEN = 4  # of English text, roughly; only for the estimate of a dry run


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a teacher is told before a picture: a system message and examples (what is known, what was written)."""

    system: str
    shots: tuple[tuple[str, str], ...]
    instructions: tuple[str, ...]  # questions that a description answers

    def messages(self, context: str) -> list[dict[str, str]]:
        turns = [{"role": "system", "content": self.system}]
        for known, written in self.shots:
            turns += [{"role": "user", "content": known}, {"role": "assistant", "content": written}]
        return [*turns, {"role": "user", "content": context}]


@dataclass(kw_only=True)
class Counts:
    """What a call did; the keys of its report."""

    pictures: int = 0
    already_there: int = 0
    asked: int = 0
    from_cache: int = 0
    written: int = 0
    malformed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class _Task:
    picture: Picture
    request: str  # what is asked, as a digest: the messages themselves are made when they are sent


def read_prompts(kind: Kind, folder: Path | None = None) -> Prompts:
    """The package's prompts of `kind`, or those of `folder`, laid out as LLaVA's: `system_message.txt` and pairs
    `NNN_caps.txt`, `NNN_conv.txt`, there or in its subfolder of that kind; `instructions.txt` for descriptions.

    Raises ValueError for what is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; choose {', '.join(KINDS)}")
    places = [folder, *(folder / name for name in KINDS[kind])] if folder else [PROMPTS / kind]
    place = next((place for place in places if (place / "system_message.txt").is_file()), None)
    if place is None:
        raise ValueError(f"prompts {folder}: there is no system_message.txt in it or in {', '.join(KINDS[kind])}")
    asks = place / "instructions.txt"
    lines = (asks if asks.is_file() else PROMPTS / "detail" / "instructions.txt").read_text(encoding="utf-8")
    shots = [(path, path.with_name(path.name.replace("_caps", "_conv"))) for path in sorted(place.glob("*_caps.txt"))]
    alone = [path for path in sorted(place.glob("*_conv.txt")) if path not in [written for _, written in shots]]
    alone += [known for known, written in shots if not written.is_file()]
    if alone:
        raise ValueError(f"{alone[0]}: its other half is missing; examples are pairs NNN_caps.txt, NNN_conv.txt")
    return Prompts(
        system=_text(place / "system_message.txt"),
        shots=tuple((_text(known), _text(written)) for known, written in shots),
        instructions=tuple(line.strip() for line in lines.splitlines() if line.strip()),
    )


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """`temperature=0.2` -> {"temperature": 0.2}; a value that is no JSON is text, `null` leaves an option out.

    Raises ValueError for a word without `=`.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals:
            raise ValueError(f"option {word!r}: expected NAME=VALUE, such as temperature=0.2")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def synthesize(
    rows: str | Path,
    kind: Kind,
    *,
    url: str,
    model: str,
    out: Path,
    api_key_env: str = "OPENAI_API_KEY",
    boxes: str | Path | None = None,
    prompts: Path | None = None,
    folder: str = "",
    cache: Path | None = None,
    limit: int = 0,
    dry_run: bool = False,
    workers: int = 4,
    options: Mapping[str, Any] | None = None,
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Write a row of `kind` for every picture of `rows` (see `captioned.pictures`) to `out`, LLaVA's JSON lines.

    Rows come in the order of the answers. Called again it goes on: pictures whose row is there are passed over, replies
    in `cache` (beside `out` unless named) are not asked for again. Malformed and refused ones are listed beside `out`.
    `options` go into each request (temperature, max_tokens, ...; None leaves one out). `limit`: at most so many
    pictures. Raises ValueError for input, prompts or an endpoint that cannot be used; what was written stays.
    """
    told = read_prompts(kind, prompts)
    asked = teacher(url, model, api_key_env, OPTIONS | dict(options or {}), patience)
    found = islice(pictures(rows, boxes, folder), limit or None)
    if dry_run:
        return _dry_run(found, told, asked, kind)
    begun = monotonic()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _appending(out) as rows_file:
        counts = _Writing(kind, told, asked, out, rows_file, cache or _beside(out, "replies")).run(found, workers)
    return asdict(counts) | {"kind": kind, "out": str(out), "seconds": round(monotonic() - begun, 1)}


class _Writing:
    """One call: which pictures are left, who is asked, what is written."""

    def __init__(self, kind: Kind, told: Prompts, asked: Teacher, out: Path, rows_file: IO[bytes], cache: Path):
        self.kind, self.told, self.teacher, self.rows_file = kind, told, asked, rows_file
        self.there = _ids(out, kind)
        self.cache = _Cache(cache)
        self.bad = _beside(out, "malformed")
        self.counts = Counts()
        self.in_a_row = 0

    def run(self, found: Iterator[Picture], workers: int) -> Counts:
        todo = [self._task(picture) for picture in found if not self._passed_over(picture)]
        with open(self.bad, "w", encoding="utf-8") as self.bad_file, self.cache, console.progress() as bar:
            task = bar.add_task(f"{self.kind}: asking {self.teacher.model}", total=len(todo))
            fresh = [job for job in todo if not self._from_cache(job)]
            bar.advance(task, len(todo) - len(fresh))
            stop = self.teacher.patience.stop
            for job, reply in spread(partial(_ask, self.teacher, self.told), fresh, workers, stop):
                self._take(job, reply)
                bar.advance(task)
        if not self.counts.malformed + self.counts.refused:
            self.bad.unlink()
        return self.counts

    def _passed_over(self, picture: Picture) -> bool:
        self.counts.pictures += 1
        known = picture.id in self.there
        self.there.add(picture.id)
        self.counts.already_there += known
        return known

    def _task(self, picture: Picture) -> _Task:
        body = json.dumps(self.teacher.body(self.told.messages(picture.context())), sort_keys=True)
        return _Task(picture=picture, request=hashlib.sha256(body.encode()).hexdigest())

    def _from_cache(self, job: _Task) -> bool:
        reply = self.cache.get(job.request)
        if reply is not None:
            self.counts.from_cache += 1
            self._read(job, reply)
        return reply is not None

    def _take(self, job: _Task, reply: Reply | RequestRefused) -> None:
        self.counts.asked += 1
        if isinstance(reply, RequestRefused):
            self.counts.refused += 1
            self.in_a_row += 1
            self._list(job, str(reply), "")
            if self.in_a_row >= IN_A_ROW:
                raise TeacherError(f"{self.in_a_row} requests in a row were refused: {reply}")
            return
        self.in_a_row = 0
        self.counts.prompt_tokens += reply.prompt_tokens
        self.counts.completion_tokens += reply.completion_tokens
        self.cache.put(job.request, reply)
        self._read(job, reply)
        if self.counts.malformed >= HOPELESS and not self.counts.written:
            raise TeacherError(f"{self.counts.malformed} replies and not one becomes a row; {self.bad} says why")

    def _read(self, job: _Task, reply: Reply) -> None:
        instruction = random.Random(job.picture.id).choice(self.told.instructions)
        try:
            found = rounds(self.kind, reply.text, reply.finish, job.picture.context(), instruction)
        except Malformed as error:
            self.counts.malformed += 1
            self._list(job, str(error), reply.text)
            return
        turns = [
            {"from": who, "value": text} for pair in found for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        made = {"kind": self.kind, "model": self.teacher.model, "request": job.request}
        row = {"id": job.picture.id, "image": job.picture.image, "conversations": turns, "made": made}
        self.rows_file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.rows_file.flush()
        self.counts.written += 1

    def _list(self, job: _Task, reason: str, text: str) -> None:
        line = {"id": job.picture.id, "image": job.picture.image, "reason": reason, "reply": text}
        self.bad_file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.bad_file.flush()


class _Cache:
    """Replies by request: JSON lines, appended as they come. Where each lies is held, not what it says."""

    def __init__(self, path: Path):
        self.path = path
        self.places: dict[str, int] = {}

    def __enter__(self) -> _Cache:
        self.file = open(self.path, "a+b")
        _cut_torn_line(self.file)
        self.file.seek(0)
        at = 0
        for line in self.file:
            try:
                self.places[json.loads(line)["request"]] = at
            except (ValueError, LookupError, TypeError):
                raise ValueError(
                    f"{self.path}: no reply at byte {at}; remove that line, or name another cache"
                ) from None
            at += len(line)
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def get(self, request: str) -> Reply | None:
        if request not in self.places:
            return None
        self.file.seek(self.places[request])
        kept = json.loads(self.file.readline())
        return Reply(text=kept["text"], finish=kept["finish"])

    def put(self, request: str, reply: Reply) -> None:
        self.places[request] = self.file.seek(0, os.SEEK_END)
        self.file.write(json.dumps({"request": request, **asdict(reply)}, ensure_ascii=False).encode() + b"\n")
        self.file.flush()


def _ask(asked: Teacher, told: Prompts, job: _Task) -> tuple[_Task, Reply | RequestRefused]:
    try:
        return job, asked.ask(told.messages(job.picture.context()))
    except RequestRefused as error:
        return job, error


def _dry_run(found: Iterator[Picture], told: Prompts, asked: Teacher, kind: Kind) -> dict[str, Any]:
    """Shows the first request and guesses the tokens of all; nobody is asked."""
    first: Messages = ()
    requests = characters = 0
    for picture in found:
        messages = told.messages(picture.context())
        first = first or messages
        requests += 1
        characters += sum(len(message["content"]) for message in messages)
    for message in first:
        console.say(f"[{message['role']}]\n{message['content']}\n")
    return {
        "kind": kind,
        "url": asked.url,
        "model": asked.model,
        "requests": requests,
        "prompt_tokens_estimated": characters // CHARACTERS_A_TOKEN,
        "completion_tokens_at_most": requests * int(asked.options.get("max_tokens") or 0) or "unknown",
    }


@contextmanager
def _appending(path: Path) -> Iterator[IO[bytes]]:
    """The file of rows, for one process at a time; a line that a kill tore is cut off, its reply is in the cache."""
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process is writing it; wait for it, or name another file") from None
        _cut_torn_line(file)
        yield file


def _cut_torn_line(file: IO[bytes]) -> None:
    """What follows the last line break was being written when the writer died."""
    end = file.seek(0, os.SEEK_END)
    keep, block = end, b""
    while keep and b"\n" not in block:
        at = max(0, keep - (1 << 16))
        file.seek(at)
        block = file.read(keep - at)
        keep = at + block.rfind(b"\n") + 1 if b"\n" in block else at
    if keep < end:
        file.truncate(keep)


def _ids(path: Path, kind: Kind) -> set[str]:
    """Pictures whose row is there. Raises ValueError when the file holds anything but rows of this kind."""
    found = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                row = json.loads(line)
                other, id = row["made"]["kind"], row["id"]
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{path}:{number}: not a row that was made here; name another file") from None
            if other != kind:
                raise ValueError(f"{path}:{number}: a row of kind {other!r}, not {kind!r}; name another file")
            found.add(id)
    return found


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}.{what}.jsonl")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()
