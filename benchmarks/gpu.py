"""Training steps of models of real shapes on one GPU, beside Hugging Face's own stack, within a given time.

    python benchmarks/gpu.py                              all cases, at most 9 minutes
    python benchmarks/gpu.py --cases 7b_stage2 --minutes 4 --profile
    python benchmarks/gpu.py --word train.compile=true --who vistune     another setting, to compare
    python benchmarks/gpu.py --tiny                       tiny shapes on the CPU: that all of it runs, no figure counts

Weights are drawn on the device, data and tokenizers are made up; nothing is downloaded and no weight touches the disk.
Every case runs in a process of its own, so that one that fails costs its row alone; what does not fit is tried again
with activations computed twice, and says so. Results go to `benchmarks/results/<device>.json` and `.md` after every
case. When time runs short, repeats are dropped before cases. Without a GPU it is `--tiny`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_made
import gpu_table
import torch

HERE = Path(__file__).resolve().parent
RESERVE = 12.0
"""Seconds that a case still to come needs at the least."""
LEVELS = {"vistune": ("none", "selective", "full"), "stock": ("none", "full")}
WHO = ("vistune", "stock")


def main(words: list[str] | None = None) -> int:
    asked = arguments(words)
    with tempfile.TemporaryDirectory() as made_here:
        bench = Bench(asked, asked.work or Path(made_here))
        try:
            bench.all()
        except KeyboardInterrupt:
            print("stopped; what was measured is kept")
        finally:
            bench.close()
    print(gpu_table.markdown(bench.result))
    failed = [row for row in bench.result["rows"] if "failed" in row and row["who"] == "vistune"]
    return 1 if failed else 0


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ",".join(case.name for case in gpu_cases.CASES)
    add("--minutes", type=float, default=9.0, help="for everything, making the data included")
    add("--cases", type=_words, default=_words(names), help=f"of {names}")
    add("--who", type=_words, default=list(WHO), help="vistune, stock")
    add("--steps", type=int, default=8, help="that count, at the most")
    add("--warmup", type=int, default=3, help="steps before them: compiling, choosing kernels, first allocations")
    add("--rounds", type=int, default=3, help="as many as the time allows")
    add("--word", action="append", default=[], help="section.key=value over every recipe of vistune")
    add("--profile", action="store_true", help="the slowest case of vistune once more under torch's profiler")
    add("--tiny", action="store_true", help="tiny shapes on the CPU")
    add("--rows", type=int, default=0, help="of the made-up data; 0: as many as the steps take")
    add("--work", type=Path, default=None, help="data, model folders without weights, logs; a temporary folder if none")
    add("--out", type=Path, default=None, help="JSON; the table goes beside it as .md")
    asked = parser.parse_args(words)
    asked.tiny = asked.tiny or not torch.cuda.is_available()
    for name in asked.cases:
        gpu_cases.named(name, asked.tiny)
    if unknown := set(asked.who) - set(WHO):
        raise ValueError(f"--who {', '.join(unknown)}: there are {', '.join(WHO)}")
    if asked.tiny:
        asked.rounds, asked.steps, asked.warmup = 1, min(asked.steps, 2), min(asked.warmup, 1)
    asked.rows = asked.rows or (64 if asked.tiny else 1600)
    return asked


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


class Bench:
    """The jobs, and the result that grows with them."""

    def __init__(self, asked: argparse.Namespace, work: Path):
        self.asked, self.work = asked, work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + asked.minutes * 60
        self.pool: Pool = Forks(self.work) if asked.tiny else Spares(self.work)
        self.made = gpu_made.make_data(self.work / "data", asked.rows, asked.tiny)
        self.cost: dict[tuple[str, str], float] = {}
        self.levels: dict[tuple[str, str], str] = {}
        self.predictions: dict[str, Path] = {}
        self.result: dict[str, Any] = {"tiny": asked.tiny, "minutes": asked.minutes, "words": asked.word, "rows": []}
        self.result |= {"steps": asked.steps, "warmup": asked.warmup, "dropped": []}

    def all(self) -> None:
        """First every case once, then the profile, then repeats while there is time."""
        queue = [(name, who) for name in self.asked.cases for who in self.asked.who if self._runs(name, who)]
        for turn in range(self.asked.rounds):
            for at, (name, who) in enumerate(queue):
                to_come = len(queue) - at - 1 if turn == 0 else 0
                left = self.deadline - time.monotonic() - to_come * RESERVE
                if left < self._least(turn, name, who):
                    self.result["dropped"].append({"round": turn + 1, "case": name, "who": who})
                    continue
                self.one(name, who, turn, seconds=left / (to_come + 1), limit=left)
            if turn == 0 and self.asked.profile:
                self.profile()

    def _runs(self, name: str, who: str) -> bool:
        return who == "vistune" or gpu_cases.named(name, self.asked.tiny).padded > 0

    def _least(self, turn: int, name: str, who: str) -> float:
        """What a job must have left to be begun."""
        return RESERVE if turn == 0 else 1.25 * self.cost.get((name, who), float("inf"))

    def one(self, name: str, who: str, turn: int, *, seconds: float, limit: float) -> None:
        """One job, tried again with more recomputation where memory was short; its row, written at once."""
        began = time.monotonic()
        while True:
            level = self.levels.get((name, who))
            measuring = min(20.0, max(3.0, seconds - 25.0))
            found = self.run(name, who, seconds=measuring, limit=limit - (time.monotonic() - began))
            higher = self._higher(name, who, level, found)
            if higher is None:
                break
            print(f"{name} {who}: {found['failed'][:100]}; again with checkpointing = {higher}", flush=True)
            self.levels[name, who] = higher
        self.cost[name, who] = time.monotonic() - began
        row = {"case": name, "who": who, "round": turn + 1, "seconds_in_all": self.cost[name, who], **found}
        self.result["rows"].append(row)
        if turn == 0 and who == "vistune" and "recipe" in row:
            self.predictions[name] = self.pool.behind({**self.job(name, "preflight", 0.0), "recipe": row["recipe"]})
        self.write()
        print(gpu_table.line(row), flush=True)

    def _higher(self, name: str, who: str, level: str | None, found: dict[str, Any]) -> str | None:
        """How much to compute twice after this result; None: as it is."""
        if not found.get("failed", "").startswith("out of memory"):
            return None
        levels = LEVELS[who]
        said = level or gpu_cases.named(name, self.asked.tiny).recipe["train"].get("checkpointing", "none")
        at = levels.index(said) if said in levels else 0
        return levels[at + 1] if at + 1 < len(levels) else None

    def run(self, name: str, who: str, *, seconds: float, limit: float, **more: Any) -> dict[str, Any]:
        return self.pool.run(self.job(name, who, seconds) | more, f"{name}_{who}", limit)

    def job(self, name: str, who: str, seconds: float) -> dict[str, Any]:
        case = gpu_cases.named(name, self.asked.tiny)
        shape = gpu_cases.shape(case, self.asked.tiny)
        template = gpu_cases.TEMPLATES[shape.family, case.data]
        start = gpu_made.make_folder(self.work / f"{case.shape}-{template}", shape, self.made, template)
        runs = len(list(self.work.glob(f"run-{name}-*.toml")))
        job = {
            "case": name,
            "who": who,
            "tiny": self.asked.tiny,
            "start": str(start),
            "data": str(gpu_made.data_of(self.made, case)),
            "images": str(self.made.images),
            "run": str(self.work / f"run-{name}-{runs}"),
            "cache": str(self.work / f"index-{name}"),
            "steps": self.asked.warmup + self.asked.steps,
            "warmup": self.asked.warmup,
            "seconds": seconds,
            "words": self.asked.word,
        }
        if level := self.levels.get((name, who)):
            job["checkpointing"] = level
        if who == "stock":
            job |= self._followed(name)
        return job

    def _followed(self, name: str) -> dict[str, Any]:
        """The samples of vistune's steps and their useful FLOPs; the file's order where it has not run."""
        for row in reversed(self.result["rows"]):
            if (row["case"], row["who"]) == (name, "vistune") and "order" in row:
                return {"order": row["order"], "flops": row["flops"]}
        steps, batch = self.asked.warmup + self.asked.steps, 2 * gpu_cases.named(name, self.asked.tiny).padded
        order = [list(range(k * batch, (k + 1) * batch)) for k in range(steps)]
        return {"order": order, "flops": [0.0] * steps}

    def profile(self) -> None:
        """vistune's case with the smallest share of the peak, once more."""
        done = [row for row in self.result["rows"] if row["who"] == "vistune" and "failed" not in row]
        left = self.deadline - time.monotonic()
        if not done or left < 2 * RESERVE:
            return
        name = min(done, key=gpu_table.mfu)["case"]
        found = self.run(name, "vistune", seconds=10.0, limit=left, profile=True)
        self.result["profile"] = {"case": name, **(found.get("profile") or {"failed": found.get("failed")})}
        self.write()

    def write(self) -> None:
        """JSON and the table, beside and then renamed."""
        self.result["preflight"] = {
            name: json.loads(path.read_text()) for name, path in self.predictions.items() if path.is_file()
        }
        devices = [row["device"] for row in self.result["rows"] if "device" in row]
        self.result["device"] = devices[0] if devices else "none"
        out = self.asked.out or HERE / "results" / f"{_slug(self.result['device'], self.asked.tiny)}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        texts = (out, json.dumps(self.result, indent=1)), (out.with_suffix(".md"), gpu_table.markdown(self.result))
        for path, text in texts:
            beside = path.with_name(path.name + ".tmp")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)

    def close(self) -> None:
        """What preflight counts beside the steps may take a little longer than they do."""
        self.pool.close(min(20.0, max(0.0, self.deadline - time.monotonic())))
        self.write()


def _slug(device: str, tiny: bool) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ("_tiny" if tiny else "")


class Pool:
    """Runs jobs, each in a process of its own, one after the other."""

    def __init__(self, work: Path):
        self.work, self.count = work, 0
        self.waited_for: list[Any] = []

    def run(self, job: dict[str, Any], name: str, limit: float) -> dict[str, Any]:
        """The job's result, or {"failed": why} of one that died or took more than `limit` seconds."""
        self.count += 1
        out = self.work / f"result-{self.count}.json"
        log = self.work / f"{self.count:02d}-{name}.log"
        code = self.start(job, out, log, max(5.0, limit))
        if out.is_file():
            return json.loads(out.read_text())
        tail = log.read_text(errors="replace").splitlines()[-3:] if log.is_file() else []
        said = f"over its {limit:.0f} s" if code is None else f"ended with code {code}"
        return {"failed": f"{said}; {' | '.join(tail)}"[:400]}

    def start(self, job: dict[str, Any], out: Path, log: Path, limit: float) -> int | None:
        """Run it to its end; its exit code, None if it had to be killed."""
        raise NotImplementedError

    def behind(self, job: dict[str, Any]) -> Path:
        """Where the result of a job that needs no GPU will be; it runs beside the others."""
        self.count += 1
        out = self.work / f"behind-{self.count}.json"
        self.waited_for.append(self.begin(job, out, self.work / f"{self.count:02d}-{job['case']}_{job['who']}.log"))
        return out

    def begin(self, job: dict[str, Any], out: Path, log: Path) -> Any:
        """Start such a job; its process."""
        raise NotImplementedError

    def close(self, seconds: float) -> None:
        """Wait so long for what runs beside, then end it."""
        until = time.monotonic() + seconds
        for process in self.waited_for:
            while time.monotonic() < until and _runs(process):
                time.sleep(0.1)
            if _runs(process):
                process.kill()


def _runs(process: Any) -> bool:
    """Of either kind of process."""
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


class Forks(Pool):
    """Processes forked from this one, which has imported everything. Not where a GPU was touched."""

    def begin(self, job: dict[str, Any], out: Path, log: Path) -> Any:
        import gpu_job

        context = multiprocessing.get_context("fork")
        process = context.Process(target=gpu_job.work_in_fork, args=(job, str(out), str(log)))
        process.start()
        return process

    def start(self, job: dict[str, Any], out: Path, log: Path, limit: float) -> int | None:
        process = self.begin(job, out, log)
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        return process.exitcode


class Spares(Pool):
    """Processes of their own; while one works, the next one is already importing."""

    def __init__(self, work: Path):
        super().__init__(work)
        self.spare = self._new()

    def _new(self) -> tuple[subprocess.Popen[str], Path]:
        log = self.work / f"spare-{self.count}.log"
        return self._process(log), log

    def _process(self, log: Path, **more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "gpu_job.py")]
        with log.open("w") as words:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": words, "stderr": subprocess.STDOUT}
            return subprocess.Popen(command, text=True, env=_environment() | more, **pipes)

    def begin(self, job: dict[str, Any], out: Path, log: Path) -> Any:
        process = self._process(log, CUDA_VISIBLE_DEVICES="")
        _tell(process, job, out)
        return process

    def start(self, job: dict[str, Any], out: Path, log: Path, limit: float) -> int | None:
        process, words = self.spare
        words.rename(log)
        began = time.monotonic()
        try:
            _tell(process, job, out)
        except BrokenPipeError:  # it died while importing; its log says why
            return process.wait()
        finally:
            self.spare = self._new()
        try:
            return process.wait(max(1.0, limit - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None

    def close(self, seconds: float) -> None:
        process, _ = self.spare
        process.kill()
        process.wait()
        super().close(seconds)


def _tell(process: subprocess.Popen[str], job: dict[str, Any], out: Path) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps({"job": job, "out": str(out)}) + "\n")
    process.stdin.close()


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONHOME")}
    given = os.environ.get("PYTHONPATH", "")
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), *([given] if given else [])]),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


if __name__ == "__main__":
    raise SystemExit(main())
