"""Implementation of `fovea publish`: add a model file to a live repository atomically."""

from __future__ import annotations

import shutil
from pathlib import Path

from fovea.service.artifact.model_file import fingerprint_of
from fovea.service.artifact.new_version import add_version
from fovea.service.artifact.repository import (
    MODEL_FILE,
    MODEL_NAME_PATTERN,
    MODEL_NAME_RULE,
    find_model_folder,
    list_model_names,
    record_default_model,
)
from fovea.service.errors import ModelError
from fovea.service.inference.engine import Engine


def publish_model(path: Path, root: Path, name: str | None = None, *, single_name: str | None = None) -> Path:
    """Validate a model file and make it the latest version of a model. Return its new path.

    The default `name` is the name in the model's contract. `single_name` is the name of the model if `root`
    has the versions of one model; no other model is published there. An interruption never leaves a partial
    version, and the next call can proceed. Raises `ModelError`.
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
    folder = find_model_folder(root, name)
    if folder == root and name != (only := list_model_names(root, single_name)[0]):
        raise ModelError(
            f"{root} has the versions of one model, {only!r}, and this model is called {name!r}; publish it "
            f"with --name {only}, or to another repository (--models)"
        )
    try:
        record_default_model(root)
        return _add_version(path, fingerprint, folder) / MODEL_FILE
    except OSError as error:
        raise ModelError(f"cannot write into {folder}: {error.strerror}") from None


def _add_version(path: Path, fingerprint: tuple[int, ...], folder: Path) -> Path:
    """Add a copy of the file as the next version.

    Raises `OSError`, or `ModelError` when the file has changed since it was validated.
    """

    def copy_file(hidden_folder: Path, _version: str) -> None:
        shutil.copyfile(path, hidden_folder / MODEL_FILE)
        if fingerprint_of(path) != fingerprint:
            raise ModelError(f"{path} has changed while it was published; publish it again")

    return add_version(folder, copy_file)
