"""Who runs, and how one job becomes one result: a process of its own, in its own environment.

Knows where each contender's interpreter and script are, nothing of what is compared.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Memory

HERE = Path(__file__).resolve().parent
PINNED_LIKE_OURS = ("torch", "transformers", "tokenizers", "pillow", "peft")
"""What the peer gets in our versions, so that neither kernels nor pixels differ."""


@dataclass(frozen=True)
class Contender:
    """`script` takes a job file and a result file. `extra` is laid over the job."""

    name: str
    script: Path
    peer: bool = False
    extra: tuple[tuple[str, Any], ...] = ()


CONTENDERS = {
    c.name: c
    for c in (
        Contender("trl", HERE / "peers" / "trl_sft.py", peer=True, extra=(("head", "shipped"),)),
        Contender("trl_forced", HERE / "peers" / "trl_sft.py", peer=True, extra=(("head", "forced"),)),
        Contender("vistune", HERE / "ours.py"),
        Contender("vistune_bf16", HERE / "ours.py", extra=(("bf16_anyway", True),)),
        Contender("stock", HERE / "peers" / "stock.py"),
    )
}
WHO = {
    "trl": "TRL's SFTTrainer as shipped (on a CPU its head scores every row)",
    "trl_forced": "TRL's SFTTrainer, supervised-rows-only head forced on (as it is on a GPU; a patch, not stock)",
    "vistune": "vistune (bf16 on a CPU without bf16 instructions is computed in fp32)",
    "vistune_bf16": "vistune, made to compute in bf16 even where the CPU only imitates it",
    "stock": "a plain loop over the stock transformers model",
}


def named(name: str) -> Contender:
    if name not in CONTENDERS:
        raise ValueError(f"there is no contender {name!r}; there are {', '.join(CONTENDERS)}")
    return CONTENDERS[name]


def peer_python(venv: Path, pip_words: list[str]) -> str:
    """The interpreter of the peer's environment, made with the current TRL release if it is not there.

    torch is held to our own build: left free, pip takes a CUDA build of another version on a machine without a GPU.
    Nothing is installed into our own environment. `pip_words` go to `pip install`.
    """
    python, done = venv / "bin" / "python", venv / "made"
    if not done.is_file():
        began = time.perf_counter()
        print(f"making {venv} with TRL", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        held = "".join(f"{name}=={importlib.metadata.version(name)}\n" for name in PINNED_LIKE_OURS)
        (venv / "constraints.txt").write_text(held)
        words = ["install", "--quiet", "-c", str(venv / "constraints.txt"), *pip_words, "trl", "pillow", "peft"]
        subprocess.run([str(python), "-m", "pip", *words], check=True)
        done.write_text(held)
        print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
    return str(python)


def run(contender: Contender, job: dict[str, Any], python: str, logs: Path) -> dict[str, Any]:
    """One run of one contender. Raises RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, got, log = Path(folder, "job.json"), Path(folder, "result.json"), logs / f"{contender.name}.log"
        given.write_text(json.dumps({**job, **dict(contender.extra)}))
        logs.mkdir(parents=True, exist_ok=True)
        command = [python, str(contender.script), str(given), str(got)]
        with log.open("w") as out:
            done = subprocess.run(command, env=_environment(job["threads"]), stdout=out, stderr=subprocess.STDOUT)
        if done.returncode or not got.is_file():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise RuntimeError(f"{contender.name} ended with code {done.returncode}; the end of {log}:\n{tail}")
        return json.loads(got.read_text())


def run_here(contender: Contender, job: dict[str, Any]) -> dict[str, Any]:
    """The same within this process, where only losses and counts matter: no import is paid twice."""
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    module = importlib.import_module(f"peers.{contender.script.stem}" if contender.name == "stock" else "ours")
    return module.result({**job, **dict(contender.extra)}, Memory())


def _environment(threads: int) -> dict[str, str]:
    """The same for all: no network, no launcher's variables, as many threads as asked."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONHOME")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
