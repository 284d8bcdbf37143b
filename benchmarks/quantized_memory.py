"""Bytes of LLaVA-1.5 in bf16, 8 and 4 bits: one real block quantised here, scaled by counts of the meta device.

`python benchmarks/quantized_memory.py` writes results/quantized_memory.{json,md}: 13B and 7B, beside the theory.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vistune.models import quantize

KINDS = ("bf16", "8bit", "4bit", "4bit double")
RESULTS = Path(__file__).parent / "results"
REPORTED = {"bf16": 28.8, "8bit": 14.0, "4bit": 8.3}
"""What a user read off a 64 GB card for llava-1.5-13b. Clean shares of the card (45.00, 21.87, 12.96 %), so GiB."""


@dataclass(frozen=True)
class Sizes:
    """A LLaVA-1.5: a CLIP tower of width 1024 (24 layers of it by default), two linear layers, a Llama."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int = 32064
    vision_layers: int = 24


REAL = (
    Sizes("llava-1.5-7b", hidden=4096, ffn=11008, layers=32, heads=32),
    Sizes("llava-1.5-13b", hidden=5120, ffn=13824, layers=40, heads=40),
)


@cache
def counts(sizes: Sizes) -> dict[str, Any]:
    """Parameters: all, of one block, and the shapes of the linear layers, head apart. On the meta device."""
    model = _model(sizes)
    block: Any = model.model.language_model.layers[0]
    return {
        "all": sum(one.numel() for one in model.parameters()),
        "block": sum(one.numel() for one in block.parameters()),
        "language": _shapes(model.model.language_model),
        "others": _shapes(model.model.vision_tower) + _shapes(model.model.multi_modal_projector),
    }


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(one.weight.shape) for one in module.modules() if isinstance(one, nn.Linear)]


def _model(sizes: Sizes) -> Any:
    text = {
        "model_type": "llama",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(config)


def theory(sizes: Sizes, kind: str, *, others: bool = False) -> int:
    """Bytes of all weights: bf16 outside the quantised matrices, and in them what the methods' papers store.

    8 bits: a byte a value and a 4-byte scale a row (arXiv 2208.07339). NF4: half a byte a value, a scale a block of 64:
    4 bytes, or 1 byte and 4 more for every 256 scales when the scales are quantised too (arXiv 2305.14314).
    `others`: vision and connector quantised too, as libraries do that are only told to spare the head.
    """
    known = counts(sizes)
    shapes = known["language"] + (known["others"] if others else [])
    values, scales = sum(rows * columns for rows, columns in shapes), sum(rows for rows, _ in shapes)
    inside = {
        "bf16": 2 * values,
        "8bit": values + 4 * scales,
        "4bit": values // 2 + 4 * values // 64,
        "4bit double": values // 2 + values // 64 + 4 * values // 64 // 256,
    }[kind]
    return 2 * (known["all"] - values) + inside


def measured(sizes: Sizes, kind: str) -> int:
    """Bytes of all weights, from a real block's tensors as they are held, and the parameters outside the blocks."""
    held, _ = _block(sizes, kind)
    known = counts(sizes)
    return sizes.layers * held + 2 * (known["all"] - sizes.layers * known["block"])


@cache
def _block(sizes: Sizes, kind: str) -> tuple[int, float]:
    """One block with random weights, quantised on the CPU: its bytes, and the seconds that took."""
    torch.manual_seed(0)
    config = _model(sizes).config.text_config
    with torch.device("meta"):
        block: Any = transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, 0)
    block = block.to(torch.bfloat16).to_empty(device="cpu")
    name, _, double = kind.partition(" ")
    seconds = 0.0
    for path, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear) and kind != "bf16":
            weight = torch.randn(linear.weight.shape, dtype=torch.bfloat16) * 0.02
            began = time.perf_counter()
            block.set_submodule(path, quantize.quantized(linear, weight, name, "cpu", bool(double)))
            seconds += time.perf_counter() - began
    return sum(one.nbytes for one in (*block.parameters(), *block.buffers())), seconds


def cache_bytes(sizes: Sizes, tokens: int) -> int:
    """Keys and values of every layer in bf16."""
    return 2 * sizes.layers * sizes.hidden * 2 * tokens


def activation_bytes(sizes: Sizes, tokens: int, kind: str) -> int:
    """An estimate of what is alive at once in a prompt's forward: six rows of the width and three of the ffn's in bf16,
    and with NF4 the largest matrix, multiplied out."""
    rows = 2 * tokens * (6 * sizes.hidden + 3 * sizes.ffn)
    return rows + (2 * sizes.hidden * sizes.ffn if kind.startswith("4bit") else 0)


def row(sizes: Sizes, kind: str, tokens: int) -> dict[str, Any]:
    held, expected = measured(sizes, kind), theory(sizes, kind)
    found: dict[str, Any] = {"model": sizes.name, "kind": kind, "measured": held, "theory": expected}
    found |= {"theory_others_too": theory(sizes, kind, others=True)}
    found |= {"off": held / expected - 1, "block_seconds": _block(sizes, kind)[1]}
    found |= {"cache": cache_bytes(sizes, tokens), "activations": activation_bytes(sizes, tokens, kind)}
    found["total"] = held + found["cache"] + found["activations"]
    if sizes.name.endswith("13b"):
        found["reported_gib"] = REPORTED.get(kind)
    return found


COLUMNS = {
    "all but the head, theory GB": ("theory_others_too", 1e9),
    "language alone, theory GB": ("theory", 1e9),
    "measured GB": ("measured", 1e9),
    "measured GiB": ("measured", 2**30),
    "cache GiB": ("cache", 2**30),
    "activations GiB": ("activations", 2**30),
    "total GiB": ("total", 2**30),
}
"""Heading -> key of a row, and the unit."""


def markdown(rows: list[dict[str, Any]], tokens: int) -> str:
    heading = ["model", "kind", *COLUMNS, "measured against theory", "reported"]
    lines = [f"Cache and activations for {tokens} tokens.\n", f"| {' | '.join(heading)} |"]
    lines.append(f"|---|---|{'---:|' * (len(heading) - 2)}")
    for one in rows:
        numbers = [f"{one[key] / unit:.2f}" for key, unit in COLUMNS.values()]
        cells = [one["model"], one["kind"], *numbers, f"{one['off']:+.2%}", str(one.get("reported_gib") or "")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=700, help="a picture of 576 tokens, a question and an answer")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantized_memory.json")
    given = parser.parse_args()
    rows = [row(sizes, kind, given.tokens) for sizes in REAL for kind in KINDS]
    found = {
        "torch": torch.__version__,
        "bitsandbytes": __import__("bitsandbytes").__version__,
        "machine": platform.machine(),
        "tokens": given.tokens,
        "sizes": [asdict(sizes) | {"parameters": counts(sizes)["all"]} for sizes in REAL],
        "rows": rows,
    }
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text(markdown(rows, given.tokens), encoding="utf-8")
    print(markdown(rows, given.tokens))


if __name__ == "__main__":
    main()
