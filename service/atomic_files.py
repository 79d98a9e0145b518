"""Atomic file writes: a file is either complete or absent."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fovea.service.errors import FoveaError

_PARTIAL_SUFFIX: Final = ".tmp"

_PARTIAL_NAME: Final = re.compile(r"\..+-[0-9a-f]{16}\.tmp")


class WriteError(FoveaError):
    """A file cannot be written because the disk is full or permission is missing."""


def write_file(path: Path, content: str | bytes) -> None:
    """Write the file and create its folders; on failure, keep the previous file and raise `WriteError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as partial:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` that replaces `path` at the end or is removed on failure.

    Readers never see a partial file. A kill or a full disk leaves the previous file intact. Calls for the
    same path, also of other processes, have files of their own, and the last one to end wins.
    Raises `OSError`.
    """
    with stage_file(path) as staged:
        yield staged.partial
        staged.flush()
        staged.publish()


@dataclass(frozen=True)
class StagedFile:
    """A file that is written beside the path that it will have."""

    path: Path
    partial: Path
    """Where to write the content."""
    _descriptor: int

    def flush(self) -> None:
        """Write the content to the disk. It must be there before the name is.

        After a power failure, the final name would otherwise belong to an empty file.
        """
        os.fsync(self._descriptor)

    def publish(self) -> None:
        """Give the file its path. It replaces a file that is there."""
        self.partial.rename(self.path)


@contextmanager
def stage_file(path: Path) -> Iterator[StagedFile]:
    """Yield an empty file beside `path`, which is removed at the end unless it was published.

    Several files can so be written first and appear together. Raises `OSError`.
    """
    _remove_abandoned(path)
    descriptor, partial = _create_partial(path)
    try:
        yield StagedFile(path, partial, descriptor)
    finally:
        partial.unlink(missing_ok=True)  # does nothing after the rename
        os.close(descriptor)


def remove_abandoned_files(folder: Path) -> list[Path]:
    """Remove the files that killed calls have left anywhere below a folder, and return their paths."""
    removed = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if _PARTIAL_NAME.fullmatch(name) and _unlink_abandoned(path):
                removed.append(path)
    return removed


def _create_partial(path: Path) -> tuple[int, Path]:
    """Create a hidden file with the usual permissions. Return an open descriptor with a lock, and the path.

    The lock shows that a process is using the file. The kernel releases the lock however the process ends.
    """
    while True:
        partial = path.with_name(f"{_partial_prefix(path)}{secrets.token_hex(8)}{_PARTIAL_SUFFIX}")
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # without file locks, no other call removes the file either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if partial.exists():
            return descriptor, partial
        os.close(descriptor)  # another call took the file for an abandoned one before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove the files that killed calls for this path have left. Their locks were released."""
    # Not `glob`: the name may hold characters that mean something in a pattern.
    prefix = _partial_prefix(path)
    for name in os.listdir(path.parent):  # noqa: PTH208 - names are enough
        if name.startswith(prefix) and name.endswith(_PARTIAL_SUFFIX):
            _unlink_abandoned(path.with_name(name))


def _unlink_abandoned(partial: Path) -> bool:
    """Remove a partial file unless it is in use. Return True if this call removed it."""
    with suppress(OSError):  # the file is already gone, or in use
        descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
            return True
        finally:
            os.close(descriptor)
    return False


def _partial_prefix(path: Path) -> str:
    return f".{path.name}-"
