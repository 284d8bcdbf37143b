"""A place in the midst of training where the model is looked at and nothing of the training changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, compiled layers as they were written: generation has other shapes at every token,
    and each would be compiled. Afterwards modes and random states are what they were; memory goes back to the device.
    """
    training = {id(one) for one in module.modules() if one.training}
    numbers, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for one in module.modules():
            one.training = id(one) in training
        random.setstate(numbers)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
            torch.cuda.empty_cache()
