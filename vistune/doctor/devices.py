"""The accelerators that torch sees and what they lack, from what the probe `devices` tried on them.

ROCm and DCU cards call themselves cuda; nothing here decides by a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vistune.doctor.findings import Finding, ok, problem, size, warning
from vistune.doctor.trial import Trial, probe

ERRORS = (
    ("802", "start the fabric manager: systemctl start nvidia-fabricmanager (of the driver's own version)"),
    ("803", "the driver's library and module are of two versions: restart the machine"),
    ("804", "take the cuda-compat folder out of LD_LIBRARY_PATH: this card does not run forward compatibility"),
    ("driver version is insufficient", "the driver is older than torch's CUDA: see `driver and torch`"),
    ("is too old", "the driver is older than torch's CUDA: see `driver and torch`"),
    ("no kernel image", "torch was built without kernels for this card: a torch build that names its architecture"),
    ("out of memory", "another process holds the memory: nvidia-smi shows which"),
)
"""Words in what torch says when it finds no card -> what to do."""
TIMEOUT = 120.0


def look() -> tuple[list[Finding], dict[str, Any]]:
    """The findings, and the probe's facts for those who ask what torch was built for."""
    trial = probe("devices", timeout=TIMEOUT)
    return findings(trial), trial.facts


def findings(trial: Trial) -> list[Finding]:
    facts = trial.facts
    if not facts.get("version"):
        return []  # torch does not import, which has its own line
    found = [*_build(facts), *_ended_badly(trial)]
    if "accelerator" not in facts:
        return found
    if facts["accelerator"] is None:
        return [*found, *_none(facts)]
    found += [one for device in facts.get("devices", []) for one in _device(device, facts)]
    return found + _lacks(facts)


def _build(facts: Mapping[str, Any]) -> list[Finding]:
    made = f"CUDA {facts['cuda']}" if facts.get("cuda") else f"ROCm {facts['hip']}" if facts.get("hip") else ""
    return [ok("torch", f"{facts['version']}, built for {made or 'processors and what plugs into it'}")]


def _ended_badly(trial: Trial) -> list[Finding]:
    if trial.code == 0:
        return []
    how = f"hung for {trial.seconds:.0f} s" if trial.hung else f"died ({trial.killer or trial.last_line})"
    last = "while its devices were tried" if "accelerator" in trial.facts else "while torch looked for devices"
    return [problem("devices", f"the probe {how} {last}", "see `dmesg`; restart the machine if the driver hangs")]


def _none(facts: Mapping[str, Any]) -> list[Finding]:
    error = str(facts.get("error") or "")
    if error and "Found no NVIDIA" not in error and "No HIP GPUs" not in error and "No CUDA GPUs" not in error:
        fix = next((cure for words, cure in ERRORS if words in error), "see the driver's lines")
        return [problem("devices", f"torch finds no card: {error}", fix)]
    bf16 = "multiplies bf16 itself" if facts.get("bf16_cpu") else "has no bf16 instructions, so bf16 runs in fp32"
    return [ok("devices", f"no accelerator; the processor {bf16}")]


def _device(device: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    title = f"{facts['accelerator']}:{device['index']}"
    faults = [f"{kind}: {device[kind]}" for kind in ("float32", "float16") if device.get(kind) is not True]
    if faults:
        text = f"{device['name']} does not multiply: {'; '.join(faults)}"
        return [problem(title, text, _cure(text, device, facts))]
    return [*_memory(title, device), *_bf16(title, device, facts)]


def _cure(text: str, device: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    archs = ", ".join(facts.get("archs") or [])
    if "no kernel image" in text or "not compatible" in text:
        return f"a torch build for {_architecture(device)}; this one is for {archs or 'others'}"
    return next((cure for words, cure in ERRORS if words in text), "see `dmesg`; try the card alone, and another one")


def _architecture(device: Mapping[str, Any]) -> str:
    major, minor = device.get("capability") or (0, 0)
    return str(device.get("arch") or f"sm_{major}{minor}")


def _memory(title: str, device: Mapping[str, Any]) -> list[Finding]:
    memory = device.get("memory")
    if not isinstance(memory, list):
        return [ok(title, f"{device['name']}, memory not told")]
    free, total = memory
    text = f"{device['name']}, {size(free)} free of {size(total)}"
    if free < 0.8 * total:
        return [warning(title, f"{text}: others use it", "nvidia-smi (or rocm-smi) shows which processes")]
    return [ok(title, text)]


def _bf16(title: str, device: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Finding]:
    if device.get("bfloat16") is True and device.get("native_bf16", True):
        tf32 = facts.get("cuda") and (device.get("capability") or [0])[0] >= 8
        return [ok(f"{title} types", f"bf16{', tf32' if tf32 else '; no tf32'}, fp16, fp32")]
    fix = "nothing to do: train.precision = bf16 computes in fp16 with loss scaling here; or train.precision=fp32"
    return [warning(f"{title} types", "no bf16 of its own, no tf32", fix)]


def _lacks(facts: Mapping[str, Any]) -> list[Finding]:
    """What accelerators that are not NVIDIA's have not, as far as it was tried."""
    kind = facts["accelerator"]
    if kind == "cuda" and not facts.get("hip"):
        return []
    lacks = [
        f"{name} ({said})" if isinstance(said, str) and len(said) < 80 else name
        for name in ("bfloat16", "float64")
        if any((said := device.get(name)) is not True for device in facts.get("devices", []))
    ]
    own = {"cuda": "ROCm", "xpu": "Intel XPU", "npu": "Ascend NPU", "mps": "Apple MPS"}.get(kind, kind)
    text = f"{own}: lacks {', '.join(lacks)}" if lacks else f"{own}: bf16 and fp64 work"
    more = "; attention's kernels have their own lines; bitsandbytes (QLoRA, 8-bit) needs a build for it"
    if kind in ("xpu", "npu", "mps"):
        more += "; runs in one process are tried, sharding over several is not"
    return [ok("not NVIDIA", text + more)]
