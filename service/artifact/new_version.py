"""Add a version to a model's folder atomically: it appears complete, or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final

from fovea.service.artifact.repository import next_version

_HIDDEN_PREFIX: Final = ".publish-"
"""Prefix of the folders in which files are prepared. The repository ignores hidden folders."""

_MAX_ATTEMPTS: Final = 100
"""Number of attempts to create a folder that other calls remove; then the cause is permanent: a dead link."""


def add_version(folder: Path, write_files: Callable[[Path, str], None]) -> Path:
    """Let `write_files` fill a hidden folder, then rename this folder to the next version number.

    `write_files` gets the hidden folder and the version. If another call adds this version first,
    `write_files` is called again with the next version. Return the new folder. An interruption never leaves a
    partial version, and the next call can proceed.
    Raises `OSError`, and the errors of `write_files`.
    """
    _remove_abandoned(folder)
    try:
        with _create_hidden_folder(folder) as hidden_folder:
            while True:
                version = folder / next_version(folder)
                write_files(hidden_folder, version.name)
                # Flush the files before the rename: after a power failure, a visible version is complete.
                for path in hidden_folder.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                _sync_folder(hidden_folder)
                try:
                    hidden_folder.rename(version)
                    break
                except OSError:
                    if not version.exists():  # else another call has just added this version
                        raise
            _sync_folder(folder)
            return version
    finally:
        with suppress(OSError):  # the folder is not empty: it holds versions
            folder.rmdir()


@contextmanager
def _create_hidden_folder(folder: Path) -> Iterator[Path]:
    """Create a hidden folder and remove it at the end, unless it was renamed.

    A lock on the folder shows that a process is using it. The kernel releases the lock however the process
    ends.
    """
    for attempt in count(1):
        hidden_folder = folder / f"{_HIDDEN_PREFIX}{secrets.token_hex(8)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            hidden_folder.mkdir()
            descriptor = os.open(hidden_folder, os.O_RDONLY)
        except (FileNotFoundError, FileExistsError):
            # Another call has just removed the parent because it was empty, or `hidden_folder` as abandoned.
            if attempt == _MAX_ATTEMPTS:
                raise
            continue
        try:
            with suppress(OSError):  # without file locks, no other call removes the folder either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not hidden_folder.exists():  # removed as abandoned before it was locked
                continue
            try:
                yield hidden_folder
            finally:
                shutil.rmtree(hidden_folder, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


def _remove_abandoned(folder: Path) -> None:
    """Remove folders that killed calls have left. Their locks were released when the calls were killed."""
    for hidden_folder in folder.glob(f"{_HIDDEN_PREFIX}*"):
        with suppress(OSError):  # the folder is already gone, or in use
            descriptor = os.open(hidden_folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(hidden_folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk if the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
