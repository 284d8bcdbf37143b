"""Asking a model about pictures: several turns, several images, streaming; and many questions at once.

Builds prompts as training does and decodes through the stock `generate`. Knows nothing of benchmarks or servers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vistune import chat, console, images, ranks
from vistune.models.load import Loaded, load
from vistune.models.quantize import load_quantized
from vistune.samples import IMAGE_ID, IMAGE_MARK, Image, Message

Question = tuple[str, Sequence[Image]]
"""A question with its images. Marks in the text say where they go; without marks they come first."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an answer is drawn. `temperature` 0 is greedy, and then `top_p` and `seed` say nothing."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model takes it: ids with every image expanded; the pixels of each image as its layout prepares
    them (uint8), and what the layout says of it (`Layout.grid`)."""

    ids: list[int]
    pixels: list[Tensor] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)


def prompt(loaded: Loaded, messages: Sequence[Message], pictures: Sequence[Image]) -> Prompt:
    """The prompt of a conversation whose last turn is a question. ValueError when marks and images do not match."""
    marks = sum(message.text.count(IMAGE_MARK) for message in messages)
    if pictures and marks != len(pictures):
        raise ValueError(f"{len(pictures)} images for {marks} {IMAGE_MARK} in the conversation; give one for each")
    encoded = chat.encode(loaded.template, loaded.encoder, messages, has_images=bool(pictures), open_turn=True)
    return filled(loaded, encoded.ids, pictures)


def filled(loaded: Loaded, encoded: Sequence[int], pictures: Sequence[Image]) -> Prompt:
    """Encoded ids, `IMAGE_ID` once per picture, with the pictures in their places. Raises ImageError."""
    opened = [images.open_image(picture) for picture in pictures]
    sizes = iter(opened)
    ids: list[int] = []
    for one in encoded:
        ids += [loaded.image_token_id] * loaded.layout.tokens(*next(sizes).size) if one == IMAGE_ID else [one]
    grids = [grid for picture in opened if (grid := loaded.layout.grid(*picture.size)) is not None]
    return Prompt(ids, [torch.from_numpy(loaded.layout.prepare(picture)) for picture in opened], grids)


def marked(text: str, pictures: Sequence[Image]) -> str:
    """`text` with a mark for each picture that has none, in front, one a line."""
    missing = len(pictures) - text.count(IMAGE_MARK)
    return f"{IMAGE_MARK}\n" * max(missing, 0) + text


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
    """Greedy answers in the questions' order. Prompts of near lengths run together, padded on the left."""
    made = [prompt(loaded, [Message(role="user", text=marked(text, seen))], seen) for text, seen in questions]
    return answer_prompts(loaded, made, Settings(max_new_tokens=max_new_tokens), batch)


def answer_prompts(loaded: Loaded, made: Sequence[Prompt], settings: Settings, batch: int = 8) -> list[str]:
    """Answers in the prompts' order. Prompts of near lengths run together, padded on the left."""
    order = sorted(range(len(made)), key=lambda i: len(made[i].ids), reverse=True)
    answers = [""] * len(made)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for i, ids in zip(chosen, _generate(loaded, [made[i] for i in chosen], settings), strict=True):
            answers[i] = _text(loaded, ids)
    return answers


@torch.no_grad()
def _generate(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    settings: Settings,
    streamer: BaseStreamer | None = None,
    stop: Sequence[StoppingCriteria] = (),
) -> list[list[int]]:
    """New ids of each prompt, through the stock `generate`."""
    model: Any = loaded.model
    longest = max(len(p.ids) for p in prompts)
    given: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if settings.temperature > 0:
        given = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    given |= padded(loaded, prompts)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        out = model.generate(
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=_pad(loaded),
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(list(stop) or [_Stop(loaded, longest)]),
            **given,
        )
    return out[:, longest:].tolist()


def padded(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The prompts as the class's own forward takes them, in one batch padded on the left."""
    model: Any = loaded.model
    longest, pad = max(len(p.ids) for p in prompts), _pad(loaded)
    ids = [[pad] * (longest - len(p.ids)) + p.ids for p in prompts]
    seen = [[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts]
    rows = {"input_ids": ids, "attention_mask": seen}
    return {name: torch.tensor(row, device=model.device) for name, row in rows.items()} | _images(loaded, prompts)


def _images(loaded: Loaded, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The images of all prompts as the class's own forward takes them."""
    model: Any = loaded.model
    if not any(p.pixels for p in prompts):
        return {}
    pixels = [images.normalize(one.to(model.device), loaded.layout, model.dtype) for p in prompts for one in p.pixels]
    inputs = loaded.family.inputs(pixels, [grid for p in prompts for grid in p.grids])
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _pad(loaded: Loaded) -> int:
    """Never seen, so any id but the image's will do."""
    pad = loaded.tokenizer.pad_token_id
    return pad if pad is not None else 0


def _stop_ids(loaded: Loaded) -> set[int]:
    """Ids that end an answer: the model's and tokenizer's end, and the template's stop where that is one token."""
    model: Any = loaded.model
    ends = model.generation_config.eos_token_id
    found = set(ends if isinstance(ends, list) else [ends]) | {loaded.tokenizer.eos_token_id}
    found.add(loaded.tokenizer.get_added_vocab().get(loaded.template.stop_string))
    return {one for one in found if one is not None}


def _text(loaded: Loaded, ids: Sequence[int]) -> str:
    """What the ids say, up to what ends an answer, without spaces around it."""
    ends = _stop_ids(loaded)
    length = next((i for i, one in enumerate(ids) if one in ends), len(ids))
    text = loaded.tokenizer.decode(ids[:length], skip_special_tokens=True).lstrip()
    stop = loaded.template.stop_string
    return (text.partition(stop)[0] if stop else text).rstrip()


class _Stop(StoppingCriteria):
    """Ends a row whose last token ends an answer or whose text holds the template's stop string, or when told to."""

    def __init__(self, loaded: Loaded, start: int):
        self.start, self.told, self.tokenizer = start, False, loaded.tokenizer
        self.ends, self.stop = _stop_ids(loaded), loaded.template.stop_string

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self.start :].tolist()
        return torch.tensor([self._ends(row) for row in rows], device=input_ids.device)

    def _ends(self, row: list[int]) -> bool:
        if self.told or row[-1] in self.ends:
            return True
        return bool(self.stop) and self.stop in self.tokenizer.decode(row, skip_special_tokens=True).lstrip()


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
    pieces, stop = _Pieces(), _Stop(loaded, len(made.ids))
    thread = threading.Thread(target=_run, args=(loaded, made, settings, pieces, stop), daemon=True)
    thread.start()
    try:
        yield from _readable(loaded, pieces.queue)
    finally:
        stop.told = True
        thread.join()


def _run(loaded: Loaded, made: Prompt, settings: Settings, pieces: _Pieces, stop: _Stop) -> None:
    try:
        _generate(loaded, [made], settings, pieces, [stop])
    except BaseException as error:  # noqa: BLE001 - it is raised again in the thread that reads
        pieces.queue.put(error)
    pieces.queue.put(None)


def _readable(loaded: Loaded, queue: Queue[int | BaseException | None]) -> Iterator[str]:
    """Text as far as it is certain: no half characters, no beginning of a stop string, no space that may end it."""
    stop = loaded.template.stop_string
    ids: list[int] = []
    said = ""
    while (one := queue.get()) is not None:
        if isinstance(one, BaseException):
            raise one
        ids.append(one)
        text = _text(loaded, _settled(loaded, ids)).rstrip("\ufffd")
        held = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
        certain = text[: len(text) - held]
        if certain.startswith(said) and len(certain) > len(said):
            yield certain[len(said) :]
            said = certain
    whole = _text(loaded, ids)
    if len(whole) > len(said):
        yield whole[len(said) :]


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _settled(loaded: Loaded, ids: list[int]) -> list[int]:
    """`ids` without the single bytes at their end: what those say depends on the bytes that follow."""
    end = len(ids)
    while end and _BYTE.fullmatch(loaded.tokenizer.convert_ids_to_tokens(ids[end - 1]) or ""):
        end -= 1
    return ids[:end]


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_model(
    model: str | Path,
    device: str = "auto",
    quantize: str = "",
    base: str | Path | None = None,
    *,
    template: str | None = None,
    precision: str = "",
) -> Loaded:
    """What is to be asked, on its device: in bf16, on a CPU in fp32, or in `precision`; or with its language model in
    "8bit" or "4bit".

    `model`: a folder or checkpoint in any format, a run, a hub id; `base`: the other half of an adapter; `template`:
    instead of the folder's. Raises ValueError.
    """
    if precision and precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: choose {', '.join(PRECISIONS)}")
    place = ranks.start(device)
    dtype = PRECISIONS[precision or ("fp32" if place.type == "cpu" else "bf16")]
    if quantize:
        return load_quantized(model, quantize, dtype=dtype, device=place, base=base, template=template)
    loaded = load(model, dtype=dtype, base=base, template=template)
    loaded.model.to(place)  # type: ignore[arg-type]
    return loaded


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
