"""Does lmms-eval, through vistune's plug-in, give the answers that vistune gives? It runs in an environment of its own,
made beside if it is not there, on a task of its own, offline:

    python scripts/check_lmms_eval.py [MODEL] [--venv DIR] [--processes 2]

Without MODEL it is the quickstart's, assembled and untrained. Exit code 1: an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = Path(__file__).with_name("lmms-eval-constraints.txt")
TASK = "vistune_digits"
LONGEST = 12
PICTURES = 6

YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function digits.doc_to_visual
doc_to_text: !function digits.doc_to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {longest}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 0.0
"""
FUNCTIONS = """\
import PIL.Image


def doc_to_visual(doc):
    return [PIL.Image.open(path).convert("RGB") for path in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


def main() -> int:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("model", nargs="?", type=Path)
    said.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "vistune-check-lmms-eval")
    said.add_argument("--processes", type=int, default=1)
    given = said.parse_args()
    sys.path.insert(0, str(ROOT))
    python = environment(given.venv)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = given.model or assembled(scratch / "model")
        rows = written(scratch)
        expected = ours(model.resolve(), rows)
        runs = {"chat": ["--batch_size", "4"], "simple": ["--batch_size", "3", "--force_simple"]}
        wrong = 0
        for kind, words in runs.items():
            found = theirs(python, model.resolve(), scratch, [*words], scratch / kind, given.processes)
            wrong += compare(kind, rows, expected, found)
    return int(wrong > 0)


def environment(folder: Path) -> str:
    """The Python of an environment with lmms-eval, this torch, and vistune with its entry point."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", f"torch=={torch.__version__}"], check=True)
        held = folder / "constraints.txt"
        held.write_text(f"torch=={torch.__version__}\n{CONSTRAINTS.read_text()}")
        subprocess.run([*pip, "install", "-q", "-c", str(held), f"{ROOT}[lmms-eval]"], check=True)
        subprocess.run([*pip, "install", "-q", "--no-deps", "-e", str(ROOT)], check=True)
        if not torch.version.cuda:  # the registry's torchvision is built for CUDA and does not load beside this torch
            subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "timm"], check=True)
        (folder / "ready").touch()
    return str(python)


def assembled(folder: Path) -> Path:
    from vistune.models.assemble import assemble
    from vistune.quickstart.run import PARTS

    assemble(PARTS / "vision", PARTS / "language", folder, template="v1", image="pad", dtype=torch.float32)
    return folder


def written(folder: Path) -> list[dict[str, Any]]:
    """The task in `folder`: questions about one picture, about two, and about none."""
    rows = list(questions(folder))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{TASK}.yaml").write_text(YAML.format(task=TASK, rows=folder / "rows.jsonl", longest=LONGEST))
    (folder / "digits.py").write_text(FUNCTIONS)
    return rows


def questions(folder: Path) -> Iterator[dict[str, Any]]:
    from tests.evaluate.toys import save, shown

    for i, one in enumerate(shown()[:PICTURES]):
        path = folder / "pictures" / f"{i}.png"
        save(one.picture, path)
        for asked in one.asked[:3]:
            yield {"question": asked.text, "images": [str(path)], "answer": asked.answer}
    both = [str(folder / "pictures" / f"{i}.png") for i in (0, 1)]
    yield {"question": "Which picture has more digits?", "images": both, "answer": "one"}
    yield {"question": "How many digits are there?", "images": [], "answer": "ten"}


def ours(model: Path, rows: list[dict[str, Any]]) -> list[str]:
    from vistune import generate
    from vistune.samples import Image

    asked = [(row["question"], [Image(path=path) for path in row["images"]]) for row in rows]
    loaded = generate.open_model(model, "cpu", precision="fp32")
    return generate.answer_batch(loaded, asked, max_new_tokens=LONGEST, batch=1)


def theirs(python: str, model: Path, tasks: Path, words: list[str], out: Path, processes: int) -> list[str]:
    """The answers that lmms-eval wrote down, in the order of the rows."""
    start = [python, "-m", "lmms_eval"]
    if processes > 1:
        start = [python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        start += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "lmms_eval"]
    command = [*start, "--model", "vistune", "--model_args", f"pretrained={model},precision=fp32", "--tasks", TASK]
    command += ["--include_path", str(tasks), "--device", "cpu", "--log_samples", "--output_path", str(out), *words]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache")}
    ended = subprocess.run(command, env=os.environ | offline, cwd=tasks, capture_output=True, text=True)
    files = sorted(out.rglob(f"*samples_{TASK}.jsonl"))
    if ended.returncode or not files:
        raise SystemExit(f"lmms-eval ended with {ended.returncode}:\n{ended.stdout[-3000:]}\n{ended.stderr[-6000:]}")
    found = [json.loads(line) for line in files[-1].read_text().splitlines()]
    return [said(row["filtered_resps"]) for row in sorted(found, key=lambda row: row["doc_id"])]


def said(value: Any) -> str:
    return said(value[0]) if isinstance(value, list) else value


def compare(kind: str, rows: list[dict[str, Any]], expected: list[str], found: list[str]) -> int:
    if len(found) != len(rows):
        raise SystemExit(f"{kind}: {len(found)} answers to {len(rows)} questions")
    wrong = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
    for i in wrong:
        print(f"{kind}: {rows[i]['question']} {expected[i]!r} is {found[i]!r} in lmms-eval")
    print(
        f"{kind}: {len(rows) - len(wrong)} of {len(rows)} answers are the same, {len(set(expected))} of them different"
    )
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
