"""Transforms that change what is said: response-format prompts, captions as conversations, answers cut short."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from string import ascii_uppercase
from typing import Any, Literal

from pydantic import Field, field_validator

from vistune.data.transforms import register
from vistune.data.transforms.rounds import Rounds, rounds_of, split_marks, with_rounds
from vistune.data.transforms.step import Step, Unfit
from vistune.samples import IMAGE_MARK, Message, Sample

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
OCR = "Reference OCR token: "
REGION = "Please provide a short description for this region: {box}."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {phrase}."
"""The response-format prompts of LLaVA-1.5 (arXiv 2310.03744, table 7), the last two as they stand in its data file."""


@register("prompt")
class Prompt(Step):
    """Asks for a form of the answer, and gives the answer that form.

    `form`: short (a word or a phrase), letter (of the right option), caption (with what OCR read in the picture),
    region (describe this box), box (where is this), region_or_box (one of the two, by chance, `seed`). `where`: in
    every question or in the first one; as published it is the first for short, every one for the others. `square`:
    boxes as shares of the picture widened to a square, as `model.image = "pad"` shows it. `tidy`: short answers and
    descriptions begin with a capital, descriptions end with a full stop.
    """

    form: Literal["short", "letter", "caption", "region", "box", "region_or_box"]
    where: Literal["published", "first", "every"] = "published"
    ocr: bool = True
    square: bool = True
    tidy: bool = True
    seed: int = 0

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        sample = samples[0]
        rounds = rounds_of(sample)
        if rounds is None:
            raise Unfit("its turns are no questions with answers", "role_order")
        chance = random.Random(f"prompt {self.seed} {row}")
        first_only = self.where == "first" or (self.where == "published" and self.form == "short")
        pairs = [
            self._asked(question, answer, notes, told=not (first_only and number), chance=chance)
            for number, ((question, answer), notes) in enumerate(zip(rounds.pairs, rounds.notes, strict=True))
        ]
        notes = [{**note, "prompted": self.form} for note in rounds.notes]
        return with_rounds(sample, Rounds(rounds.system, pairs, notes))

    def _asked(
        self, question: str, answer: str, notes: Mapping[str, Any], *, told: bool, chance: random.Random
    ) -> tuple[str, str]:
        """The round with its prompt; what does not depend on the prompt (options, letters, boxes) comes untold too."""
        marks, question = split_marks(question)
        form = chance.choice(("region", "box")) if self.form == "region_or_box" else self.form
        if form == "short":
            return marks + _lines(question, SHORT if told else ""), self._capital(answer)
        if form == "letter":
            listed, letter = _options(notes)
            return marks + _lines(question, listed, LETTER if told else ""), letter
        if form == "caption":
            tokens = notes.get("ocr_tokens") if self.ocr else None
            if tokens and not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
                raise Unfit(f"note ocr_tokens is {tokens!r:.60}, expected a list of texts")
            read = OCR + ", ".join(tokens) if tokens else ""
            return marks + _lines(question, CAPTION if told else "", read), answer
        phrase, box = _phrase(notes, answer), box_text(notes, square=self.square)
        if form == "region":
            described = self._capital(phrase.rstrip(".") + ".") if self.tidy else phrase
            return marks + (REGION.format(box=box) if told else box), described
        phrase = phrase.rstrip(".")
        return marks + (BOX.format(phrase=phrase) if told else phrase), box

    def _capital(self, answer: str) -> str:
        return answer[:1].upper() + answer[1:] if self.tidy else answer


def box_text(notes: Mapping[str, Any], *, square: bool = True) -> str:
    """`[x1, y1, x2, y2]` as shares of the picture, two decimals, from the notes `box` (pixels), `width`, `height`.

    `square`: of the picture widened to a square, with what is lacking on both sides, as LLaVA-1.5 shows it. Raises
    Unfit.
    """
    try:
        x1, y1, x2, y2 = (float(number) for number in notes["box"])
        width, height = int(notes["width"]), int(notes["height"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise Unfit(f"notes box, width and height are needed, in pixels: {type(error).__name__}: {error}") from None
    if min(width, height) <= 0 or not all(isfinite(number) for number in (x1, y1, x2, y2)):
        raise Unfit(f"the picture's size is {width} x {height}, its box {notes['box']!r:.60}")
    side = max(width, height)
    left, above = ((side - width) // 2, (side - height) // 2) if square else (0, 0)
    across, down = (side, side) if square else (width, height)
    shares = ((x1 + left) / across, (y1 + above) / down, (x2 + left) / across, (y2 + above) / down)
    return str([round(min(1.0, max(0.0, share)), 2) for share in shares])


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _options(notes: Mapping[str, Any]) -> tuple[str, str]:
    """(options in lines "A. text", letter of the right one)."""
    choices, answer = notes.get("choices"), notes.get("answer")
    if not isinstance(choices, list | tuple) or not 1 < len(choices) <= len(ascii_uppercase):
        raise Unfit(f"note choices is {choices!r:.60}; a letter needs 2 to {len(ascii_uppercase)} options")
    if not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise Unfit(f"note answer is {answer!r}, which is none of its {len(choices)} options")
    listed = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join(listed), ascii_uppercase[answer]


def _phrase(notes: Mapping[str, Any], answer: str) -> str:
    phrase = str(notes.get("phrase", answer)).strip()
    if not phrase:
        raise Unfit("the region has no phrase", "empty_answer")
    return phrase


INSTRUCTIONS = [
    "Describe this picture in one sentence.",
    "What can be seen here? Keep it short.",
    "Sum up what the picture shows.",
    "Give a brief caption for this photo.",
    "In a few words, what is in this image?",
    "Say shortly what this image is about.",
    "Write a caption that fits the picture.",
    "Tell me, in brief, what you see.",
    "What does this photo show? One sentence is enough.",
    "Put the content of the image into one short statement.",
    "Name the main things in this picture, briefly.",
]


@register("caption_to_conversation")
class CaptionToConversation(Step):
    """The answer, a caption, with an instruction chosen by chance from `instructions` instead of its question.

    `mark`: the picture before the instruction, after it, or one of both by chance.
    """

    instructions: list[str] = Field(default_factory=lambda: list(INSTRUCTIONS), min_length=1)
    mark: Literal["before", "after", "either"] = "either"
    seed: int = 0

    @field_validator("instructions")
    @classmethod
    def _said(cls, value: list[str]) -> list[str]:
        for instruction in value:
            if not instruction.strip() or IMAGE_MARK in instruction:
                raise ValueError(f"{instruction!r} is no instruction: it must be a text without {IMAGE_MARK}")
        return value

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        sample = samples[0]
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        if len(answers) != 1 or not answers[0].strip():
            raise Unfit(f"it has {len(answers)} answers, expected one: the caption", "empty_answer")
        chance = random.Random(f"caption {self.seed} {row}")
        instruction = chance.choice(self.instructions)
        before = chance.choice((True, False)) if self.mark == "either" else self.mark == "before"
        marks = [IMAGE_MARK] * len(sample.images)
        asked = "\n".join([*marks, instruction] if before else [instruction, *marks])
        return replace(
            sample, messages=(Message(role="user", text=asked), Message(role="assistant", text=answers[0].strip()))
        )


@register("cut_answers")
class CutAnswers(Step):
    """Answers of more than `characters` end with the last whole sentence (`.` or `。`) within them.

    A full stop that ends these characters (spaces apart) does not count, as in LLaVA-OneVision-1.5, where this comes
    from; without any other the answer is cut where the characters end.
    """

    characters: int = Field(4096, ge=1)

    def make(self, samples: Sequence[Sample], row: int, part: int) -> Sample:
        sample = samples[0]
        if all(message.role != "assistant" or len(message.text) <= self.characters for message in sample.messages):
            return sample
        cut = [
            replace(message, text=self.cut(message.text)) if message.role == "assistant" else message
            for message in sample.messages
        ]
        return replace(sample, messages=tuple(cut))

    def cut(self, answer: str) -> str:
        if len(answer) <= self.characters:
            return answer
        head = answer[: self.characters]
        before = head.rstrip(".。 \t\n")
        end = max(before.rfind("."), before.rfind("。"))
        return head[: end + 1] if end >= 0 else head
