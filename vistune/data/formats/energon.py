"""Datasets of tar shards as megatron-energon and WebDataset write them; blends of them; or tars alone.

A row is found by its place in a tar and read alone. Pictures stay in the tar until they are opened. What a dataset
says of itself is read as data: its own Python is never run.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from vistune import files
from vistune.data.formats import Reader, refuse_unknown, register
from vistune.data.reading.metadataset import Subset, expand, is_metadataset, read_range
from vistune.data.reading.nv_meta import FOLDER, Kind, Meta, read_meta
from vistune.data.reading.tar import Files, TarError
from vistune.data.reading.tar_rows import Shard, look_of, open_rows, raw_sample
from vistune.data.reading.tar_samples import Misread, Raw, read
from vistune.samples import IMAGE_MARK, Fault, FaultCode, Message, Sample, SampleError

OPTIONS = ("split", "kind", "prompts", "range", "dataset_config", "split_config")
_KEPT = 64  # samples whose headers are kept: rows of one pack are often read together


class Energon:
    """Rows of tar shards. A packed sample is several rows, one a sub-sample; any other kind is one row.

    `id` is `shard/key`, for a packed sample with `#sub`. `prompts` "ignore" leaves nothing of a question but its
    pictures, as captioning does.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Shard],
        kind: Kind,
        look: Kind | None,
        *,
        fields: Mapping[str, str],
        prompts: str,
        subset: Subset,
        cache: Path | None,
    ):
        self.name = name
        self.kind = kind
        self._shards = list(shards)
        self._fields = dict(fields)
        self._prompts = prompts
        facts = _facts(self._shards)
        self._rows = open_rows(self._shards, kind, look, facts, cache)
        first, last = subset.of(int(self._rows.samples.sum()))
        self._first, self._last = self._rows.at(first), self._rows.at(last)
        if self._first == self._last:
            raise ValueError(f"{name}: no samples in its {len(shards)} shard(s), or none in the range")
        told = (name, kind, sorted(self._fields.items()), prompts, first, last, facts, [s.excluded for s in shards])
        self._digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        self._files = Files()
        self._kept: OrderedDict[tuple[int, int], Raw] = OrderedDict()

    def __len__(self) -> int:
        return self._last - self._first

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(row)
        place = self._rows.table[self._first + row]
        shard = self._shards[int(place["shard"])]
        id = shard.name
        try:
            raw = self._raw(int(place["shard"]), int(place["start"]), int(place["stop"]))
            id = f"{shard.name}/{raw.key}" + (f"#{place['sub']}" if self.kind == "packed" else "")
            got = read(self.kind, raw, int(place["sub"]), self._fields)
            messages = got.messages if self._prompts == "use" else _without_prompts(got.messages)
        except Misread as error:
            raise self._fault(row, id, error.code, error.reason, shard.path) from None
        except (TarError, OSError) as error:
            raise self._fault(row, id, "row_unreadable", str(error), shard.path) from None
        return Sample(id=id, source=self.name, row=row, messages=messages, images=got.images, notes=got.notes)

    def fingerprint(self) -> str:
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def _raw(self, shard: int, start: int, stop: int) -> Raw:
        kept = self._kept.get((shard, start))
        if kept is None:
            kept = self._kept[shard, start] = raw_sample(self._shards[shard].path, self._files, start, stop)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return kept

    def _fault(self, row: int, id: str, code: FaultCode, reason: str, path: str) -> SampleError:
        return SampleError(Fault(source=self.name, row=row, id=id, code=code, reason=reason, path=path))


class Chain:
    """The datasets of a blend one after the other, each once: weights and repetitions are the recipe's business."""

    def __init__(self, name: str, readers: Sequence[Reader]):
        self.name = name
        self.readers = list(readers)
        self._starts = [0]
        for reader in self.readers:
            self._starts.append(self._starts[-1] + len(reader))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Sample:
        if not 0 <= row < len(self):
            raise IndexError(row)
        at = bisect_right(self._starts, row) - 1
        try:
            sample = self.readers[at][row - self._starts[at]]
        except SampleError as error:
            raise SampleError(replace(error.fault, source=self.name, row=row)) from None
        return replace(sample, source=self.name, row=row)

    def fingerprint(self) -> str:
        parts = "\n".join([self.name, *(reader.fingerprint() for reader in self.readers)])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


@register("energon")
def open_energon(
    path: str, images: Sequence[str], name: str, cache: Path | None, options: Mapping[str, Any]
) -> Energon | Chain:
    """A dataset folder, a folder of tars, one tar, or a blend's `.yaml`. Options: `OPTIONS`."""
    refuse_unknown(path, "energon", options, OPTIONS)
    if images:
        raise ValueError(f"{path}: pictures lie in the shards themselves; take `images` = {list(images)} out")
    if is_metadataset(path):
        return _open_blend(path, name, cache, options)
    kind = _one_of(path, options, "kind", ("", *get_args(Kind)))
    prompts = _one_of(path, options, "prompts", ("use", "ignore"))
    subset = _range(path, options)
    shards, meta = _shards(path, options)
    look = _look(shards)
    kind = kind or meta.kind or look
    if kind is None:
        raise ValueError(
            f"{path}: {meta.why}, and its first sample looks like none of {', '.join(get_args(Kind))}. No code of a "
            "data set is run here: set the option `kind`, or write the data in another format"
        )
    return Energon(name, shards, kind, look, fields=meta.fields, prompts=prompts, subset=subset, cache=cache)


def _open_blend(path: str, name: str, cache: Path | None, options: Mapping[str, Any]) -> Chain:
    others = {key: value for key, value in options.items() if key != "split"}
    if "range" in others:
        raise ValueError(f"{path}: a range of a blend is written in the blend itself, as `subset`")
    parts = expand(path, options.get("split", "train"))
    opened = [open_energon(part.path, (), part.path, cache, {**others, **part.options()}) for part in parts]
    return Chain(name, opened)


def _shards(path: str, options: Mapping[str, Any]) -> tuple[list[Shard], Meta]:
    """The tars of the split that is asked for, in its order. Raises ValueError when there are none."""
    split = options.get("split", "train")
    if path.endswith(".tar"):
        return [Shard(path.rsplit("/", 1)[-1], path)], Meta(None, "it is a tar alone", {}, None)
    if not files.is_folder(path):
        raise ValueError(f"{path}: no dataset folder, no .tar and no .yaml of a blend is there")
    meta = Meta(None, f"it has no {FOLDER}", {}, None)
    if files.is_folder(files.join(path, FOLDER)):
        configs = {key: str(options[key]) for key in ("dataset_config", "split_config") if key in options}
        meta = read_meta(path, **configs)
    if meta.splits is not None and split not in meta.splits:
        raise ValueError(f"{path}: has no split {split!r}. Splits: {', '.join(meta.splits)}")
    names = meta.splits[split] if meta.splits is not None else list(meta.counts or _tars_below(path))
    shards = [
        Shard(name, files.join(path, name), (meta.counts or {}).get(name), _excluded(meta, name))
        for name in names
        if name not in meta.excluded
    ]
    if not shards:
        raise ValueError(f"{path}: no .tar in its split {split!r}")
    return shards, meta


def _tars_below(folder: str) -> list[str]:
    below = folder.split("://")[-1].strip("/") + "/"
    return [path.split(below, 1)[-1] for path in files.listed(folder, ".tar")]


def _excluded(meta: Meta, shard: str) -> frozenset[str]:
    cut = len(shard) + 1
    return frozenset(entry[cut:] for entry in meta.excluded if entry.startswith(shard + "/"))


def _look(shards: Sequence[Shard]) -> Kind | None:
    """What the first sample looks like, of the first shard that has any."""
    opened = Files()
    for shard in shards:
        try:
            size = files.size(shard.path)
            if opened.read(shard.path, 0, 512).strip(b"\0"):
                return look_of(raw_sample(shard.path, opened, 0, size))
        except FileNotFoundError:
            raise ValueError(f"{shard.path}: the dataset names this shard, and it is not there") from None
    return None


def _facts(shards: Sequence[Shard]) -> list[str]:
    """What changes when a shard may have changed."""
    try:
        if not files.is_remote(shards[0].path):
            return [files.facts(shard.path) for shard in shards]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda shard: files.facts(shard.path), shards))
    except OSError as error:
        raise ValueError(f"a shard that the dataset names cannot be opened: {error}") from None


def _without_prompts(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """One caption: the question keeps its pictures' places and nothing else."""
    turns = [message for message in messages if message.role != "system"]
    if len(turns) != 2:
        raise Misread("role_order", f'{len(turns)} turns; prompts = "ignore" is for one question and one answer')
    marks = "\n".join([IMAGE_MARK] * turns[0].text.count(IMAGE_MARK))
    return (replace(turns[0], text=marks), turns[1])


def _one_of(path: str, options: Mapping[str, Any], key: str, known: Sequence[str]) -> Any:
    value = options.get(key, known[0])
    if value not in known:
        choices = ", ".join(repr(choice) for choice in known if choice)
        raise ValueError(f"{path}: option {key} = {value!r} is unknown; choose {choices}")
    return value


def _range(path: str, options: Mapping[str, Any]) -> Subset:
    try:
        return read_range(options["range"]) if "range" in options else Subset()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
