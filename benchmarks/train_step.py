"""One training step of vistune beside TRL's SFTTrainer: speed, memory, losses, on the same made-up samples.

    python benchmarks/train_step.py                      everything; hours on two cores
    python benchmarks/train_step.py --stages 2 --vocab 8k --precision bf16 --rounds 3
    python benchmarks/train_step.py --quick              a smoke test without peers: no figure of it means anything

It prepares LLaVA-format data and a tiny model folder once (`--data`), makes the peer's own virtual environment once
(`--peer-venv`; nothing is installed into ours), then runs the contenders in turn, each in a process of its own, round
by round. TRL runs twice: as shipped, where on a CPU its head scores every row, and with its supervised-rows-only head
forced on as it is on a GPU (see peers/trl_sft.py). Everybody trains the same parameters with AdamW at the same constant
rate, from the same folder, on the same eight samples per step, without workers and gradient checkpointing; bf16 is
autocast over fp32 weights. A step lasts from the end of the one before, so data and logging are in it.

Speed is non-padding tokens per CPU-second of the contender's process (all its threads), which a busy machine disturbs
less than tokens per second. Losses are compared over 20 unpacked steps in fp32, with ids and labels. It ends with
code 1 if they differ by more than a relative 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import contenders
import stages
import summary
import torch
from flops import step_flops
from made_data import FULL, QUICK, Made, make
from made_model import TEMPLATE_NAMES
from measure import Memory, machine, matmul_peak
from stages import Stage, data_of

HERE = Path(__file__).resolve().parent
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = 1e-3
"""Relative difference of two losses; fp32 sums in another order stay far below."""


def main(words: list[str] | None = None) -> int:
    asked = arguments(words)
    made = make(asked.data, QUICK if asked.quick else FULL)
    python = sys.executable
    if any(contenders.named(name).peer for name in asked.who + asked.parity_with):
        python = contenders.peer_python(asked.peer_venv, asked.pip.split())
    bench = Bench(asked, made, python)
    try:
        if "speed" in asked.parts:
            bench.speed()
        if "parity" in asked.parts:
            bench.parity()
    except KeyboardInterrupt:
        print("stopped; what was measured is kept")
    finally:
        bench.write()
    print(summary.markdown(bench.result, contenders.WHO))
    return 0 if all(found["holds"] for found in bench.result["parity"].values()) else 1


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=11, help="per run, the first --dropped of them not counted")
    add("--dropped", type=int, default=2)
    add("--stages", type=_stages, default=[1, 2, "lora"])
    add("--vocab", type=_words, default=["8k", "32k"])
    add("--precision", type=_words, default=["fp32", "bf16"])
    add("--who", type=_words, default=["trl", "trl_forced", "vistune"], help=f"of {', '.join(contenders.CONTENDERS)}")
    add("--parts", type=_words, default=["speed", "parity"])
    add("--parity-steps", type=int, default=20)
    add("--parity-with", type=_words, default=["trl"], help="whose losses vistune's are compared with")
    add("--batch", type=int, default=8)
    add(
        "--micro-batch", type=int, default=0, help="vistune's packs in one forward; 0: all of the step, as the peers do"
    )
    add("--lr", type=float, default=1e-3)
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--data", type=Path, default=HERE / ".data", help="made there if it is not there yet, about 250 MB")
    add("--peer-venv", type=Path, default=HERE / ".venv-trl", help="made there if it is not there yet")
    add("--pip", default="", help="words for the peer's pip install, for example an index that has CPU wheels of torch")
    add("--out", type=Path, default=None, help="JSON; the table goes beside it as .md")
    add("--quick", action="store_true", help="2 steps of tiny data and model, vistune and the stock loop only")
    asked = parser.parse_args(words)
    if asked.quick:
        asked.rounds, asked.steps, asked.dropped, asked.parity_steps, asked.batch = 1, 2, 0, 2, 4
        asked.stages, asked.vocab, asked.precision = [2, "lora"], ["8k"], ["fp32"]
        asked.who, asked.parity_with, asked.data = ["vistune"], ["stock"], asked.data / "quick"
    elif asked.data == HERE / ".data":
        asked.data = asked.data / "full"
    for name in asked.who + asked.parity_with:
        contenders.named(name)
    name = re.sub(r"[^a-z0-9]+", "-", machine()["processor"].lower()).strip("-")
    asked.out = asked.out or HERE / "results" / f"train_step_{'quick' if asked.quick else name}.json"
    return asked


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _stages(text: str) -> list[Stage]:
    return [stages.named(word) for word in _words(text)]


class Bench:
    """The runs, and the result that grows with them and is written after each."""

    def __init__(self, asked: argparse.Namespace, made: Made, python: str):
        self.asked, self.made, self.python = asked, made, python
        self.orders: dict[Stage, list[int]] = {}
        facts = {
            key: getattr(asked, key) for key in ("rounds", "steps", "dropped", "batch", "lr", "threads", "micro_batch")
        }
        self.result: dict[str, Any] = {
            **facts,
            "machine": machine(),
            "matmul_peak": self.peaks(),
            "memory": Memory().how,
        }
        self.result |= {"summary": [], "parity": {}, "runs": []}

    def peaks(self) -> dict[str, float]:
        """FLOP/s of matrix products here and now: what a shared machine gives changes from minute to minute."""
        seconds = 0.1 if self.asked.quick else 1.0
        return {name: matmul_peak(kind, self.asked.threads, seconds=seconds) for name, kind in TYPES.items()}

    def job(self, stage: Stage, vocab: str, precision: str, steps: int, **more: Any) -> dict[str, Any]:
        """What one contender is told."""
        return {
            "model": str(self.made.model(vocab)),
            "data": str(self.made.data(stage)),
            "images": str(self.made.images),
            "template": str(self.made.template(stage)),
            "template_name": TEMPLATE_NAMES[data_of(stage)],
            "stage": stage,
            "precision": precision,
            "steps": steps,
            "batch": self.asked.batch,
            "micro_batch": self.asked.micro_batch,
            "lr": self.asked.lr,
            "length": 2048,
            "threads": self.asked.threads,
            **more,
        }

    def order(self, stage: Stage) -> list[int]:
        """Rows in the order in which vistune's plan takes them; the peers follow it. Without vistune: the file's."""
        if not {"vistune", "vistune_bf16"} & set(self.asked.who) and "parity" not in self.asked.parts:
            return list(range(self.asked.steps * self.asked.batch))
        if stage not in self.orders:
            steps = max(self.asked.steps, self.asked.parity_steps)
            job = self.job(stage, "8k", "fp32", steps, only_order=True)
            self.orders[stage] = self.run("vistune", job)["order"]
        return self.orders[stage]

    def run(self, who: str, job: dict[str, Any]) -> dict[str, Any]:
        one = contenders.named(who)
        if self.asked.quick:
            return contenders.run_here(one, job)
        return contenders.run(one, job, self.python if one.peer else sys.executable, self.asked.data / "logs")

    def speed(self) -> None:
        """Round robin: every round, every cell, every contender."""
        cells = [(s, v, p) for s in self.asked.stages for v in self.asked.vocab for p in self.asked.precision]
        for turn in range(self.asked.rounds):
            for stage, vocab, precision in cells:
                job = self.job(stage, vocab, precision, self.asked.steps, order=self.order(stage))
                for who in self.asked.who:
                    beside = self.peaks()
                    self.keep(who, turn, (stage, vocab, precision), self.run(who, job) | {"matmul_peak": beside})

    def keep(self, who: str, turn: int, cell: summary.Cell, run: dict[str, Any]) -> None:
        """Add the useful FLOPs to each step, check that everybody saw the same samples, write."""
        stage, vocab, _ = cell
        config = json.loads((self.made.model(vocab) / "config.json").read_text())
        for k, step in enumerate(run["steps"]):
            rows = self.order(stage)[k * self.asked.batch : (k + 1) * self.asked.batch]
            counts = [self.made.counts[data_of(stage)][row] for row in rows]
            expected = (sum(c[0] for c in counts), sum(c[1] for c in counts))
            if (step["tokens"], step["supervised"]) != expected:
                seen = (step["tokens"], step["supervised"])
                raise RuntimeError(f"{who}, step {k + 1}: (tokens, supervised) {seen}, the data has {expected}")
            step["flops"] = step_flops(config, counts, stage)
        run |= {"who": who, "round": turn, "cell": cell}
        self.result["runs"].append(run)
        self.write()
        print(f"round {turn + 1}  {_told(run, self.asked.dropped)}", flush=True)

    def parity(self) -> None:
        """The losses of vistune and of each peer asked for, fp32, unpacked, on the same ids."""
        for stage in self.asked.stages:
            more = {"order": self.order(stage), "keep_ids": True, "pack": False}
            job = self.job(stage, "8k", "fp32", self.asked.parity_steps, **more)
            adapters = {"adapters": str(self.asked.data / "adapters.safetensors")} if stage == "lora" else {}
            ours = self.run("vistune", job | {f"keep_{key}": path for key, path in adapters.items()})
            for who in self.asked.parity_with:
                found = summary.parity(ours, self.run(who, job | adapters))
                found["allowed"] = ALLOWED
                found["holds"] = found["same_ids"] and found["largest_relative_difference"] <= ALLOWED
                self.result["parity"][f"vistune and {who}, stage {stage}"] = found
                self.write()

    def write(self) -> None:
        """JSON and the table, beside and then renamed."""
        self.result["summary"] = summary.summarise(self.result["runs"], self.asked.dropped)
        out: Path = self.asked.out
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in (
            (out, json.dumps(self.result, indent=1)),
            (out.with_suffix(".md"), summary.markdown(self.result, contenders.WHO)),
        ):
            beside = path.with_name(path.name + ".tmp")
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)


def _told(run: dict[str, Any], dropped: int) -> str:
    found, (stage, vocab, precision) = summary.figures(run, dropped), run["cell"]
    return (
        f"stage {stage} {vocab:3} {precision} {run['who']:10}  {found['tokens_per_cpu_s']:7,.0f} tok/CPU-s  "
        f"{found['tokens_per_s']:7,.0f} tok/s  peak {found['peak_bytes'] / 1e6:6,.0f} MB  "
        f"loss {found['last_loss']:.4f}{'  contended' if found['contended'] else ''}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
