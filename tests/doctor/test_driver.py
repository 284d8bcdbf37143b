"""Drivers, cards and torch builds that do not fit each other, from made-up outputs of the system."""

from __future__ import annotations

from typing import Any

import pytest

from vistune.doctor import devices, driver, rocm
from vistune.doctor.driver import Nvidia
from vistune.doctor.findings import Finding
from vistune.doctor.trial import Trial

SMI = "\n".join(f"{i}, GPU-{i}aaa, NVIDIA A100-SXM4-80GB, 535.104.05" for i in range(4))
KERNEL = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19"
GOOD = Nvidia(4, KERNEL, 0, SMI, {"driver_cuda": 12020, "init": 0, "path": "/usr/lib/libcuda.so.1"})
TORCH: dict[str, Any] = {"version": "2.11.0+cu128", "cuda": "12.8", "hip": None, "archs": ["sm_80", "sm_90"]}


def levels(found: list[Finding]) -> dict[str, str]:
    return {one.title: one.level for one in found}


def said(found: list[Finding], title: str) -> str:
    return next(f"{one.found} -> {one.fix}" for one in found if one.title == title)


def changed(nvidia: Nvidia = GOOD, **values: Any) -> Nvidia:
    return Nvidia(**{name: getattr(nvidia, name) for name in nvidia.__dataclass_fields__} | values)


def test_a_fitting_machine():
    found = driver.findings(GOOD, TORCH)
    assert set(levels(found).values()) == {"ok"}
    assert "4 x NVIDIA A100-SXM4-80GB, driver 535.104.05" in said(found, "nvidia-smi")
    assert "within one major version" in said(found, "driver and torch")


def test_a_machine_without_cards():
    assert levels(driver.findings(Nvidia(library={"error": "no"}), TORCH)) == {"NVIDIA driver": "ok"}


@pytest.mark.parametrize("cuda, spoken, driver_needed", [("13.0", 12020, "580"), ("12.8", 11040, "525")])
def test_a_driver_older_than_torch_by_a_major_version(cuda: str, spoken: int, driver_needed: str):
    found = driver.findings(changed(library={"driver_cuda": spoken, "init": 0}), TORCH | {"cuda": cuda})
    assert levels(found)["driver and torch"] == "problem"
    text = said(found, "driver and torch")
    assert f"a driver of {driver_needed} or newer" in text and f"cuda-compat-{cuda[:2]}-" in text


def test_a_newer_driver_is_well():
    found = driver.findings(changed(library={"driver_cuda": 13000, "init": 0}), TORCH)
    assert levels(found)["driver and torch"] == "ok"


def test_a_torch_for_processors_beside_a_card():
    found = driver.findings(GOOD, TORCH | {"version": "2.13.0+cpu", "cuda": None})
    assert "built for processors alone" in said(found, "driver and torch")
    assert levels(found)["driver and torch"] == "problem"


MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54"
LOST = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
FAULTS = [
    (changed(smi_code=18, smi=MISMATCH), "nvidia-smi", "restart the machine"),
    (changed(smi_code=9, smi=LOST), "nvidia-smi", "modprobe nvidia"),
    (changed(smi_code=None, smi=""), "nvidia-smi", "the driver hangs"),
    (changed(library={"error": "libcuda.so.1: cannot open"}), "libcuda", "--gpus all"),
    (Nvidia(1, "", 127, "", {"error": "libcuda.so.1: cannot open"}), "NVIDIA driver", "install the NVIDIA driver"),
    (changed(library={"driver_cuda": 12020, "init": 802}), "libcuda", "nvidia-fabricmanager"),
    (changed(library={"driver_cuda": 12020, "init": 804}), "libcuda", "LD_LIBRARY_PATH"),
    (changed(library={}), "libcuda", "crashed or hung"),
]


@pytest.mark.parametrize("nvidia, title, cure", FAULTS, ids=[cure for _, _, cure in FAULTS])
def test_faults_of_the_driver(nvidia: Nvidia, title: str, cure: str):
    found = driver.findings(nvidia, TORCH)
    assert levels(found)[title] == "problem" and cure in said(found, title)


@pytest.mark.parametrize(
    "chosen, level, text",
    [
        ("", "problem", "hides every one of 4"),
        ("-1", "problem", "hides every one"),
        ("0,7,1", "problem", "no '7'"),
        ("0,1", "warning", "shows 2 of 4"),
        ("GPU-1aaa,GPU-3", "warning", "shows 2 of 4"),
        ("3,2,1,0", None, ""),
        (None, None, ""),
    ],
)
def test_visible_devices(chosen: str | None, level: str | None, text: str):
    found = driver.visible(chosen, GOOD, {})
    assert [one.level for one in found] == ([level] if level else [])
    assert not found or text in found[0].found


def test_more_ranks_than_cards():
    found = driver.visible("0,1", GOOD, {"LOCAL_WORLD_SIZE": "8"})
    assert "invalid device ordinal" in said(found, "ranks and cards") and "--nproc-per-node 2" in said(
        found, "ranks and cards"
    )
    assert driver.visible(None, GOOD, {"LOCAL_WORLD_SIZE": "4"}) == []


CARD: dict[str, Any] = {
    "index": 0, "name": "NVIDIA A100", "capability": [8, 0], "memory": [79 << 30, 80 << 30], "native_bf16": True,
    "float32": True, "bfloat16": True, "float16": True, "float64": True,
}  # fmt: skip


def looked(card: dict[str, Any], **facts: Any) -> list[Finding]:
    return devices.findings(Trial(0, TORCH | {"accelerator": "cuda", "count": 1, "devices": [CARD | card]} | facts))


def test_a_good_card():
    found = looked({})
    assert set(levels(found).values()) == {"ok"} and "79 GiB free of 80 GiB" in said(found, "cuda:0")
    assert "bf16, tf32" in said(found, "cuda:0 types") and "not NVIDIA" not in levels(found)


def test_a_card_without_bf16():
    found = looked({"capability": [7, 0], "native_bf16": False})
    assert levels(found)["cuda:0 types"] == "warning" and "fp16" in said(found, "cuda:0 types")


def test_a_card_that_torch_has_no_kernels_for():
    found = looked({"capability": [12, 0], "float32": "RuntimeError: CUDA error: no kernel image is available"})
    assert levels(found)["cuda:0"] == "problem"
    assert "sm_120" in said(found, "cuda:0") and "sm_80, sm_90" in said(found, "cuda:0")


def test_memory_that_others_hold():
    assert levels(looked({"memory": [10 << 30, 80 << 30]}))["cuda:0"] == "warning"


def test_a_card_that_calls_itself_cuda_and_is_not():
    card = {"name": "K100_AI", "arch": "gfx928", "float64": "RuntimeError: not implemented"}
    found = looked(card, cuda=None, hip="6.3")
    assert (
        "ROCm: lacks float64" in said(found, "not NVIDIA") and "tf32" not in said(found, "cuda:0 types").split(";")[0]
    )
    assert "built for ROCm 6.3" in said(found, "torch")


@pytest.mark.parametrize("kind, name", [("xpu", "Intel XPU"), ("npu", "Ascend NPU"), ("mps", "Apple MPS")])
def test_other_accelerators(kind: str, name: str):
    found = looked({"bfloat16": True}, accelerator=kind, cuda=None)
    assert name in said(found, "not NVIDIA")


@pytest.mark.parametrize(
    "error, cure",
    [
        ("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized", "fabricmanager"),
        ("The NVIDIA driver on your system is too old (found version 11040)", "driver and torch"),
        ("Error 804: forward compatibility was attempted on non supported HW", "cuda-compat"),
    ],
)
def test_a_build_for_cards_that_finds_none(error: str, cure: str):
    found = devices.findings(Trial(0, TORCH | {"accelerator": None, "error": error}))
    assert levels(found)["devices"] == "problem" and cure in said(found, "devices")


def test_no_card_at_all_is_no_fault():
    found = devices.findings(Trial(0, TORCH | {"accelerator": None, "error": "Found no NVIDIA driver on your system."}))
    assert levels(found)["devices"] == "ok"


def test_a_probe_that_hangs_or_dies():
    assert "hung" in said(devices.findings(Trial(None, TORCH, "", 120)), "devices")
    assert "SIGSEGV" in said(devices.findings(Trial(-11, TORCH | {"accelerator": "cuda"})), "devices")
    assert devices.findings(Trial(1, {})) == []


HIP = {"version": "2.11.0+das", "hip": "6.3", "cuda": None}


def test_rocm():
    assert rocm.findings(rocm.Rocm(), TORCH, {}) == []
    named = rocm.Rocm(True, True, ["/opt/rocm"], "/opt/gone", False)
    assert "export ROCM_PATH=/opt/rocm" in said(rocm.findings(named, HIP, {}), "ROCM_PATH")
    unset = rocm.Rocm(True, True, ["/opt/dtk"])
    assert levels(rocm.findings(unset, HIP, {})) == {"ROCM_PATH": "warning"}
    closed = rocm.Rocm(True, False, ["/opt/rocm"], "/opt/rocm", True)
    assert "render,video" in said(rocm.findings(closed, HIP, {}), "ROCm device")
    assert "--device=/dev/kfd" in said(rocm.findings(rocm.Rocm(False), HIP, {}), "ROCm device")
    plain = {"version": "2.13.0+cpu", "hip": None, "cuda": None}
    assert levels(rocm.findings(rocm.Rocm(True), plain, {}))["ROCm and torch"] == "problem"
    hidden = rocm.findings(rocm.Rocm(True, True, ["/opt/rocm"], "/opt/rocm", True), HIP, {"HIP_VISIBLE_DEVICES": "-1"})
    assert levels(hidden)["HIP_VISIBLE_DEVICES"] == "problem"
