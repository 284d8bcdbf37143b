"""What several rooms' tests begin with: a tiny model and its data, made once a module, and steadier arithmetic."""

from __future__ import annotations

import pytest
import torch

from tests.made import made_data, stage0


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
