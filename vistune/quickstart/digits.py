"""The 1,797 handwritten digits that ship with the package, and which of them are held out (ATTRIBUTION.md).

Knows nothing of pictures, models or training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("digits.npz")


def load() -> tuple[np.ndarray, np.ndarray]:
    """All scans: images uint8 [1797, 8, 8] with ink from 0 to 16, labels int64 [1797] from 0 to 9."""
    with np.load(FILE) as arrays:
        return arrays["images"], arrays["labels"].astype(np.int64)


def split() -> tuple[np.ndarray, np.ndarray]:
    """Scan numbers for training [1437] and held out [360], 36 of each digit.

    The marks are stored beside the scans, so no version of a random generator can move a scan across.
    """
    with np.load(FILE) as arrays:
        held_out = arrays["held_out"]
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
