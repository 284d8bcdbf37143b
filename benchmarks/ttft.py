"""Time to the first token by resolution: vision, connector and prefill of FastVLM beside LLaVA-1.5's ViT-L/14-336.

    python benchmarks/ttft.py                          both towers at real size before Qwen2-0.5B's shape
    python benchmarks/ttft.py --language tiny          before a tiny language model: the towers alone, nearly
    python benchmarks/ttft.py --quick                  a smoke test: no figure of it means anything

Weights are random and both models have the same language model, so what differs is the tower, the number of tokens it
gives, and the connector's input. A picture and a question go in as pixels and ids (decoding and resizing are not in
it), and the first answer token comes out; each part is also timed by itself. The contenders take turns, round by round;
medians and quartiles go to `benchmarks/results/ttft.json` and `.md` (`--out`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import machine

from vistune.models.families import family
from vistune.models.towers import clip, fastvithd

HERE = Path(__file__).resolve().parent
SIDES = (256, 512, 768, 1024)
QUESTION = 32
"""Tokens of text beside the picture's."""
LANGUAGE = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
VIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def main(words: list[str] | None = None) -> int:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("--language", choices=LANGUAGE, default="0.5b")
    said.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="of FastVLM's pictures")
    said.add_argument("--rounds", type=int, default=7)
    said.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    said.add_argument("--dtype", choices=("fp32", "bf16"), default="")
    said.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    said.add_argument("--quick", action="store_true")
    said.add_argument("--out", type=Path, default=HERE / "results" / "ttft.json")
    asked = said.parse_args(words)
    if asked.quick:
        asked.language, asked.sides, asked.rounds = "tiny", [256], 1
    if asked.threads:
        torch.set_num_threads(asked.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
        asked.dtype or ("bf16" if "cuda" in asked.device else "fp32")
    ]
    result = {
        "machine": machine(),
        "device": torch.cuda.get_device_name() if "cuda" in asked.device else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "language": asked.language,
        "question_tokens": QUESTION,
        "rounds": asked.rounds,
        "contenders": measure(contenders(asked, dtype), asked.rounds, asked.device),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    asked.out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    return 0


def contenders(asked: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """By name: the parts of a first token in their order, each a function of what the one before gave."""
    fast, llava = models(asked.language)
    found = {}
    for model in (fast, llava):
        model.to(asked.device, dtype).eval()
    for side in asked.sides:
        found[f"FastViTHD {side}"] = parts(fast, side, (side // fastvithd.STRIDE) ** 2, fastvithd.see, asked.device)
    see = lambda tower, pixels: clip.see(tower, pixels, llava.config)  # noqa: E731 - as fastvithd.see is called
    found["ViT-L/14 336 (LLaVA-1.5)"] = parts(llava, VIT["image_size"], clip.tokens(llava.config), see, asked.device)
    return found


def models(language: str) -> tuple[Any, Any]:
    """FastVLM and LLaVA with towers of real size and the same kind of language model, random."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # random weights make values so small that a CPU would trip over them
    text = transformers.Qwen2Config(**LANGUAGE[language], tie_word_embeddings=True)
    image = text.vocab_size - 1
    fast = transformers.FastVlmConfig(text_config=text, image_token_index=image, tie_word_embeddings=True)
    vision = transformers.CLIPVisionConfig(**VIT)
    llava = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, tie_word_embeddings=True
    )
    return family("fastvlm").model_class(fast), family("llava").model_class(llava)


def parts(model: Any, side: int, tokens: int, see: Callable[[Any, Any], Any], device: str) -> dict[str, Any]:
    """One contender: its number of tokens, and vision, connector and prefill as functions."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1000, (1, tokens + QUESTION), generator=draw)
    pixels = torch.rand(1, 3, side, side, generator=draw).to(device, model.dtype)
    inner, words = model.model, ids.to(device)

    def prefill(features: torch.Tensor) -> torch.Tensor:
        embeds = inner.get_input_embeddings()(words)
        embeds[:, :tokens] = features
        out = inner.language_model(inputs_embeds=embeds, use_cache=True)
        return model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)

    return {
        "tokens": tokens,
        "vision_parameters": sum(p.numel() for p in inner.vision_tower.parameters()),
        "steps": {
            "vision": lambda _: see(inner.vision_tower, pixels),
            "connector": inner.multi_modal_projector,
            "prefill": prefill,
        },
    }


@torch.no_grad()
def measure(found: dict[str, dict[str, Any]], rounds: int, device: str) -> dict[str, Any]:
    """Seconds of every part, median and quartiles over `rounds`, after one round that does not count."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in found}
    for number in range(rounds + 1):
        for name, one in found.items():
            value, began = None, clock(device)
            start = began
            for part, step in one["steps"].items():
                value = step(value)
                now = clock(device)
                if number:
                    seconds[name].setdefault(part, []).append(now - began)
                began = now
            if number:
                seconds[name].setdefault("total", []).append(began - start)
    return {
        name: {
            "tokens": one["tokens"],
            "vision_parameters": one["vision_parameters"],
            "seconds": {part: spread(values) for part, values in seconds[name].items()},
        }
        for name, one in found.items()
    }


def clock(device: str) -> float:
    if "cuda" in device:
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def markdown(result: dict[str, Any]) -> str:
    """One table; the last column against LLaVA-1.5's tower."""
    reference = next(one for name, one in result["contenders"].items() if name.startswith("ViT"))
    whole = reference["seconds"]["total"]["median"]
    lines = [
        f"Time to first token in ms, median of {result['rounds']}: {result['device']}, {result['dtype']}, "
        f"{result['threads']} threads, language model {result['language']}, {QUESTION} tokens of text, random weights.",
        "",
        "| tower | parameters | tokens | vision | connector | prefill | total (quartiles) | of ViT-L/14 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in result["contenders"].items():
        took = {part: value["median"] * 1e3 for part, value in one["seconds"].items()}
        total = one["seconds"]["total"]
        lines.append(
            f"| {name} | {one['vision_parameters'] / 1e6:.1f}M | {one['tokens']} | {took['vision']:.1f} | "
            f"{took['connector']:.1f} | {took['prefill']:.1f} | {took['total']:.1f} "
            f"({total['low'] * 1e3:.1f} to {total['high'] * 1e3:.1f}) | {total['median'] / whole:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
