"""LLaVA-Bench (In-the-Wild): long answers, which a judge compares with a reference's; or reviews of such a judge."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vistune.evaluate import official
from vistune.evaluate.benchmarks import PROTOCOL, Judged
from vistune.evaluate.items import Answer, Question, Result, item, match
from vistune.evaluate.judge import Reply, Request
from vistune.evaluate.official import Place

Pair = tuple[float, float]
"""What the judge gives the reference and the answer, of 10 each."""

FAILED: Pair = (-1, -1)
"""What the official files say where a reply was not read."""
PREFIX = "llava_bench_"
"""What a question's category is called in the rules and in the reviews."""
ALL = "all"
SCALE = 10.0
WITHOUT_FAILED = "by category, without failed reviews"
REFERENCES, CONTEXTS, RULES = "answers_gpt4.jsonl", "context.jsonl", "rule.json"
FIGURES = ("ratio", "ref", "cand")

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
OWN_RULE = {
    "role": "Assistant",
    "prompt": (
        "Two assistants answered the question above about a picture. You do not see the picture; the context says "
        "what is in it. Judge how helpful, relevant, accurate and suitably detailed each of the two answers is, and "
        "give each a grade from 1 to 10, 10 being the best. Do not let the order of the two sway you.\n"
        "Your first line holds the two grades and nothing else: that of Assistant 1, one space, that of Assistant 2. "
        "Give your reasons from the second line on."
    ),
}
OWN = f"{PROTOCOL}, rule: vistune"


@dataclass(frozen=True, slots=True)
class Review:
    """One judgement; the category as the rules call it, or "" where a review says none."""

    id: str
    category: str
    pair: Pair

    @property
    def readable(self) -> bool:
        return all(math.isfinite(value) and value >= 0 for value in self.pair)


class LLaVABench(Judged):
    """Files: `questions.jsonl` (question_id, image, text, category: conv, detail or complex), `context.jsonl` (image,
    caption: a text or a list of them), `answers_gpt4.jsonl` (the reference's answers), `images/`; and `rule.json`: what
    the judge is told, per category, which LLaVA keeps with its code. Without it a rule of our own words is sent, and
    the protocol says so.

    Prompt: the question as it is. The judge, at temperature 0.2, gets the context, the question, the reference's answer
    as that of Assistant 1, the model's as that of Assistant 2, and the rule.

    Rule: the first line of a reply is two numbers with one space or comma between, or the reply is not read. `ref` and
    `cand` are ten times the means of the two, `ratio` is cand of ref in percent (published: that of all questions). A
    reply that failed or is not read is counted and scores nothing. In a file of reviews made elsewhere (rows with
    `tuple`, as LLaVA's script writes them) such rows say [-1, -1] and enter the means, since that is the official
    arithmetic; the figures without them stand beside it.
    """

    name = "llava_bench"
    title = "LLaVA-Bench (In-the-Wild)"
    also = ("llava_bench_in_the_wild", "llava_in_the_wild", "llava_w", "llava_bench_wild")
    folders = ("llava-bench-in-the-wild", "llava_bench")
    published = 60
    max_new_tokens = 1024
    server = "LLaVA's summarize_gpt_review.py"

    def questions(self, place: Place) -> list[Question]:
        truths = _references(place) if place.find(REFERENCES) else {}
        return [
            Question(
                id=row["question_id"],
                text=row["text"],
                images=(place.picture(row["image"], "images"),),
                category=str(row["category"]),
                truth=str(truths.get(str(row["question_id"]), {}).get("text", "")),
            )
            for row in _rows(place)
        ]

    def read(self, path: Path) -> tuple[list[Answer], list[str]]:
        return official.answers(path, instead=("tuple", "score"))

    def score(self, place: Place, answers: Sequence[Answer]) -> Result:
        """The reviews of a judge elsewhere; answers alone have no score."""
        reviews = [(answer, review) for answer in answers if (review := _review(answer)) is not None]
        made = [Question(id=answer.id, text="", category=review.category) for answer, review in reviews]
        listed = place.find("questions.jsonl") is not None or not reviews
        questions = self.questions(place) if listed else list({one.key: one for one in made}.values())
        matched = match(questions, [answer for answer, _ in reviews] or answers)
        if not reviews:
            return Result(
                scores={},
                headline="ratio",
                questions=len(questions),
                answered=matched.answered,
                remarks=matched.remarks,
            )
        if failed := [
            f"{one.id}: {_first_line(answer.row.get('content', one.pair))}"
            for answer, one in reviews
            if not one.readable
        ]:
            matched.remarks["failed"] = failed
        if no_pair := [str(answer.id) for answer in answers if _review(answer) is None]:
            matched.remarks["without a pair of scores"] = no_pair
        known = {str(one.id): one for one in questions}
        every, kept = [one for _, one in reviews], [one for _, one in reviews if one.readable]
        rest = {f"{name}_without_failed": value for name, value in summary(kept).get(ALL, {}).items()}
        return Result(
            scores=_scores(every) | rest,
            headline="ratio",
            questions=len(questions),
            answered=matched.answered,
            tables={"by category": _table(every)} | ({WITHOUT_FAILED: _table(kept)} if failed else {}),
            items=[
                _item(known.get(one.id, unlisted), answer, str(answer.row.get("content", "")), one.pair)
                for (answer, one), unlisted in zip(reviews, made, strict=True)
            ],
            remarks=matched.remarks,
        )

    def requests(self, place: Place, answers: Sequence[Answer]) -> list[Request]:
        if any(_review(answer) for answer in answers):
            raise ValueError("LLaVA-Bench: these answers are a judge's reviews already; score them without --judge")
        given = _given(self.questions(place), answers)
        contexts, references, rules = _contexts(place), _references(place), _rules(place)
        found = []
        for row in _rows(place):
            if (answer := given.get(str(row["question_id"]))) is None:
                continue
            reference = _of(references, str(row["question_id"]), REFERENCES, row)
            rule = _of(rules, PREFIX + row["category"], RULES, row) if rules else OWN_RULE
            context = _of(contexts, row["image"], CONTEXTS, row)
            messages = _messages(context, row["text"], reference["text"], answer.text, rule)
            found.append(Request(id=str(row["question_id"]), messages=messages, temperature=0.2, max_tokens=1024))
        return found

    def reviewed(self, place: Place, answers: Sequence[Answer], replies: Mapping[str, Reply]) -> Result:
        questions = self.questions(place)
        matched = match(questions, answers)
        reviews, items, failed, over = [], [], [], []
        for question, answer in zip(questions, matched.answers, strict=True):
            reply = replies.get(str(question.id), Reply(error="not asked"))
            one = Review(str(question.id), PREFIX + question.category, parse_score(reply.text))
            if answer is not None and (reply.error or not one.readable):
                failed.append(f"{question.id}: {reply.error or f'unreadable: {_first_line(reply.text)}'}")
            elif answer is not None:
                reviews.append(one)
                over += [f"{question.id}: {one.pair[0]:g} {one.pair[1]:g}"] * (max(one.pair) > SCALE)
            items.append(_item(question, answer, reply.text, None if reply.error else one.pair))
        remarks = {kind: found for kind, found in (("failed", failed), ("over 10", over)) if found}
        return Result(
            scores=_scores(reviews),
            headline="ratio",
            questions=len(questions),
            answered=len(reviews),
            tables={"by category": _table(reviews)},
            items=items,
            remarks=matched.remarks | remarks,
            protocol=PROTOCOL if place.find(RULES) else OWN,
        )

    def reviews(self, place: Place, answers: Sequence[Answer], replies: Mapping[str, Reply], out: Path) -> list[Path]:
        """`reviews.jsonl`, a row for each reply, read or not, in the questions' order; a failed request has none."""
        given, references = _given(self.questions(place), answers), _references(place)
        lines = []
        for number, row in enumerate(_rows(place), 1):
            key = str(row["question_id"])
            answer, reply = given.get(key), replies.get(key)
            if answer is None or reply is None or reply.error:
                continue
            reference = _of(references, key, REFERENCES, row)
            review = {
                "id": number,
                "question_id": row["question_id"],
                "answer1_id": reference.get("answer_id", reference["question_id"]),
                "answer2_id": answer.row.get("answer_id", answer.id),
                "category": PREFIX + row["category"],
                "content": reply.text,
                "tuple": list(parse_score(reply.text)),
            }
            lines.append(json.dumps(review) + "\n")
        return [official.write(out / "reviews.jsonl", "".join(lines))]


def parse_score(reply: str) -> Pair:
    """The two numbers of a reply's first line, as LLaVA reads them: whatever Python calls a number, nan too, with one
    space or comma between; [-1, -1] for anything else."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(words) != 2:
        return FAILED
    try:
        return float(words[0]), float(words[1])
    except ValueError:
        return FAILED


def summary(reviews: Iterable[Review]) -> dict[str, dict[str, float]]:
    """Ratio, ref and cand of all reviews and of each category, as LLaVA's summarize_gpt_review.py prints them: means
    rounded to three decimals, figures to one. A figure that is no number (of nothing, of a nan) is not there."""
    pairs: dict[str, list[Pair]] = defaultdict(list)
    for review in reviews:
        pairs[ALL].append(review.pair)
        if review.category:
            pairs[review.category].append(review.pair)
    return {category: _figures(pairs[category]) for category in sorted(pairs)}


def _figures(pairs: Sequence[Pair]) -> dict[str, float]:
    ref, cand = (round(mean, 3) for mean in np.asarray(pairs, dtype=float).mean(0).tolist())
    ratio = cand / ref * 100 if ref else math.nan
    values = (round(ratio, 1), round(ref * 10, 1), round(cand * 10, 1))
    return {name: value for name, value in zip(FIGURES, values, strict=True) if math.isfinite(value)}


def _scores(reviews: Sequence[Review]) -> dict[str, float]:
    """`ratio`, `ref`, `cand` of all, then `conv_ratio` and so on."""
    found = summary(reviews)
    whole = found.pop(ALL, {})
    return whole | {
        f"{category.removeprefix(PREFIX)}_{name}": value for category, of in found.items() for name, value in of.items()
    }


def _table(reviews: Sequence[Review]) -> list[dict[str, Any]]:
    counts = {category: sum(one.category == category for one in reviews) for category in {r.category for r in reviews}}
    counts[ALL] = len(reviews)
    return [{"category": name, "reviews": counts[name], **figures} for name, figures in summary(reviews).items()]


def _review(answer: Answer) -> Review | None:
    """What a row of a review file says; None for a row that is none. Older files call the pair `score`."""
    pair = answer.row.get("tuple", answer.row.get("score"))
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, int | float) for one in pair):
        return None
    return Review(str(answer.id), str(answer.row.get("category", "")), (float(pair[0]), float(pair[1])))


def _item(question: Question, answer: Answer | None, content: str, pair: Pair | None) -> dict[str, Any]:
    shown = None if pair is None else [_plain(one) for one in pair]
    more = {"content": content, "tuple": shown}
    return item(question, None if answer is None else answer.text, None, None if shown is None else shown[1], **more)


def _plain(value: float) -> Any:
    """JSON has no word for these."""
    return value if math.isfinite(value) else None if math.isnan(value) else "inf" if value > 0 else "-inf"


def _first_line(text: object) -> str:
    return repr(str(text).split("\n")[0][:80])


def _messages(
    context: str, question: str, reference: str, answer: str, rule: Mapping[str, str]
) -> tuple[dict[str, str], ...]:
    role = rule["role"]
    blocks = {
        "[Context]": context,
        "[Question]": question,
        f"[{role} 1]": f"{reference}\n\n[End of {role} 1]",
        f"[{role} 2]": f"{answer}\n\n[End of {role} 2]",
        "[System]": rule["prompt"],
    }
    told = "".join(f"{head}\n{text}\n\n" for head, text in blocks.items())
    return {"role": "system", "content": SYSTEM}, {"role": "user", "content": told}


def _given(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, Answer]:
    found = zip(questions, match(questions, answers).answers, strict=True)
    return {str(question.id): answer for question, answer in found if answer is not None}


def _rows(place: Place) -> list[dict[str, Any]]:
    return official.question_rows(place.file("questions.jsonl"), "image", "category")


def _references(place: Place) -> dict[str, dict[str, Any]]:
    """The reference's answers by question_id."""
    return {str(row["question_id"]): row for row in official.question_rows(place.file(REFERENCES))}


def _contexts(place: Place) -> dict[str, str]:
    """What a picture shows, in words, by the picture's name."""
    path = place.file(CONTEXTS)
    found = {}
    for number, row in enumerate(official.json_lines(path), 1):
        told = official.field(row, "caption", path, number)
        found[official.field(row, "image", path, number)] = "\n".join(told) if isinstance(told, list) else str(told)
    return found


def _rules(place: Place) -> dict[str, dict[str, str]]:
    """What LLaVA's judge is told, by category; nothing where its file is not there."""
    path = place.find(RULES)
    if path is None:
        return {}
    found = official.json_file(path)
    if not isinstance(found, dict) or not all(isinstance(rule, dict) for rule in found.values()):
        raise ValueError(f"{path}: not LLaVA's rules, which are an object of {{category: {{role, prompt}}}}")
    for name, rule in found.items():
        for key in ("role", "prompt") if name.startswith(PREFIX) else ():
            official.field(rule, key, path, name)
    return found


def _of(found: Mapping[str, Any], key: str, file: str, row: Mapping[str, Any]) -> Any:
    if key not in found:
        raise ValueError(f"LLaVA-Bench: question {row['question_id']} wants {key} of {file}, which does not have it")
    return found[key]
