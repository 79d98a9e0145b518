"""The memory file of a model's weights is sealed by the service, whatever its writer has done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fovea.service.artifact.model_file import PinnedFile, fingerprint_of
from tests.memory_files import is_sealed


@pytest.fixture
def pinned_file(tmp_path: Path) -> Iterator[PinnedFile]:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a model")
    pinned_file = PinnedFile(path, fingerprint_of(path))
    yield pinned_file
    pinned_file.close()


def test_incomplete_weights_are_dropped_and_sealed(pinned_file: PinnedFile) -> None:
    """Their writer has died, or has found no memory."""
    file = Path(pinned_file.weights_file.path)
    file.write_bytes(b"half of the weights")
    pinned_file.seal_weights()
    assert is_sealed(file)
    assert file.read_bytes() == b""
    for change in (lambda: file.write_bytes(b"other weights"), lambda: os.truncate(file, 10)):
        with pytest.raises(PermissionError):
            change()


def test_sealed_weights_stay(pinned_file: PinnedFile) -> None:
    file = Path(pinned_file.weights_file.path)
    pinned_file.seal_weights()
    pinned_file.seal_weights()
    assert is_sealed(file)
