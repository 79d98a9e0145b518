"""`fovea publish`: a model file into a repository that is being served, so that nobody sees half of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from service.engine import Engine
from service.errors import ModelError
from service.layout import MODEL_FILE, NAME, NAME_RULE, keep_default, next_version


def publish(path: Path, root: Path, name: str | None = None) -> Path:
    """Prove a model file here, and make it the latest version of a model; return where it is now.

    `name` is what its contract says unless told. Raises `ModelError`.
    """
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
        return _move_in(path, folder) / MODEL_FILE
    except OSError as error:
        raise ModelError(f"cannot write into {folder}: {error.strerror}") from None


def _move_in(path: Path, folder: Path) -> Path:
    """Copy into a hidden folder, which gets its number by being renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    hidden = folder / f".{os.getpid()}"
    hidden.mkdir()
    try:
        shutil.copyfile(path, hidden / MODEL_FILE)
        with (hidden / MODEL_FILE).open("rb") as file:
            os.fsync(file.fileno())
        while True:
            version = folder / next_version(folder)
            try:
                return hidden.rename(version)
            except OSError:
                if not version.exists():  # else somebody has just published that one
                    raise
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
