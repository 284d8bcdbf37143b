"""Answers a second: a benchmark's questions in batches beside one at a time, as LLaVA's scripts ask them.

    python benchmarks/evaluate.py                  the quickstart's tiny model, pictures of its digits, on a CPU
    python benchmarks/evaluate.py --model DIR      any model folder
    python benchmarks/evaluate.py --quick          a smoke test: no figure of it means anything

The reference is what LLaVA's `model_vqa_loader.py` does, with stock classes alone: question by question in the file's
order, the picture opened and prepared in line, `generate` of one row, greedy. Beside it `vistune evaluate`'s own road,
one question at once and in batches. All start from the same files and end in the same texts, which are compared. The
contenders take turns, round by round; medians go to `benchmarks/results/evaluate.json` and `.md` (`--out`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import machine
from PIL import Image as Picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from vistune.evaluate.answering import Local, is_near_tie
from vistune.evaluate.items import Question
from vistune.generate import open_model
from vistune.models.assemble import assemble
from vistune.quickstart import digits, scenes, words
from vistune.quickstart.run import PARTS
from vistune.samples import Image

HERE = Path(__file__).resolve().parent
Texts = list[str]


def main(arguments: list[str] | None = None) -> int:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("--model", type=Path, help="a model folder; empty: the quickstart's parts, assembled")
    said.add_argument("--questions", type=int, default=96)
    said.add_argument("--max-new-tokens", type=int, default=16)
    said.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    said.add_argument("--rounds", type=int, default=5)
    said.add_argument("--device", default="cpu")
    said.add_argument("--precision", default="fp32")
    said.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    said.add_argument("--quick", action="store_true")
    said.add_argument("--out", type=Path, default=HERE / "results" / "evaluate.json")
    asked = said.parse_args(arguments)
    if asked.quick:
        asked.questions, asked.rounds, asked.batches = 6, 1, [1, 4]
    if asked.threads:
        torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as made:
        result = measure(asked, Path(made))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    asked.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0


def measure(asked: argparse.Namespace, made: Path) -> dict[str, Any]:
    folder = asked.model or assembled(made / "model")
    questions = drawn(made / "pictures", asked.questions)
    ours = open_model(folder, asked.device, precision=asked.precision)
    contenders: dict[str, Callable[[], Texts]] = {
        "one at a time, as LLaVA asks": reference(folder, questions, asked, ours.model.dtype)
    }
    for batch in asked.batches:
        name = f"vistune, {batch} at once" if batch > 1 else "vistune, one at a time"
        contenders[name] = lambda batch=batch: answered(Local(ours, batch), questions, asked.max_new_tokens)
    took: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    texts: dict[str, Texts] = {}
    for number in range(asked.rounds + 1):  # the first does not count
        for name, ask in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            texts[name] = ask()
            if number:
                took[name].append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu})
    alone = [said for _, said in Local(ours, 1).answer(questions, asked.max_new_tokens)]
    return {
        "machine": machine(),
        "device": asked.device,
        "precision": asked.precision,
        "threads": torch.get_num_threads(),
        "questions": len(questions),
        "max_new_tokens": asked.max_new_tokens,
        "rounds": asked.rounds,
        "tokens": statistics.mean(said.tokens for said in alone),
        "near_ties": sum(is_near_tie(said.margin) for said in alone),
        "contenders": summary(took, texts),
    }


def assembled(folder: Path) -> Path:
    assemble(PARTS / "vision", PARTS / "language", folder, template="v1", image="pad", dtype=torch.float32)
    return folder


def drawn(folder: Path, count: int) -> list[Question]:
    """Questions about pictures of digits, three to a picture as in many benchmarks, as the quickstart asks them."""
    draw, (images, labels) = random.Random(0), digits.load()
    folder.mkdir(parents=True)
    questions: list[Question] = []
    while len(questions) < count:
        made = scenes.scene(draw, digits.split()[1].tolist(), labels)
        path = folder / f"{len(questions)}.png"
        scenes.picture(made, images, draw).save(path)
        for one in words.questions(made.cells, draw)[:3]:
            shown = (Image(path=str(path)),)
            questions.append(Question(id=len(questions), text=one.text, images=shown, truth=one.answer))
    return questions[:count]


def reference(
    folder: Path, questions: list[Question], asked: argparse.Namespace, dtype: torch.dtype
) -> Callable[[], Texts]:
    """Question by question, stock classes alone."""
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=dtype)
    model.to(asked.device).eval()

    @torch.inference_mode()
    def ask() -> Texts:
        found = []
        for one in questions:
            content = [{"type": "image"}, {"type": "text", "text": "\n" + one.text}]
            prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            picture = Picture.open(one.images[0].path).convert("RGB")
            inputs = processor(images=picture, text=prompt, return_tensors="pt").to(asked.device, dtype)
            ids = model.generate(**inputs, max_new_tokens=asked.max_new_tokens, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            found.append(processor.batch_decode(new, skip_special_tokens=True)[0].strip())
        return found

    return ask


def answered(local: Local, questions: list[Question], tokens: int) -> Texts:
    found = dict(local.answer(questions, tokens))
    return [found[i].text for i in range(len(questions))]


def summary(took: dict[str, list[dict[str, float]]], texts: dict[str, Texts]) -> dict[str, Any]:
    """Answers a second and the factor over the first contender: medians over the rounds, of the same round's pairs."""
    first = next(iter(took))
    found = {}
    for name, rounds in took.items():
        speeds = [len(texts[name]) / one["wall"] for one in rounds]
        factors = {
            kind: [before[kind] / one[kind] for before, one in zip(took[first], rounds, strict=True)]
            for kind in ("wall", "cpu")
        }
        found[name] = {
            "answers_per_s": statistics.median(speeds),
            "factor": {kind: statistics.median(values) for kind, values in factors.items()},
            "factor_range": [min(factors["wall"]), max(factors["wall"])],
            "same_texts": sum(a == b for a, b in zip(texts[name], texts[first], strict=True)),
            "seconds": rounds,
        }
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['questions']} questions about pictures, answers of {result['tokens']:.1f} tokens on average (at most "
        f"{result['max_new_tokens']}), {result['device']}, {result['precision']}, {result['threads']} threads; medians "
        f"of {result['rounds']} rounds. Near ties: {result['near_ties']}.",
        "",
        "| who asks | answers / s | times as fast (range) | by CPU time | same answers |",
        "|---|---|---|---|---|",
    ]
    for name, one in result["contenders"].items():
        low, high = one["factor_range"]
        lines.append(
            f"| {name} | {one['answers_per_s']:.1f} | {one['factor']['wall']:.2f} ({low:.2f} to {high:.2f}) | "
            f"{one['factor']['cpu']:.2f} | {one['same_texts']} of {result['questions']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
