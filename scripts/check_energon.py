"""Opens a dataset folder with megatron-energon itself and compares every sample with what vistune reads.

Usage, in an environment that has megatron-energon beside vistune (CPU torch will do):

    python scripts/check_energon.py FOLDER [--source PATH --format FORMAT --images DIR ...]

Without --source the folder is compared with itself as vistune reads it; with it, with the data it was converted from.
Texts, the pictures' encoded bytes and their decoded pixels must be equal, read by one rank and by two. The classes of
LLaVA-OneVision-1.5 that such folders name need not be installed: they are stood in for. Exit code 1 on a difference.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from megatron.energon import DefaultTaskEncoder, Sample, SampleDecoder, WorkerConfig, get_loader, get_train_dataset
from megatron.energon.edataclass import edataclass

from vistune.data.formats import Reader, open_source
from vistune.data.reading.picture_bytes import read_picture
from vistune.images import open_image
from vistune.samples import SampleError

MODULE = "aiak_training_llm.data.multimodal"
Picture = tuple[str, str]  # hashes of the encoded bytes and of the pixels
Conversation = tuple[tuple[tuple[str, str], ...], tuple[Picture, ...]]


@edataclass
class PackedCaptioningSample(Sample):
    images: Any
    prompts: Any
    captions: Any


@edataclass
class MultiMixQASample(Sample):
    messages: Any
    video: Any = None
    image: Any = None
    system: Any = None


class WithBytes(SampleDecoder):
    """Energon's own decoder; a picture comes with the bytes it was decoded from."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        decoded = super().__call__(dict(sample))
        pictures = {part for part, value in decoded.items() if isinstance(value, PIL.Image.Image)}
        return {part: (sample[part], value) if part in pictures else value for part, value in decoded.items()}


class Encoder(DefaultTaskEncoder):
    decoder = WithBytes(image_decode="pil")

    def encode_sample(self, sample: Any) -> Any:
        return sample


def stand_in() -> None:
    """The module that the folder's dataset.yaml names, with its sample classes."""
    parts = MODULE.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    for kind in (PackedCaptioningSample, MultiMixQASample):
        setattr(sys.modules[MODULE], kind.__name__, kind)


def hashes(raw: bytes, picture: PIL.Image.Image) -> Picture:
    pixels = np.asarray(picture.convert("RGB"))
    return hashlib.sha256(raw).hexdigest(), f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}"


def through_energon(folder: Path, rank: int = 0, world: int = 1) -> Iterator[Any]:
    workers = WorkerConfig(rank=rank, world_size=world, num_workers=0)
    dataset = get_train_dataset(
        folder,
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
        repeat=False,
    )
    yield from get_loader(dataset)


def conversations(sample: Any) -> Iterator[Conversation]:
    """What one sample of energon holds, in the manner of `of_vistune`."""
    if isinstance(sample, MultiMixQASample):
        system = [("system", sample.system)] if sample.system is not None else []
        turns = [*system, *((turn["role"], turn["content"]) for turn in sample.messages)]
        yield tuple(turns), tuple(hashes(*picture) for picture in sample.image or ())
        return
    for prompts, captions, images in zip(sample.prompts, sample.captions, sample.images, strict=True):
        asked, said, shown = (value if isinstance(value, list) else [value] for value in (prompts, captions, images))
        pairs = zip(asked, said, strict=True)
        turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
        yield tuple(turns), tuple(hashes(*picture) for picture in shown)


def of_vistune(reader: Reader, left_out: set[int]) -> Iterator[Conversation]:
    for row in range(len(reader)):
        if row in left_out:
            continue
        try:
            sample = reader[row]
        except SampleError as error:
            print(f"vistune: {error}", file=sys.stderr)
            continue
        turns = tuple((message.role, message.text) for message in sample.messages)
        yield turns, tuple(hashes(read_picture(image), open_image(image)) for image in sample.images)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default="")
    parser.add_argument("--format", default="energon", help="of the source")
    parser.add_argument("--images", action="append", default=[], help="folder of the source's pictures")
    words = parser.parse_args()
    stand_in()
    samples = list(through_energon(words.folder))
    found = Counter(conversation for sample in samples for conversation in conversations(sample))
    ledger = words.folder / "left_out.jsonl"
    lines = ledger.read_text(encoding="utf-8").splitlines() if words.source and ledger.exists() else []
    left_out = {json.loads(line)["row"] for line in lines}
    reader = open_source(words.source or str(words.folder), words.format, images=words.images)
    wanted = Counter(of_vistune(reader, left_out))
    keys = Counter(sample.__key__ for rank in (0, 1) for sample in through_energon(words.folder, rank, 2))
    report = {
        "megatron-energon": importlib.metadata.version("megatron-energon"),
        "samples": len(samples),
        "conversations": found.total(),
        "pictures": sum(len(pictures) * n for (_, pictures), n in found.items()),
        "left out by the conversion": len(left_out),
        "missing from energon": (wanted - found).total(),
        "only in energon": (found - wanted).total(),
        "two ranks see the same": keys == Counter(sample.__key__ for sample in samples),
    }
    print(json.dumps(report, indent=2))
    return 0 if wanted == found and samples and report["two ranks see the same"] else 1


if __name__ == "__main__":
    sys.exit(main())
