"""The table of what `prepare` brings: every file of a published data set, where it comes from and where it goes.

Sizes and check sums are those that their owners or public code state, each with its source; an unknown one is unknown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HUB = "https://huggingface.co"
GB = 1_000_000_000

Kind = Literal["rows", "archive", "covers"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file to fetch.

    `rows`: the JSON itself, saved as `folder`/`file`. `archive`: a zip whose pictures belong into `folder`, below the
    data's root. `covers`: a JSON of links, saved as `file` beside `folder`, into which the linked pictures go.
    """

    name: str
    kind: Kind
    address: str
    file: str  # what it is called on disk: unique, since three of them are called images.zip by their owners
    folder: str
    size: int | None = None  # bytes, exactly
    about: int | None = None  # bytes, as rounded by its source
    sha256: str = ""
    by_default: bool = True
    where: str = ""  # a page for people, if the address should fail

    @property
    def link(self) -> str:
        """The address, on the mirror that HF_ENDPOINT names if it is the hub's."""
        mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/")
        return mirror + self.address.removeprefix(HUB) if mirror and self.address.startswith(HUB) else self.address

    @property
    def place(self) -> str:
        """What it becomes, below the root: a file for rows, else a folder."""
        return f"{self.folder}/{self.file}".lstrip("/") if self.kind == "rows" else f"{self.folder}/"

    def home(self, root: Path) -> Path:
        """Where a part that is no archive lies as a file."""
        folder = root / self.folder
        return (folder.parent if self.kind == "covers" else folder) / self.file

    @property
    def on_hub(self) -> bool:
        return self.address.startswith(HUB)

    @property
    def weight(self) -> int:
        """Bytes to expect: exact, rounded, or 0 for unknown."""
        return self.size or self.about or 0

    @property
    def size_text(self) -> str:
        if not self.weight:
            return "unknown"
        return f"{self.weight / GB:.2f} GB" if self.size else f"about {self.weight / GB:.3g} GB"


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A published data set: its rows, its parts, and the folder that the rows' picture paths are relative to."""

    name: str
    rows: int  # as published
    images: str  # below the root
    parts: tuple[Part, ...]

    @property
    def rows_file(self) -> str:
        """The JSON, below the root."""
        return next(part.place for part in self.parts if part.kind == "rows")

    def chosen(self, only: tuple[str, ...]) -> Iterator[Part]:
        """Parts by name, or those that are brought without being named. Raises ValueError for an unknown name."""
        names = [part.name for part in self.parts]
        if unknown := [name for name in only if name not in names]:
            raise ValueError(f"{self.name} has no part {unknown[0]!r}; its parts: {', '.join(names)}")
        for part in self.parts:
            if part.name in only or (not only and part.by_default) or part.kind == "rows":
                yield part

    def folder_of(self, picture: str) -> str:
        """The row of the closing table that a picture path of the JSON is counted in."""
        path = f"{self.images}/{picture}".lstrip("/")
        folders = {part.folder for part in self.parts if part.kind != "rows"}
        found = next((folder for folder in folders if path.startswith(folder + "/")), "")
        return found or path.rpartition("/")[0] or "."


LLAVA_PRETRAIN = DataSet(
    name="llava_pretrain",
    rows=558_128,
    images="LLaVA-Pretrain/images",
    parts=(
        Part(
            name="rows",
            kind="rows",
            address=f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
            file="blip_laion_cc_sbu_558k.json",
            folder="LLaVA-Pretrain",
            about=181_000_000,  # haotian-liu/LLaVA docs/Data.md
        ),
        Part(
            name="images",
            kind="archive",
            address=f"{HUB}/datasets/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
            file="llava_pretrain_images.zip",
            folder="LLaVA-Pretrain/images",
        ),
    ),
)

# Addresses: haotian-liu/LLaVA README.md, "Visual Instruction Tuning"; those of OCR-VQA as noted.
MIX665K = DataSet(
    name="mix665k",
    rows=665_298,
    images="",
    parts=(
        Part(
            name="rows",
            kind="rows",
            address=f"{HUB}/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
            file="llava_v1_5_mix665k.json",
            folder="",
        ),
        Part(
            name="coco",
            kind="archive",
            address="http://images.cocodataset.org/zips/train2017.zip",
            file="coco_train2017.zip",
            folder="coco/train2017",
            size=19_336_861_798,  # this and the sum: tensorflow/datasets url_checksums/coco2017.txt
            sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        ),
        Part(
            name="gqa",
            kind="archive",
            address="https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
            file="gqa_images.zip",
            folder="gqa/images",
            about=20_300_000_000,  # phiyodr/vqaloader README.md
        ),
        Part(
            name="textvqa",
            kind="archive",
            address="https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
            file="textvqa_train_val_images.zip",
            folder="textvqa/train_images",
            about=6_600_000_000,  # phiyodr/vqaloader README.md
        ),
        Part(
            name="vg",
            kind="archive",
            address="https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
            file="vg_images.zip",
            folder="vg/VG_100K",
            about=9_100_000_000,  # `ls -lh` in public download scripts, as for part 2
        ),
        Part(
            name="vg2",
            kind="archive",
            address="https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
            file="vg_images2.zip",
            folder="vg/VG_100K_2",
            about=5_100_000_000,
        ),
        Part(
            name="ocr_vqa",
            kind="covers",
            # The file of the folder that LLaVA's README links, by the number that public loaders of OCR-VQA use.
            address="https://docs.google.com/uc?export=download&confirm=t&id=1r0tyZUwGCc4wIG4RkiglCGNL_nFJjR6Q",
            file="dataset.json",
            folder="ocr_vqa/images",
            where="https://drive.google.com/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
        ),
        Part(
            name="ocr_vqa_zip",
            kind="archive",
            # A community's copy (haotian-liu/LLaVA pull request 1458), for links that have died since.
            address=f"{HUB}/datasets/weizhiwang/llava_v15_instruction_images/resolve/main/ocr_vqa_images_llava_v15.zip",
            file="ocr_vqa_images_llava_v15.zip",
            folder="ocr_vqa/images",
            about=8_400_000_000,  # `ls -lh` in public download scripts
            by_default=False,
        ),
    ),
)

DATASETS: dict[str, DataSet] = {data.name: data for data in (LLAVA_PRETRAIN, MIX665K)}


def data_set(name: str) -> DataSet:
    """Raises ValueError for an unknown name."""
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r} to prepare; there are: {', '.join(sorted(DATASETS))}")
    return DATASETS[name]


def links(parts: list[Part]) -> list[str]:
    """Lines for `curl` and for an `aria2c -i` list, with file names under which `--from` finds them again."""
    curl = [f"curl -L -C - --retry 9 -o {part.file} '{part.link}'" for part in parts]
    aria = [line for part in parts for line in (part.link, f"  out={part.file}")]
    return ["# curl", *curl, "", "# aria2c -c -x 4 -i FILE", *aria]
