"""What LLaVA-1.5's authors published, for orientation beside a score: docs/MODEL_ZOO.md of their repository."""

from __future__ import annotations

PUBLISHED: dict[str, tuple[float, float]] = {
    "vqav2": (78.5, 80.0),
    "gqa": (62.0, 63.3),
    "vizwiz": (50.0, 53.6),
    "scienceqa": (66.8, 71.6),
    "textvqa": (58.2, 61.3),
    "pope": (85.9, 85.9),
    "mme": (1510.7, 1531.3),
    "mmbench": (64.3, 67.7),
    "mmbench_cn": (58.3, 63.6),
    "seed": (58.6, 61.6),
    "llava_bench": (65.4, 72.5),
    "mmvet": (31.1, 36.1),
}
"""By benchmark: LLaVA-1.5 7B and 13B, both fully tuned (ScienceQA: of questions with a picture; MME: perception)."""
