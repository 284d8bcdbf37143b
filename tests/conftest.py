"""What several rooms' tests begin with: a tiny model and its data, made once a module, and steadier arithmetic."""

from __future__ import annotations

import gc
import os

# Before torch is imported, which reads it once: sums come in one order whoever starts the tests, and a process that is
# forked from them does not wait for threads that did not come along.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.made import made_data, stage0
from vistune import console

# A process group that an earlier test left as garbage is ended by joining its threads. In a process that is forked from
# this one they are not there, and joining them may wait for ever: what came along is not collected.
os.register_at_fork(after_in_child=gc.freeze)

# Made-up examples are the same in every run, so that a change fails for what it changed and nobody waits for a slow
# machine; --explore draws new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--explore", action="store_true", help="draw new examples for the tests that make theirs up")


def pytest_configure(config):
    settings.load_profile("explore" if config.getoption("--explore") else "steady")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--runslow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; run with --runslow"))


@pytest.fixture(autouse=True)
def words_on_stdout(monkeypatch):
    """A command with --json sends its words to stderr, for the rest of the process."""
    monkeypatch.setattr(console.out, "stderr", False)


@pytest.fixture
def one_thread():
    """Sums come in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return stage0(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made_data(tmp_path_factory.mktemp("data"))
