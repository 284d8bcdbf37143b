"""The shipped scans are the UCI set, and the split is fair and fixed."""

import hashlib

import numpy as np

from vistune.quickstart import digits


def test_scans_are_those_of_the_published_set():
    images, labels = digits.load()
    assert images.shape == (1797, 8, 8) and images.dtype == np.uint8 and images.max() == 16
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.FILE.stat().st_size < 100_000


def test_split_is_stratified_complete_and_never_moves():
    _, labels = digits.load()
    train, held_out = digits.split()
    assert np.bincount(labels[held_out]).tolist() == [36] * 10
    assert sorted([*train, *held_out]) == list(range(1797))
    assert hashlib.sha256(np.sort(held_out).astype("<i4").tobytes()).hexdigest()[:16] == "749c9751d8a0d5ba"
