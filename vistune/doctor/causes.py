"""Why an import fails, from its error text: the texts that are known, each with its cure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from vistune.doctor import libraries
from vistune.doctor.trial import Trial

UNNEEDED = {
    "torchvision": "vistune does not need it, and transformers' models do not import beside a broken one",
    "torchaudio": "vistune does not need it",
    "flash_attn": "vistune attends without it",
    "xformers": "vistune attends without it",
    "apex": "vistune does not use it",
    "transformer_engine": "vistune does not use it",
    "deepspeed": "vistune shards without it",
    "timm": "vistune does not need it",
}
PIP = {"flash_attn": "flash-attn", "PIL": "pillow", "yaml": "pyyaml", "google.protobuf": "protobuf"}
OF_CUDA = ("__nvJitLink", "nvJitLink", "cublas", "cudnn", "ncclComm", "nccl", "cusparse", "cufft", "cusolver")


def pip_name(module: str) -> str:
    """The distribution that brings a module."""
    top = module.split(".")[0]
    return PIP.get(module) or PIP.get(top, top.replace("_", "-"))


def explain(module: str, trial: Trial, places: Iterable[Path] | None = None) -> tuple[str, str]:
    """What is wrong with an import that failed, and the one-line cure."""
    if trial.hung:
        return f"did not finish importing within {trial.seconds:.0f} s{_frame(trial)}", _hang(module)
    errors = trial.facts.get("errors", [])
    text = "\n".join([*errors, trial.stderr])
    said = errors[-1] if errors else trial.last_line
    if trial.killer:
        return _killed(module, trial)
    for pattern, answer in KNOWN:
        found = re.search(pattern, text)
        if found:
            return _short(_line_of(found, errors) or said), answer(module, found, places)
    return _short(said or f"ended with code {trial.code}"), _again(module)


def _line_of(found: re.Match[str], errors: list[str]) -> str:
    return next((error for error in errors if found.group(0) in error), "")


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


def _hang(module: str) -> str:
    return f"see where: python -X importtime -c 'import {module}' (a network folder, or a driver that does not answer)"


def _killed(module: str, trial: Trial) -> tuple[str, str]:
    where = _frame(trial)
    if trial.killer == "SIGKILL":
        return f"was killed while importing{where}", "most likely out of memory: see `dmesg`, give it more"
    if trial.killer == "SIGILL":
        return f"met an unknown instruction while importing{where}", _without(module, "built for a newer processor")
    return f"crashed while importing ({trial.killer}){where}", _without(module, "its build does not fit")


def _frame(trial: Trial) -> str:
    """Where it was, of what faulthandler printed, innermost first."""
    frame = re.search(r'File "([^<"][^"]*)", line (\d+) in', trial.stderr)
    return f", last in {frame.group(1)}:{frame.group(2)}" if frame else ""


def _without(module: str, why: str) -> str:
    name = pip_name(module)
    if module in UNNEEDED:
        return f"pip uninstall {name}  ({UNNEEDED[module]})"
    return f"{why}: pip install --force-reinstall --no-deps {name}"


def _again(module: str) -> str:
    if module in UNNEEDED:
        return f"pip uninstall {pip_name(module)}  ({UNNEEDED[module]})"
    return f"pip install --force-reinstall --no-deps {pip_name(module)}"


def _library(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    return libraries.cure(found.group(1), places)


def _symbol(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    if found.group(1).startswith(OF_CUDA):
        return "unset LD_LIBRARY_PATH  (it leads to the libraries of another CUDA than torch's own)"
    if module in UNNEEDED:
        return f"pip uninstall {pip_name(module)}  (built for another torch; {UNNEEDED[module]})"
    return f"built for another torch: pip install --force-reinstall --no-deps {pip_name(module)}"


def _vision(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    return "pip uninstall torchvision  (built for another torch; vistune does not need it), or the one that fits"


def _absent(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    absent = found.group(1)
    part = absent != module and absent.split(".")[0].startswith((module.split(".")[0], "_"))
    return _again(module) if part else f"pip install {pip_name(absent)}"


def _threads(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    return "raise the limit of processes (ulimit -u), or OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1"


def _glibc(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    if "GLIBCXX" in found.group(0):
        return "an old libstdc++ is found first: conda install -c conda-forge libstdcxx-ng, or unset LD_LIBRARY_PATH"
    return "this system's libc is older than the package was built for: a newer system or container, or an older build"


def _shadow(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    return f"a file or folder of yours is named like a package, or its files are of two versions: {_again(module)}"


def _numpy(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    return f"built for another numpy: pip install --force-reinstall --no-deps {pip_name(module)}"


def _mapped(module: str, found: re.Match[str], places: Iterable[Path] | None) -> str:
    return "its folder is mounted noexec, or memory is short: install into a folder from which programs may run"


Answer = Callable[[str, "re.Match[str]", Iterable[Path] | None], str]
KNOWN: tuple[tuple[str, Answer], ...] = (
    (libraries.MISSING.pattern, _library),
    (r"undefined symbol: (\S+)", _symbol),
    (r"operator torchvision::nms does not exist", _vision),
    (r"version [`'](?:GLIBCXX|GLIBC)_[\d.]+' not found", _glibc),
    (r"pthread_create failed|Thread creation failed|can't start new thread|Resource temporarily", _threads),
    (r"compiled using NumPy 1|numpy\.dtype size changed|_ARRAY_API not found|numpy\.core\.multiarray failed", _numpy),
    (r"failed to map segment from shared object", _mapped),
    (r"No module named '([\w.]+)'", _absent),
    (r"partially initialized module|circular import|cannot import name", _shadow),
)
