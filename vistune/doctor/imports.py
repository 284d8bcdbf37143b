"""What imports and what does not, tried in another process: one for all where all is well, a new one after a fault."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping

from vistune.doctor.causes import explain, pip_name
from vistune.doctor.findings import Finding, ok, problem, warning
from vistune.doctor.trial import Trial, probe

NEEDED = (
    "torch",
    "transformers.models.llava.modeling_llava",  # transformers itself imports nothing until a model is asked for
    "peft",
    "accelerate",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "google.protobuf",
    "safetensors",
    "PIL.Image",
    "pyarrow",
    "fsspec",
    "pydantic",
    "typer",
    "rich",
    "jinja2",
    "yaml",
)
"""Deep ones first: what they load, the others find loaded, as in every run."""
TRIED = ("torchvision", "torchaudio", "flash_attn", "bitsandbytes", "triton", "xformers", "deepspeed", "apex", "timm")
"""What others import where it is there, so that a broken one does harm."""
TIMEOUT = 90.0


def look(timeout: float = TIMEOUT) -> list[Finding]:
    trials = try_all((name for name in (*NEEDED, *TRIED) if is_there(name)), timeout)  # else `packages` says so
    return findings(trials, os.getcwd())


def is_there(name: str) -> bool:
    """Whether a module could be imported, by the place of its package alone: nothing is run."""
    try:
        return importlib.util.find_spec(name.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def try_all(names: Iterable[str], timeout: float = TIMEOUT) -> dict[str, Trial]:
    """Import them one after the other in one process, and what comes after one that fails in the next process."""
    left = list(names)
    trials: dict[str, Trial] = {}
    while left:
        trial = probe("importing", str(timeout), *left, timeout=timeout * len(left) + 30)
        trials |= {name: one for name, one in read(trial, timeout).items() if name in left} or {left[0]: trial}
        left = [name for name in left if name not in trials]
    return trials


def read(trial: Trial, timeout: float) -> dict[str, Trial]:
    """The trial of each module that a process got to, as if it had been alone in it."""
    each = {name: Trial(0, facts, trial.stderr) for name, facts in trial.facts.get("done", {}).items()}
    last = trial.facts.get("underway")
    if last and last not in each:
        each[last] = Trial(None if "Timeout (" in trial.stderr else trial.code, {}, trial.stderr, timeout)
    return each


def findings(trials: Mapping[str, Trial], folder: str = "") -> list[Finding]:
    """One line for all that imports, one for each that does not."""
    broken = [_broken(name, trial, trials) for name, trial in trials.items() if not imports(trial)]
    hidden = [_hidden(name, trial) for name, trial in trials.items() if folder and _is_inside(trial, folder)]
    whole = [pip_name(name) for name, trial in trials.items() if imports(trial)]
    return [*([ok("imports", ", ".join(whole))] if whole else []), *broken, *hidden]


def imports(trial: Trial) -> bool:
    return trial.code == 0 and "file" in trial.facts


def _broken(name: str, trial: Trial, trials: Mapping[str, Trial]) -> Finding:
    found, fix = explain(name, trial)
    title = f"import {name}"
    fault = _fault_of_another(name, found, trials)
    if fault:
        return problem(title, f"does not import because of {fault}: {found}", f"cure {fault} first (its own line)")
    if name in NEEDED:
        return problem(title, found, fix)
    harm = name == "torchvision" and not imports(trials.get("transformers.models.llava.modeling_llava", Trial(0)))
    return (problem if harm else warning)(title, found, fix)


def _fault_of_another(name: str, found: str, trials: Mapping[str, Trial]) -> str:
    """The deeper package whose own import fails with the same words."""
    for other, trial in trials.items():
        if other.split(".")[0] == name.split(".")[0] or imports(trial):
            continue
        theirs, _ = explain(other, trial)
        if theirs == found and _is_deeper(other, name):
            return other.split(".")[0]
    return ""


DEPTH = ("numpy", "torch", "torchvision", "tokenizers", "safetensors", "accelerate", "transformers", "peft")
"""Who may break whom: the earlier the later."""


def _is_deeper(other: str, name: str) -> bool:
    order = {one: i for i, one in enumerate(DEPTH)}
    return order.get(other.split(".")[0], len(DEPTH)) < order.get(name.split(".")[0], len(DEPTH) + 1)


def _is_inside(trial: Trial, folder: str) -> bool:
    """Whether what was imported lies in the working folder itself, so that it hides the installed package."""
    file = str(trial.facts.get("file", ""))
    if not file.startswith(folder + os.sep):
        return False
    inner = file.removeprefix(folder + os.sep).split(os.sep)
    return len(inner) == 1 or (len(inner) == 2 and inner[1] == "__init__.py")


def _hidden(name: str, trial: Trial) -> Finding:
    file = trial.facts["file"]
    return problem(f"import {name}", f"{file} hides the installed package", "rename it, or start elsewhere")
