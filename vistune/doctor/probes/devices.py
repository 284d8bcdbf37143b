"""What torch was built for, which accelerators it sees, and what they can: tried, not read off their names."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vistune.doctor.trial import tell


def main() -> None:
    """Facts, told one after another: the build, the accelerator, then each device's memory and abilities."""
    tell(version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip, archs=torch.cuda.get_arch_list())
    tell(threads=torch.get_num_threads(), tf32=bool(torch.backends.cuda.matmul.allow_tf32))
    kind = accelerator()
    if kind is None:
        tell(accelerator=None, error=why_none(), bf16_cpu=has_bf16_instructions())
        return
    count = torch.accelerator.device_count()
    tell(accelerator=kind, count=count, nccl=nccl())
    own = os.environ.get("LOCAL_RANK", "") if "WORLD_SIZE" in os.environ else ""
    devices: list[dict[str, Any]] = []
    for index in range(count) if not own.isdigit() else [int(own)] if int(own) < count else []:
        devices.append(describe(kind, index))
        tell(devices=devices)


def accelerator() -> str | None:
    """cuda (also of ROCm), xpu, npu, mps, ..., or None."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return found.type if found is not None else None


def why_none() -> str:
    """What torch says when a build for cards finds none."""
    if not (torch.version.cuda or torch.version.hip):
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:400]
    return ""


def has_bf16_instructions() -> bool:
    ask: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    amx: Callable[[], bool] | None = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool((ask and ask()) or (amx and amx()))


def nccl() -> str:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return ""
    version = torch.cuda.nccl.version()
    return ".".join(str(part) for part in version) if isinstance(version, tuple) else str(version)


def describe(kind: str, index: int) -> dict[str, Any]:
    """One device: name, capability, memory, and what was tried on it (True, or the error)."""
    device = torch.device(kind, index)
    said: dict[str, Any] = {"index": index, "name": name(kind, index)}
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        said |= {"capability": list(torch.cuda.get_device_capability(index)), "total": properties.total_memory}
        said |= {"uuid": str(getattr(properties, "uuid", "")), "arch": str(getattr(properties, "gcnArchName", ""))}
        said |= {"native_bf16": native_bf16()}
    said["memory"] = tried(lambda: list(memory(kind, index)))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        said[str(dtype).removeprefix("torch.")] = tried(partial(product, device, dtype))
    return said


def native_bf16() -> bool:
    """Whether bf16 is of the card and not imitated; older torch does not tell."""
    try:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    except TypeError:
        return torch.cuda.is_bf16_supported()


def name(kind: str, index: int) -> str:
    module = getattr(torch, kind, None)
    ask = getattr(module, "get_device_name", None)
    return str(ask(index)) if ask else kind


def memory(kind: str, index: int) -> tuple[int, int]:
    """Free and whole memory in bytes."""
    ask = getattr(torch.accelerator, "get_memory_info", None) or getattr(getattr(torch, kind), "mem_get_info")  # noqa: B009
    free, total = ask(index)
    return int(free), int(total)


def product(device: torch.device, dtype: torch.dtype) -> bool:
    """A product of matrices forward and backward with a right result."""
    left = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
    out = left @ left.detach()
    out.sum().backward()
    assert left.grad is not None
    if float(out[0, 0]) != 64 or float(left.grad[0, 0]) != 64:
        raise RuntimeError(f"64 ones times 64 ones is {float(out[0, 0])}, its gradient {float(left.grad[0, 0])}")
    return True


def tried(work: Callable[[], Any]) -> Any:
    """What it gives, or the error as text."""
    try:
        return work()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
