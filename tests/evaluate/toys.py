"""Every benchmark in small, in its official layout: LLaVA's folders and file names, questions about pictures of digits.

Made up from end to end; only names, keys and shapes are those of the published files.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image

from vistune.quickstart import digits, scenes, words

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
LETTERS = "ABCD"


@dataclass
class Toy:
    """What was written. `right`: rows of an answers file that earns full marks; empty where nothing is scored here."""

    folder: Path
    questions: int
    right: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """A picture, and questions about it with one right answer each."""

    picture: PIL.Image.Image
    asked: list[words.Question]


@cache
def shown(count: int = 14) -> tuple[Shown, ...]:
    draw, (images, labels) = random.Random("toys"), digits.load()
    made = [scenes.scene(draw, digits.split()[1].tolist(), labels) for _ in range(count)]
    return tuple(Shown(scenes.picture(one, images, draw), words.questions(one.cells, draw)) for one in made)


def save(picture: PIL.Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, "JPEG" if path.suffix == ".jpg" else "PNG")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def said(id: int | str, prompt: str, text: str) -> dict[str, Any]:
    """A line of an answers file, as LLaVA's scripts write it."""
    return {"question_id": id, "prompt": prompt, "text": text, "answer_id": "", "model_id": "right", "metadata": {}}


def options(number: int, right: str) -> tuple[list[str], str]:
    """Four options with the right one among them, and its letter."""
    others = [word for word in words.DIGITS if word != right][number : number + 3]
    at = number % 4
    return [*others[:at], right, *others[at:]], LETTERS[at]


def listed(choices: list[str]) -> str:
    return "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCDE", choices, strict=False))


def vqav2_val(root: Path) -> Toy:
    """The files of visualqa.org for val2014; ten people answered each question."""
    folder, questions, annotations, right = root / "vqav2", [], [], []
    for i, one in enumerate(shown()[:3]):
        save(one.picture, folder / "val2014" / f"COCO_val2014_{i:012}.jpg")
        for j, asked in enumerate(one.asked[:2]):
            questions.append({"image_id": i, "question": asked.text, "question_id": 1000 * i + j})
            people = [asked.answer] * 7 + ["something else"] * 3
            answers = [{"answer": a, "answer_confidence": "yes", "answer_id": n + 1} for n, a in enumerate(people)]
            annotations.append(
                {"question_type": "which", "answer_type": "other" if j else "number", "image_id": i}
                | {"multiple_choice_answer": asked.answer, "question_id": 1000 * i + j, "answers": answers}
            )
            right.append(said(1000 * i + j, asked.text + SHORT, asked.answer))
    about = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    task = {"task_type": "Open-Ended", "questions": questions}
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", about | task)
    write_json(folder / "v2_mscoco_val2014_annotations.json", about | {"annotations": annotations})
    return Toy(folder, len(questions), right)


def vqav2_test(root: Path) -> Toy:
    """LLaVA's two files: test-dev is asked, the upload has a row for every question of test."""
    folder, rows = root / "vqav2", []
    for i, one in enumerate(shown()[:3]):
        name = f"COCO_test2015_{i:012}.jpg"
        save(one.picture, folder / "test2015" / name)
        rows.append({"question_id": i, "image": name, "text": one.asked[0].text + SHORT, "category": "default"})
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[:2])
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    return Toy(folder, 2)


def gqa(root: Path) -> Toy:
    folder, rows, truths, right = root / "gqa", [], {}, []
    for i, one in enumerate(shown()[:4]):
        save(one.picture, folder / "data" / "images" / f"n{i}.jpg")
        asked, id = one.asked[0], f"2010000{i}"
        rows.append({"question_id": id, "image": f"n{i}.jpg", "text": asked.text + SHORT, "category": "default"})
        kind = {"structural": "query", "semantic": "attr", "detailed": "place"}
        truths[id] = {"question": asked.text, "imageId": f"n{i}", "isBalanced": True, "answer": asked.answer}
        truths[id] |= {"fullAnswer": f"It is {asked.answer}.", "types": kind, "groups": {"global": None, "local": ""}}
        truths[id] |= {"entailed": [], "equivalent": [id], "semantic": [], "semanticStr": ""}
        right.append(said(id, rows[-1]["text"], f"{asked.answer.capitalize()}."))
    write_lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    write_json(folder / "data" / "testdev_balanced_questions.json", truths)
    return Toy(folder, len(rows), right)


def vizwiz_val(root: Path) -> Toy:
    folder, rows, right = root / "vizwiz", [], []
    for i, one in enumerate(shown()[:3]):
        name, asked = f"VizWiz_val_{i:08}.jpg", one.asked[0]
        save(one.picture, folder / "val" / name)
        answers = [{"answer": asked.answer, "answer_confidence": "yes"}] * 10
        rows.append({"image": name, "question": asked.text, "answers": answers, "answer_type": "other"})
        rows[-1]["answerable"] = 1
        right.append(said(name, asked.text + UNSURE + SHORT, asked.answer))
    write_json(folder / "val.json", rows)
    return Toy(folder, len(rows), right)


def vizwiz_test(root: Path) -> Toy:
    folder, rows = root / "vizwiz", []
    for i, one in enumerate(shown()[:3]):
        name = f"VizWiz_test_{i:08}.jpg"
        save(one.picture, folder / "test" / name)
        rows.append({"question_id": i, "image": name, "text": one.asked[0].text + UNSURE + SHORT})
        rows[-1]["category"] = "default"
    write_lines(folder / "llava_test.jsonl", rows)
    write_json(folder / "test.json", [{"image": row["image"], "question": row["text"].split("\n")[0]} for row in rows])
    return Toy(folder, len(rows))


def scienceqa(root: Path) -> Toy:
    """Two of three problems have a picture; one problem is of another split."""
    folder, problems, asked_of, right = root / "scienceqa", {}, [], []
    for i, one in enumerate(shown()[:4]):
        id, pictured, split = str(10 + i), i % 2 == 0, "test" if i < 3 else "train"
        choices, letter = options(i, one.asked[1].answer)
        problem = {"question": one.asked[1].text, "choices": choices, "answer": LETTERS.index(letter)}
        problem["hint"] = "Look at the picture." if pictured else ""
        problem |= {"image": "image.png" if pictured else None, "task": "closed choice", "grade": "grade1"}
        problem |= {"subject": "natural science", "topic": "digits", "category": "digits", "skill": "count"}
        problems[id] = problem | {"lecture": "", "solution": "", "split": split}
        if split != "test":
            continue
        context = f"Context: {problem['hint']}\n" if pictured else ""
        text = f"{context}{problem['question']}{listed(choices)}"
        talk = [{"from": "human", "value": f"<image>\n{text}" if pictured else text}, {"from": "gpt", "value": letter}]
        asked_of.append({"id": id, "conversations": talk} | ({"image": f"{id}/image.png"} if pictured else {}))
        right.append(said(id, talk[0]["value"] + LETTER, letter))
        if pictured:
            save(one.picture, folder / "images" / "test" / id / "image.png")
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["13"], "val": [], "test": ["10", "11", "12"]})
    write_json(folder / "llava_test_CQM-A.json", asked_of)
    return Toy(folder, 3, right)


def textvqa(root: Path) -> Toy:
    """A picture may have several questions: they share its id, and the text tells them apart."""
    folder, rows, data, right = root / "textvqa", [], [], []
    for i, one in enumerate(shown()[:2]):
        id = f"{i:016x}"
        save(one.picture, folder / "train_images" / f"{id}.jpg")
        for j, asked in enumerate(one.asked[:2]):
            text = f"{asked.text}\nReference OCR token: {one.asked[0].answer}, {j}{SHORT}"
            rows.append({"question_id": id, "image": f"{id}.jpg", "text": text, "category": "default"})
            data.append({"question": asked.text, "question_id": 34602 + 2 * i + j, "image_id": id})
            data[-1] |= {"answers": [asked.answer] * 10, "set_name": "val", "image_classes": ["Sign"]}
            data[-1] |= {"question_tokens": asked.text.lower().split(), "image_width": 96, "image_height": 96}
            right.append(said(id, text, asked.answer))
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    write_json(folder / "TextVQA_0.5.1_val.json", about | {"data": data})
    return Toy(folder, len(rows), right)


def pope(root: Path) -> Toy:
    """LLaVA's file begins each category at an id of its own; each label file counts from 1."""
    folder, rows, right = root / "pope", [], []
    for first, kind in {0: "adversarial", 10_000_000: "random", 20_000_000: "popular"}.items():
        labels = []
        for i in range(4):
            name, label = f"COCO_val2014_{i % 2:012}.jpg", ("yes", "no")[i % 2]
            save(shown()[i % 2].picture, folder / "val2014" / name)
            text = f"Is there a {words.DIGITS[i]} in the image?"
            labels.append({"question_id": i + 1, "image": name, "text": text, "label": label})
            id = first + i + 1
            rows.append({"question_id": id, "image": name, "text": text + SHORT, "category": kind})
            right.append(said(id, text + SHORT, f"{label.capitalize()}, it is."))
        write_lines(folder / "coco" / f"coco_pope_{kind}.json", labels)
    write_lines(folder / "llava_pope_test.jsonl", rows)
    return Toy(folder, len(rows), right)


MME_FLAT = (
    *("existence", "count", "position", "color", "OCR"),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
MME_NESTED = ("posters", "celebrity", "scene", "landmark", "artwork")


def mme(root: Path) -> Toy:
    """Both layouts: a category's texts beside its pictures, or in two folders; two questions under a picture's id."""
    folder, rows, right = root / "MME", [], []
    release = folder / "MME_Benchmark_release_version"
    for number, category in enumerate((*MME_FLAT, *MME_NESTED)):
        nested = category in MME_NESTED
        name = f"{category}/images/0000.jpg" if nested else f"{category}/0000.png"
        save(shown()[number].picture, release / name)
        asked = [(f"Is a digit in picture {number}?", "Yes"), (f"Is picture {number} empty?", "No")]
        text = release / category / ("questions_answers_YN/0000.txt" if nested else "0000.txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("\n".join(f"{question} Please answer yes or no.\t{truth}" for question, truth in asked))
        for question, truth in asked:
            rows.append({"question_id": name, "image": name, "text": question + SHORT, "category": category})
            right.append(said(name, question + SHORT, truth))
    write_lines(folder / "llava_mme.jsonl", rows)
    return Toy(folder, len(rows), right)


def _mmbench(folder: Path, file: str, ask: Callable[[words.Question], str], suffix: str) -> Toy:
    columns = ["index", "question", "hint", *LETTERS, "answer", "category", "image", "source"]
    columns += ["l2-category", "comment", "split"]
    rows, right = [], []
    for i, one in enumerate(shown()[:3]):
        choices, letter = options(i, one.asked[1].answer)
        stream = io.BytesIO()
        one.picture.save(stream, "JPEG")
        row = {"index": i, "question": ask(one.asked[1]), "hint": "two\nlines" if i == 1 else "", "answer": letter}
        row |= dict(zip(LETTERS, choices, strict=True))
        row |= {"category": "digits", "image": base64.b64encode(stream.getvalue()).decode(), "source": "made-up"}
        rows.append(row | {"l2-category": "finegrained", "comment": "", "split": "dev"})
        hint = f"{row['hint']}\n" if row["hint"] else ""
        prompt = f"{hint}{row['question']}{listed(choices)}{suffix}"
        more = {"round_id": 0, "options": choices, "option_char": list(LETTERS)}
        right.append(said(i, prompt, letter) | more)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / file).open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, columns, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return Toy(folder, len(rows), right)


def mmbench(root: Path) -> Toy:
    return _mmbench(root / "mmbench", "mmbench_dev_20230712.tsv", lambda asked: asked.text, LETTER)


def mmbench_cn(root: Path) -> Toy:
    return _mmbench(
        root / "mmbench_cn", "mmbench_dev_cn_20231003.tsv", lambda asked: "图中有几个数字?", "\n请直接回答选项字母。"
    )


def seed(root: Path) -> Toy:
    """Pictures by the data's id, without a suffix; videos by their middle frame, called after type and id."""
    folder, rows, truths, right = root / "seed_bench", [], [], []
    for i, one in enumerate(shown()[:4]):
        video = i == 3
        id: int | str = f"v10_{i}" if video else 101669 + i
        image = f"SEED-Bench-video-image/10_{id}.png" if video else f"SEED-Bench-image/{5448517 + i}_{i}"
        save(one.picture, folder / image)
        choices, letter = options(i, one.asked[1].answer)
        text = f"{one.asked[1].text}{listed(choices)}{LETTER}"
        kind = "video" if video else "image"
        rows.append({"question_id": id, "image": image, "text": text, "category": kind})
        truth = {f"choice_{key}": value for key, value in zip("abcd", choices, strict=True)}
        truth |= {"question": one.asked[1].text, "answer": letter, "data_type": kind, "question_id": str(id)}
        truths.append(truth | {"data_id": f"{id}.mp4" if video else f"{5448517 + i}_{i}"})
        truths[-1] |= {"question_type_id": 10, "segment": [1.0, 4.5]} if video else {"question_type_id": 1 + i // 2}
        right.append(said(id, text, letter))
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    write_lines(folder / "llava-seed-bench.jsonl", rows)
    write_json(folder / "SEED-Bench.json", {"questions": truths, "question_type": types})
    return Toy(folder, len(rows), right)


def llava_bench(root: Path) -> Toy:
    folder, rows, context, reference = root / "llava-bench-in-the-wild", [], [], []
    for i, (one, kind) in enumerate(zip(shown(), ("conv", "detail", "complex"), strict=False)):
        save(one.picture, folder / "images" / f"{i + 1:03}.jpg")
        rows.append({"question_id": i, "image": f"{i + 1:03}.jpg", "text": one.asked[0].text, "category": kind})
        context.append({"id": f"{i + 1:03}", "image": f"{i + 1:03}.jpg", "caption": f"It says {one.asked[0].answer}."})
        reference.append({"question_id": i, "prompt": one.asked[0].text, "text": one.asked[0].answer})
        reference[-1] |= {"answer_id": f"r{i}", "model_id": "gpt-4", "metadata": {}}
    write_lines(folder / "questions.jsonl", rows)
    write_lines(folder / "context.jsonl", context)
    write_lines(folder / "answers_gpt4.jsonl", reference)
    return Toy(folder, len(rows), reference)


def mmvet(root: Path) -> Toy:
    folder, rows, about, right = root / "mm-vet", [], {}, []
    for i, one in enumerate(shown()[:3]):
        save(one.picture, folder / "images" / f"v1_{i}.png")
        asked, skills = one.asked[1], (["ocr"], ["ocr", "math"], ["rec"])[i]
        rows.append({"question_id": i, "image": f"v1_{i}.png", "text": asked.text, "category": "default"})
        about[f"v1_{i}"] = {"imagename": f"v1_{i}.png", "question": asked.text, "answer": asked.answer}
        about[f"v1_{i}"] |= {"imagesource": "made-up", "capability": skills}
        right.append(said(i, asked.text, asked.answer))
    write_lines(folder / "llava-mm-vet.jsonl", rows)
    write_json(folder / "mm-vet.json", about)
    return Toy(folder, len(rows), right)


def custom(root: Path) -> Toy:
    """A user's own questions: one of each way to compare."""
    folder, right = root / "custom", []
    picture, (place, count, *_) = shown()[0].picture, shown()[0].asked
    save(picture, folder / "images" / "a.png")
    choices, letter = options(0, count.answer)
    rows: list[dict[str, Any]] = [
        {"metric": "exact", "text": place.text, "answer": place.answer},
        {"metric": "option", "text": count.text + listed(choices), "options": choices, "answer": letter},
        {"metric": "yes_no", "text": "Is there a digit?", "answer": "yes"},
        {"metric": "vqa", "text": place.text, "answers": [place.answer] * 10},
        {"metric": "anls", "text": place.text, "answers": [place.answer, "nothing"]},
        {"metric": "contains", "text": count.text, "answer": count.answer},
    ]
    for i, row in enumerate(rows):
        row |= {"question_id": i, "image": "a.png", "category": ("places", "counts")[i % 2]}
        right.append(said(i, row["text"], row.get("answer") or row["answers"][0]))
    write_lines(folder / "questions.jsonl", rows)
    (folder / "benchmark.toml").write_text('title = "Digits"\nmax_new_tokens = 8\n')
    return Toy(folder, len(rows), right)


LAYOUTS: dict[str, Callable[[Path], Toy]] = {
    "vqav2": vqav2_val,
    "gqa": gqa,
    "vizwiz": vizwiz_val,
    "scienceqa": scienceqa,
    "textvqa": textvqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "mmbench_cn": mmbench_cn,
    "seed": seed,
    "llava_bench": llava_bench,
    "mmvet": mmvet,
    "custom": custom,
}
"""The twelve as LLaVA's playground/data/eval has them, of those with a hidden test set the one with answers, and one of
a user's own; what writes each, by benchmark."""
