"""The cases that users asked about, counted: what docs/preflight.md shows."""

from __future__ import annotations

from pathlib import Path

from vistune import console
from vistune import recipe as recipes
from vistune.preflight import check, inference, show
from vistune.preflight.steps import Instead

RECIPES = Path(__file__).parent.parent / "recipes"
SAMPLE = ("data.pack=false", "train.unit=samples")

CASES: dict[str, tuple[str, tuple[str, ...], str, int, Instead]] = {
    # what: recipe, words, card, cards, what stands for data
    "13B, everything learns, one 64 GiB card": ("llava_1_5/13b_instruct", (), "64GB", 1, Instead()),
    "13B, LoRA r = 128, one 64 GiB card": ("llava_1_5/13b_instruct_lora", (), "64GB", 1, Instead()),
    "13B stage 1, 32 samples at once, one 64 GiB card": (
        "llava_1_5/13b_align",
        ("train.micro_batch=32", "train.batch=32", *SAMPLE),
        "64GB",
        1,
        Instead(length=640, images=1),
    ),
    "the same, captions of up to 2,048 tokens": (
        "llava_1_5/13b_align",
        ("train.micro_batch=32", "train.batch=32", *SAMPLE),
        "64GB",
        1,
        Instead(length=2048, images=1),
    ),
    "13B, everything learns, 8 x 80 GB in zero3, 16 samples a card at once": (
        "llava_1_5/13b_instruct",
        ("train.micro_batch=16", *SAMPLE),
        "A100-80GB",
        8,
        Instead(length=1024, images=1),
    ),
    "OneVision 4B stage 1, one 24 GB card, packs of 6,050 tokens": (
        "llava_onevision_1_5/4b_align",
        ("data.length=6050",),
        "4090",
        1,
        Instead(),
    ),
    "OneVision 4B stage 1, one 24 GB card, packs of 32,768 tokens": (
        "llava_onevision_1_5/4b_align",
        ("data.length=32768",),
        "4090",
        1,
        Instead(),
    ),
}


def main() -> None:
    """Every case, the model that is counted named by its recipe's start folder."""
    for what, (file, words, gpu, gpus, instead) in CASES.items():
        console.say(f"\n{what}")
        report = check.check(recipes.read(RECIPES / f"{file}.toml", words), gpu=gpu, gpus=gpus, instead=instead)
        show.show(report)
    console.say("\nLLaVA-1.5-13B answers")
    inference.show(inference.check(["llava-1.5-13b"], gpu="64GB", length=1024))


if __name__ == "__main__":
    main()
