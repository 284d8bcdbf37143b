"""Asking a model about pictures: several turns, several images, streaming; and many questions at once.

Knows nothing of benchmarks or servers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from vistune import console, images, ranks
from vistune.asking import Question, Said, answers
from vistune.decoding import Prompt, Settings, decode, marked, prompt
from vistune.models.load import Loaded, load
from vistune.models.quantize import load_quantized
from vistune.samples import Image, Message
from vistune.speech import Speech, Tongue

__all__ = [
    "Chat",
    "Prompt",
    "Question",
    "Said",
    "Settings",
    "Terminal",
    "answer_batch",
    "answers",
    "converse",
    "open_model",
    "prompt",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Chat:
    """A conversation with a model. Images of every turn stay in view."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self.messages: list[Message] = []
        self.pictures: list[Image] = []

    def ask(
        self,
        text: str,
        images: Sequence[Image] = (),
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The answer, piece by piece. The turn joins the conversation when the answer is whole. Raises ValueError."""
        settings = Settings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        question = Message(role="user", text=marked(text, images))
        pictures = [*self.pictures, *images]
        made = prompt(self.loaded, [*self.messages, question], pictures)
        whole = ""
        for piece in _stream(self.loaded, made, settings):
            whole += piece
            yield piece
        self.messages += [question, Message(role="assistant", text=whole)]
        self.pictures = pictures


def answer_batch(loaded: Loaded, questions: Sequence[Question], max_new_tokens: int = 128, batch: int = 8) -> list[str]:
    """Greedy answers in the questions' order. ValueError for a question that cannot be asked."""
    found = [""] * len(questions)
    for at, said in answers(loaded, questions, max_new_tokens, batch):
        if said.error:
            raise ValueError(said.error)
        found[at] = said.text
    return found


class _Pieces(BaseStreamer):
    """Hands new ids from the thread that generates to the one that reads. None: no more; an exception: it failed."""

    def __init__(self) -> None:
        self.queue: Queue[int | BaseException | None] = Queue()
        self.prompt = True

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.queue.put(int(value.view(-1)[0]))
        self.prompt = False

    def end(self) -> None:
        """`generate` says so on success only; the thread's own end is what counts."""


def _stream(loaded: Loaded, made: Prompt, settings: Settings) -> Iterator[str]:
    """Pieces of the answer. Closing the iterator ends the generation."""
    pieces, told = _Pieces(), threading.Event()
    thread = threading.Thread(target=_run, args=(loaded, made, settings, pieces, told), daemon=True)
    thread.start()
    try:
        yield from _readable(loaded, pieces.queue)
    finally:
        told.set()
        thread.join()


def _run(loaded: Loaded, made: Prompt, settings: Settings, pieces: _Pieces, told: threading.Event) -> None:
    try:
        decode(loaded, [made], settings, streamer=pieces, told=told)
    except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that reads
        pieces.queue.put(error)
    pieces.queue.put(None)


def _readable(loaded: Loaded, queue: Queue[int | BaseException | None]) -> Iterator[str]:
    """Text as far as it is certain."""
    speech = Speech(Tongue(loaded))
    while (one := queue.get()) is not None:
        if isinstance(one, BaseException):
            raise one
        if piece := speech.add(one):
            yield piece
    if piece := speech.close():
        yield piece


def open_model(
    model: str | Path,
    device: str = "auto",
    quantize: str = "",
    base: str | Path | None = None,
    *,
    template: str = "",
    precision: str = "",
) -> Loaded:
    """What is to be asked, on its device; or with its language model in "8bit" or "4bit".

    `model`: a folder or checkpoint in any format, a run, a hub id; `base`: the other half of an adapter; `template`:
    instead of the folder's; `precision`: see `precision_on`. Raises ValueError.
    """
    place = ranks.start(device)
    dtype = PRECISIONS[precision_on(place, precision)]
    if dtype == torch.float32 and place.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # or patches would be embedded in ten bits
    if quantize:
        return load_quantized(model, quantize, dtype=dtype, device=place, base=base, template=template or None)
    loaded = load(model, dtype=dtype, base=base, template=template or None)
    loaded.model.to(place)  # type: ignore[arg-type]
    return loaded


def precision_on(device: torch.device, precision: str = "") -> str:
    """What is computed in there: as said (fp32, bf16, fp16), else bf16, on a CPU fp32. ValueError for another word."""
    if precision and precision not in PRECISIONS:
        raise ValueError(f"--precision {precision}: choose {', '.join(PRECISIONS)}")
    return precision or ("fp32" if device.type == "cpu" else "bf16")


def converse(loaded: Loaded, pictures: list[Path], ask: str, settings: Settings) -> None:
    """The terminal: one question with `ask`, else a conversation. Raises ValueError."""
    talk = Terminal(Chat(loaded), settings, [Image(path=str(path)) for path in pictures])
    if ask:
        talk.answer(ask)
        return
    console.say("Ask away. /image FILE adds a picture, /new starts over, Ctrl-D ends.")
    while (line := _line()) is not None:
        talk.hear(line)


def _line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None


@dataclass
class Terminal:
    """What the lines of a conversation do. `waiting`: pictures for the next question."""

    chat: Chat
    settings: Settings
    waiting: list[Image] = field(default_factory=list)

    def hear(self, line: str) -> None:
        """One line from the person. What does not fit is said and changes nothing."""
        try:
            if line == "/new":
                self.chat, self.waiting = Chat(self.chat.loaded), []
            elif line.startswith("/image "):
                self.waiting.append(_picture(line.removeprefix("/image ").strip()))
            elif line:
                self.answer(line)
        except ValueError as error:
            console.warn(str(error))

    def answer(self, text: str) -> None:
        given = self.settings
        pieces = self.chat.ask(
            text,
            self.waiting,
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            top_p=given.top_p,
            seed=given.seed,
        )
        for piece in pieces:
            console.out.print(piece, end="", markup=False)
        console.say("")
        self.waiting = []


def _picture(path: str) -> Image:
    """The picture, opened once so that a wrong path shows at once."""
    picture = Image(path=path)
    images.open_image(picture)
    return picture
