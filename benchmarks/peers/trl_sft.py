"""TRL's SFTTrainer on the prepared data: one job from a JSON file, one JSON result. Runs in the peer's environment.

`head = "shipped"` is TRL untouched. `head = "forced"` makes its fused head believe that it is on a Triton device, so
that it scores supervised rows only, as it does on a GPU: `trl.trainer.utils._use_triton`, which decides `compact` in
`add_fused_lm_head`, is replaced from outside; the kernels keep their own, so they still run in plain torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import PIL
import torch
import transformers
import trl
import trl.trainer.utils
from transformers import AutoProcessor, LlavaForConditionalGeneration, TrainerCallback
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from made_data import turns
from measure import Memory, StepClock
from peers import adapted
from stages import Stage, learns

VERSIONS = {m.__name__: m.__version__ for m in (torch, transformers, trl, accelerate, datasets, peft, PIL)}


class Recorder(SFTTrainer):
    """SFTTrainer that hands its step's loss and sizes to a clock, and changes nothing."""

    seen: list[dict[str, Any]]
    keep_ids = False

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
        real, labels = inputs["attention_mask"].bool(), inputs["labels"]
        figures = {
            "tokens": int(real.sum()),
            "positions": real.numel(),
            "supervised": int((labels[:, 1:] != -100).sum()),
        }
        if self.keep_ids:
            figures["ids"] = [row[keep].tolist() for row, keep in zip(inputs["input_ids"], real, strict=True)]
            figures["labels"] = [row[keep].tolist() for row, keep in zip(labels, real, strict=True)]
        loss = super().training_step(model, inputs, *rest, **more)
        self.seen.append({**figures, "loss": float(loss)})
        return loss


class Ticks(TrainerCallback):
    """Ends a step of the clock when the trainer ends its own."""

    def __init__(self, clock: StepClock, seen: list[dict[str, Any]]):
        self.clock, self.seen = clock, seen

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step(**self.seen[-1])


def dataset(job: dict[str, Any]) -> datasets.Dataset:
    """The job's rows, in its order, as the `messages` and `images` columns that TRL asks for; images decode lazily."""
    rows = json.loads(Path(job["data"]).read_text())
    picked = [rows[row] for row in job["order"]]
    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    columns: dict[str, list[Any]] = {
        "messages": [[{"role": t["role"], "content": t["content"][-1]["text"]} for t in turns(row)] for row in picked],
        "images": [[str(Path(job["images"]) / row["image"])] if "image" in row else [] for row in picked],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def freeze(model: LlavaForConditionalGeneration, stage: Stage) -> None:
    """The connector learns, and the language model where the stage says so; adapters are peft's business."""
    model.requires_grad_(learns(stage) == "all")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)


def settings(job: dict[str, Any], folder: str) -> SFTConfig:
    """What the contenders share is set; everything else stays as TRL ships it."""
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=job["batch"],
        max_steps=job["steps"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        bf16=job["precision"] == "bf16",
        gradient_checkpointing=False,
        assistant_only_loss=True,
        max_length=job["length"],
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )


def run(job: dict[str, Any], memory: Memory) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    if job["head"] == "forced":
        trl.trainer.utils._use_triton = lambda device: True
    processor = AutoProcessor.from_pretrained(job["model"])
    processor.chat_template = Path(job["template"]).read_text()
    model = LlavaForConditionalGeneration.from_pretrained(job["model"], dtype=torch.float32)
    with_adapters = learns(job["stage"]) == "adapters"
    if not with_adapters:
        freeze(model, job["stage"])
    clock, seen = StepClock(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorder(
            model=model,
            args=settings(job, folder),
            train_dataset=dataset(job),
            processing_class=processor,
            callbacks=[Ticks(clock, seen)],
            peft_config=adapted.config() if with_adapters else None,
        )
        if path := job.get("adapters"):
            adapted.begin_with(trainer.model, path)
        trainer.seen, trainer.keep_ids = seen, job.get("keep_ids", False)
        trainer.train()
    return {
        "steps": clock.steps,
        "baseline_bytes": memory.baseline,
        "peak_bytes": memory.peak(),
        "memory": memory.how,
        "versions": VERSIONS,
    }


if __name__ == "__main__":
    after_imports = Memory()
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run(given, after_imports)))
