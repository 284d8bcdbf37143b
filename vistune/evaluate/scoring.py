"""How answers are compared: pure functions of strings, each by the rule of those who published it.

Knows no benchmark, file or question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from string import ascii_uppercase

from vistune.evaluate.contractions import CONTRACTIONS

PUNCTUATION = frozenset(""";/[]"{}()=+\\_-><@`,?!""")
"""What is cut out of an answer. A colon, a percent sign, and every mark beyond ASCII stay."""

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_COUNTED)} | {"none": "0"}

ARTICLES = frozenset(("a", "an", "the"))

PEOPLE = 10
"""How many people answered each question of VQAv2, VizWiz and TextVQA."""

_FULL_STOP = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")

_MOST_FULL_STOPS = 32
"""More than so many stay: upstream hands a flag (re.UNICODE, 32) to where the number of replacements goes."""


def normalise(text: str) -> str:
    """An answer as LLaVA hands it to EvalAI and compares it for TextVQA (its m4c_evaluator, from Pythia).

    Lower case; commas and question marks deleted, 's cut off; then as `basic`. Not idempotent: "whats" becomes
    "what's", which becomes "what 's".
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return basic(text.strip())


@lru_cache(maxsize=1 << 16)
def basic(text: str) -> str:
    """An answer as VQA's own evaluation compares it: one line, no punctuation, digits for number words to ten, no
    articles, apostrophes put back. Lower case. Source: VQA's PythonEvaluationTools.

    Kept, since ten people say the same few words 214,354 times over in VQAv2's val.
    """
    words = _without_punctuation(_one_line(text)).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """A mark that stands beside a space anywhere in the text is deleted wherever it stands; any other becomes a space;
    a comma between digits makes all of them be deleted. Then full stops go, but those before a digit.

    Upstream means to keep full stops after a digit too, but its look-behind is misspelt and asks for nothing: "50."
    becomes "50".
    """
    deleted = _THOUSANDS.search(text) is not None
    out = text
    for mark in PUNCTUATION.intersection(text):
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if deleted or beside_space else " ")
    return _FULL_STOP.sub("", out, count=_MOST_FULL_STOPS)


def agreement(answers: Sequence[str]) -> dict[str, float]:
    """For each distinct answer that people gave, what it scores, 0..1: leaving out one of them at a time, min(1, how
    many of the others said it / 3), averaged. Of ten, 1, 2, 3 and 4 who say it give 0.3, 0.6, 0.9 and 1."""
    total = len(answers)
    return {
        answer: (count * min(1.0, (count - 1) / 3) + (total - count) * min(1.0, count / 3)) / total
        for answer, count in Counter(answers).items()
    }


def textvqa(answers: Sequence[str]) -> dict[str, float]:
    """Of ten people's answers, each normalised one and what it scores (M4C's TextVQA accuracy).

    ValueError for another number of answers.
    """
    if len(answers) != PEOPLE:
        raise ValueError(f"{len(answers)} people's answers; TextVQA accuracy is defined for {PEOPLE}")
    return agreement([normalise(answer) for answer in answers])


def vqav2(answer: str, people: Sequence[str]) -> float:
    """VQA accuracy, 0..1, as VQA's own evaluation has it: answers are put in basic form only where people disagree."""
    answer, people = _one_line(answer), [_one_line(one) for one in people]
    if len(set(people)) > 1:
        answer, people = basic(answer), [basic(one) for one in people]
    return agreement(people).get(answer, 0.0)


def vizwiz(answer: str, people: Sequence[str]) -> float:
    """VQA accuracy, 0..1, as VizWiz has it: all in basic form.

    VizWiz's own evaluation leaves people's answers as they are, since its files hold them in basic form already.
    """
    return agreement([basic(one) for one in people]).get(basic(answer), 0.0)


def vqa(answer: str, truths: Sequence[str]) -> float:
    """VQA accuracy, 0..1, all answers normalised.

    It asks three people for a full score, where one of them is left out at a time. With fewer than four truths, as many
    are asked as there are, and none is left out: what all of them say scores 1.
    """
    given, people = normalise(answer), [normalise(truth) for truth in truths]
    if len(people) > 3:
        return agreement(people).get(given, 0.0)
    return people.count(given) / len(people) if people else 0.0


def exact(answer: str, truth: str) -> float:
    """1 where both are the same; case, spaces around and full stops at the end apart (as GQA is submitted)."""
    return float(_plain(answer) == _plain(truth))


def option(answer: str, truth: str, options: Sequence[str] = ()) -> float:
    """1 where the answer chooses the right one of several options: by its letter or its text; see `chosen`.

    `truth` is a letter or an option's text. ValueError when it is neither.
    """
    right = chosen(truth, options)
    if right is None:
        raise ValueError(f"truth {truth!r}: neither the letter nor the text of one of the {len(options)} options")
    return float(chosen(answer, options) == right)


def chosen(answer: str, options: Sequence[str] = ()) -> str | None:
    """The letter that an answer chooses: "B", "b", "(B)", "B. a cat", "The answer is B.", or B's text. None: none, or
    two. Without options all letters are open."""
    letters = ascii_uppercase[: len(options)] if options else ascii_uppercase
    said = [letter for letter, text in zip(letters, options, strict=False) if _plain(text) == _plain(answer)]
    if len(said) == 1:
        return said[0]
    found = _leading(answer.strip()) or _announced(answer)
    return found if found and found in letters else None


def _leading(answer: str) -> str | None:
    """The letter that an answer consists of or starts with. "A dog" starts with none; "A. dog" and "(A) dog" do."""
    if found := re.fullmatch(r"\(?([A-Za-z])[).:]*", answer):
        return found[1].upper()
    found = re.match(r"(?:\(([A-Z])\)|([A-Z])[).:])\s", answer)
    return found[1] or found[2] if found else None


def _announced(answer: str) -> str | None:
    found = set(re.findall(r"\b(?:answer|option|choice) is:? \(?([A-Z])\b", answer))
    return found.pop() if len(found) == 1 else None


def yes_no(answer: str, truth: str) -> float:
    """1 where the answer says yes or no as `truth` does; what says neither is wrong. ValueError for such a truth."""
    right = said_yes_no(truth)
    if right is None:
        raise ValueError(f"truth {truth!r} is neither yes nor no")
    return float(said_yes_no(answer) == right)


def said_yes_no(answer: str) -> str | None:
    """ "yes" or "no", whichever comes first; "not" and "n't" are no. None where none of them is said."""
    found = re.search(r"\b(yes|no|not|cannot)\b|n't\b", answer.lower().replace("’", "'"))
    return None if found is None else "yes" if found[0] == "yes" else "no"


def anls(answer: str, truths: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer, 0..1: the nearest truth's, 0 below the threshold.

    As DocVQA's evaluation has it: case and the number of spaces are no difference, but lengths are of the texts as they
    were given. No truth scores 0.
    """
    best = max((_likeness(answer, truth) for truth in truths), default=0.0)
    return best if best >= threshold else 0.0


def _likeness(one: str, other: str) -> float:
    longest = max(len(one.upper()), len(other.upper()))
    same, as_well = (" ".join(text.lower().split()) for text in (one, other))
    return 1 - distance(same, as_well) / longest if longest else 1.0


def distance(one: str, other: str) -> int:
    """Levenshtein: how many characters must be put in, left out or changed to make one text the other."""
    row = list(range(len(other) + 1))
    for i, character in enumerate(one, 1):
        corner, row[0] = row[0], i
        for j, beside in enumerate(other, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (character != beside))
    return row[-1]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
