"""Answers of the model that trains: the ranks share the questions, and with shards every rank makes every forward.

Knows nothing of benchmarks or scores.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from threading import Event

import PIL.Image

from vistune import decoding, ranks, speech
from vistune.decoding import Prompt, Settings, marked
from vistune.evaluate.answering import Local, Said
from vistune.evaluate.items import Question
from vistune.evaluate.run import shares
from vistune.models.load import Loaded
from vistune.samples import Image, Message
from vistune.train.measuring.rounds import Rounds
from vistune.train.spreading.sharding import let_go

SIDE = 56
"""Pixels of a side of the picture that a rank looks at while the others have questions and it has none."""


def answers(what: str, questions: Sequence[Question], tokens: int, rounds: Rounds) -> list[Said] | None:
    """What the model says to each question, `tokens` at most, on every rank; None with a warning when it failed."""
    work = partial(_in_step if rounds.sharded else _apart, questions, tokens, rounds)
    told = rounds.together(what, work)
    if told is None:
        return None
    said: dict[int, Said] = {}
    for each in told:
        said |= each
    return [said[position] for position in range(len(questions))]


def _apart(questions: Sequence[Question], tokens: int, rounds: Rounds) -> dict[int, Said]:
    """This rank's questions, at its own pace."""
    mine = shares(questions, range(len(questions)), ranks.world())[ranks.rank()]
    local, said = Local(rounds.loaded, batch=rounds.recipe.evaluate.batch), {}
    with rounds.autocast():
        for place, one in local.answer([questions[position] for position in mine], tokens):
            said[mine[place]] = one
            rounds.beat(f"{len(said)} of {len(mine)} answers")
            rounds.leave_if_asked()
    return said


def _in_step(questions: Sequence[Question], tokens: int, rounds: Rounds) -> dict[int, Said]:
    """This rank's questions, forward by forward with the other ranks."""
    said: dict[int, Said] = {}

    def work() -> None:
        for shows in (True, False):  # the vision tower runs on every rank or on none
            group = [i for i, one in enumerate(questions) if bool(one.images) == shows]
            group.sort(key=lambda i: -len(questions[i].text))
            size = rounds.recipe.evaluate.batch * ranks.world()
            for start in range(0, len(group), size):
                rounds.leave_if_asked()
                rounds.beat(f"{len(said) * ranks.world()} of {len(questions)} answers")
                mine = group[start : start + size][ranks.rank() :: ranks.world()]
                said.update(_round(mine, questions, tokens, shows, rounds))

    try:
        with rounds.autocast():
            rounds.module.lend(work)
    finally:
        let_go(rounds.module)
    return said


def _round(
    mine: Sequence[int], questions: Sequence[Question], tokens: int, shows: bool, rounds: Rounds
) -> dict[int, Said]:
    """Answers to `mine` at once. A rank without a question that can be asked looks on."""
    loaded, said, made = rounds.loaded, dict[int, Said](), dict[int, Prompt]()
    for position in mine:
        try:
            made[position] = _prompt(loaded, questions[position].text, questions[position].images)
        except (ValueError, OSError) as error:
            said[position] = Said(error=str(error))
    settings, over = Settings(max_new_tokens=tokens), Event()
    if not made:
        over.set()
    prompts = list(made.values()) or [_prompt(loaded, "?", [_blank()] if shows else [])]
    new = decoding.decode(loaded, prompts, settings, told=over, alike=True)
    for position, one in zip(made, new, strict=False):  # of who looks on there is one too many
        margin = one.margin if math.isfinite(one.margin) else None
        said[position] = Said(text=speech.spoken(loaded, one.ids), tokens=len(one.ids), margin=margin)
    return said


def _prompt(loaded: Loaded, text: str, pictures: Sequence[Image]) -> Prompt:
    return decoding.prompt(loaded, [Message(role="user", text=marked(text, pictures))], pictures)


def _blank() -> Image:
    file = io.BytesIO()
    PIL.Image.new("RGB", (SIDE, SIDE), "white").save(file, "PNG")
    return Image(data=file.getvalue(), name="blank")
