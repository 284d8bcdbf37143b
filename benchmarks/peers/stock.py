"""A plain loop over the stock `transformers` model, the second opinion on losses: padded batches, whole logits.

It needs no environment of its own, and is no contender for speed unless asked to be.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from peft import get_peft_model
from transformers import AutoProcessor, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from made_data import turns
from measure import Memory, StepClock
from peers import adapted
from stages import learns

VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, PIL)}


def batches(job: dict[str, Any], processor: Any) -> Any:
    """The job's rows, `batch` at a time, as the stock processor makes them, with labels on the assistant's spans."""
    rows = json.loads(Path(job["data"]).read_text())
    for start in range(0, job["steps"] * job["batch"], job["batch"]):
        picked = [rows[row] for row in job["order"][start : start + job["batch"]]]
        messages = [turns(row) for row in picked]
        for row, conversation in zip(picked, messages, strict=True):
            if "image" in row:
                conversation[0]["content"][0]["path"] = str(Path(job["images"]) / row["image"])
        made = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
        )
        made["labels"] = made["input_ids"].masked_fill(torch.as_tensor(made.pop("assistant_masks")) == 0, -100)
        yield made


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    processor = AutoProcessor.from_pretrained(job["model"])
    processor.chat_template = Path(job["template"]).read_text()
    model = LlavaForConditionalGeneration.from_pretrained(job["model"], dtype=torch.float32).train()
    model = _learning(model, job)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=job["lr"], weight_decay=0.0)
    clock = StepClock()
    for batch in batches(job, processor):
        with torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        real = batch["attention_mask"].bool()
        figures = {"loss": loss.item(), "tokens": int(real.sum()), "positions": real.numel()}
        figures["supervised"] = int((batch["labels"][:, 1:] != -100).sum())
        if job.get("keep_ids"):
            for name, values in (("ids", batch["input_ids"]), ("labels", batch["labels"])):
                figures[name] = [row[keep].tolist() for row, keep in zip(values, real, strict=True)]
        clock.step(**figures)
    return clock.steps


def _learning(model: Any, job: dict[str, Any]) -> Any:
    """The model with what the stage says learning, behind peft where that is adapters."""
    language = learns(job["stage"])
    if language == "adapters":
        model = get_peft_model(model, adapted.config())
        if path := job.get("adapters"):
            adapted.begin_with(model, path)
        return model
    model.requires_grad_(language == "all")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def result(job: dict[str, Any], memory: Memory) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    steps = run(job)
    peak = {"baseline_bytes": memory.baseline, "peak_bytes": memory.peak(), "memory": memory.how}
    return {"steps": steps, **peak, "versions": VERSIONS}


if __name__ == "__main__":
    after_imports = Memory()
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(result(given, after_imports)))
