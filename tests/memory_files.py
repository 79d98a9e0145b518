"""Memory files of the service, as tests look at them."""

from __future__ import annotations

import fcntl
from pathlib import Path


def is_sealed(file: Path) -> bool:
    """Return whether no process can change the content of a memory file any more."""
    with file.open("rb") as opened:
        return bool(fcntl.fcntl(opened, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)
