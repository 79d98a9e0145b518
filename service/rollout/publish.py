"""Implementation of `fovea publish`: add a model file to a live repository atomically."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final

from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.artifact.repository import (
    MODEL_FILE,
    MODEL_NAME_PATTERN,
    MODEL_NAME_RULE,
    next_version,
    record_default_model,
)
from fovea.service.errors import ModelError
from fovea.service.inference.engine import Engine

_HIDDEN_PREFIX: Final = ".publish-"
"""Prefix of the folders in which files are prepared. The repository ignores hidden folders."""

_MAX_ATTEMPTS: Final = 100
"""How often to create a folder that other calls remove. Then the cause is permanent, such as a dead link."""


def publish_model(path: Path, root: Path, name: str | None = None) -> Path:
    """Validate a model file and make it the latest version of a model. Return its new path.

    The default `name` is the name in the model's contract. An interruption never leaves a partial version,
    and the next call can proceed. Raises `ModelError`.
    """
    fingerprint = fingerprint_of(path)
    engine = Engine.load(path, provider="cpu", threads=1)
    try:
        engine.check_golden_set()
    except ModelError as error:
        raise type(error)(f"{path}: {error}") from None
    name = name or engine.contract.name
    if not MODEL_NAME_PATTERN.fullmatch(name):
        raise ModelError(f"the name is {name!r}; {MODEL_NAME_RULE}")
    folder = root / name
    try:
        record_default_model(root)
        return _add_version(path, fingerprint, folder) / MODEL_FILE
    except OSError as error:
        raise ModelError(f"cannot write into {folder}: {error.strerror}") from None


def _add_version(path: Path, fingerprint: tuple[int, ...], folder: Path) -> Path:
    """Copy the file into a hidden folder, then rename the folder to the next version number.

    Raises `OSError`, or `ModelError` when the file has changed since it was validated.
    """
    _remove_abandoned(folder)
    try:
        with _create_hidden_folder(folder) as hidden_folder:
            shutil.copyfile(path, hidden_folder / MODEL_FILE)
            if fingerprint_of(path) != fingerprint:
                raise ModelError(f"{path} has changed while it was published; publish it again")
            # Flush the file before the rename: after a power failure, a visible version must be complete.
            with (hidden_folder / MODEL_FILE).open("rb") as file:
                os.fsync(file.fileno())
            _sync_folder(hidden_folder)
            while True:
                version = folder / next_version(folder)
                try:
                    hidden_folder.rename(version)
                    break
                except OSError:
                    if not version.exists():  # else another call has just published this version
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
