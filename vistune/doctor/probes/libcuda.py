"""Loads the NVIDIA driver's own library and asks which CUDA it speaks, without torch."""

from __future__ import annotations

import ctypes

from vistune.doctor.trial import tell


def main() -> None:
    """Facts: `driver_cuda` as 1000 * major + 10 * minor, `path`, `init` (0 is well), or `error`."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        tell(error=str(error))
        return
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split()[-1] for line in maps if "libcuda.so" in line}
    version = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    tell(driver_cuda=version.value, path=sorted(paths)[0] if paths else "")
    tell(init=library.cuInit(0))


if __name__ == "__main__":
    main()
