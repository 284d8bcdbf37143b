"""Converting takes no more memory than a shard, and a conversion that was interrupted leaves no half of it behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.convert_stream import make, watched
from tests.models.test_checkpoint_llava import same
from vistune.models import checkpoints, weights
from vistune.models.convert import convert

# As `convert` does it, with a rest after every tensor, so that there is a middle to be interrupted in.
SLOWLY = """
import sys, time
from vistune.models import convert, weights
write = weights.write_file
slow = lambda file, tensors, written: write(file, tensors, lambda done: (written(done), time.sleep(0.1)))
weights.write_file = slow
convert.convert(sys.argv[1], sys.argv[2])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "source", layers=12, hidden=512, words=4000, shard_bytes=20_000_000)


def test_memory_grows_by_less_than_the_largest_shard(source, tmp_path):
    """Tens of megabytes, in a process of its own, so what Python and torch take is left out; the real size, where that
    counts too, is `benchmarks/convert_stream.py`."""
    sizes = [file.stat().st_size for file in source.glob("pytorch_model-*.bin")]
    seen = watched(source, tmp_path / "hf", "hf")
    assert seen.code == 0 and seen.anonymous - seen.before <= 1.3 * max(sizes) < 0.7 * sum(sizes), seen
    assert same(checkpoints.read(source).tensors, weights.stored(tmp_path / "hf"))


def test_an_interrupted_conversion_leaves_no_half_of_it(source, tmp_path):
    signals = {"killed": signal.SIGKILL, "stopped": signal.SIGINT}
    running = {
        name: subprocess.Popen(
            [sys.executable, "-c", SLOWLY, str(source), str(tmp_path / name)],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for name in signals
    }
    for name, process in running.items():
        half = tmp_path / f"{name}.tmp" / weights.SINGLE
        for _ in range(300):
            if half.exists() and half.stat().st_size > 1_000_000:
                break
            time.sleep(0.1)
        assert half.exists() and process.poll() is None
        os.kill(process.pid, signals[name])
    assert all(process.wait(60) != 0 for process in running.values())
    # What was asked to stop cleans up; what was killed leaves what the next run takes away.
    assert [path.name for path in tmp_path.iterdir()] == ["killed.tmp"]
    convert(source, tmp_path / "killed")
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]
    assert same(checkpoints.read(source).tensors, weights.stored(tmp_path / "killed"))
