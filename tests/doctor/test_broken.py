"""`vistune doctor` on machines that are broken: no package at all, and packages that fail in the ways that they do.

`python -S` sees no installed package; what is laid on PYTHONPATH stands for them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
LLAVA = "transformers/models/llava/modeling_llava.py"


def doctor(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(folder)])
    kept = {
        name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "ROCM_PATH", "LD_LIBRARY_PATH")
    }
    command = [sys.executable, "-S", "-m", "vistune", "doctor", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, env={**kept, "PYTHONPATH": path, **environment}
    )


def findings(done: subprocess.CompletedProcess) -> dict[str, dict[str, Any]]:
    said = json.loads(done.stdout)
    assert said["ok"] is (done.returncode == 0)
    return {one["title"]: one for one in said["findings"]}


def lay(folder: Path, name: str, code: str) -> None:
    """A package, with the record of its installation; `name` may be a file deeper in it."""
    file = folder / (name if name.endswith(".py") else f"{name}/__init__.py")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    top = name.split("/")[0]
    for package in [folder / top, *(one for one in file.parents if folder / top in one.parents)]:
        (package / "__init__.py").touch()
    record = folder / f"{top}-99.0.dist-info"
    record.mkdir(exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {top}\nVersion: 99.0\n")


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    """One machine with every fault, since each run costs seconds."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "toolkit/lib64").mkdir(parents=True)
    (folder / "toolkit/lib64/libcudart.so.12").touch()
    lay(folder, "torch", "raise ImportError('libcudart.so.12: cannot open shared object file: No such file')")
    lay(folder, "numpy", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    lay(folder, "pyarrow", "import time; time.sleep(600)")
    lay(folder, "flash_attn", "raise ImportError('flash_attn_2.so: undefined symbol: _ZN3c105Error4whatEv')")
    lay(folder, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    lay(
        folder,
        LLAVA,
        "try:\n    import torchvision\nexcept RuntimeError as e:\n    raise ImportError('no llava') from e",
    )
    lay(folder, "bitsandbytes", "import os; os._exit(3)")
    lay(folder, "peft", "import torch")
    lay(folder, "rich", "")
    words = ("--json", "--only", "python", "--timeout", "4")
    return doctor(folder, *words, CUDA_HOME=str(folder / "toolkit")), folder


@pytest.mark.slow
def test_a_missing_library_is_found_where_it_lies(broken):
    done, folder = broken
    one = findings(done)["import torch"]
    assert one["level"] == "problem" and "libcudart.so.12" in one["found"]
    assert one["fix"] == f"export LD_LIBRARY_PATH={folder}/toolkit/lib64${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"


def test_what_breaks_because_of_another_says_so(broken):
    one = findings(broken[0])["import peft"]
    assert "because of torch" in one["found"] and "torch" in one["fix"]


def test_a_crash_is_a_finding(broken):
    one = findings(broken[0])["import numpy"]
    assert one["level"] == "problem" and "SIGSEGV" in one["found"] and "numpy/__init__.py:1" in one["found"]


def test_a_hang_is_a_finding_and_ends(broken):
    one = findings(broken[0])["import pyarrow"]
    assert one["level"] == "problem" and "did not finish importing within 4 s" in one["found"]


def test_flash_attn_of_another_torch(broken):
    one = findings(broken[0])["import flash_attn"]
    assert one["level"] == "warning" and "undefined symbol" in one["found"]
    assert one["fix"].startswith("pip uninstall flash-attn")


def test_a_broken_torchvision_breaks_transformers(broken):
    every = findings(broken[0])
    vision, models = every["import torchvision"], every["import transformers.models.llava.modeling_llava"]
    assert vision["level"] == "problem" and "pip uninstall torchvision" in vision["fix"]
    assert models["level"] == "problem" and "because of torchvision" in models["found"]


def test_a_process_that_just_leaves(broken):
    assert findings(broken[0])["import bitsandbytes"]["level"] == "warning"


def test_the_table_of_a_broken_machine(broken):
    _, folder = broken
    done = doctor(folder, "--only", "processes", "--only", "storage")
    assert "\x1b" not in done.stdout and "This machine can" in done.stdout


def test_a_machine_with_nothing_installed(tmp_path: Path):
    done = doctor(tmp_path, str(tmp_path / "runs" / "deep"))
    assert done.returncode == 1 and not done.stderr
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("-> pip install 'torch"))
    assert all(f"'{name}" in line for name in ("torch", "transformers", "numpy", "pillow", "typer", "rich"))
    assert "This machine cannot train yet: 1 problem" in done.stdout or "Python.h" in done.stdout


def test_other_verbs_say_where_to_ask(tmp_path: Path):
    command = [sys.executable, "-S", "-m", "vistune", "train", "recipe.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "No module named 'typer'" in done.stderr and "`vistune doctor`" in done.stderr


def test_a_file_that_hides_a_package(tmp_path: Path):
    (tmp_path / "yaml.py").write_text("")
    one = findings(doctor(tmp_path, "--json", "--only", "python"))["import yaml"]
    assert one["level"] == "problem" and "hides the installed package" in one["found"]


def test_help_and_unknown_words(tmp_path: Path):
    assert "RUN_FOLDER".lower() in doctor(tmp_path, "--help").stdout.lower()
    assert doctor(tmp_path, "--gpus", "8").returncode == 2
