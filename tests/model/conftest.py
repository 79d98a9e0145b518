"""Shared setup of the tests of `model/`."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Limit PyTorch to one thread: with more threads than free cores, OpenMP waits fifty times longer."""
    torch.set_num_threads(1)
