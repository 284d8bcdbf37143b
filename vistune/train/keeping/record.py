"""What a run writes about itself: recipe, environment, summary, model card. Small files, beside and then renamed."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vistune import __version__, console, ranks
from vistune.data.index import Index
from vistune.models import attention
from vistune.recipe import Recipe, dump
from vistune.train.keeping import checkpoint
from vistune.train.loop import Loop, mean_last
from vistune.train.spreading import parallel


def finished(folder: Path, loop: Loop) -> dict[str, Any] | None:
    """The summary of a run whose steps are all done and whose model folder stands."""
    saved = checkpoint.folders(folder)
    whole = (folder / "summary.json").exists() and (folder / "model" / "config.json").exists()
    if not (saved and whole and checkpoint.read_state(saved[-1])["state"]["step"] >= loop.steps):
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if summary["steps"] < loop.steps:
        return None
    console.say(f"{folder} is finished: {summary['steps']} steps; model folder: {folder / 'model'}")
    return summary


def summarize(folder: Path, rows: list[dict[str, Any]], loop: Loop) -> dict[str, Any]:
    return {
        "run": str(folder),
        "model": str(folder / "model"),
        "steps": loop.state.step,
        "world": ranks.world(),
        "first_loss": rows[0]["loss"],
        "last_loss": mean_last(rows),
        "losses": [row["loss"] for row in rows],
        "seconds": loop.state.seconds,
        "tokens": loop.state.tokens,
        "samples": loop.state.consumed,
        "quarantined": len(loop.ledger.faults),
        "nonfinite": loop.state.nonfinite,
    }


def card(recipe: Recipe, index: Index, summary: dict[str, Any]) -> str:
    """The model card: what it started from, what learned on which data, how it ended."""
    sources = "\n".join(f"- `{Path(s.path).name}` ({s.format}, {s.epochs:g} epochs)" for s in recipe.data.sources)
    rates = "\n".join(f"- {key}: {rate.lr:g} to {rate.min_lr:g}" for key, rate in recipe.learn.root.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n\n"
        f"# {recipe.name}\n\nTrained with vistune {__version__} from `{recipe.model.start}`.\n\n"
        f"## What learned\n\n{rates}\n\n## Data\n\n{sources}\n\n"
        f"{summary['samples']:,} samples, {summary['tokens']:,} tokens, {summary['steps']:,} steps, "
        f"{summary['quarantined']} rows set aside. Index `{index.hash[:16]}`.\n\n"
        f"## Scores\n\n- loss, mean of the last 10 steps: {summary['last_loss']:.4f}\n{_scores(summary)}\n"
        f"## Recipe\n\n```toml\n{dump(recipe).strip()}\n```\n"
    )


def _scores(summary: dict[str, Any]) -> str:
    """Lines of what was asked while it trained: at the end, and of the best checkpoint where that is another."""
    last, known = summary.get("evaluation"), summary.get("best")
    if last is None:
        return ""
    found = {} if last["held_out_loss"] is None else {"held-out loss": f"{last['held_out_loss']:.4f}"}
    for name, value in last["headline"].items():
        share = last["partial"].get(name)
        found[name] = f"{value:.4g}" + (f", asked {share:.1%} of its questions" if share else "")
    lines = [f"- {name}: {text}\n" for name, text in found.items()]
    if known is not None and known["step"] != last["step"]:
        lines.append(f"- best {known['by']}, at step {known['step']}: {known['value']:.4g}\n")
    return "".join(lines)


def write_environment(folder: Path, recipe: Recipe, index: Index, loop: Loop) -> None:
    """What the run ran on: versions, commit, device, and the hash of its data."""
    if not ranks.is_first():
        return
    names = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "pillow", "pyarrow")
    device = torch.cuda.get_device_name(loop.device) if loop.device.type == "cuda" else platform.processor() or "cpu"
    config: Any = loop.module.model.config
    facts = {
        "vistune": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in names},
        "device": device,
        "threads": torch.get_num_threads(),
        "world": ranks.world(),
        "shards": ranks.world() // recipe.parallel.replicas if parallel.sharded(recipe) else 1,
        "parallel": recipe.parallel.model_dump(mode="json"),
        "precision": str(loop.dtype).removeprefix("torch."),
        "compile": recipe.train.compile,
        "attention": attention.settled(config, loop.device, loop.dtype),
        "peak_flops": loop.peak,
        "data_index": index.hash,
    }
    with checkpoint.disk_errors(folder):
        write(folder / "environment.json", json.dumps(facts, indent=2))


def _commit() -> str:
    """Commit of the checkout that vistune is run from; empty for an installed package."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists() or shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip()


def write(path: Path, text: str) -> None:
    """Write a small file beside, then rename."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
