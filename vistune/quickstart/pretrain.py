"""Pre-trains the quickstart's vision and language parts: `python -m vistune.quickstart.pretrain --out DIR`.

Made once, on the training scans alone; the result ships in `parts/`. The vision part never sees a word, the language
part never sees a pixel: bringing the two together is what the quickstart's two stages are for.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from vistune.quickstart import digits, scenes
from vistune.quickstart.texts import GRID, Texts, spread, tokenizer
from vistune.samples import NO_LOSS

PARTS = Path(__file__).with_name("parts")
SIDE = 48

VISION = CLIPVisionConfig(
    image_size=SIDE,
    patch_size=SIDE // GRID,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=5,
    num_attention_heads=4,
    projection_dim=128,
)
LANGUAGE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def learn(model: nn.Module, loss_of: Callable[[int], Tensor], steps: int, lr: float, name: str) -> None:
    """AdamW with warm-up and cosine over `steps` calls of `loss_of(step)`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup, start, seen = max(1, steps // 20), time.monotonic(), 0.0
    for step in range(steps):
        rate = lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps) + 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += loss.item() / 100
        if step % 100 == 99:
            print(f"{name} step {step + 1}/{steps} loss {seen:.4f} {time.monotonic() - start:.0f} s", flush=True)
            seen = 0.0


# --- vision ---------------------------------------------------------------------------------------------------------

WILD = scenes.Jitter(size=(29.0, 46.0), turn=16.0, shear=0.25, shift=4.0)


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, resample=3, do_convert_rgb=True
    )


def pictures(count: int, scans: list[int], draw: random.Random, jitter: scenes.Jitter) -> tuple[Tensor, Tensor]:
    """Pictures as the processor makes them, uint8 [count, 3, S, S], and what each cell holds, [count, 4], 10 = none."""
    images, labels = digits.load()
    pixels, cells = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8), []
    to_tensor = processor()
    for i in range(count):
        shown = scenes.scene(draw, scans, labels)
        drawn = scenes.picture(shown, images, draw, jitter)
        made = to_tensor(drawn, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        pixels[i] = made.round().clamp(0, 255).to(torch.uint8)
        cells.append([10 if d is None else d for d in shown.cells])
    return pixels, torch.tensor(cells)


def normalize(pixels: Tensor) -> Tensor:
    made = processor()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (made.image_mean, made.image_std))
    return (pixels / 255 - mean) / std


def vision(folder: Path, seed: int, count: int = 24000, steps: int = 2400, batch: int = 64) -> None:
    """Learn to name the digit and the place of every patch's cell, from the features that a LLaVA connector reads.

    The heads that do the naming are thrown away.
    """
    torch.manual_seed(seed)
    train, _ = digits.split()
    draw = random.Random(f"{seed} vision")
    pixels, cells = pictures(count, train.tolist(), draw, WILD)
    targets, place = spread(cells), spread(torch.arange(4)[None]).expand(batch, -1).flatten()
    model = CLIPVisionModel(VISION)
    heads = nn.ModuleList(nn.Linear(VISION.hidden_size, 11 + 4) for _ in range(2))

    def loss_of(step: int) -> Tensor:
        rows = torch.randint(count, (batch,))
        states = model(normalize(pixels[rows]), output_hidden_states=True).hidden_states
        total, wanted = torch.zeros(()), targets[rows].flatten()
        for head, layer, weight in zip(heads, (-2, -1), (1.0, 0.3), strict=True):
            digit, at = head(states[layer][:, 1:]).flatten(0, 1).split((11, 4), -1)
            named = F.cross_entropy(digit, wanted, label_smoothing=0.05)
            total = total + weight * (named + 0.5 * F.cross_entropy(at, place, label_smoothing=0.05))
        return total

    learn(nn.ModuleList([model, heads]), loss_of, steps, 1.5e-3, "vision")
    model.half().save_pretrained(folder)
    processor().save_pretrained(folder)


# --- language -------------------------------------------------------------------------------------------------------


def told(model: LlamaForCausalLM, texts: Texts, ids: Tensor, places: Tensor, blur: float) -> Tensor:
    """Word vectors [N, T, D] of texts; a patch's is the sum of what stands there and of where that is.

    A picture read through a connector is no clean word. So patches are lost (but one of each cell), weakened towards
    the word for nothing, and noisy: this keeps the language part, frozen while the connector learns, from asking for
    more than the connector can give. `blur` goes from 0 (clean) to 1.
    """
    table: Any = model.get_input_embeddings()
    vectors, rows = table(ids), torch.arange(len(ids))[:, None]
    seen = vectors[rows, places]
    kept = (torch.rand(seen.shape[:2]) < torch.empty(len(ids), 1).uniform_(1 - 0.7 * blur, 1.2)).float()
    patch = torch.arange(GRID**2).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)  # of every cell
    kept[rows, patch[torch.arange(4), torch.randint(4, (len(ids), 4))]] = 1.0
    weight = (kept * torch.empty_like(kept).uniform_(1 - 0.4 * blur, 1.0))[..., None]
    seen = weight * seen + (1 - weight) * table.weight[texts.told[-1]]
    seen = seen + table(texts.where).sum(1)
    return vectors.index_put((rows, places), seen + 0.3 * blur * seen.detach().std() * torch.randn_like(seen))


def language(folder: Path, seed: int, steps: int = 3000, batch: int = 16) -> None:
    """Learn to caption and to answer about pictures that are told in words, patch by patch."""
    torch.manual_seed(seed)
    made = tokenizer()
    texts = Texts(made, seed)
    config = LlamaConfig(vocab_size=len(made), bos_token_id=1, eos_token_id=2, pad_token_id=0, **LANGUAGE)
    model = LlamaForCausalLM(config)

    def loss_of(step: int) -> Tensor:
        ids, labels, places = texts.batch(batch)
        vectors = told(model, texts, ids, places, min(1.0, 2 * step / steps))
        hidden, wanted = model.model(inputs_embeds=vectors).last_hidden_state[:, :-1], labels[:, 1:]
        return F.cross_entropy(model.lm_head(hidden[wanted != NO_LOSS]), wanted[wanted != NO_LOSS])

    learn(model, loss_of, steps, 2e-3, "language")
    model.half().save_pretrained(folder)
    made.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("vision", "language"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for part in (vision, language):
        if given.only in (None, part.__name__):
            part(given.out / part.__name__, given.seed)


if __name__ == "__main__":
    main()
