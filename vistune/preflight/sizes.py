"""Bytes for people and cards by name. GB are 10^9 bytes and GiB 2^30, everywhere; a card's "80GB" means GiB, as cards
are sold."""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB, GB = 2**30, 10**9


def both(size: float) -> str:
    """Bytes in both units."""
    return f"{size / GB:,.1f} GB ({size / GIB:,.1f} GiB)"


@dataclass(frozen=True)
class Card:
    """A GPU: its memory in bytes, and what its dense bf16 (fp16 where it has no bf16) products reach in TFLOP/s by its
    data sheet; 0 where it is not known."""

    name: str
    memory: int
    tflops: float = 0.0


# NVIDIA's data sheets, dense tensor-core figures without sparsity: A100 (312), H100 SXM and H200 (989), H100 PCIe
# (756), H20 (148), B200 (2,250), L40S (362), L40 (181), L4 (121), A40 (150), A10 (125), A6000 (155), V100 (125, fp16),
# T4 (65, fp16), RTX 4090 (165, fp32 accumulation), RTX 3090 (71, fp32 accumulation), RTX 5090 (210, fp32 accumulation),
# RTX PRO 6000 Blackwell (504), A800 as A100, H800 as H100; AMD's: MI250X a die (191), MI300X (1,307).
CARDS = {
    card.name.lower(): card
    for card in (
        *(Card("A100-40GB", 40 * GIB, 312), Card("A100-80GB", 80 * GIB, 312), Card("A800", 80 * GIB, 312)),
        *(Card("H100", 80 * GIB, 989), Card("H100-PCIe", 80 * GIB, 756), Card("H800", 80 * GIB, 989)),
        *(Card("H200", 141 * GB, 989), Card("H20", 96 * GIB, 148), Card("B200", 180 * GB, 2250)),
        *(Card("L40S", 48 * GIB, 362), Card("L40", 48 * GIB, 181), Card("L4", 24 * GIB, 121)),
        *(Card("A40", 48 * GIB, 150), Card("A10", 24 * GIB, 125), Card("A6000", 48 * GIB, 155)),
        *(Card("V100", 32 * GIB, 125), Card("V100-16GB", 16 * GIB, 125), Card("T4", 16 * GIB, 65)),
        *(Card("4090", 24 * GIB, 165), Card("3090", 24 * GIB, 71), Card("5090", 32 * GIB, 210)),
        *(Card("RTX-PRO-6000", 96 * GIB, 504), Card("MI250X", 64 * GIB, 191), Card("MI300X", 192 * GIB, 1307)),
    )
}
_ALIKE = {"a100": "a100-80gb", "rtx4090": "4090", "rtx3090": "3090", "rtx5090": "5090", "v100-32gb": "v100"}


def card(said: str) -> Card:
    """A card by its memory ("80GB" and "80GiB" are both 80 GiB) or by its name. ValueError lists the names."""
    text = re.sub(r"[ _]+", "-", said.strip().lower())
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)-?(gb|gib|g)?", text):
        return _sized(size)
    name = text.removeprefix("nvidia-").removeprefix("geforce-").replace("rtx-4090", "4090").replace("rtx-3090", "3090")
    name = _ALIKE.get(name, name)
    if name in CARDS:
        return CARDS[name]
    raise ValueError(
        f"--gpu {said}: a card's memory such as 80GB, or one of {', '.join(one.name for one in CARDS.values())}"
    )


def _sized(size: re.Match[str]) -> Card:
    known = CARDS.get(size[0].lower()) if not size[2] else None  # "4090" is a card, not 4,090 GiB
    return known or Card(f"{float(size[1]):g} GiB", int(float(size[1]) * GIB))
