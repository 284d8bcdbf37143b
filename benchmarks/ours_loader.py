"""One pass of vistune's loader over a data file, for loader.py: a job file in, a result file out."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vistune.chat import template
from vistune.data.formats import open_source
from vistune.data.index import build_index
from vistune.data.loader import load
from vistune.data.plan import Plan
from vistune.data.tokenize import Language
from vistune.images import FixedLayout, normalize
from vistune.text_encoder import open_encoder

IMAGE_TOKEN = 32_001
LENGTH = 8192  # nothing is shortened: the others shorten nothing either


def main(given: str, got: str) -> None:
    job = json.loads(Path(given).read_text())
    torch.set_num_threads(job["threads"])
    cache = Path(job["cache"])
    layout = FixedLayout(mode="pad")
    language = Language(template("v1"), open_encoder(job["tokenizer"]), layout, IMAGE_TOKEN)
    reader = open_source(job["data"], images=job["images"], cache=cache)
    index = build_index([reader], language, max(LENGTH, job["length"]), cache=cache)
    plan = Plan(index, batch=job["batch"], length=index.length)
    Path(got).write_text(json.dumps(measured(plan, reader, language, job)))


def measured(plan: Plan, reader: Any, language: Language, job: dict[str, Any]) -> dict[str, Any]:
    """Costs of an epoch. The device normalises pixels in training; here it is done on the CPU, and counted apart."""
    gc.collect()
    began, used, normalising = time.perf_counter(), _used(), 0.0
    sums = {"samples": 0, "images": 0, "text_tokens": 0, "supervised": 0, "pixel_squares": 0.0}
    for batches in load(plan, [reader], language, packs_per_micro=job["batch"], workers=job["workers"]):
        for batch in batches:
            sums["samples"] += batch.samples
            sums["text_tokens"] += int((batch.ids[: batch.tokens] != IMAGE_TOKEN).sum())
            sums["supervised"] += len(batch.rows)
            assert not batch.faults, batch.faults[0]
            if batch.pixels is None:
                continue
            sums["images"] += len(batch.pixels)
            at = time.process_time()
            pixels = normalize(batch.pixels, language.layout, torch.float32)
            normalising += time.process_time() - at
            few = pixels[:, :, ::48, ::48].double()
            sums["pixel_squares"] += float((few * few).sum())
    gc.collect()
    return {**sums, "wall_s": time.perf_counter() - began, "cpu_s": _used() - used, "normalise_s": normalising}


def _used() -> float:
    return sum(os.times()[:4])


if __name__ == "__main__":
    main(*sys.argv[1:])
