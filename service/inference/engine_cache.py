"""The folder in which a provider keeps compiled engines, so that only the first process compiles a model."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fovea.service.errors import ModelError

_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH

_LOCK_FILE: Final = "lock"


@contextmanager
def lock_engine_cache(folder: str) -> Iterator[None]:
    """Create the folder, and hold its lock inside the `with` block; do nothing if `folder` is empty.

    One process at a time compiles: another would read an engine that is only half written. An engine is
    executable code for the GPU, so nobody else may be able to write to the folder.

    Raises `ModelError` if the folder cannot be used.
    """
    if not folder:
        yield
        return
    try:
        Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        status = Path(folder).lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(None, "it is not a folder itself")
        if status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS:
            raise PermissionError(None, "others can write to it; give a folder of your own, with mode 700")
        descriptor = os.open(Path(folder) / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ModelError(f"FOVEA_PROVIDER needs FOVEA_ENGINE_CACHE, {folder}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
