"""What the tests of `model/` share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests run beside each other; with more threads than free cores, OpenMP waits fifty times longer."""
    torch.set_num_threads(1)
