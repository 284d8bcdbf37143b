"""Is a FastVLM folder that vistune wrote the same model to `transformers`' own class? That class builds its tower with
timm, which wants torchvision, so it runs in an environment of its own, made beside:

    python scripts/check_fastvlm.py [FOLDER] [--venv DIR]

Without FOLDER a tiny random model is written and compared. Exit code 1: they differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
TIMM = "timm==1.0.31"
TOLERANCE = 1e-5
"""Greatest norm of a difference, relative to the norm: both compute in fp32 on the CPU, with different kernels."""
SIDES = (256, 512)


def main() -> int:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("folder", nargs="?", type=Path)
    said.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "vistune-check-fastvlm")
    said.add_argument("--stock", type=Path, help=argparse.SUPPRESS)  # the other half: run in the environment
    given = said.parse_args()
    if given.stock:
        write_stock(given.folder, given.stock)
        return 0
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or written(Path(scratch))
        answers = Path(scratch) / "stock.safetensors"
        command = [environment(given.venv), __file__, str(folder), "--stock", str(answers)]
        subprocess.run(command, check=True, cwd=scratch)
        return compare(folder, load_file(answers))


def written(scratch: Path) -> Path:
    """A tiny random model, opened and saved by vistune."""
    from tests.tiny_fastvlm import tiny_fastvlm
    from vistune.models.load import load, save

    save(load(tiny_fastvlm(scratch / "made")), scratch / "written", card="")
    return scratch / "written"


def environment(folder: Path) -> str:
    """The Python of an environment that sees this one's packages, and has timm and the torchvision of this torch."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True)
        packages = next((folder / "lib").glob("python*/site-packages"))
        (packages / "outer.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        minor = int(torch.__version__.split(".")[1])
        wanted = [TIMM, f"torchvision==0.{minor + 15}.*"]  # torch 2.13 goes with 0.28, and so on back to 2.0
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *wanted], check=True)
        (folder / "ready").touch()
    return str(python)


def inputs(config: dict[str, Any], side: int) -> dict[str, torch.Tensor]:
    """One picture of noise between a few words."""
    draw = torch.Generator().manual_seed(side)
    low = min(config["image_token_index"], config["text_config"]["vocab_size"]) - 1
    words = torch.randint(0, low, (2, 7), generator=draw)
    ids = torch.cat([words[0], torch.full(((side // 64) ** 2,), config["image_token_index"]), words[1]])[None]
    pixels = torch.rand(1, 3, side, side, generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def answers(model: Any, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What is compared: the tower's map, the projected features, the logits, eight greedy ids."""
    found = {}
    for side in SIDES:
        asked = inputs(config, side)
        seen = model.get_image_features(asked["pixel_values"], return_dict=True)
        found[f"map {side}"] = seen.last_hidden_state.contiguous()
        found[f"features {side}"] = seen.pooler_output.contiguous()
        found[f"logits {side}"] = model(**asked).logits
        found[f"greedy ids {side}"] = model.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return found


def write_stock(folder: Path, out: Path) -> None:
    """The half that runs in the environment: the stock class's answers."""
    without_operators()
    from transformers import FastVlmForConditionalGeneration

    model, info = FastVlmForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"the stock class does not take every tensor of {folder}: {info}")
    save_file(answers(model.eval(), read(folder)), out)


def without_operators() -> None:
    """Let torchvision be imported where its compiled part does not load (built for CUDA, beside a torch without):
    timm needs only what is written in Python."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("nms", "qnms"):  # those it says something about without asking whether they are there
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def read(folder: Path) -> dict[str, Any]:
    said = json.loads((folder / "config.json").read_text())
    return said | {"image_token_index": said.get("image_token_index", said.get("image_token_id"))}


def compare(folder: Path, stock: dict[str, torch.Tensor]) -> int:
    from vistune.models.load import load

    ours, worst = answers(load(folder).model, read(folder)), 0.0
    for name, value in stock.items():
        if name.startswith("greedy"):
            difference = 0.0 if torch.equal(ours[name], value) else 1.0
        else:
            difference = ((ours[name] - value).norm() / value.norm()).item()
        worst = max(worst, difference)
        print(f"{name:18} {'equal' if difference == 0 else f'{difference:.1e}'}")
    print(f"{folder}: {'the same model' if worst <= TOLERANCE else 'NOT the same model'}, at most {worst:.1e} apart")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
