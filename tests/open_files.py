"""The open files of the process of the tests."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def list_open_files() -> set[str]:
    """Return number and target of each open file of this process.

    What one test left open may be closed during the next one, so look for new files, not for fewer.
    """
    files = set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing of the folder itself, or closed meanwhile
            files.add(f"{path.name} {path.readlink()}")
    return files
