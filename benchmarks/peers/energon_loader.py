"""megatron-energon over a WebDataset of the same rows and pictures, its task encoder doing what LLaVA's dataset does.

Runs in its own environment. The dataset is crude (bytes as they are), so that energon decodes nothing a second time.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from llava_dataset import Preparer, Row, collate, measured
from megatron.energon import (
    Cooker,
    CrudeWebdataset,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_val_dataset,
    stateless,
)
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator
from PIL import Image


@stateless
def cook(sample: dict[str, Any]) -> dict[str, Any]:
    picture = sample.get("jpg")
    return {**basic_sample_keys(sample), "row": json.loads(sample["json"]), "picture": picture}


class Encoder(DefaultTaskEncoder):
    """Bytes -> ids, labels, pixels; batches as LLaVA's."""

    decoder = None  # bytes as they are: Pillow decodes, as in the other contenders
    cookers = [Cooker(cook)]  # noqa: RUF012 (energon's own way)

    def __init__(self, tokenizer: str):
        super().__init__()
        self.prepare = Preparer(tokenizer)

    @stateless
    def encode_sample(self, sample: dict[str, Any]) -> Row:
        data = sample["picture"]
        picture = None if data is None else Image.open(io.BytesIO(data)).convert("RGB")
        return self.prepare(sample["row"], picture)

    def batch(self, samples: list[Row]) -> Row:
        return collate(samples)

    def encode_batch(self, batch: Row) -> Row:
        return batch


def prepare(folder: Path) -> None:
    """Index the shards as `energon prepare` does, unless that was done."""
    if (folder / ".nv-meta" / "dataset.yaml").exists():
        return
    shards = sorted(path.name for path in folder.glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(
        folder, shards, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=2
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def main(given: str, got: str) -> None:
    job = json.loads(Path(given).read_text())
    torch.set_num_threads(job["threads"])
    folder = Path(job["shards"])
    prepare(folder)
    config = WorkerConfig(rank=0, world_size=1, num_workers=job["workers"])
    encoder = Encoder(job["tokenizer"])

    def batches() -> Iterable[Row]:
        data = get_val_dataset(
            folder, split_part="train", worker_config=config, batch_size=job["batch"], task_encoder=encoder
        )
        return get_loader(data)

    Path(got).write_text(json.dumps(measured(batches)))


if __name__ == "__main__":
    assert CrudeWebdataset
    main(*sys.argv[1:])
