"""A model behind an OpenAI-compatible URL as the one who answers: requests side by side, pictures in their own bytes.

Knows the format of such requests, nothing of what serves them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from vistune import files, images
from vistune.asking import Said
from vistune.decoding import marked
from vistune.evaluate.client import Completer, open_client, reason
from vistune.evaluate.items import Question
from vistune.samples import IMAGE_MARK, Image

_KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_TRYABLE = (400, 413, 422)
"""What a server says of one request that it does not take (too long, too large); of the next it may be different."""


def is_url(model: str) -> bool:
    """Whether a model is somewhere to be asked rather than something to be opened."""
    return model.startswith(("http://", "https://"))


class Remote:
    """See `vistune.evaluate.answering.Answerer`. `batch` requests are under way at a time; margins are not known.

    ValueError, in one sentence, when the server is not there, names no model, or refuses the key.
    """

    def __init__(self, url: str, served: str = "", key: str = "OPENAI_API_KEY", batch: int = 16):
        self.url, self.batch, self.client = url, batch, open_client(url, key)
        self.complete = Completer(self.client)
        self.name = served or self._first()

    def _first(self) -> str:
        try:
            found = [one.id for one in self.client.with_options(max_retries=1).models.list()]
        except Exception as error:
            raise ValueError(f"{self.url}: {_told(error)}") from error
        if not found:
            raise ValueError(f"{self.url}: lists no model; give its name with --served NAME")
        return str(found[0])

    def answer(self, questions: Sequence[Question], max_new_tokens: int) -> Iterator[tuple[int, Said]]:
        """See `Answerer`."""
        waiting = iter(enumerate(questions))
        going: dict[Future[Said], int] = {}
        pool = ThreadPoolExecutor(self.batch, "requests")
        try:
            while True:
                while len(going) < 2 * self.batch and (following := next(waiting, None)) is not None:
                    at, question = following
                    going[pool.submit(self._ask, question, max_new_tokens)] = at
                if not going:
                    return
                done, _ = wait(going, return_when=FIRST_COMPLETED)
                for one in done:
                    yield going.pop(one), one.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, question: Question, max_new_tokens: int) -> Said:
        try:
            content = parts(marked(question.text, question.images), question.images)
        except ValueError as error:
            return Said(error=str(error))
        try:
            reply = self.complete(self.name, [{"role": "user", "content": content}], 0, max_new_tokens)
        except Exception as error:
            if getattr(error, "status_code", None) in _TRYABLE:
                return Said(error=f"{self.url}: {_told(error)}")
            raise ValueError(
                f"{self.url}: {_told(error)}. What was answered is kept; the same command goes on from there"
            ) from error
        said = reply.choices[0].message.content if reply.choices else None
        if said is None:
            return Said(error=f"{self.url}: an answer without text")
        return Said(text=said.strip(), tokens=reply.usage.completion_tokens if reply.usage else 0)


def parts(text: str, pictures: Sequence[Image]) -> list[dict[str, Any]]:
    """A user turn as a chat request has it: pictures where their marks are. ValueError for one that cannot be read."""
    pieces = text.split(IMAGE_MARK) if pictures else [text]
    if len(pieces) != len(pictures) + 1:
        raise ValueError(
            f"{len(pictures)} images for {len(pieces) - 1} {IMAGE_MARK} in the question; give one for each"
        )
    found: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i:
            found.append({"type": "image_url", "image_url": {"url": data_url(pictures[i - 1])}})
        if words := piece.strip("\n") if pictures else piece:
            found.append({"type": "text", "text": words})
    return found


def data_url(picture: Image) -> str:
    """A picture as a data: URL: PNG and JPEG byte for byte, anything else as the PNG of its pixels. Raises ImageError.

    The header is read first, so that what is no picture is named here and not by the server.
    """
    images.image_size(picture)
    encoded = picture.data
    if encoded is None:
        with files.open_binary(picture.path, picture.start, picture.size) as file:
            encoded = file.read()
    kind = next((name for magic, name in _KINDS.items() if encoded.startswith(magic)), "")
    if not kind:
        buffer = io.BytesIO()
        images.open_image(picture).save(buffer, "PNG")
        encoded, kind = buffer.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode('ascii')}"


def _told(error: Exception) -> str:
    """Why a request came to nothing, in one sentence."""
    status = getattr(error, "status_code", None)
    if status in (401, 403):
        return f"refuses the key ({status}); --key names the environment variable that holds one"
    if status == 404:
        return f"knows no such model or address (404: {reason(error)}); --served NAME, and the URL ends in /v1"
    if status is None and "Connection" in type(error).__name__:
        return "nobody answers there; is the server up?"
    return reason(error)
