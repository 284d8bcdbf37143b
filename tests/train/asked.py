"""Held-out data and a benchmark of one's own for tests that evaluate in the midst of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.made import made_data


def made_questions(folder: Path, rows: int = 8) -> Path:
    """A folder with `custom/`: questions with one picture, with two or without; what is right is "red"."""
    custom = folder / "custom"
    made_data(custom, rows, seed=5)
    lines = []
    for number, row in enumerate(json.loads((custom / "data.json").read_text())):
        names = row.get("image", [])
        text = row["conversations"][0]["value"].replace("<image>\n", "")
        line = {"question_id": number, "text": text, "answer": "red", "category": f"kind {number % 2}"}
        lines.append(line | ({"image": names} if names else {}))
    (custom / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (custom / "benchmark.toml").write_text('metric = "contains"\nmax_new_tokens = 6\n')
    return folder


def evaluate_section(data: Path, questions: Path, /, **more: Any) -> dict[str, Any]:
    """[evaluate] with two held-out sources and the benchmark."""
    source = {"path": str(data), "images": str(data.parent / "images")}
    held = [{**source, "name": "a"}, {**source, "name": "b", "cap": 5}]
    return {"every": 2, "held_out": held, "benchmarks": ["custom"], "data": str(questions), "batch": 5} | more
