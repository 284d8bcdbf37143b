"""Converting takes no more memory than a shard, and a conversion that was interrupted leaves no half of it behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from benchmarks.convert_stream import make, watched
from tests.original_llava import same
from vistune.models import checkpoints, weights
from vistune.models.convert import convert


def slowly(source, out):
    """As `convert` does it, with a rest after every tensor, so that there is a middle to be interrupted in."""
    write = weights.write_file

    def resting(file, tensors, written):
        write(file, tensors, lambda done: (written(done), time.sleep(0.05)))

    weights.write_file = resting
    convert(source, out)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "source", layers=12, hidden=512, words=4000, shard_bytes=20_000_000)


@pytest.mark.slow
def test_memory_grows_by_less_than_the_largest_shard(source, tmp_path):
    """Tens of megabytes, in a process of its own, so what Python and torch take is left out; the real size, where that
    counts too, is `benchmarks/convert_stream.py`."""
    sizes = [file.stat().st_size for file in source.glob("pytorch_model-*.bin")]
    seen = watched(source, tmp_path / "hf", "hf")
    assert seen.code == 0 and seen.anonymous - seen.before <= 1.3 * max(sizes) < 0.7 * sum(sizes), seen
    assert same(checkpoints.read(source).tensors, weights.stored(tmp_path / "hf"))


def test_an_interrupted_conversion_leaves_no_half_of_it(source, tmp_path):
    signals = {"killed": signal.SIGKILL, "stopped": signal.SIGINT}
    fork = multiprocessing.get_context("fork")  # the imports, which take the most time, are there already
    running = {name: fork.Process(target=slowly, args=(source, tmp_path / name)) for name in signals}
    for process in running.values():
        process.start()
    for name, process in running.items():
        half = tmp_path / f"{name}.tmp" / weights.SINGLE
        for _ in range(300):
            if half.exists() and half.stat().st_size > 1_000_000:
                break
            time.sleep(0.1)
        assert half.exists() and process.is_alive()
        os.kill(process.pid, signals[name])
    for process in running.values():
        process.join(60)
        assert process.exitcode not in (0, None)
    # What was asked to stop cleans up; what was killed leaves what the next run takes away.
    assert [path.name for path in tmp_path.iterdir()] == ["killed.tmp"]
    convert(source, tmp_path / "killed")
    assert [path.name for path in tmp_path.iterdir()] == ["killed"]
    assert same(checkpoints.read(source).tensors, weights.stored(tmp_path / "killed"))
