"""How much memory a conversion takes: a synthetic LLaVA checkpoint in shards, there and back, watched from outside.

    python benchmarks/convert_stream.py --scratch DIR [--layers 32 --hidden 4096]

Prints the peak of anonymous memory beside the largest shard; what is mapped from files does not count, since the system
takes it back when it needs it. One more run is killed halfway, to show that nothing half-written stays.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from vistune.models import weights

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


@dataclass
class Watched:
    """One conversion as seen from outside."""

    code: int
    seconds: float
    anonymous: int
    """Greatest anonymous memory in bytes."""
    before: int
    """The same before the first tensor was read: Python, torch, transformers."""


def make(
    folder: Path,
    *,
    layers: int = 32,
    hidden: int = 4096,
    words: int = 32_000,
    shard_bytes: int = 2_000_000_000,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """An original LLaVA checkpoint with random weights, pickled in shards with an index, its tower in a folder inside;
    written a shard at a time."""
    folder.mkdir(parents=True)
    _write_tower(folder / "tower", VISION if hidden >= 4096 else VISION | {"hidden_size": 64, "intermediate_size": 128})
    _write_tokenizer(folder, words)
    inner = int(hidden * 2.6875)
    said = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": words}
    said |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "model_type": "llava_llama"}
    said |= {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "tower", "mm_projector_type": "mlp2x_gelu"}
    said |= {"image_aspect_ratio": "pad", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    (folder / "config.json").write_text(json.dumps(said))
    width = VISION["hidden_size"] if hidden >= 4096 else 64
    shapes = _shapes(layers, hidden, inner, words, width)
    entries = {
        name: weights.Entry(dtype, shape, lambda shape=shape: _random(shape, dtype)) for name, shape in shapes.items()
    }
    weights.write_pickles(folder, entries, shard_bytes)
    return folder


def _shapes(layers: int, hidden: int, inner: int, words: int, vision: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden), "model.norm.weight": (hidden,)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.mm_projector.0.weight": (hidden, vision), "model.mm_projector.2.weight": (hidden, hidden)}
    shapes |= {"model.mm_projector.0.bias": (hidden,), "model.mm_projector.2.bias": (hidden,)}
    return shapes | {"lm_head.weight": (words, hidden)}


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Rows that differ, from a few thousand random numbers: drawing billions would take longer than all the rest."""
    drawn = torch.randn(min(shape[-1] * 7, 100_000)).to(dtype) * 0.02
    count = torch.Size(shape).numel()
    return drawn.repeat(-(-count // len(drawn)))[:count].reshape(shape)


def _write_tower(folder: Path, sizes: dict[str, int]) -> None:
    config = transformers.CLIPVisionConfig(**sizes, image_size=336, patch_size=14)
    transformers.CLIPVisionModel(config).half().save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    ).save_pretrained(folder)


def _write_tokenizer(folder: Path, words: int) -> None:
    """As many words as the embedding has rows."""
    named = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, words)}
    made = Tokenizer(models.WordLevel(named, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


_CONVERT = """
import sys, time
from pathlib import Path
from vistune.models.convert import convert
print("ready", flush=True); time.sleep(0.3)
convert(sys.argv[1], sys.argv[2], sys.argv[3])
"""


def watched(source: Path, out: Path, to: str, kill_at: float | None = None) -> Watched:
    """Convert in a process of its own and sample its anonymous memory every 20 ms. `kill_at`: end it with SIGKILL when
    that share of the source's bytes has been written."""
    total = sum(file.stat().st_size for file in source.glob("*.bin")) or 1
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _CONVERT, str(source), str(out), to], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    before = peak = _anonymous(process.pid)
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        if kill_at is not None and _written(out.with_name(out.name + ".tmp")) > kill_at * total:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    process.stdout.close()
    return Watched(process.returncode, time.perf_counter() - began, peak, before)


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _written(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder on a disk with room for three")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    given = parser.parse_args()
    scratch = given.scratch / "convert-stream"
    source = make(scratch / "source", layers=given.layers, hidden=given.hidden)
    files = [*source.glob("*.bin")]
    largest = max(file.stat().st_size for file in files)
    size = sum(file.stat().st_size for file in files)
    print(f"source: {size / 1e9:.2f} GB in {len(files)} shards, the largest {largest / 1e9:.2f} GB")
    try:
        killed = watched(source, scratch / "killed", "hf", kill_at=0.5)
        left = sorted(path.name for path in scratch.iterdir())
        print(f"killed halfway: exit {killed.code}, in the folder: {', '.join(left)}")
        shutil.rmtree(scratch / "killed.tmp")
        for out, start, to in (("hf", source, "hf"), ("back", scratch / "hf", "llava")):
            seen = watched(start, scratch / out, to)
            share = seen.anonymous / largest
            print(
                f"to {to}: {seen.seconds:.0f} s, anonymous memory {seen.anonymous / 1e9:.2f} GB at most "
                f"({seen.before / 1e9:.2f} before it began), {share:.2f} x the largest shard; exit {seen.code}"
            )
            assert seen.code == 0 and share <= 1.3, seen
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
