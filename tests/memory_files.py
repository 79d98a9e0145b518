"""Memory files of the service, as tests look at them."""

from __future__ import annotations

import fcntl
from pathlib import Path

from fovea.service.runners.load_messages import LoadCommand


def is_sealed(file: Path) -> bool:
    """Return whether no process can change the content of a memory file any more."""
    with file.open("rb") as opened:
        return bool(fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)


def weights_path_of(load: LoadCommand) -> Path:
    """Return the path of the memory file for the weights of a model."""
    assert load.weights_file
    return Path(load.weights_file.path)
