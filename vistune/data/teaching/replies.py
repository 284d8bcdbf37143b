"""What a teacher wrote becomes rounds of question and answer, or is named malformed. Pure functions of strings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from vistune.samples import IMAGE_MARK

Kind = Literal["conversation", "detail", "reasoning"]
Round = tuple[str, str]

LEAST_ROUNDS = {"conversation": 2, "reasoning": 1}
MOST_ROUNDS = {"conversation": 20, "reasoning": 1}
SHORTEST_DETAIL = 40  # characters: less is no description in detail

FENCE = re.compile(r"\A```[\w-]*\n(.*?)\n?```\Z", re.DOTALL)
LABEL = re.compile(r"^\W{0,4}(question|q|user|human|answer|a|assistant|gpt)\W{0,4}\d*\s*[.:]\W{0,3}[ \t]*", re.I | re.M)
ASKS = ("question", "q", "user", "human")
RULE = re.compile(r"^={3,}\s*$|^-{3,}\s*$", re.M)
TOLD = re.compile(r"\b(?:captions?|bounding[ -]box(?:es)?)\b|\[\s*[01]?\.\d+\s*,", re.I)


class Malformed(ValueError):
    """A reply that does not become a row, and why."""


def rounds(kind: Kind, text: str, finish: str, known: str, instruction: str) -> list[Round]:
    """Question and answer pairs of a reply of `kind`. `known`: what the teacher was told of the picture, whose words
    may come again; `instruction`: the question to a description. Raises Malformed."""
    if finish == "length":
        raise Malformed("it was cut at the largest number of tokens")
    if not text.strip():
        raise Malformed(f"it is empty (finish: {finish or 'unknown'})")
    found = [(instruction, _description(text))] if kind == "detail" else _pairs(text)
    if kind != "detail" and not LEAST_ROUNDS[kind] <= len(found) <= MOST_ROUNDS[kind]:
        raise Malformed(f"{len(found)} rounds, expected {LEAST_ROUNDS[kind]} to {MOST_ROUNDS[kind]}")
    for i, (question, answer) in enumerate(found):
        if not question or not answer:
            raise Malformed(f"round {i} has an empty {'question' if not question else 'answer'}")
        _refuse_leaks(i, answer if kind == "detail" else f"{question}\n{answer}", known)
    asked = [question.lower() for question, _ in found]
    if len(set(asked)) < len(asked):
        raise Malformed("it asks the same question twice")
    return found


def _description(text: str) -> str:
    text = _unfenced(text)
    if text[:1] in "{[" or LABEL.match(text):
        raise Malformed(f"a description was expected, it begins with {text[:40]!r}")
    if len(text) < SHORTEST_DETAIL:
        raise Malformed(f"a description of {len(text)} characters")
    return text


def _pairs(text: str) -> list[Round]:
    text = _unfenced(text)
    return [_pair(entry) for entry in _objects(text)] if text[:1] in "{[" else _labelled(text)


def _objects(text: str) -> Iterable[Any]:
    """Entries of a JSON list, of an object that holds one, or of JSON lines."""
    try:
        whole = json.loads(text)
    except ValueError:
        lines = [line.strip().rstrip(",") for line in text.splitlines() if line.strip() and not RULE.match(line)]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise Malformed(f"it begins as JSON and is none: {error}") from None
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        return lists[0] if len(lists) == 1 else [whole]
    return whole if isinstance(whole, list) else [whole]


def _pair(entry: Any) -> Round:
    if isinstance(entry, dict):
        low = {str(key).lower(): value for key, value in entry.items()}
        question = next((low[key] for key in ASKS if key in low), None)
        answer = next((low[key] for key in ("answer", "a", "assistant", "gpt") if key in low), None)
        if isinstance(question, str) and isinstance(answer, str):
            return question.strip(), answer.strip()
    raise Malformed(f'an entry is not {{"question": text, "answer": text}}: {json.dumps(entry)[:80]}')


def _labelled(text: str) -> list[Round]:
    """`Question: ... Answer: ...`, each on a line of its own or with `===` between."""
    pieces = LABEL.split(RULE.sub("", text))
    if pieces[0].strip():
        raise Malformed(f"neither JSON nor `Question:`, it begins with {pieces[0].strip()[:40]!r}")
    labels, texts = pieces[1::2], [piece.strip() for piece in pieces[2::2]]
    asks = [label.lower() in ASKS for label in labels]
    if asks != [i % 2 == 0 for i in range(len(asks))] or len(asks) % 2:
        raise Malformed("questions and answers do not take turns")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _refuse_leaks(i: int, text: str, known: str) -> None:
    if IMAGE_MARK in text:
        raise Malformed(f"round {i} has {IMAGE_MARK} in its text")
    if (found := TOLD.search(text)) and found[0].lower() not in known.lower():
        raise Malformed(f"round {i} speaks of what the teacher was told: {found[0]!r}")


def _unfenced(text: str) -> str:
    text = text.strip()
    found = FENCE.match(text)
    return found[1].strip() if found else text
