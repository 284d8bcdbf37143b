"""Writes tar shards that vistune, megatron-energon and LLaVA-OneVision-1.5's own code open.

Equal samples give equal bytes: no time, no owner, no place is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml

from vistune.data.converting.staged import Staged
from vistune.data.reading.nv_meta import FOLDER
from vistune.data.reading.picture_bytes import own_name, read_picture, true_suffix
from vistune.data.reading.tar import ShardWriter
from vistune.data.writers import NotHeld, register
from vistune.samples import Sample

Layout = Literal["mixqa", "packed", "packed_turns"]
"""mixqa: one conversation a sample; packed: several captioned pictures a sample, one turn each; packed_turns: several
conversations a sample, with any number of turns and pictures."""

CLASSES = {
    "mixqa": "MultiMixQASample",
    "packed": "PackedCaptioningSample",
    "packed_turns": "PackedCaptioningSample",
}
MODULE = "aiak_training_llm.data.multimodal"
MAX_SAMPLES, MAX_BYTES = 10_000, 3_000_000_000  # of a shard, as the reference's converter has them
_DECODED = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pbm", ".pnm")  # energon decodes by suffix, these alone

_LOADERS = {
    "mixqa": '''"""How megatron-energon reads these samples. vistune does not run this file."""


def sample_loader(sample):
    told = sample["json"]
    media = [sample[name] for name in told.get("name", [])]
    system = [turn["content"] for turn in told["texts"] if turn["role"] == "system"]
    return {
        "__key__": sample["__key__"],
        "__restore_key__": sample["__restore_key__"],
        "messages": [turn for turn in told["texts"] if turn["role"] != "system"],
        "system": system[-1] if system else None,
        "image": media or None,
        "video": None,
    }


def part_filter(part):
    return True
''',
    "packed": '''"""How megatron-energon reads these samples. vistune does not run this file."""


def sample_loader(sample):
    told = sample["json"]
    images = []
    for i, named in enumerate(told["images"]):
        if isinstance(named, list):
            images.append([sample[f"img{i}_{j}.jpg"] for j in range(len(named))])
        else:
            images.append(sample[f"img{i}.jpg"])
    return {
        "__key__": sample["__key__"],
        "__restore_key__": sample["__restore_key__"],
        "images": images,
        "prompts": told["prompts"],
        "captions": told["captions"],
    }


def part_filter(part):
    return True
''',
}


class Energon:
    """A dataset folder: shards with `.tar.idx`, and `.nv-meta`. Every sample is in the split "train"."""

    def __init__(self, out: Path, layout: Layout = "mixqa", max_samples: int = MAX_SAMPLES, max_bytes: int = MAX_BYTES):
        if layout not in get_args(Layout):
            raise ValueError(f"{out}: layout {layout!r} is unknown; choose {', '.join(get_args(Layout))}")
        self.layout = layout
        self.report: dict[str, Any] = {"samples": 0, "conversations": 0, "pictures_written": 0, "shards": 0, "bytes": 0}
        self._limits = max_samples, max_bytes
        self._staged = Staged(out)
        self._folder = self._staged[out]
        self._folder.mkdir()
        self._counts: dict[str, int] = {}
        self._shard: ShardWriter | None = None

    def add(self, sample: Sample) -> None:
        """One conversation; in a packed layout, a pack of one."""
        if self.layout == "mixqa":
            self._write(*_mixqa(sample, self.report["samples"]), 1)
        else:
            self.add_pack([sample])

    def add_pack(self, samples: Sequence[Sample]) -> None:
        """One packed sample. Raises NotHeld when one of `samples` is not for this layout."""
        for sample in samples:
            if reason := not_packed(sample, self.layout):
                raise NotHeld(reason)
        self._write(*_packed(samples, self.report["samples"], self.layout), len(samples))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.abandon()
            self._staged.abandon()
            return
        self._close_shard()
        self._write_meta()
        self._staged.commit()

    def _write(self, key: str, parts: dict[str, bytes], conversations: int) -> None:
        most, largest = self._limits
        needed = sum(len(data) + 2048 for data in parts.values())  # with headers and padding
        full = self._shard is not None and (self._shard.samples >= most or self._shard.size + needed > largest)
        if full:
            self._close_shard()
        if self._shard is None:
            self._shard = ShardWriter(self._folder / f"pretrain-{len(self._counts):06d}.tar")
        self._shard.add(key, parts)
        self.report["samples"] += 1
        self.report["conversations"] += conversations
        self.report["pictures_written"] += len(parts) - 1

    def _close_shard(self) -> None:
        if self._shard is None:
            return
        self._shard.close()
        self._counts[self._shard.path.name] = self._shard.samples
        self.report["shards"] += 1
        self.report["bytes"] += self._shard.path.stat().st_size
        self._shard = None

    def _write_meta(self) -> None:
        meta = self._folder / FOLDER
        meta.mkdir()
        dataset = {
            "sample_type": {"__module__": MODULE, "__class__": CLASSES[self.layout]},
            "part_filter": "sample_loader.py:part_filter",
            "sample_loader": "sample_loader.py:sample_loader",
        }
        split = {"exclude": [], "split_parts": {"train": list(self._counts), "val": [], "test": []}}
        info = {"shard_counts": self._counts}
        for name, value in (("dataset.yaml", dataset), ("split.yaml", split), (".info.yaml", info)):
            (meta / name).write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
        (meta / ".info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        (meta / "sample_loader.py").write_text(_LOADERS[self.layout.split("_")[0]], encoding="utf-8")


def not_packed(sample: Sample, layout: Layout) -> str:
    """Why `sample` cannot be part of a pack of this layout; "" when it can."""
    roles = [message.role for message in sample.messages]
    if "system" in roles:
        return "a packed sample has no place for a system text"
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        return f"turns {', '.join(roles)}; a packed sample holds questions with answers"
    if layout == "packed" and (len(roles) != 2 or len(sample.images) != 1):
        return f"{len(roles) // 2} question(s), {len(sample.images)} picture(s); layout packed holds one of each"
    return ""


def _mixqa(sample: Sample, number: int) -> tuple[str, dict[str, bytes]]:
    pictures = {}
    for i, image in enumerate(sample.images):
        data = read_picture(image)
        pictures[f"{i}_{_decoded_name(own_name(image), data)}"] = data
    told: dict[str, Any] = {
        "texts": [{"role": message.role, "content": message.text} for message in sample.messages],
        "media": "image" if pictures else "text",
    }
    if pictures:
        told["name"] = list(pictures)
    kept = {key: value for key, value in sample.notes.items() if key not in told}
    key = f"{'image' if pictures else 'text'}_{number}"
    return key, {**pictures, "json": _json({**told, **kept})}


def _decoded_name(name: str, data: bytes) -> str:
    """`name`, with a suffix behind it where energon would else hand out bytes; what decodes looks at the bytes."""
    if name.lower().endswith(_DECODED):
        return name
    suffix = true_suffix(data)
    return f"{name or 'picture'}{suffix if suffix in _DECODED else '.jpg'}"


def _packed(samples: Sequence[Sample], number: int, layout: Layout) -> tuple[str, dict[str, bytes]]:
    """`.jpg` is part of the names that readers of this layout ask for, whatever the bytes are."""
    pictures: dict[str, bytes] = {}
    named: list[Any] = []
    for i, sample in enumerate(samples):
        if layout == "packed":
            pictures[f"img{i}.jpg"] = read_picture(sample.images[0])
            told = sample.notes.get("images")
            named.append(told if isinstance(told, str) else own_name(sample.images[0]))
        else:
            pictures |= {f"img{i}_{j}.jpg": read_picture(image) for j, image in enumerate(sample.images)}
            named.append([f"img{i:03d}_sub{j:03d}.jpg" for j in range(len(sample.images))])
    asked, said = ([_texts(sample, role, layout) for sample in samples] for role in ("user", "assistant"))
    told = {"prompts": asked, "captions": said, "images": named}
    return f"ps_{number:08d}", {**pictures, "json": _json(told)}


def _texts(sample: Sample, role: str, layout: Layout) -> str | list[str]:
    texts = [message.text for message in sample.messages if message.role == role]
    return texts[0] if layout == "packed" else texts


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode()


@register("energon")
def open_energon(
    out: Path, layout: Layout = "mixqa", max_samples: int = MAX_SAMPLES, max_bytes: int = MAX_BYTES
) -> Energon:
    return Energon(out, layout, max_samples, max_bytes)
