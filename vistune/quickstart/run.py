"""The main job in small, from scans to answers, through the very code that a big run uses.

A table of contents: every step is a room of its own. `vistune quickstart` and `make quickstart` end here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vistune import console, generate, images, recipe
from vistune.models import assemble
from vistune.models.load import Loaded, load, quiet
from vistune.models.proving import verify
from vistune.quickstart import picture, scenes
from vistune.samples import IMAGE_MARK, Image
from vistune.train import stage

PARTS = Path(__file__).with_name("parts")
MARK = "quickstart.json"
"""In the run folder: that it is ours to make anew."""

QUICK = scenes.Sizes(align=320, instruct=320, captions=40, questions=20)
BATCH = 64
"""Questions answered at once."""
HELD_OUT = "heldout"
"""The held-out questions as a benchmark, below the data."""
LONGEST = 16
"""Tokens of an answer to a question, at most."""


@dataclass(frozen=True)
class Asked:
    """What was asked about a picture, what is true, and what the model said of that picture and of another."""

    kind: str
    image: Path
    question: str
    truth: str
    answer: str
    shuffled: str


def run(folder: Path | str, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Assemble, align, instruct, evaluate on held-out scans, export, ask. Returns what `summary.json` holds.

    `quick` shows in a minute that everything works; its scores mean nothing. Raises ValueError when `folder` holds
    something else than an earlier quickstart.
    """
    started = time.monotonic()
    folder = _claim(Path(folder), seed, quick)
    console.say("1/6 draw pictures of real handwritten digits; some scans are held out")
    paths = scenes.write(folder / "data", seed, QUICK if quick else scenes.Sizes())
    _write_benchmark(folder / "data" / HELD_OUT, paths)
    console.say("2/6 assemble a vision part, a fresh connector and a language part")
    _assemble(folder / "stage0", seed)
    console.say("3/6 align: the connector learns from captions, all else is frozen")
    align = stage.run(_recipe("align", folder, folder / "stage0", paths.align, paths.images, seed))
    captions = _ask(load(align["model"], template="plain"), paths.captions, paths.images, 40)
    console.say("4/6 instruct: connector and language part learn from conversations")
    instruct = stage.run(_recipe("instruct", folder, Path(align["model"]), paths.instruct, paths.images, seed))
    console.say("5/6 answer questions about pictures of held-out scans")
    questions = _ask(load(instruct["model"]), paths.questions, paths.images, LONGEST)
    console.say("6/6 open the exported folder with stock transformers and ask")
    told = _ask_stock(Path(instruct["model"]), questions[0])
    summary = {
        "held_out_exact_match": _share(questions),
        "shuffled_exact_match": _share(questions, shuffled=True),
        "align_caption_match": _share(captions),
        "align_caption_shuffled": _share(captions, shuffled=True),
        "align_caption_gain": _share(captions) - _share(captions, shuffled=True),
        "align_left_the_rest_untouched": untouched(folder / "stage0", Path(align["model"])),
        "kinds": _kinds(questions),
        "seconds": round(time.monotonic() - started, 1),
        "seconds_training": {"align": round(align["seconds"], 1), "instruct": round(instruct["seconds"], 1)},
        "seed": seed,
        "quick": quick,
        "threads": torch.get_num_threads(),
        "model": instruct["model"],
        "asked": told,
        "losses": {"align": align["losses"], "instruct": instruct["losses"]},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _draw(folder / "report.png", summary, questions)
    _show(folder, summary)
    return summary


def _claim(folder: Path, seed: int, quick: bool) -> Path:
    """The folder, empty but for its mark. Only what an earlier quickstart made is removed."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ValueError(f"{folder}: is not empty and is no earlier quickstart; give another folder, or remove it")
    for made in ("data", "stage0", "align", "instruct"):
        shutil.rmtree(folder / made, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps({"seed": seed, "quick": quick}) + "\n", encoding="utf-8")
    return folder


def _write_benchmark(folder: Path, paths: scenes.Paths) -> None:
    """The held-out questions as a benchmark of one's own (`custom`), for `vistune evaluate`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in json.loads(paths.questions.read_text(encoding="utf-8")):
        asked, told = (turn["value"] for turn in row["conversations"][:2])
        text = asked.removeprefix(f"{IMAGE_MARK}\n")
        one = {"question_id": row["id"], "image": row["image"], "text": text, "answer": told, "category": _kind(row)}
        lines.append(json.dumps(one) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "benchmark.toml").write_text(
        f'title = "held-out digits"\nmetric = "exact"\nimages = "../{paths.images.name}"\nmax_new_tokens = {LONGEST}\n',
        encoding="utf-8",
    )


def _assemble(folder: Path, seed: int) -> None:
    """The stage-0 model folder, in fp32, with the proof that the parts in it are the parts we ship."""
    vision, language = PARTS / "vision", PARTS / "language"
    assemble.assemble(vision, language, folder, template="v1", image="pad", seed=seed, dtype=torch.float32)
    proof = verify.verify(folder, vision=vision, language=language)
    proof.show()
    if not proof.ok:
        raise ValueError(f"{folder}: the assembled model is not what its parts are; see the table above")


def _recipe(name: str, folder: Path, start: Path, data: Path, pictures: Path, seed: int) -> recipe.Recipe:
    """`recipes/tiny/<name>.toml` with this run's folders and seed."""
    words = [
        f"run={folder / name}",
        f"model.start={start}",
        f"data.sources.0.path={data}",
        f"data.sources.0.images={pictures}",
        f"train.seed={seed}",
    ]
    if name == "instruct":
        words.append(f"evaluate.data={folder / 'data' / HELD_OUT}")
    return recipe.read(_recipes() / f"{name}.toml", words)


def _recipes() -> Path:
    """Where `recipes/tiny` lies: beside the package in a checkout, inside it when it was installed from a wheel."""
    package = Path(__file__).parents[1]
    for place in (package.parent, package):
        if (place / "recipes" / "tiny").is_dir():
            return place / "recipes" / "tiny"
    raise ValueError(f"quickstart: recipes/tiny lies neither beside {package} nor in it; run from a checkout")


def _ask(loaded: Loaded, file: Path, pictures: Path, longest: int) -> list[Asked]:
    """Ask the first question of every row of `file`, about its own picture and about one of half the file further."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    shown = [pictures / row["image"] for row in rows]
    texts = [row["conversations"][0]["value"] for row in rows]
    half = len(rows) // 2
    answers = [
        generate.answer_batch(
            loaded,
            [(text, [Image(path=str(image))]) for text, image in zip(texts, seen, strict=True)],
            max_new_tokens=longest,
            batch=BATCH,
        )
        for seen in (shown, shown[half:] + shown[:half])
    ]
    return [
        Asked(_kind(row), image, text.removeprefix(f"{IMAGE_MARK}\n"), row["conversations"][1]["value"], own, other)
        for image, text, row, own, other in zip(shown, texts, rows, *answers, strict=True)
    ]


def _share(asked: Sequence[Asked], *, shuffled: bool = False) -> float:
    """Share of answers that are the truth, letter by letter; of the answers about another picture if `shuffled`."""
    return round(sum((one.shuffled if shuffled else one.answer) == one.truth for one in asked) / len(asked), 4)


def _kind(row: dict[str, Any]) -> str:
    """The kind of a question stands at the end of its row's id."""
    return row["id"].rpartition("-")[2]


def _kinds(asked: Sequence[Asked]) -> dict[str, dict[str, float]]:
    by_kind: dict[str, list[Asked]] = {}
    for one in asked:
        by_kind.setdefault(one.kind, []).append(one)
    return {
        kind: {"questions": len(some), "exact_match": _share(some), "shuffled": _share(some, shuffled=True)}
        for kind, some in sorted(by_kind.items())
    }


def untouched(before: Path, after: Path) -> bool:
    """Whether vision and language in the folder `after` are bit for bit those of `before`, and the connector is not."""
    old, new = load(before), load(after)
    same = {
        part: all(
            torch.equal(a, b)
            for module, other in zip(old.family.parts(old.model)[part], new.family.parts(new.model)[part], strict=True)
            for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
        )
        for part in ("vision", "connector", "language")
    }
    return same == {"vision": True, "connector": False, "language": True}


def _ask_stock(folder: Path, asked: Asked) -> dict[str, Any]:
    """Ask once more without any code of ours: stock classes, the folder's own chat template and processor."""
    with quiet():
        processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    content = [{"type": "image"}, {"type": "text", "text": asked.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    shown = images.open_image(Image(path=str(asked.image)))
    inputs = processor(images=shown, text=prompt, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    said = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    return {"image": str(asked.image), "question": asked.question, "answer": said, "truth": asked.truth}


def _draw(path: Path, summary: dict[str, Any], questions: Sequence[Asked]) -> None:
    """The picture; without matplotlib a line says how to get it."""
    captions = picture.Score("captions after align", summary["align_caption_match"], summary["align_caption_shuffled"])
    answers = picture.Score(
        "questions after instruct", summary["held_out_exact_match"], summary["shuffled_exact_match"]
    )
    path.unlink(missing_ok=True)
    try:
        picture.report(
            path,
            losses=summary["losses"],
            scores=[captions, answers],
            examples=[picture.Example(one.image, one.question, one.answer, one.truth) for one in examples(questions)],
            subtitle=f"real handwritten digits · {summary['threads']} threads · {summary['seconds']:.0f} s "
            f"· seed {summary['seed']}",
        )
    except picture.NoMatplotlib as missing:
        console.say(str(missing))


def examples(asked: Sequence[Asked], count: int = 8, mistakes: int = 2) -> list[Asked]:
    """The first questions about pictures of their own, kind after kind, whatever was answered; then first mistakes."""
    wrong = list({one.image: one for one in reversed(asked) if one.answer != one.truth}.values())[::-1][:mistakes]
    seen = {one.image for one in wrong}
    chosen: list[Asked] = []
    kinds = list(dict.fromkeys(one.kind for one in asked))
    for number in range(count - len(wrong)):
        kind = kinds[number % len(kinds)]
        found = next((one for one in asked if one.kind == kind and one.image not in seen), None)
        if found is not None:
            chosen.append(found)
            seen.add(found.image)
    return chosen + wrong


def _show(folder: Path, summary: dict[str, Any]) -> None:
    percent = "{:.1%}".format
    console.table(
        "held-out questions by kind",
        ("kind", "questions", "exact match", "with shuffled pictures"),
        [(k, v["questions"], percent(v["exact_match"]), percent(v["shuffled"])) for k, v in summary["kinds"].items()],
    )
    asked = summary["asked"]
    console.table(
        "the quickstart",
        ("what", "value"),
        [
            ("held-out exact match", percent(summary["held_out_exact_match"])),
            ("the same with shuffled pictures", percent(summary["shuffled_exact_match"])),
            ("captions after align alone", percent(summary["align_caption_match"])),
            ("the same with shuffled pictures", percent(summary["align_caption_shuffled"])),
            ("vision and language untouched by align", "yes" if summary["align_left_the_rest_untouched"] else "NO"),
            ("seconds", summary["seconds"]),
            ("model folder", summary["model"]),
            ("summary, report", f"{folder / 'summary.json'}, {folder / 'report.png'}"),
        ],
    )
    console.say(f"asked: {asked['question']}  answer: {asked['answer']}  ({asked['image']})")
    console.say(f"ask it yourself: vistune chat {summary['model']} --image {asked['image']}")
    asked_again = f"--benchmark custom --data {folder / 'data' / HELD_OUT}"
    console.say(f"score it again: vistune evaluate {summary['model']} {asked_again}")
