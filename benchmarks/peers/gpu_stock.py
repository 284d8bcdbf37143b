"""One case run by Hugging Face's own stack: the stock class, padded batches as its Trainer makes them, its own loss
over every row, AdamW fused. The batches are made beforehand, so reading and decoding cost it nothing.

Weights and samples are those of vistune's run; the tokens too, which is checked elsewhere (`train_step.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_made
import torch
from gpu_ours import facts, matmul_peak, measured, recipe_of, wait
from peft import LoraConfig, get_peft_model
from stages import LORA
from torch import Tensor, nn

from vistune import inputs
from vistune.data.batch import Item, read_planned
from vistune.images import normalize
from vistune.models import load
from vistune.models.filling import fill
from vistune.train import adapters

IGNORED = -100
WORKERS = 12


def result(job: dict[str, Any]) -> dict[str, Any]:
    """As `gpu_ours.result`. Raises torch.OutOfMemoryError where it does not fit."""
    tiny = job["tiny"]
    device = torch.device("cpu" if tiny else "cuda")
    case = gpu_cases.named(job["case"], tiny)
    dtype = torch.float32 if tiny else torch.bfloat16
    gpu_made.answer_reads(device, dtype)
    recipe = recipe_of(job)
    peak = matmul_peak(device, recipe)
    said = load.describe(job["start"], template=recipe.model.template, image=recipe.model.image)
    data = inputs.read(recipe, said, Path(recipe.run))
    steps = [list(padded(data, rows, case.padded, said, dtype, device.type == "cuda")) for rows in job["order"]]
    model = made_model(job, case, recipe, device, dtype)
    if job.get("checkpointing") and job["checkpointing"] != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    filled = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        filled = torch.cuda.memory_allocated()
    autocast = torch.autocast("cuda", torch.bfloat16) if not (tiny or pure(case)) else nullcontext()
    losses, done, took = train(model, steps, job, recipe, device, autocast)
    sizes = [size | {"flops": flops} for size, flops in zip(map(sized, steps), job["flops"], strict=True)]
    return {
        "losses": losses,
        "checkpointing": "full" if job.get("checkpointing") not in (None, "none") else "none",
        "compile": False,
        "precision": "fp32" if tiny else "bf16 weights" if pure(case) else "bf16 autocast, frozen weights in bf16",
        "filled_bytes": filled,
        **measured(sizes, [0.0] * len(sizes), job["warmup"], done, took),
        **facts(device, peak),
    }


def pure(case: gpu_cases.Case) -> bool:
    """Whether the weights that learn are bf16 as well: where fp32 ones with their moments would not fit one card."""
    return "language" in case.learn and not case.lora


def padded(data: inputs.Data, rows: list[int], count: int, said: Any, dtype: torch.dtype, pin: bool) -> Iterator[Any]:
    """The rows as batches of `count`, right-padded to the longest of each, labels on the supervised tokens."""
    column = data.index.columns["row"]
    place = {int(row): position for position, row in enumerate(column)}
    with ThreadPoolExecutor(WORKERS) as pool:
        read = lambda row: read_planned(data.index, data.readers, place[row], data.language)  # noqa: E731
        items = list(pool.map(read, rows))
    for start in range(0, len(items), count):
        batch = joined(items[start : start + count], said, dtype)
        yield {name: value.pin_memory() if pin else value for name, value in batch.items()}


def joined(items: list[Item], said: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """One batch as a processor and a collator would give it."""
    ids = [torch.from_numpy(item.tokens.ids.astype("int64")) for item in items]
    masks = [torch.from_numpy(item.tokens.loss_mask) for item in items]
    pad = lambda rows, value: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)  # noqa: E731
    labels = [one.masked_fill(~mask, IGNORED) for one, mask in zip(ids, masks, strict=True)]
    batch = {
        "input_ids": pad(ids, 0),
        "attention_mask": pad([torch.ones_like(one) for one in ids], 0),
        "labels": pad(labels, IGNORED),
    }
    pixels = [torch.from_numpy(image) for item in items for image in item.pixels]
    return batch | ({"pixel_values": normalize(torch.stack(pixels), said.layout, dtype)} if pixels else {})


def made_model(job: dict[str, Any], case: gpu_cases.Case, recipe: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The stock class with the drawn weights, what learns marked, behind peft where the case has adapters."""
    loaded = load.outline(job["start"], template=recipe.model.template, image=recipe.model.image)
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(dtype)
    fill(loaded, device)
    model: Any = loaded.model
    model.set_attn_implementation("sdpa")
    model.config.use_cache = False
    model.requires_grad_(False)
    parts = loaded.family.parts(model)
    if case.lora:
        return adapted(model, case, recipe.train.seed)
    for part in case.learn:
        for module in parts[part]:
            module.requires_grad_(True)
            if not pure(case):
                module.float()
    return model


def adapted(model: Any, case: gpu_cases.Case, seed: int) -> Any:
    """peft's adapters, beginning with vistune's values, and the connector in full; what learns in fp32."""
    said = LoraConfig(
        r=case.lora,
        lora_alpha=2 * case.lora,
        lora_dropout=0.0,
        target_modules=LORA.targets,
        modules_to_save=[LORA.connector],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, said)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if ".lora_" in name:
            value = adapters.initial(name.removeprefix("base_model.model."), parameter.shape, seed, _unasked)
            parameter.data.copy_(value)
    return model


def _unasked(name: str) -> Tensor:
    raise AssertionError(name)  # only DoRA asks for a weight


def sized(step: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in step),
        "supervised": supervised(step),
        "positions": sum(batch["input_ids"].numel() for batch in step),
        "images": sum(len(batch["pixel_values"]) for batch in step if "pixel_values" in batch),
        "samples": sum(len(batch["input_ids"]) for batch in step),
        "micro_batches": len(step),
        "forward_flops": 0.0,
    }


def supervised(step: list[dict[str, Tensor]]) -> int:
    return sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in step)


def train(
    model: Any, steps: list[Any], job: dict[str, Any], recipe: Any, device: torch.device, autocast: Any
) -> tuple[list[float], int, float]:
    """All steps, or as many as fit the time; the losses, and how many steps counted in how many seconds."""
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    rate = next(iter(recipe.learn.root.values())).lr
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0, fused=True)
    counts = [supervised(step) for step in steps]
    losses: list[Tensor] = []
    began = time.perf_counter()
    for number, step in enumerate(steps):
        if number == job["warmup"]:
            wait(device)
            began = time.perf_counter()
        if number > job["warmup"] and time.perf_counter() - began > job["seconds"]:
            break
        losses.append(torch.zeros((), device=device))
        for batch in step:
            moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            with autocast:
                loss = model(**moved, num_items_in_batch=counts[number], use_cache=False).loss
            loss.backward()
            losses[-1] += loss.detach()
        nn.utils.clip_grad_norm_(learned, recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait(device)
    return [float(loss) for loss in losses], len(losses) - job["warmup"], time.perf_counter() - began
