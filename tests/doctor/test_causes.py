"""Error texts of imports to their cures, and libraries to the folders they lie in."""

from __future__ import annotations

from pathlib import Path

import pytest

from vistune.doctor import libraries
from vistune.doctor.causes import explain
from vistune.doctor.imports import findings
from vistune.doctor.trial import MARK, Trial, read_facts, run


def failed(*errors: str, stderr: str = "", code: int | None = 0) -> Trial:
    return Trial(code, {"errors": list(errors)} if errors else {}, stderr, 1.0)


TEXTS = [
    ("torch", "ImportError: libcuda.so.1: cannot open shared object file: No such file or directory", "--gpus all"),
    ("cv2", "ImportError: libGL.so.1: cannot open shared object file: No such file", "apt install libgl1"),
    ("torch", "ImportError: libfoo.so.3: cannot open shared object file: No such file", "none of the toolkits"),
    ("torch", "ImportError: a/libcusparse.so.12: undefined symbol: __nvJitLinkComplete_12_4", "unset LD_LIBRARY_PATH"),
    (
        "flash_attn",
        "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDevice",
        "pip uninstall flash-attn",
    ),
    ("bitsandbytes", "OSError: libbitsandbytes.so: undefined symbol: _ZN2at4_ops", "--no-deps bitsandbytes"),
    ("torchvision", "RuntimeError: operator torchvision::nms does not exist", "pip uninstall torchvision"),
    ("numpy", "ImportError: version `GLIBCXX_3.4.32' not found (required by x.so)", "libstdcxx"),
    ("torch", "ImportError: /lib64/libc.so.6: version `GLIBC_2.32' not found (required by x.so)", "newer system"),
    ("pyarrow", "AttributeError: _ARRAY_API not found", "built for another numpy"),
    ("peft", "ModuleNotFoundError: No module named 'psutil'", "pip install psutil"),
    ("PIL.Image", "ImportError: cannot import name '_imaging' from 'PIL'", "reinstall --no-deps pillow"),
    ("numpy", "ModuleNotFoundError: No module named 'numpy._core'", "reinstall --no-deps numpy"),
    ("torch", "ImportError: libtorch_cpu.so: failed to map segment from shared object", "noexec"),
    ("torch", "SomethingNew: never seen before", "reinstall --no-deps torch"),
]


@pytest.mark.parametrize("module, text, cure", TEXTS, ids=[text[:40] for _, text, _ in TEXTS])
def test_a_known_text_has_its_cure(module: str, text: str, cure: str):
    found, fix = explain(module, failed(text), places=[])
    assert cure in fix and found in text


@pytest.mark.parametrize(
    "stderr",
    [
        "OpenBLAS blas_thread_init: pthread_create failed for thread 7 of 64: Resource temporarily unavailable",
        "libgomp: Thread creation failed: Resource temporarily unavailable",
    ],
)
def test_threads_that_cannot_be_created(stderr: str):
    _, fix = explain("numpy", failed(stderr=stderr, code=1))
    assert "ulimit -u" in fix and "OPENBLAS_NUM_THREADS=1" in fix


def test_signals_and_hangs():
    crash = 'Fatal Python error: Segmentation fault\n  File "/x/numpy/core.py", line 23 in <module>\n'
    assert "SIGSEGV" in explain("numpy", failed(stderr=crash, code=-11))[0]
    assert "/x/numpy/core.py:23" in explain("numpy", failed(stderr=crash, code=-11))[0]
    assert "newer processor" in explain("pyarrow", failed(code=-4))[1]
    assert "memory" in explain("torch", failed(code=-9))[1]
    assert "importtime" in explain("torch", failed(code=None))[1]


def test_the_cause_deepest_down_is_told():
    trial = failed("RuntimeError: Failed to import transformers.x", "ModuleNotFoundError: No module named 'regex'")
    assert explain("transformers", trial) == ("ModuleNotFoundError: No module named 'regex'", "pip install regex")


def test_a_library_in_another_version_is_named(tmp_path: Path):
    for place, name in (
        ("cuda/lib64", "libcudart.so.11.0"),
        ("cuda/lib64/stubs", "libcublas.so.12"),
        ("rocm/lib", "x"),
    ):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).touch()
    places = libraries.folders({"CUDA_HOME": str(tmp_path / "cuda"), "ROCM_PATH": str(tmp_path / "rocm")}, [])
    assert [tmp_path / "cuda/lib64", tmp_path / "rocm/lib"] == places[:2]
    assert "libcudart.so.11.0 is here, another version" in libraries.cure("libcudart.so.12", places)
    assert "none of the toolkits" in libraries.cure("libcublas.so.12", [*places, tmp_path / "cuda/lib64/stubs"])


def test_libraries_of_wheels_are_found(tmp_path: Path):
    (tmp_path / "nvidia/cudnn/lib").mkdir(parents=True)
    (tmp_path / "nvidia/cudnn/lib/libcudnn.so.9").touch()
    places = libraries.folders({}, [str(tmp_path)])
    assert libraries.cure("libcudnn.so.9", places).startswith(f"export LD_LIBRARY_PATH={tmp_path}/nvidia/cudnn/lib$")


def test_a_library_of_rocm_and_of_dtk(tmp_path: Path):
    for variable, name in (("ROCM_PATH", "libamdhip64.so.6"), ("DTKROOT", "libgalaxyhip.so.5")):
        (tmp_path / variable / "lib").mkdir(parents=True)
        (tmp_path / variable / "lib" / name).touch()
        places = libraries.folders({variable: str(tmp_path / variable)}, [])
        found, fix = explain("torch", failed(f"ImportError: {name}: cannot open shared object file: No"), places)
        assert name in found and f"LD_LIBRARY_PATH={tmp_path / variable}/lib$" in fix


def test_one_broken_package_is_blamed_once():
    text = "ImportError: libcudart.so.12: cannot open shared object file: No such file"
    llava = "transformers.models.llava.modeling_llava"
    trials = {name: failed(text) for name in ("torch", llava, "peft", "torchvision")} | {
        "rich": Trial(0, {"file": "r"})
    }
    blamed = {one.title: one.found for one in findings(trials) if one.level == "problem"}
    assert "because of" not in blamed["import torch"]
    assert all("because of torch:" in blamed[f"import {name}"] for name in (llava, "peft", "torchvision"))


def test_facts_survive_what_kills_the_probe():
    assert read_facts(f'chatter\n{MARK}{{"a": 1}}\n{MARK}{{"b": 2, "a": 3}}\n{MARK}{{"c": ') == {
        "a": 3, "b": 2, "cut": f'{MARK}{{"c": '
    }  # fmt: skip
    trial = run(["sh", "-c", f"echo '{MARK}{{\"a\": 1}}'; kill -ABRT $$"], 10)
    assert trial.killer == "SIGABRT" and trial.facts == {"a": 1} and not trial.hung


def test_children_of_what_hangs_end_too():
    trial = run(["sh", "-c", "sleep 300 & sleep 300"], 0.5)
    assert trial.hung and trial.seconds < 5
    assert run(["no-such-program"], 1).code == 127
