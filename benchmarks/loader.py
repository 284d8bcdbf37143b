"""Samples per second and core with pictures decoded: vistune, a plain dataset as LLaVA's, and megatron-energon.

    python benchmarks/loader.py                     3 rounds of 1,000 samples each
    python benchmarks/loader.py --quick             a smoke test without energon: no figure of it means anything

All go over the same rows of a mix665k-shaped file (made_mix665k.py) with the same pictures: decode, pad to a square,
resize to 336, normalise, tokenize with a loss mask, lay out in batches. Each runs in a process of its own with the same
number of workers, in turn, round by round; imports, LLaVA's reading of the JSON, our index and energon's are not
counted. Speed is samples per CPU-second of the process and its workers. vistune leaves the normalising to the device;
for the comparison it is done on the CPU and counted, `without_normalising` is shown beside. Sums of tokens, supervised
tokens and pixels are compared: with other work the script ends with code 1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import contenders
import made_mix665k
from contenders import Contender
from measure import machine

HERE = Path(__file__).resolve().parent
WHO = {
    "llava": Contender("llava", HERE / "peers" / "llava_dataset.py"),
    "energon": Contender("energon", HERE / "peers" / "energon_loader.py", peer=True),
    "vistune": Contender("vistune", HERE / "ours_loader.py"),
}
GOAL = 1.5
"""Times the samples per CPU-second of each of the others."""
SAME = ("samples", "images", "text_tokens", "supervised")
PINNED_LIKE_OURS = ("torch", "transformers", "tokenizers", "pillow", "numpy")


def main(words: list[str] | None = None) -> int:
    asked = arguments(words)
    small = {"pieces": 600, "words": 2000} if asked.quick else {}
    made = made_mix665k.make(asked.data, asked.samples, pictures=asked.pictures, **small)
    write_shards(made, asked.data / "shards")
    python = energon_python(asked.peer_venv, asked.pip.split()) if "energon" in asked.who else sys.executable
    result: dict[str, Any] = {"machine": machine(), "samples": asked.samples, "workers": asked.workers, "runs": []}
    for turn in range(asked.rounds):
        for who in asked.who:
            run = run_one(WHO[who], job(made, asked), python, asked)
            result["runs"].append({"who": who, "round": turn, **run})
            print(f"round {turn + 1}  {who:8} {run['samples'] / run['cpu_s']:6.1f} samples/CPU-s", flush=True)
    result |= {"summary": summary(result["runs"]), "same_work": same_work(result["runs"])}
    for path, text in ((asked.out, json.dumps(result, indent=1)), (asked.out.with_suffix(".md"), table(result))):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    print(table(result))
    return 0 if result["same_work"] else 1


def run_one(one: Contender, told: dict[str, Any], python: str, asked: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own; a smoke test in this one, so that no import is paid twice."""
    if not asked.quick:
        return contenders.run(one, told, python if one.peer else sys.executable, asked.data / "logs")
    sys.path[:0] = [str(HERE.parent), str(one.script.parent)]
    given, got = asked.data / "job.json", asked.data / "result.json"
    given.write_text(json.dumps(told))
    importlib.import_module(one.script.stem).main(str(given), str(got))
    return json.loads(got.read_text())


def job(made: made_mix665k.Made, asked: argparse.Namespace) -> dict[str, Any]:
    """What every contender is told."""
    return {
        "data": str(made.json),
        "images": str(made.images),
        "tokenizer": str(made.tokenizer),
        "shards": str(made.folder / "shards"),
        "cache": str(made.folder / "cache"),
        "length": asked.length,
        "batch": asked.batch,
        "workers": asked.workers,
        "threads": 1,
    }


def write_shards(made: made_mix665k.Made, folder: Path, per_shard: int = 250) -> None:
    """The same rows and pictures as a WebDataset, in file order."""
    if folder.exists():
        return
    beside = folder.with_name("shards.tmp")
    beside.mkdir(exist_ok=True)
    rows = json.loads(made.json.read_text())
    for start in range(0, len(rows), per_shard):
        with tarfile.open(beside / f"rows-{start // per_shard:05d}.tar", "w") as tar:
            for number in range(start, min(start + per_shard, len(rows))):
                row = rows[number]
                _add(tar, f"{number:08d}.json", json.dumps(row).encode())
                if "image" in row:
                    _add(tar, f"{number:08d}.jpg", (made.images / row["image"]).read_bytes())
    beside.rename(folder)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    about = tarfile.TarInfo(name)
    about.size = len(data)
    tar.addfile(about, io.BytesIO(data))


def energon_python(venv: Path, pip_words: list[str]) -> str:
    """The interpreter of energon's environment, made if it is not there; what both use is held to our versions."""
    python, done = venv / "bin" / "python", venv / "made"
    if not done.is_file():
        print(f"making {venv} with megatron-energon", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        held = "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in PINNED_LIKE_OURS)
        (venv / "constraints.txt").write_text(held)
        words = ["install", "--quiet", "-c", str(venv / "constraints.txt"), *pip_words, "megatron-energon"]
        subprocess.run([str(python), "-m", "pip", *words, "transformers", "pillow"], check=True)
        done.write_text(held)
    return str(python)


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, and vistune's ratio to each other one, round by round."""
    speed: dict[str, list[float]] = {}
    for run in runs:
        speed.setdefault(run["who"], []).append(run["samples"] / run["cpu_s"])
        if "normalise_s" in run:
            left = run["cpu_s"] - run["normalise_s"]
            speed.setdefault("vistune without_normalising", []).append(run["samples"] / left)
    found: dict[str, dict[str, Any]] = {}
    for who, values in speed.items():
        found[who] = {"samples_per_cpu_s": statistics.median(values), "range": [min(values), max(values)]}
        if who in WHO and who != "vistune" and "vistune" in speed:
            ratios = [ours / theirs for ours, theirs in zip(speed["vistune"], values, strict=True)]
            found[who] |= {"vistune_times": statistics.median(ratios), "times_range": [min(ratios), max(ratios)]}
    return found


def same_work(runs: list[dict[str, Any]]) -> bool:
    """Whether everybody saw as many samples, pictures and tokens, and pixels of the same sum of squares."""
    first = runs[0]
    return all(
        all(run[key] == first[key] for key in SAME)
        and abs(run["pixel_squares"] / max(first["pixel_squares"], 1e-9) - 1) < 1e-4
        for run in runs
    )


def table(result: dict[str, Any]) -> str:
    lines = ["| who | samples / CPU-s | vistune's speed |", "|---|---|---|"]
    for who, found in result["summary"].items():
        low, high = found["range"]
        times = f"{found['vistune_times']:.2f}x" if "vistune_times" in found else ""
        lines.append(f"| {who} | {found['samples_per_cpu_s']:.1f} ({low:.1f} to {high:.1f}) | {times} |")
    work = ", ".join(f"{key} {result['runs'][0][key]:,}" for key in SAME)
    return "\n".join([*lines, "", f"{'The same' if result['same_work'] else 'NOT THE SAME'} work: {work}.", ""])


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--samples", type=int, default=1000)
    add("--pictures", type=int, default=400)
    add("--rounds", type=int, default=3)
    add("--batch", type=int, default=8)
    add("--workers", type=int, default=2)
    add("--length", type=int, default=65536, help="longest sample; long enough that none is shortened")
    add("--who", type=lambda text: text.split(","), default=list(WHO), help=f"of {', '.join(WHO)}")
    add("--data", type=Path, default=HERE / ".data" / "loader", help="made there if it is not there yet")
    add("--peer-venv", type=Path, default=HERE / ".venv-energon", help="made there if it is not there yet")
    add("--pip", default="", help="words for the peer's pip install, for example an index that has CPU wheels of torch")
    add("--quick", action="store_true", help="24 samples, one round, without energon")
    add("--out", type=Path, default=HERE / "results" / "loader.json")
    asked = parser.parse_args(words)
    if asked.quick:
        asked.samples, asked.pictures, asked.rounds, asked.who = 24, 8, 1, ["llava", "vistune"]
        asked.workers = 0
    return asked


if __name__ == "__main__":
    raise SystemExit(main())
