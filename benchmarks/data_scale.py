"""The data side at the size of LLaVA's mix665k and far beyond: time and memory of everything before the first step.

    python benchmarks/data_scale.py                                 all of it; about half an hour on two cores
    python benchmarks/data_scale.py --parts scan,index,start,rank
    python benchmarks/data_scale.py --quick                         a smoke test: no figure of it means anything

Each part is a process of its own. Memory is anonymous memory (RssAnon: heap, not mapped files) of it and its children,
sampled from outside, above what the part's process held once its imports were done; pages that a forked child shares
with its parent count in both. The file is made first (made_mix665k.py). `whole_json` is what LLaVA does in every rank:
json.load of the file. The offline packer is first-fit decreasing over the whole epoch at once, written here.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_mix665k
import numpy as np
from measure import TICK, machine

HERE = Path(__file__).resolve().parent
LENGTHS = (2048, 8192)
BATCH, WORLD = 128, 8
IMAGE_TOKEN = 32_001
HUGE = 85_000_000
_EVERY = 0.02  # seconds between two looks at the memory

Figures = dict[str, Any]
Part = Callable[[argparse.Namespace], Figures]


def whole_json(asked: argparse.Namespace) -> Figures:
    """What the reference holds in every rank."""
    mark()
    with timed() as took, open(asked.data / "mix665k.json") as file:
        rows = json.load(file)
    time.sleep(2 * _EVERY)
    return {**took, "rows": len(rows)}


def scan(asked: argparse.Namespace) -> Figures:
    """Where the rows of the file begin and end."""
    from vistune.data.formats import open_source

    shutil.rmtree(asked.work / "cache", ignore_errors=True)
    mark()
    with timed() as took:
        reader = open_source(str(asked.data / "mix665k.json"), images=str(asked.data / "images"), cache=asked.cache)
    return {**took, "rows": len(reader)}


def index(asked: argparse.Namespace) -> Figures:
    """The index, from a file whose rows are found already."""
    for folder in asked.cache.glob("index-*"):
        shutil.rmtree(folder)
    reader, language = _source(asked)
    mark()
    from vistune.data.index import build_index

    with timed() as took:
        made = build_index([reader], language, max(asked.lengths), cache=asked.cache, workers=asked.workers)
    text = made.columns["text"] + made.columns["image"]
    return {**took, "rows": len(made), "faults": len(made.faults), "tokens": _spread(text), "hash": made.hash[:16]}


def start(asked: argparse.Namespace) -> Figures:
    """A later start, its imports too, until the first micro-batch is decoded."""
    steps = _steps(asked, stop=1)
    next(steps)
    return {"wall_s_with_imports": time.time() - asked.began}


def rank(asked: argparse.Namespace) -> Figures:
    """What one of eight ranks holds for its data over some steps, read in this process."""
    mark_at: list[float] = []
    images = 0
    for batches in _steps(asked, stop=asked.steps, marked=mark_at):
        images += sum(0 if batch.pixels is None else len(batch.pixels) for batch in batches)
    return {"wall_s": time.perf_counter() - mark_at[0], "steps": asked.steps, "images": images}


def plan(asked: argparse.Namespace) -> Figures:
    """An epoch planned, with everything that is told of it before the first step; fill beside an offline packer's."""
    made = _index(asked)
    _forget_plans(made.folder)
    mark()
    from vistune.data.plan import Plan

    found: Figures = {}
    for length in asked.lengths:
        here = made if length == made.length else _shorter(asked, length)
        for unit, batch in (("samples", BATCH), ("packs", BATCH // 4)):
            with timed() as took:
                told = Plan(here, batch=batch, unit=unit, length=length, workers=asked.workers).describe()
            keys = ("samples", "packs", "steps_per_epoch", "longest_pack", "padding_share")
            found[f"{unit} {length}"] = {**took, "fill": 1 - told["padding_share"], **{key: told[key] for key in keys}}
    return found


def _forget_plans(folder: Path) -> None:
    """Leaves the index alone, without what plans keep beside it."""
    from vistune.data.growing import COLUMNS

    for path in folder.iterdir():
        if path.name not in ("meta.json", "faults.jsonl", "chunks.bin", *(f"{name}.npy" for name in COLUMNS)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def offline(asked: argparse.Namespace) -> Figures:
    """First-fit decreasing over all samples at once: what a packer that sees everything makes of these lengths."""
    mark()
    found: Figures = {}
    for length in asked.lengths:
        made = _index(asked) if length == max(asked.lengths) else _shorter(asked, length)
        sizes = np.asarray(made.tokens(np.flatnonzero(made.columns["fault"] == 0)))
        with timed() as took:
            packs = first_fit(sizes, length)
        found[str(length)] = {
            **took,
            "packs": packs,
            "fill": float(sizes.sum() / packs / length),
            "over_half": int((sizes > length // 2).sum()),
            "tokens": _spread(sizes),
        }
    return found


def huge(asked: argparse.Namespace) -> Figures:
    """Step k from an index of made-up lengths: opened, planned, one step after another at random places."""
    folder = made_index(asked)
    mark()
    from vistune.data.index import open_index
    from vistune.data.plan import Plan

    found: Figures = {}
    for unit, batch in (("samples", BATCH), ("packs", BATCH // 4)):
        with timed() as took:
            here = Plan(open_index(folder), batch=batch, unit=unit, length=8192, window=16384, workers=asked.workers)
            last = here.steps - 1
        places = [last, 0, *np.random.default_rng(1).integers(0, last, 20).tolist()]
        seconds = []
        for k in places:
            with timed() as one:
                here.step(int(k))
            seconds.append(one["wall_s"])
        with timed() as again:
            fresh = Plan(open_index(folder), batch=batch, unit=unit, length=8192, window=16384)
            fresh.step(last // 2)
        found[unit] = {
            "steps": last + 1,
            "first_start_s": took["wall_s"],
            "later_start_and_a_step_s": again["wall_s"],
            "step_median_s": statistics.median(seconds),
            "step_max_s": max(seconds),
        }
    return found


PARTS: dict[str, Part] = {part.__name__: part for part in (whole_json, scan, index, start, rank, plan, offline, huge)}


def mark() -> None:
    """What is held now is the baseline: asks the driver to note it, and waits until it did."""
    print("mark", flush=True)
    sys.stdin.readline()


class timed:
    """`with timed() as took`: wall and CPU seconds, those of finished children too."""

    def __enter__(self) -> Figures:
        self.took: Figures = {}
        self._wall, self._cpu = time.perf_counter(), self._used()
        return self.took

    def __exit__(self, *error: object) -> None:
        self.took.update(wall_s=time.perf_counter() - self._wall, cpu_s=self._used() - self._cpu)

    @staticmethod
    def _used() -> float:
        return sum(os.times()[:4])


def first_fit(sizes: np.ndarray, room: int) -> int:
    """How many packs first-fit decreasing needs. A tree of most rooms finds the first that fits."""
    leaves = 1 << (max(1, len(sizes)) - 1).bit_length()
    tree = [room] * (2 * leaves)
    opened = 0
    for size in np.sort(sizes)[::-1].tolist():
        node = 1
        while node < leaves:
            node = 2 * node + (tree[2 * node] < size)
        opened = max(opened, node - leaves + 1)
        tree[node] -= size
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return opened


def made_index(asked: argparse.Namespace) -> Path:
    """An index of `asked.huge` rows: the lengths of the real one drawn again and again, a few rows with a fault."""
    from vistune.data import growing

    folder = asked.work / f"huge-{asked.huge}"
    if (folder / "meta.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    real = _index(asked)
    columns = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=kind, shape=(asked.huge,))
        for name, kind in growing.COLUMNS.items()
    }
    rng, piece = np.random.default_rng(0), 1 << 20
    for at in range(0, asked.huge, piece):
        stop = min(at + piece, asked.huge)
        drawn = rng.integers(0, len(real), stop - at)
        for name in ("text", "image", "supervised", "images", "shortened"):
            columns[name][at:stop] = real.columns[name][drawn]
        columns["fault"][at:stop] = rng.random(stop - at) < 1e-4
        columns["source"][at:stop] = np.arange(at, stop) * 40 // asked.huge
        columns["row"][at:stop] = np.arange(at, stop)
    meta = {"format": growing.FORMAT, "hash": "made-up", "length": real.length, "rows": asked.huge, "faults": 0}
    (folder / "faults.jsonl").write_text("")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def _source(asked: argparse.Namespace) -> tuple[Any, Any]:
    from vistune.chat import template
    from vistune.data.formats import open_source
    from vistune.data.tokenize import Language
    from vistune.images import FixedLayout
    from vistune.text_encoder import open_encoder

    encoder = open_encoder(asked.data / "tokenizer")
    language = Language(template("v1"), encoder, FixedLayout(mode="pad"), IMAGE_TOKEN)
    reader = open_source(str(asked.data / "mix665k.json"), images=str(asked.data / "images"), cache=asked.cache)
    return reader, language


def _index(asked: argparse.Namespace) -> Any:
    from vistune.data.index import build_index

    reader, language = _source(asked)
    return build_index([reader], language, max(asked.lengths), cache=asked.cache, workers=asked.workers)


def _shorter(asked: argparse.Namespace, length: int) -> Any:
    """The same samples as if each had been shortened to `length`, without measuring them again."""
    from vistune.data.index import Index

    made = _index(asked)
    columns = {name: np.array(column) for name, column in made.columns.items()}
    columns["text"] = np.minimum(columns["text"], length - columns["image"])
    return Index(columns, [], f"{made.hash} {length}", length)


def _steps(asked: argparse.Namespace, stop: int, marked: list[float] | None = None) -> Iterator[Any]:
    from vistune.data.index import build_index
    from vistune.data.loader import load
    from vistune.data.plan import Plan

    mark()
    if marked is not None:
        marked.append(time.perf_counter())
    reader, language = _source(asked)
    made = build_index([reader], language, max(asked.lengths), cache=asked.cache)
    order = Plan(made, batch=BATCH, length=max(asked.lengths))
    yield from load(order, [reader], language, stop_step=min(stop, order.steps), world=WORLD, workers=0)


def _spread(tokens: np.ndarray) -> Figures:
    tokens = tokens[tokens > 0]
    marks = (1, 10, 25, 50, 75, 90, 95, 99, 100)
    values = np.percentile(tokens, marks).round().astype(int).tolist()
    return {"mean": round(float(tokens.mean()), 1), **dict(zip(map(str, marks), values, strict=True))}


def run(part: str, asked: argparse.Namespace) -> Figures:
    """One part in a process of its own: what it says, and the memory of it and its children."""
    words = ["--data", asked.data, "--work", asked.work, "--huge", asked.huge, "--workers", asked.workers]
    words += ["--steps", asked.steps, "--lengths", ",".join(map(str, asked.lengths)), "--part", part]
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, words), "--began", str(time.time())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    busy, began = _busy(), time.perf_counter()
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert child.stdin is not None and child.stdout is not None
    held = peak = 0
    said = b""
    while True:
        if select.select([child.stdout], [], [], _EVERY)[0]:
            line = child.stdout.readline()
            if not line:
                break
            if line == b"mark\n":
                held = peak = _anonymous(child.pid)
                child.stdin.write(b"\n")
                child.stdin.flush()
            else:
                said = line
        peak = max(peak, _anonymous(child.pid))
    if child.wait():
        raise RuntimeError(f"{part} ended with code {child.returncode}")
    used = sum(os.times()[2:4])
    passed = time.perf_counter() - began
    foreign = (_busy() - busy - (used - asked.used)) / passed
    asked.used = used
    return {**json.loads(said), "held_bytes": held, "peak_bytes": peak - held, "foreign_cores": round(foreign, 2)}


def _anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process and all below it; 0 for one that is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        below = [Path(task, "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    return own + sum(_anonymous(int(child)) for children in below for child in children)


def _busy() -> float:
    user, nice, system, _idle, _wait, irq, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + soft) / TICK


def table(result: dict[str, Any]) -> str:
    """Markdown: one line a figure."""
    lines = ["| part | wall s | CPU s | peak MB | others' cores | |", "|---|---|---|---|---|---|"]
    for name, found in result["parts"].items():
        rest = {key: value for key, value in found.items() if key not in _SHOWN}
        cells = (_number(found, "wall_s"), _number(found, "cpu_s"), f"{found['peak_bytes'] / 1e6:,.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {found['foreign_cores']} | {_words(rest)} |")
    return "\n".join(lines) + "\n"


_SHOWN = ("wall_s", "cpu_s", "peak_bytes", "held_bytes", "foreign_cores")


def _number(found: Figures, key: str) -> str:
    return f"{found[key]:,.1f}" if key in found else ""


def _words(found: Figures) -> str:
    def one(value: Any) -> str:
        if isinstance(value, dict):
            return "(" + _words(value) + ")"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key} {one(value)}" for key, value in found.items())


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; all need index once")
    add("--data", type=Path, default=HERE / ".data" / "mix665k", help="made there if it is not there yet, 1.2 GB")
    add("--work", type=Path, default=HERE / ".data" / "scale", help="caches, and 2.6 GB of made-up index")
    add("--rows", type=int, default=made_mix665k.ROWS)
    add("--huge", type=int, default=HUGE)
    add("--workers", type=int, default=2)
    add("--steps", type=int, default=20)
    add("--lengths", type=lambda text: [int(word) for word in text.split(",")], default=list(LENGTHS))
    add("--quick", action="store_true")
    add("--out", type=Path, default=HERE / "results" / "data_scale.json")
    add("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    add("--began", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args(words)
    if asked.quick:
        asked.rows, asked.huge, asked.steps, asked.workers = 300, 50_000, 2, 0
    asked.cache, asked.used = asked.work / "cache", sum(os.times()[2:4])
    return asked


def main(words: list[str] | None = None) -> int:
    asked = arguments(words)
    if asked.part:
        print(json.dumps(PARTS[asked.part](asked)), flush=True)
        return 0
    small = {"pictures": 12, "pieces": 600, "words": 2000} if asked.quick else {}
    made = made_mix665k.make(asked.data, asked.rows, **small)
    result: dict[str, Any] = {"machine": machine(), "bytes": made.json.stat().st_size, "sources": made.sources}
    result["parts"] = {}
    asked.used = sum(os.times()[2:4])
    for part in asked.parts.split(","):
        result["parts"][part] = run(part, asked)
        print(table({"parts": {part: result["parts"][part]}}).splitlines()[-1], flush=True)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        beside = asked.out.with_name(asked.out.name + ".tmp")
        beside.write_text(json.dumps(result, indent=1))
        beside.replace(asked.out)
    asked.out.with_suffix(".md").write_text(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
