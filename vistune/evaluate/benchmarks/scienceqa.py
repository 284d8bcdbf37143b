"""ScienceQA: multiple choice from school books, half of it with a picture. Asks and scores as LLaVA does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vistune.evaluate import official
from vistune.evaluate.benchmarks import LETTER, Benchmark
from vistune.evaluate.items import Answer, Question, Result, accuracies, item, match, of_answered, percent
from vistune.evaluate.official import Place, field
from vistune.samples import IMAGE_MARK, Image

LLAVA = "llava_test_CQM-A.json"
SPLIT = "test"
LETTERS = "ABCDE"
FAILED = "FAILED"
"""What stands for a letter where none is found, and for the answer where there is none (LLaVA's eval_science_qa.py)."""

SENTENCE = re.compile(r"The answer is ([A-Z]).")
"""Any character may follow the letter, but one has to; the sentence counts only where it stands once."""


class ScienceQA(Benchmark):
    """ScienceQA, test.

    Files, in the folder or below it:
        problems.json           {id: {question, choices, answer, hint, image, subject, grade, ...}, ...}
        pid_splits.json         {"test": [id, ...], ...}
        llava_test_CQM-A.json   [{id, image, conversations}, ...]; built from the problems where it is absent
        images/test/5/image.png
    Prompt: `<image>` on a line of its own where there is a picture, "Context: " and the hint where there is one, the
    question, "A. " and so on with the choices, each on a line, and `LETTER`.
    Score: the letter is the whole answer, or its beginning with a full stop and a space after it, or it stands in the
    one sentence "The answer is X."; anything else, no answer included, is wrong. The accuracy is over all problems;
    the published figure, IMG-accuracy, is over those whose stored prompt has `<image>`.
    """

    name = "scienceqa"
    title = "ScienceQA"
    also = ("sqa", "science_qa", "scienceqa_img")
    folders = ("scienceqa", "sqa")
    published = 4_241
    max_new_tokens = 1024

    def questions(self, place: Place) -> list[Question]:
        known, picture = _problems(place), _pictures(place)
        if (path := place.find(LLAVA)) is None:
            return [_question(one, picture) for one in known.values()]
        rows = official.json_file(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path}: a list of {{id, image, conversations}} is expected; fetch it again")
        _differ([str(field(row, "id", path, number)) for number, row in enumerate(rows, 1)], path)
        return [_asked(row, known, picture, path, number) for number, row in enumerate(rows, 1)]

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        problems, picture = list(_problems(place).values()), _pictures(place)
        questions = [_question(one, picture) for one in problems]
        matched = match(questions, answers)
        items = [
            _item(question, one, given)
            for question, one, given in zip(questions, problems, matched.answers, strict=True)
        ]
        shown = [one for one in items if one["is_multimodal"]]
        scores = {"accuracy": percent(sum(one["correct"] for one in items), len(items))}
        if shown:
            scores["img_accuracy"] = percent(sum(one["correct"] for one in shown), len(shown))
        scores |= of_answered(items)
        return Result(
            scores=scores,
            headline="img_accuracy",
            questions=len(items),
            answered=matched.answered,
            tables=_tables(problems, [one["correct"] for one in items]),
            items=items,
            remarks=matched.remarks | _unlike(problems, matched.answers),
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of problems.json. `answer` counts from 0; `image` is the picture's name in the problem's folder."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    image: str
    subject: str
    grade: str

    @property
    def prompt(self) -> str:
        """As llava_test_CQM-A.json has it, which LLaVA's own converter no longer writes so."""
        context = f"Context: {self.hint}\n" if self.hint else ""
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        return _prompt(f"{context}{self.question}{choices}".replace("  ", " "), bool(self.image))


def letter(text: str) -> str:
    """The letter that an answer gives, or `FAILED`; it need not be one of the question's."""
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def index(letter: str, choices: int) -> int:
    """Which of so many choices the letter is, from 0; -1 for none of them."""
    return LETTERS[:choices].find(letter) if len(letter) == 1 else -1


def _item(question: Question, one: Problem, given: Answer | None) -> dict[str, Any]:
    said = FAILED if given is None else given.text
    parsed = letter(said)
    chosen = index(parsed, len(one.choices))
    prompt = "Unknown" if given is None else given.prompt
    known = item(
        question,
        None if given is None else given.text,
        chosen == one.answer,
        parsed_ans=parsed,
        ground_truth=LETTERS[one.answer],
        pred=said,
        index=chosen,
        is_multimodal=IMAGE_MARK in prompt,
    )
    return known | ({"question": given.prompt} if given and given.prompt else {})


def _tables(problems: Sequence[Problem], rights: Sequence[bool]) -> dict[str, list[dict[str, Any]]]:
    """By subject, by grade and by what comes with the question, as ScienceQA's own table has them."""
    pairs = list(zip(problems, rights, strict=True))
    contexts = sorted(
        ((context, right) for one, right in pairs for context in _contexts(one)), key=lambda pair: CONTEXTS[pair[0]]
    )
    return {
        "Accuracy / subject": accuracies("subject", sorted((one.subject, right) for one, right in pairs)),
        "Accuracy / grade": accuracies("grade", sorted((_grades(one.grade), right) for one, right in pairs)),
        "Accuracy / context": accuracies("context", contexts),
    }


CONTEXTS = {"text": 0, "image": 1, "none": 2}


def _contexts(one: Problem) -> list[str]:
    """A problem with a hint and a picture is one of each."""
    return [name for name, there in (("text", one.hint), ("image", one.image)) if there] or ["none"]


def _grades(grade: str) -> str:
    number = grade.removeprefix("grade")
    return grade if not number.isdigit() else "1-6" if int(number) <= 6 else "7-12"


def _unlike(problems: Sequence[Problem], answers: Sequence[Answer | None]) -> dict[str, list[str]]:
    """Answers whose stored prompt says otherwise than the problem whether there is a picture; IMG-accuracy follows the
    prompt."""
    pairs = [(one, IMAGE_MARK in given.prompt) for one, given in zip(problems, answers, strict=True) if given]
    without = [one.id for one, shown in pairs if one.image and not shown]
    extra = [one.id for one, shown in pairs if shown and not one.image]
    found = {"prompts without <image> to a problem with a picture": without}
    found["prompts with <image> to a problem without a picture"] = extra
    return {kind: ids for kind, ids in found.items() if ids}


def _prompt(text: str, picture: bool) -> str:
    mark = f"{IMAGE_MARK}\n" if picture else ""
    return f"{mark}{text.replace(IMAGE_MARK, '').strip()}{LETTER}"


Picture = Callable[[str], Image]
"""Where a picture lies, by its name from the split's folder."""


def _pictures(place: Place) -> Picture:
    """In the folder, or beside the problems."""
    beside = str(place.file("problems.json").parent / "images" / SPLIT)
    return lambda name: place.picture(name, f"images/{SPLIT}", SPLIT, "images", beside)


def _question(one: Problem, picture: Picture) -> Question:
    images = (picture(f"{one.id}/{one.image}"),) if one.image else ()
    truth = LETTERS[one.answer]
    return Question(id=one.id, text=one.prompt, images=images, category=one.subject, truth=truth)


def _asked(row: dict[str, Any], known: dict[str, Problem], picture: Picture, path: Path, number: int) -> Question:
    """A row of LLaVA's question file."""
    id = field(row, "id", path, number)
    turns = field(row, "conversations", path, number)
    if not turns or "value" not in turns[0]:
        raise ValueError(f"{path}:{number}: its conversation has no first turn with a value")
    image = row.get("image")
    one = known.get(str(id))
    return Question(
        id=id,
        text=_prompt(turns[0]["value"], bool(image)),
        images=(picture(image),) if image else (),
        category=one.subject if one else "",
        truth=LETTERS[one.answer] if one else "",
    )


def _differ(ids: Sequence[str], path: Path) -> None:
    if twice := [id for id, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{path}: problem {twice[0]} is there twice; ids must differ")


def _problems(place: Place) -> dict[str, Problem]:
    """The split's problems in its order. ValueError that names file, problem and key for one that is missing."""
    path, splits = place.file("problems.json"), place.file("pid_splits.json")
    rows = official.json_file(path)
    if not isinstance(rows, dict):
        raise ValueError(f"{path}: problems are {{id: {{question, choices, answer, ...}}}} there; fetch it again")
    ids = [str(id) for id in field(official.json_file(splits), SPLIT, splits, 1)]
    if gone := [id for id in ids if id not in rows]:
        raise ValueError(f"{path}: problem {gone[0]}, which {splits} lists, is not there ({len(gone)} are missing)")
    _differ(ids, splits)
    return {id: _read(id, rows[id], path) for id in ids}


def _read(id: str, row: dict[str, Any], path: Path) -> Problem:
    choices, answer = field(row, "choices", path, id), field(row, "answer", path, id)
    if not isinstance(answer, int) or not 0 <= answer < min(len(choices), len(LETTERS)):
        raise ValueError(f"{path}:{id}: answer {answer!r} is none of its {len(choices)} choices, counted from 0")
    return Problem(
        id=id,
        question=field(row, "question", path, id),
        choices=tuple(choices),
        answer=answer,
        hint=row.get("hint") or "",
        image=row.get("image") or "",
        subject=row.get("subject", ""),
        grade=row.get("grade", ""),
    )
