"""`fovea publish`: a model file into a repository that is being served, so that nobody sees half of it."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fovea.service.artifact.model_file import stamp_of
from fovea.service.artifact.repository import MODEL_FILE, NAME, NAME_RULE, keep_default, next_version
from fovea.service.errors import ModelError
from fovea.service.inference.engine import Engine

_HIDDEN: Final = ".publish-"
"""What the folders begin with in which files are made ready: a repository passes over what is hidden."""


def publish(path: Path, root: Path, name: str | None = None) -> Path:
    """Prove a model file here, and make it the latest version of a model; return where it is now.

    `name` is what its contract says unless told. Whatever ends it, no version is half there, and the next
    call can do the same. Raises `ModelError`.
    """
    stamp = stamp_of(path)
    engine = Engine.load(path, provider="cpu", threads=1)
    try:
        engine.prove()
    except ModelError as error:
        raise type(error)(f"{path}: {error}") from None
    name = name or engine.contract.name
    if not NAME.fullmatch(name):
        raise ModelError(f"the name is {name!r}; {NAME_RULE}")
    folder = root / name
    try:
        keep_default(root)
        return _move_in(path, stamp, folder) / MODEL_FILE
    except OSError as error:
        raise ModelError(f"cannot write into {folder}: {error.strerror}") from None


def _move_in(path: Path, stamp: tuple[int, ...], folder: Path) -> Path:
    """Copy into a hidden folder, which gets its number by being renamed. Raises `OSError`, and `ModelError`
    when the file is not the one that was proven any more."""
    _remove_left(folder)
    try:
        with _hidden(folder) as hidden:
            shutil.copyfile(path, hidden / MODEL_FILE)
            if stamp_of(path) != stamp:
                raise ModelError(f"{path} has changed while it was published; publish it again")
            with (hidden / MODEL_FILE).open("rb") as file:
                os.fsync(file.fileno())
            _sync(hidden)
            while True:
                version = folder / next_version(folder)
                try:
                    hidden.rename(version)
                    break
                except OSError:
                    if not version.exists():  # else somebody has just published that one
                        raise
            _sync(folder)
            return version
    finally:
        with suppress(OSError):  # there are versions in it, as there should be
            folder.rmdir()


@contextmanager
def _hidden(folder: Path) -> Iterator[Path]:
    """A folder of our own, which is gone at the end unless it was renamed. A lock on it says that somebody
    is at work in it, whatever ends this process."""
    while True:
        hidden = folder / f"{_HIDDEN}{secrets.token_hex(8)}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            hidden.mkdir()
        except FileNotFoundError:  # another call has failed, and removed the folder as it was empty
            continue
        descriptor = os.open(hidden, os.O_RDONLY)
        try:
            with suppress(OSError):  # of a file system without locks: nobody removes it then either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not hidden.exists():  # somebody took it for one that was left, before it had its lock
                continue
            try:
                yield hidden
            finally:
                shutil.rmtree(hidden, ignore_errors=True)
            return
        finally:
            os.close(descriptor)


def _remove_left(folder: Path) -> None:
    """Remove what a call has left that was killed: its lock went with it."""
    for left in folder.glob(f"{_HIDDEN}*"):
        with suppress(OSError):  # it is gone already, or somebody is at work in it
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)


def _sync(folder: Path) -> None:
    """Have the names in a folder on the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
